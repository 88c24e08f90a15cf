"""Accelerate's configurations are handed out as they are; a run's folder is its recipe's name."""

from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from robust_accel.__main__ import main
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import RECIPES, launch_configurations, packaged_recipes


@pytest.mark.parametrize("name", launch_configurations())
def test_a_launch_configuration_is_copied_and_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, copied = (RECIPES / f"{name}.yaml").read_text(), tmp_path / "launch.yaml"
    assert main(["recipe", "copy", name, str(copied)]) == 0
    assert copied.read_text() == whole
    assert f"accelerate launch --config_file {copied}" in capsys.readouterr().out
    launch_command_parser().parse_args(["--config_file", str(copied), "train.py"])
    assert main(["recipe", "show", name]) == 0
    assert capsys.readouterr().out == whole
    assert main(["recipe", "copy", name, str(copied)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["recipe", "show", name, "train.epochs=3"]) == 2
    assert "it has no settings of ours" in capsys.readouterr().err
    assert main(["train", name]) == 2  # it is no recipe


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "accelerate/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == launch_configurations()
    assert len(lines) >= 5 and all(len(line.split()) > 3 for line in lines)


def test_no_two_packaged_recipes_write_into_one_folder(tmp_path: Path) -> None:
    folders = [load_recipe(name).output for name in packaged_recipes()]
    assert len(set(folders)) == len(folders)
    assert load_recipe("cifar10/dat_pgd").output == Path("runs/cifar10/dat_pgd")
    own = tmp_path / "cifar10" / "own.yaml"
    own.parent.mkdir()
    own.write_text("base: quickstart\n")
    assert load_recipe(own).output == Path("runs/own")
    assert load_recipe(str(RECIPES / "cifar10/at.yaml")).output == Path("runs/cifar10/at")


def test_a_batch_is_checked_for_the_processes_that_would_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "quickstart", "--processes", "4"]) == 0
    capsys.readouterr()
    assert main(["check", "quickstart", "--processes", "3"]) == 2
    said = capsys.readouterr().err
    assert "64 is not divisible by 3 processes x 1 micro-batches: choose 63 or 66" in said
