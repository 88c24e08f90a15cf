"""A run goes on with the data that it began with, or says what has changed."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import Forked
from PIL import Image

from robust_accel.__main__ import main
from robust_accel.exit_codes import UNAVAILABLE, USAGE
from robust_accel.models import ModelSettings, create_classifier, save_model
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
    return train(load_recipe("quickstart", settings), resume=resume)


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


@pytest.mark.long
def test_a_damaged_image_ends_training_with_its_name(data: Path, tmp_path: Path) -> None:
    file = data / "train" / "dark" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    files = ("data.in_memory=false", "data.image_size=8", "data.num_workers=1", "data.augment=none")
    with pytest.raises(ValueError, match=r"image 3 of split train of .*dark/3.png\) has no format"):
        run(tmp_path / "refused", data, *files)
    report = run(tmp_path / "skipped", data, *files, "data.on_bad=skip", "train.batch_size=5")
    assert report["steps"] == 3  # 15 images
    assert report["left_out"]["train"].items() >= {"images": 1, "of": 16}.items()
    assert "3.png) has no format that PIL knows" in report["left_out"]["train"]["first"][0]
    text = (tmp_path / "skipped" / "report.md").read_text()
    assert re.search(r"left_out\.train\.images *\| *1 ", text)


@pytest.mark.launch
def test_one_process_with_a_bad_image_ends_both(data: Path, tmp_path: Path) -> None:
    (data / "train" / "dark" / "3.png").write_bytes(b"")
    files = ("data.in_memory=false", "data.image_size=8", "data.num_workers=1", "data.augment=none")
    own = (
        "train",
        "quickstart",
        *SMALL,
        *files,
        f"output={tmp_path / 'run'}",
        f"data.path={data}",
    )
    code, output = Forked(*own).wait()
    assert code in (USAGE, UNAVAILABLE)  # of the one that found it, or of the other
    (line,) = [line for line in output.splitlines() if line.startswith("robust-accel: data.")]
    assert re.search(r"data\.path: image 3 of .*dark/3\.png\) is empty; data\.on_bad: skip", line)


EACH_ITS_OWN = """
import os, sys
from robust_accel.__main__ import main
from robust_accel.exit_codes import UNAVAILABLE, USAGE
sys.exit(main([*sys.argv[1:-1], f"data.path={sys.argv[-1]}/{os.environ['RANK']}"]))
"""


def each_its_own(data: Path, tmp_path: Path, bad: str) -> Path:
    """A script whose processes see a copy of the images each; the second cannot read one."""
    for rank in range(2):
        shutil.copytree(data, tmp_path / "own" / str(rank))
    (tmp_path / "own" / "1" / bad).write_bytes(b"")
    script = tmp_path / "each_its_own.py"
    script.write_text(EACH_ITS_OWN)
    return script


@pytest.mark.launch
def test_processes_that_see_other_images_are_refused(data: Path, tmp_path: Path) -> None:
    """As where one of them could not read what another could."""
    script = each_its_own(data, tmp_path, "train/dark/3.png")
    own = ("data.on_bad=skip", f"output={tmp_path / 'run'}", tmp_path / "own")
    code, output = Forked("train", "quickstart", *SMALL, *own, script=script).wait()
    assert code == 2
    said = "data.path: process 1 does not have the images of process 0: train 15 images"
    assert output.count(said) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


COMMANDS = {
    "evaluate": ("evaluate.eps=0.1", "evaluate.autoattack=null", "evaluate.pgd.num_steps=1"),
    "certify": ("certify.sigma=0.1", "certify.n0=2", "certify.n=2"),
}


@pytest.mark.launch
@pytest.mark.parametrize("command", COMMANDS)
def test_processes_that_measure_other_images_are_refused(
    data: Path, tmp_path: Path, command: str
) -> None:
    """Nothing is written: whose images it would be of is unclear."""
    script = each_its_own(data, tmp_path, "test/dark/1.png")
    model = create_classifier(ModelSettings(name="wide_resnet10_1"), num_classes=2, in_chans=1)
    save_model(model, tmp_path / "model")
    own = (*COMMANDS[command], "data.on_bad=skip", f"output={tmp_path / 'out'}", tmp_path / "own")
    code, output = Forked(command, tmp_path / "model", *own, script=script).wait()
    assert code == USAGE, output
    (line,) = [line for line in output.splitlines() if line.startswith("robust-accel: ")]
    assert "data.path: process 1 does not have the images of process 0: test 3 images" in line
    assert not (tmp_path / "out").exists()
