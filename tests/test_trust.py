"""A run folder from a stranger is data: no command imports or calls what its recipe names."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_accel.__main__ import main
from robust_accel.commands.certify import certify_model
from robust_accel.commands.evaluate import evaluate_model
from robust_accel.commands.pseudo_label import pseudo_label
from robust_accel.plain_yaml import dump, read_plain
from robust_accel.recipe import USED, load_recipe
from robust_accel.trained_model import _classifier_of, load_model, recipe_of
from robust_accel.training.run import train

CODE = """
from pathlib import Path
TOUCHED = Path(__file__).with_suffix(".touched")
TOUCHED.write_text("imported")

class Signed:
    norm = "linf"

    def __init__(self, eps=0.1):
        TOUCHED.write_text("called")
        self.eps = eps

    def __call__(self, loss_fn, x, *, generator=None):
        return (x + self.eps).clamp(0, 1)

class Noisy:
    def __init__(self, sigma=0.25):
        self.sigma = sigma

    def for_batch(self, x):
        raise NotImplementedError
"""
EVALUATE = ("model", "data", "evaluate")
QUICK = ("evaluate.images=8", "evaluate.pgd.num_steps=1", "evaluate.train_images=null")
CERTIFY = ("certify.n=100", "certify.images=2")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module that can be imported, and leaves a file when it is."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_parts.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    yield folder / "own_parts.touched"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that was trained by an attack of a user's own."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    settings = ["attack.name=own_parts:Signed", "attack.eps=0.2", "train.epochs=1"]
    settings += ["data.train_size=600", "evaluate.autoattack=null", "evaluate.pgd=null"]
    train(load_recipe("quickstart", [*settings, f"output={folder}"]))
    assert code.read_text() == "called"
    return folder


@pytest.fixture
def untouched(code: Path) -> Iterator[Path]:
    """The module as if it had never been imported, and it is not in the test."""
    sys.modules.pop("own_parts", None)
    code.unlink(missing_ok=True)
    yield code
    assert "own_parts" not in sys.modules
    assert not code.exists()


def stranger(run: Path, folder: Path, **sections: Any) -> Path:
    """A copy of the run whose recipe says something else."""
    shutil.copytree(run, folder)
    return changed(folder, **sections)


def changed(folder: Path, **sections: Any) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump(read_plain(recipe) | sections))
    return folder


COMMANDS: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "evaluate": lambda run: evaluate_model(str(run), [*QUICK, "evaluate.norm=linf"]),
    "certify": lambda run: certify_model(str(run), ["certify.sigma=0.1", *CERTIFY]),
    "pseudo-label": lambda run: pseudo_label(str(run), run / "labels.parquet"),
    "report": lambda run: main(["report", str(run)]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_a_run_folder_names_is_imported_or_called(
    run: Path, untouched: Path, tmp_path: Path, command: str
) -> None:
    names = ["os:system", "own_parts:Signed", "own_parts:nothing"]
    values = {"command": f"touch {tmp_path}/victim", "norm": "linf", "eps": 0.1}
    sections = ("attack", "objective", "schedule", "communication", "optimizer", "train")
    named = {
        section: {"name": names[i % 3], "path": "/dev/null"} | values
        for i, section in enumerate(sections)
    }
    folder = stranger(run, tmp_path / "run", **named)
    COMMANDS[command](folder)
    for name in names:
        for section in ("attack", "objective"):
            changed(folder, **{section: values | {"name": name}})
            recipe_of(str(folder), ["certify.sigma=1"], required=tuple(USED))
    assert not (tmp_path / "victim").exists()


def test_a_run_of_an_own_attack_is_measured_by_its_plain_values(run: Path, untouched: Path) -> None:
    assert read_plain(run / "recipe.yaml")["evaluate"]["eps"] == 0.2
    evaluate = recipe_of(str(run), (), required=EVALUATE).evaluate
    assert (evaluate.norm, evaluate.eps) == ("linf", 0.2)
    evaluate = recipe_of(str(run), ["evaluate.eps=0.1"], required=EVALUATE).evaluate
    assert (evaluate.norm, evaluate.eps) == ("linf", 0.1)


def test_what_only_the_code_knows_is_asked_for(
    run: Path, untouched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, objective = {"name": "own_parts:Signed", "eps": 0.1}, {"name": "own_parts:Noisy"}
    folder = stranger(run, tmp_path / "run", attack=attack, objective=objective, evaluate=None)
    assert main(["evaluate", str(folder)]) == 2
    assert main(["certify", str(folder), *CERTIFY]) == 2
    why = "is not imported from a run folder unless it is trusted (--trust): give"
    assert capsys.readouterr().err.splitlines() == [
        f"robust-accel: {folder}/recipe.yaml: evaluate.norm: missing: attack.name "
        f"'own_parts:Signed' {why} evaluate.norm and evaluate.eps",
        f"robust-accel: {folder}/recipe.yaml: certify.sigma: missing: objective.name "
        f"'own_parts:Noisy' {why} it, as certify.sigma=0.25",
    ]
    given = ["evaluate.norm=l2", "evaluate.eps=0.5", "certify.sigma=0.1"]
    recipe = recipe_of(str(folder), given, required=("model", "data", "evaluate", "certify"))
    assert (recipe.evaluate.norm, recipe.evaluate.eps, recipe.certify.sigma) == ("l2", 0.5, 0.1)
    # an eps beside its norm is enough
    attack["norm"] = "l2"
    (folder / "recipe.yaml").write_text(
        dump(read_plain(folder / "recipe.yaml") | {"attack": attack})
    )
    evaluate = recipe_of(str(folder), (), required=EVALUATE).evaluate
    assert (evaluate.norm, evaluate.eps) == ("l2", 0.1)


def test_a_run_is_found_by_its_path_from_home(
    run: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    name, own = f"~/{run.name}", load_model(run).state_dict()
    recipe = recipe_of(name, (), required=("model",))
    assert recipe.output == run
    for found in (load_model(name), _classifier_of(recipe, name)):
        torch.testing.assert_close(found.state_dict(), own, rtol=0, atol=0)


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_no_checkpoint_means_no_random_weights(run: Path, untouched: Path, null: str) -> None:
    recipe = recipe_of(str(run), [f"model.checkpoint={null}"], required=("model",))
    found = _classifier_of(recipe, str(run)).state_dict()
    torch.testing.assert_close(found, load_model(run).state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"model\.checkpoint: null is no file"):
        recipe_of("resnet18", [f"model.checkpoint={null}"], required=("model",))


def test_trust_imports_it(run: Path, code: Path, tmp_path: Path) -> None:
    attack, objective = {"name": "own_parts:Signed"}, {"name": "own_parts:Noisy"}
    folder = stranger(run, tmp_path / "run", attack=attack, objective=objective, evaluate=None)
    recipe = recipe_of(str(folder), (), required=("model", "data", "evaluate"), trust=True)
    assert (recipe.evaluate.norm, recipe.evaluate.eps) == ("linf", 0.1)
    recipe = recipe_of(str(folder), (), required=("model", "data", "certify"), trust=True)
    assert recipe.certify.sigma == 0.25
    for command in ("evaluate", "certify"):
        sys.modules.pop("own_parts", None)
        code.unlink()
        assert main([command, str(folder), "data.path=nowhere.parquet", "--trust"]) == 2
        assert code.exists()


@pytest.mark.parametrize("name", ["x" * 300, "é" * 128, "a/" * 2100, "local-dir:/" + "x" * 256])
def test_a_model_of_a_name_that_no_file_can_have(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    label = ["pseudo-label", name, "--out", "labels.parquet", "--data", "sklearn:digits"]
    for arguments in (["evaluate", name], ["certify", name], label):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"robust-accel: '{name[:20]}") and ": no model: a " in line
        assert re.search(r"has at most (255|4096) bytes, not [\d,]+$", line)
    with pytest.raises(ValueError, match=r"no model: a (name in a )?path has at most"):
        load_model(name)


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [
        ("evaluate", "optimizer.lr=1", "optimizer.lr: this command does not read it; it reads mod"),
        (
            "evaluate",
            "train.epochs=1",
            "train.epochs: this command does not read it; it reads model, data, "
            "attack, train.channels_last, evaluate",
        ),
        ("certify", "evaluate.eps=0.1", "evaluate.eps: this command does not read it"),
    ],
)
def test_settings_that_a_command_does_not_read_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, setting: str, said: str
) -> None:
    assert main([command, str(run), setting]) == 2
    assert capsys.readouterr().err.startswith(f"robust-accel: command line: {said}")
