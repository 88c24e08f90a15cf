"""Recipes are listed, shown with where each setting is from, and copied into files of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from robust_accel.__main__ import main
from robust_accel.exit_codes import UNWRITABLE
from robust_accel.plain_yaml import read_plain
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import RECIPES, SCHEMA, launch_configurations, packaged_recipes


def test_every_recipe_is_listed_with_its_sentence_its_cost_and_what_was_reached(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipes"]) == 0
    listed: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            name, line = line.split(maxsplit=1)
        listed.setdefault(name, []).append(line.strip())
    assert [*listed] == [*packaged_recipes(), *launch_configurations()]
    assert all(len(said[0].split()) > 1 for said in listed.values()), "no sentence at its head"
    for name in packaged_recipes():
        keys = [text.partition(": ")[0] for text in listed[name][1:]]
        assert keys == ["Cost", "Reached"], name


def test_a_word_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "N-fgsm"]) == 0
    assert "cifar10/cpu " in (said := capsys.readouterr().out) and "dat_pgd " not in said
    assert main(["recipes", "no such word"]) == 2
    assert "'no such word'" in capsys.readouterr().err


def test_what_is_shown_names_where_each_setting_is_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: cifar10/dat_pgd\ntrain: {batch_size: 64}\n")
    assert main(["recipe", "show", str(own), "train.seed=5"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["batch_size:", "64", "#", str(own)] in lines
    assert ["seed:", "5", "#", "command", "line"] in lines
    assert ["augment:", "crop_flip", "#", "cifar10/_cifar10.yaml"] in lines
    assert ["eps:", "8/255", "#", "cifar10/dat_pgd.yaml"] in lines
    assert ["keep:", "2", "#", "default"] in lines


def test_what_is_shown_of_a_list_is_a_recipe_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    sources = "[{path: a.npz, fraction: 0.25}, {path: b.npz, fraction: 0.25, size: 3}]"
    own.write_text(f"base: quickstart\ndata: {{unlabeled: {sources}}}\n")
    assert main(["recipe", "show", str(own)]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_recipe(shown).settings == load_recipe(own).settings


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_copy_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    copy = tmp_path / f"{Path(name).name}.yaml"
    assert main(["recipe", "copy", name, str(copy)]) == 0
    own = {"output": f"runs/{copy.stem}"}
    assert load_recipe(copy).settings == load_recipe(name).settings | own
    head = copy.read_text().partition("\n# From ")
    assert head[0] == (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert f"$schema={SCHEMA.as_uri()}\n" in head[2]  # wherever the copy lies


def test_what_is_looked_at_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's recipe is code where it names classes: to read it before must not run it."""
    done, own, copy = tmp_path / "executed", tmp_path / "own.yaml", tmp_path / "copy.yaml"
    (tmp_path / "hostile_module.py").write_text(f"open({str(done)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    own.write_text(
        "base: quickstart\nattack: {name: 'hostile_module:A', eps: 8/255, own: [1]}\n"
        + "".join(
            f"{section}: {{name: 'hostile_module:A'}}\n"
            for section in ("objective", "schedule", "communication")
        )
        + "data: {mix: {mixup: 1}}\n"
    )
    assert main(["recipe", "show", str(own)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["name:", "hostile_module:A", "#", str(own)] in shown
    assert ["own:", "[1]", "#", str(own)] in shown
    assert main(["recipe", "copy", str(own), str(copy)]) == 0
    assert read_plain(copy)["attack"] == {"name": "hostile_module:A", "eps": "8/255", "own": [1]}
    assert not done.exists()
    assert main(["check", str(own)]) == 2  # it tells what train would
    assert done.exists()


def test_a_copy_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "own.yaml"
    assert main(["recipe", "copy", "quickstart", str(target)]) == UNWRITABLE
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == f"robust-accel: {target}: Not a directory"


def test_a_copy_replaces_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "own.yaml"
    copy.write_text("mine")
    assert main(["recipe", "copy", "quickstart", str(copy)]) == 2
    assert f"{copy}: is there already" in capsys.readouterr().err
    assert copy.read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["recipes"], ["trian"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from robust_accel.__main__ import main\n"
        f"sys.argv = ['robust-accel', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'timm', 'datasets', 'accelerate', 'numpy', 'pydantic')\n"
        "print('imported:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
