"""Keys, sections and their members are explained; a name that is none is met by a close one."""

import json

import pytest

from robust_accel.__main__ import main


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("attack.num_steps", ["attack.num_steps (pgd): whole number >= 1; default: 10"]),
        (
            "eps",
            ["attack.eps (n-fgsm)", "evaluate.eps: number > 0 or null", "optimizer.eps (lamb)"],
        ),
        ("pgd", ["Source: Madry et al. 2018", "attack.norm (pgd): linf, l2, l1; default: linf"]),
        ("schedule", ["piecewise: ", "schedule.milestones (piecewise)", "must be given"]),
        ("train", ["train.max_time", "train.awp.gamma"]),
        ("train.awp", ["train.awp.gamma"]),
        ("output", ["output: text"]),
    ],
)
def test_it_is_explained(asked: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", asked]) == 0
    found = capsys.readouterr().out
    assert all(text in found for text in said), found


def test_what_is_no_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "train.epoch"]) == 2
    assert "(did you mean train.epochs?)" in capsys.readouterr().err
    for command in ("explain", "recipes"):
        assert main([command, 5000 * "x"]) == 2
        assert len(capsys.readouterr().err) < 300


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"base", "train", "output"}
