"""The evaluate command: numbers of this model, these images and this attack, and of no other."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import quick_run

from robust_accel.__main__ import main
from robust_accel.commands.evaluate import evaluate_model
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train

LEVELS = {"ant": 40, "bee": 128, "cat": 215}


def folder_of(path: Path, classes: tuple[str, ...], number: int = 16) -> Path:
    """Grey images of a level a class, as `load_dataset` reads folders."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(LEVELS[name], 12, (8, 8)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def insects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "insects", ("ant", "bee", "cat"))


@pytest.fixture(scope="module")
def run(insects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "insects"
    settings = [f"data.path={insects}", "data.validation_size=0", "attack.eps=0.05"]
    settings += ["train.epochs=40", "train.batch_size=24", "evaluate.autoattack=null"]
    settings += ["attack.num_steps=2", "evaluate.pgd.num_steps=3", f"output={folder}"]
    train(load_recipe("quickstart", settings))
    return folder


def rows(folder: RunFolder) -> list[dict]:
    return folder.read_report()["measurements"]


def test_classes_are_compared_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of ants, bees and cats, on a folder that holds bees and cats."""
    assert rows(RunFolder(run))[0]["accuracy"] > 0.9
    others = folder_of(tmp_path / "others", ("bee", "cat"))
    measured, _ = evaluate_model(str(run), [f"data.path={others}", f"output={tmp_path / 'out'}"])
    clean = rows(measured)[0]
    assert clean["accuracy"] > 0.9
    assert [row["name"] for row in clean["per_class"]] == ["bee", "cat"]
    assert "cat" in (measured.path / "report.md").read_text()
    LEVELS["dog"] = 250
    dogs = folder_of(tmp_path / "dogs", ("bee", "dog"))
    assert main(["evaluate", str(run), f"data.path={dogs}", f"output={tmp_path / 'no'}"]) == 2
    error = capsys.readouterr().err
    assert "[dog]" in error and "[ant, bee, cat]" in error


def test_data_without_a_training_split_are_measured(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The recipe's own gap to training images is not these data's; asked for, it is refused."""
    caplog.set_level("INFO")
    others = folder_of(tmp_path / "others", ("ant", "bee", "cat"))
    shutil.rmtree(others / "train")
    settings = [f"data.path={others}", f"output={tmp_path / 'out'}", "evaluate.pgd=null"]
    (clean,) = rows(evaluate_model(str(run), settings).folder)
    assert (clean["purpose"], clean["accuracy"] > 0.9) == ("accuracy", True)
    assert "evaluate.train_images: left out" in caplog.text
    assert main(["evaluate", str(run), *settings, "evaluate.train_images=5"]) == 2
    assert "has no split 'train'" in capsys.readouterr().err


def test_targets_are_of_the_models_classes_whoever_measures(tmp_path: Path) -> None:
    """Ten logits, five of whose classes the data have."""
    own = ["data.classes=[0, 1, 2, 3, 4]", "model.num_classes=10", "evaluate.autoattack_images=2"]
    quick_run(tmp_path, *own, "train.epochs=1", "evaluate.autoattack=quick", "evaluate.images=2")
    other = ["evaluate.seed=1", "evaluate.batch_size=2"]
    evaluate_model(str(tmp_path), other)
    found = [row for row in rows(RunFolder(tmp_path)) if row["attack"]["name"] == "autoattack"]
    assert {row["seed"] for row in found} == {0, 1}
    assert [row["attack"]["num_targets"] for row in found] == [9, 9]


def test_a_later_attack_does_not_stand_under_an_earlier_ones_name(run: Path) -> None:
    evaluate_model(str(run), ["evaluate.eps=0.02", "evaluate.autoattack=null"])
    evaluate_model(str(run), ["evaluate.eps=0.2", "evaluate.pgd.num_steps=5"])
    found = [row for row in rows(RunFolder(run)) if row["attack"]["name"] == "pgd"]
    assert {row["threat_model"]["eps"] for row in found} == {0.02, 0.05, 0.2}
    text = (run / "report.md").read_text()
    card = (run / "model" / "README.md").read_text()
    for row in found:
        percent = f"{100 * row['accuracy']:.2f}"
        assert percent in text
        assert percent in card or row["purpose"] == "train"
    assert len({row["key"] for row in found}) == len(found)


def test_a_report_shows_the_model_that_is_in_the_folder(run: Path, tmp_path: Path) -> None:
    """Its weights were exchanged by hand: what was measured of the old ones is theirs."""
    folder = shutil.copytree(run, tmp_path / "changed")
    weights = load_file(folder / "model" / "model.safetensors")
    key = next(key for key in weights if key.endswith("fc.bias"))
    weights[key][0] += 100  # all are ants
    save_file(weights, folder / "model" / "model.safetensors")
    evaluate_model(str(folder), ["evaluate.pgd=null"])
    found = rows(RunFolder(folder))
    assert [row["attack"]["name"] for row in found] == ["none", "none"]  # of test and of train
    assert found[0]["accuracy"] == pytest.approx(1 / 3)
    assert {row["function"] for row in found} != {rows(RunFolder(run))[0]["function"]}


def test_pictures_say_whose_they_are_and_are_not_chosen_by_success(run: Path) -> None:
    report = RunFolder(run).read_report()
    with safe_open(run / "examples.safetensors", "pt") as file:
        about, labels = file.metadata(), file.get_tensor("labels")
        moved = (file.get_tensor("x_adv") - file.get_tensor("x")).abs().amax()
    assert about["function"] == report["model"]["function"]
    assert about["selection"] == "first 8"
    assert json.loads(about["source"]) == report["measurements"][0]["images"]["source"]
    assert moved <= json.loads(about["threat_model"])["eps"] + 1e-6
    assert labels.tolist() == [0] * 8  # of the folder, right or not
    assert "figures/examples.png" in (run / "report.md").read_text()


def test_listed_images_are_said_to_be_listed(run: Path, tmp_path: Path) -> None:
    out = f"output={tmp_path / 'listed'}"
    measured, _ = evaluate_model(str(run), ["evaluate.ids=[3, 20, 40]", out])
    clean = rows(measured)[0]
    assert clean["images"]["n"] == 3
    assert clean["images"]["selection"] == "3 listed ids (504dce4d2611)"
    assert [row["class"] for row in clean["per_class"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOTHERE"], "NOTHERE: no model"),
        (["{run}", "evaluate.ids=[0, 1000]"], "evaluate.ids: "),
        (["{run}", "evaluate.eps=2"], "evaluate.eps: 2.* at most 1"),
        (["{run}", "evaluate.pgd.step_size=0.0001"], "evaluate.pgd.step_size: "),
        (["{run}", "evaluate.drawz=3"], "did you mean draws"),
    ],
)
def test_faults_are_one_line_before_anything_is_spent(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "measurements.jsonl").read_bytes()
    assert main(["evaluate", *(text.format(run=run) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert (run / "measurements.jsonl").read_bytes() == before


def test_errors_on_published_corruptions_of_a_run(
    run: Path, insects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three severities of black images: the dark class, of three, is right."""
    names = sorted(LEVELS)[:3]
    labels = np.repeat(np.arange(3), 4)
    images = np.stack([np.full((8, 8, 1), LEVELS[names[i]], dtype=np.uint8) for i in labels])
    folder = tmp_path / "c"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels, 5))
    np.save(folder / "fog.npy", np.concatenate([images] * 2 + [0 * images] * 3))
    asked = ["evaluate.corruptions.names=[fog]", "evaluate.pgd=null", f"output={tmp_path / 'out'}"]
    asked += ["evaluate.autoattack=null"]
    command = ["evaluate", str(run), *asked]
    assert main([*command, f"evaluate.corruptions.path={folder}"]) == 0
    assert "corruption error (%)" in capsys.readouterr().out
    found = rows(RunFolder(tmp_path / "out"))
    (fog,) = (row for row in found if row["purpose"] == "corruption")
    assert [one["accuracy"] for one in fog["by_severity"]] == [1, 1, *[pytest.approx(1 / 3)] * 3]
    (mean,) = (row for row in found if row["purpose"] == "corruptions")
    assert mean["mean_error"] == pytest.approx(0.4)
    assert "mean error 40.00% (1 corruption x 5" in (tmp_path / "out" / "report.md").read_text()
    assert main([*command, f"evaluate.corruptions.path={tmp_path / 'no'}"]) == 2
    assert "evaluate.corruptions.path: " in capsys.readouterr().err
    settings = [f"data.path={insects}", f"output={tmp_path / 'run'}"]
    settings += [f"evaluate.corruptions.path={tmp_path / 'no'}", "data.validation_size=0"]
    settings += ["train.batch_size=24", "evaluate.autoattack=null"]
    assert main(["train", "quickstart", *settings]) == 2
    assert "evaluate.corruptions.path: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
