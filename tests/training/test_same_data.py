"""A run goes on with the data that it began with, or says what has changed."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robust_accel.__main__ import main
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train

SMALL = (
    "data.validation_size=0",
    "train.epochs=1",
    "train.batch_size=8",
    "train.select=last",
    "attack.num_steps=1",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=1",
)


def write(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


def run(folder: Path, data: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    settings = (*SMALL, f"output={folder}", f"data.path={data}", *settings)
    return train(load_recipe("quickstart", settings), resume=resume, quiet=True)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, number in (("train", 8), ("test", 2)):
        for i in range(number):
            write(tmp_path / "data" / split / "dark" / f"{i}.png", i)
            write(tmp_path / "data" / split / "light" / f"{i}.png", 255 - i)
    return tmp_path / "data"


def test_a_run_goes_on_only_with_the_data_it_began_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, data)
    assert run(folder, data, resume=True)["steps"] == 2
    checkpoint = RunFolder(folder).steps()[-1] / "progress.pt"
    before = checkpoint.read_bytes()

    write(data / "train" / "light" / "new.png", 200)
    recipe = str(folder / "recipe.yaml")
    assert main(["train", recipe, "--resume"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # after datasets' progress bars
    assert "data.path: the run has trained on 16 images (digest " in error
    assert "as train, and now there are 17 images (digest " in error
    assert checkpoint.read_bytes() == before

    (data / "train" / "light" / "new.png").unlink()
    (data / "train" / "dark" / "7.png").rename(data / "train" / "light" / "70.png")
    with pytest.raises(ValueError, match=r"16 images \(digest .*now there are 16 images \(digest"):
        run(folder, data, resume=True)
    (data / "train" / "light" / "70.png").rename(data / "train" / "dark" / "7.png")
    assert run(folder, data, resume=True)["steps"] == 2


def test_a_damaged_image_ends_training_with_its_name(data: Path, tmp_path: Path) -> None:
    file = data / "train" / "dark" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    files = ("data.in_memory=false", "data.image_size=8", "data.num_workers=1", "data.augment=none")
    with pytest.raises(
        ValueError, match=r"image 3 of split train of .*dark/3.png\) cannot be read"
    ):
        run(tmp_path / "refused", data, *files)
    report = run(tmp_path / "skipped", data, *files, "data.damaged=skip", "train.batch_size=5")
    assert report["steps"] == 3  # 15 images
