"""What a run may change on the way, and what would make its measurements others."""

from pathlib import Path

import pytest

from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.start import Start, find_start

ENGINE = {"engine": "torch", "zero_stage": None, "num_processes": 1, "device": "cpu"}
LAST = ("train.select=last",)
NONE_HELD_OUT = (*LAST, "data.validation_size=0")


def started(path: Path, *settings: str) -> RunFolder:
    """A run that was ended before its first checkpoint."""
    folder = RunFolder(path)
    folder.path.mkdir()
    load_recipe("quickstart", [*settings]).save(folder.recipe)
    return folder


def start_of(folder: RunFolder, *settings: str) -> Start:
    return find_start(load_recipe("quickstart", [*settings]), folder, ENGINE, resume=True)


@pytest.mark.parametrize(
    "setting",
    ["evaluate={norm: l2, eps: 1.0}", "evaluate.eps=0.3", "evaluate.pgd={attack: apgd, loss: dlr}"],
)
def test_while_images_are_held_out_their_attack_stays(tmp_path: Path, setting: str) -> None:
    """Whichever weights are left: another attack's accuracy would look like a collapse."""
    folder = started(tmp_path / "run", *LAST)
    key = setting.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"^output: .* other settings: {key}.*, now "):
        start_of(folder, *LAST, setting)
    alone = started(tmp_path / "alone", *NONE_HELD_OUT)
    assert start_of(alone, *NONE_HELD_OUT, setting) == Start()


def test_how_many_are_measured_at_once_is_free_where_nothing_is_chosen(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", *LAST)
    assert start_of(folder, *LAST, "evaluate.batch_size=17", "evaluate.seed=7") == Start()
