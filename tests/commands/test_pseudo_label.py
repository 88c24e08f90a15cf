"""A teacher's labels: what is written, that training reads it, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from robust_accel.__main__ import main
from robust_accel.commands.pseudo_label import pseudo_label
from robust_accel.data import DataSettings, load_data, load_to_label
from robust_accel.models import create_classifier, model_folder
from robust_accel.recipe import load_recipe
from robust_accel.trained_model import load_classifier
from robust_accel.training.run import train

SMALL = (
    "data.train_size=600",
    "data.test_size=40",
    "data.validation_size=0",
    "train.epochs=3",
    "train.select=last",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=1",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(load_recipe("quickstart", [*SMALL, f"output={folder}"]))
    return folder


def test_what_a_run_left_out_is_labeled_and_trained_on(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pseudo.parquet"
    result = pseudo_label(str(teacher), out)
    assert result["n"] == 1437 - 600
    rows = datasets.load_dataset("parquet", data_files=str(out), cache_dir=tmp_path)["train"]
    assert rows.column_names == ["image", "pseudo_label", "confidence"]
    confidence = np.array(rows["confidence"][:])
    assert confidence.mean() == pytest.approx(result["mean_confidence"])
    assert ((confidence > 0.1) & (confidence <= 1)).all()

    # by hand: the saved model's predictions on the images of the file
    recipe = load_recipe("quickstart", [*SMALL, f"data.unlabeled.path={out}"])
    data = load_data(recipe.data)
    classifier = load_classifier(recipe, str(teacher), data.test, 10).eval()
    with torch.no_grad():
        probabilities = classifier(data.unlabeled.images.float() / 255).softmax(dim=1)
    assert rows["pseudo_label"][:] == probabilities.argmax(dim=1).tolist()
    torch.testing.assert_close(
        torch.from_numpy(confidence), probabilities.max(dim=1).values.double(), rtol=1e-4, atol=1e-6
    )
    assert data.unlabeled.labels.tolist() == rows["pseudo_label"][:]

    settings = [*SMALL, f"output={tmp_path / 'student'}", f"data.unlabeled.path={out}"]
    student = train(load_recipe("quickstart", settings))
    assert student["clean_accuracy"]["accuracy"] > 0.5


def test_only_some_are_labeled_where_a_size_is_given(teacher: Path, tmp_path: Path) -> None:
    whole, some = tmp_path / "whole.parquet", tmp_path / "some.parquet"
    pseudo_label(str(teacher), whole)
    assert pseudo_label(str(teacher), some, overrides=["data.unlabeled.size=40"])["n"] == 40
    with pytest.raises(ValueError, match=r"data.unlabeled.size: 900 exceeds the 837 images"):
        pseudo_label(str(teacher), tmp_path / "x.npz", overrides=["data.unlabeled.size=900"])
    rows = [{**row, "image": row["image"]["bytes"]} for row in rows_of(whole)]
    assert all({**row, "image": row["image"]["bytes"]} in rows for row in rows_of(some))
    # of another source than the run's own all are
    own = [f"data.unlabeled.path={some}", "data.unlabeled.size=36", "train.epochs=1"]
    train(load_recipe("quickstart", [*SMALL, *own, f"output={tmp_path / 'student'}"]))
    assert pseudo_label(str(tmp_path / "student"), tmp_path / "all.npz", str(whole))["n"] == 837


def test_a_students_classes_are_found_by_name(tmp_path: Path) -> None:
    folder, out = tmp_path / "teacher", tmp_path / "p.parquet"
    path = tmp_path / "images.parquet"
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    rows = {"image": [Image.new("L", (8, 8), 9 * i) for i in range(12)], "label": [0, 1, 2] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": names})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    data = [f"data.path={path}", "data.test_split=train", "data.train_size=null"]
    small = ["train.batch_size=4", "train.epochs=1", "evaluate.train_images=null"]
    settings = [*SMALL, *data, "data.test_size=null", *small, "data.classes=[2, 1]"]
    train(load_recipe("quickstart", [*settings, f"output={folder}"]))
    pseudo_label(str(folder), out, str(path))
    labels = [row["pseudo_label"] for row in rows_of(out)]  # 0: emu, 1: dog
    student = [*settings[:-1], f"data.unlabeled.path={out}"]
    found = load_data(load_recipe("quickstart", student).data).unlabeled.labels.tolist()
    assert found == [2 - label for label in labels]
    with pytest.raises(ValueError, match=r"^unlabeled.label_column: .*emu"):
        load_data(load_recipe("quickstart", [*student, "data.classes=[0, 1]"]).data)


def write_rows(path: Path, labels: list[int], of: datasets.ClassLabel | datasets.Value) -> Path:
    images = [Image.new("L", (8, 8), 5 * i) for i in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": of})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(path)
    return path


def test_arrays_whose_classes_are_numbered_otherwise_are_refused(
    teacher: Path, tmp_path: Path
) -> None:
    """They stay in their file, so their labels cannot be put in order."""
    out, names = tmp_path / "pseudo.npz", ["cat", "dog", "emu"]
    feature = datasets.ClassLabel(names=names)
    path = write_rows(tmp_path / "images.parquet", [0, 1, 2] * 4, feature)
    pseudo_label(str(teacher), out)
    with np.load(out) as archive:
        content = dict(archive)
    assert json.loads(content.pop("class_names").tobytes()) == [str(i) for i in range(10)]
    content["label"] = content["label"] % 2

    def student(of: list[str], classes: tuple[int, ...] | None = None) -> list[int]:
        text = np.frombuffer(json.dumps(of).encode(), dtype=np.uint8)
        np.savez(out, class_names=text, **content)
        unlabeled = {"path": str(out), "fraction": 0.5}
        about = {"test_split": "train", "unlabeled": unlabeled, "classes": classes}
        return load_data(DataSettings(path=str(path), **about)).unlabeled.labels[:].tolist()

    assert student(names) == content["label"].tolist() == student(names[:2])
    assert student(names[1:], (1, 2)) == content["label"].tolist()
    for other, said in ((["dog", "cat"], "found by name"), (["cat", "eel"], "which .* has not")):
        with pytest.raises(ValueError, match=rf"^unlabeled.path: .*pseudo\.npz.*{said}"):
            student(other)


def test_what_was_left_out_is_what_training_left_out(tmp_path: Path) -> None:
    """Also where labels that are no class are left out, so that fewer images are drawn from."""
    labels = [255 if i % 7 == 0 else i % 2 for i in range(40)]
    path = write_rows(tmp_path / "images.parquet", labels, datasets.Value("int64"))
    about = {"path": str(path), "test_split": "train", "train_size": 10, "on_bad": "skip"}
    settings = DataSettings(validation_size=0, unlabeled={}, **about)
    data = load_data(settings, num_classes=2)
    rows, images = load_to_label(settings, num_classes=2)
    assert data.train.images[:, 0, 0, 0].unique().numel() + len(images) == 34 == 10 + len(rows)
    used = set(data.train.images[:10, 0, 0, 0].tolist())
    assert used.isdisjoint(images.images[:, 0, 0, 0].tolist())


def rows_of(path: Path) -> datasets.Dataset:
    own = {"data_files": str(path), "cache_dir": path.parent / "cache"}
    rows = datasets.load_dataset("parquet", **own)["train"]
    return rows.cast_column("image", datasets.Image(decode=False))


def test_the_same_as_arrays(teacher: Path, tmp_path: Path) -> None:
    """A .npz that training maps, and numpy reads."""
    parquet, arrays = tmp_path / "pseudo.parquet", tmp_path / "new" / "pseudo.npz"
    assert pseudo_label(str(teacher), arrays) == pseudo_label(str(teacher), parquet)
    expected, found = (
        load_data(load_recipe("quickstart", [*SMALL, f"data.unlabeled.path={path}"]).data)
        for path in (parquet, arrays)
    )
    images = expected.unlabeled.images
    (read,) = found.unlabeled.batches([torch.arange(len(images))], torch.device("cpu"))
    assert read[0].equal(images.float() / 255)
    assert read[1].equal(expected.unlabeled.labels)
    with np.load(arrays) as archive:
        assert archive["image"].dtype == np.uint8
        assert archive["image"].shape == (len(images), 8, 8, 1)
        assert archive["label"].tolist() == expected.unlabeled.labels.tolist()
        assert ((archive["confidence"] > 0.1) & (archive["confidence"] <= 1)).all()


def test_any_images_are_labeled_by_any_timm_model(tmp_path: Path) -> None:
    """Files in a folder, of several sizes: the parquet holds their bytes, not their paths."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    out = tmp_path / "pseudo.parquet"
    settings = ["model.pretrained=false", "data.in_memory=false", "data.image_size=32"]
    settings.append("data.num_workers=1")
    pseudo_label("test_resnet", out, str(tmp_path / "images"), settings)
    shutil.rmtree(tmp_path / "images")
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset("parquet", data_files=str(out), cache_dir=cache)["train"]
    assert [row["image"].size for row in rows] == [(48, 40 + i) for i in range(5)]
    assert all(0 <= label < 1000 for label in rows["pseudo_label"])


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.parquet"
    taken.write_text("precious")
    cases = [
        ([str(teacher), "--out", str(taken)], "--out: .*is there already"),
        ([str(teacher), "--out", str(tmp_path / "a.csv")], r"does not end in \.parquet or \.npz"),
        (["test_resnet", "--out", str(taken / "a.parquet")], "--out: .* is no folder"),
        (
            [str(teacher), "--out", str(tmp_path / "a.parquet"), "data.train_size=null"],
            "data.unlabeled.path: not given, and data.train_size leaves no image out",
        ),
        (
            [str(teacher), "--out", str(tmp_path / "a.parquet"), "--data", str(tmp_path / "none")],
            "data.unlabeled.path: .*cannot be loaded",
        ),
        (
            ["test_resnet", "--out", str(tmp_path / "a.parquet")],
            "data.path",
        ),
    ]
    for arguments, message in cases:
        assert main(["pseudo-label", *arguments]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert re.search(message, error), error
    assert taken.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.parquet"]


def test_a_run_is_what_fine_tuning_starts_from(teacher: Path, tmp_path: Path) -> None:
    weights = f"model.checkpoint={teacher}"
    recipe = load_recipe("quickstart", [*SMALL, weights, f"output={tmp_path / 'tuned'}"])
    started = create_classifier(recipe.model, num_classes=10, in_chans=1)
    again = load_classifier(recipe, str(teacher), load_data(recipe.data).test, 10)
    for a, b in zip(started.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert model_folder(teacher).name == "model"
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ValueError, match="has the run been trained to its end"):
        create_classifier(recipe.model.model_copy(update={"checkpoint": str(tmp_path)}))
