"""``train.deterministic`` is at work in the run, and not after it."""

from pathlib import Path

import pytest
import torch

from robust_accel.recipe import Recipe, load_recipe
from robust_accel.training.loop import Loop
from robust_accel.training.run import train


def recipe(folder: Path, epochs: int) -> Recipe:
    settings = [f"output={folder}", f"train.epochs={epochs}", "train.deterministic=true"]
    settings += ["data.train_size=640", "evaluate.autoattack=null", "evaluate.pgd=null"]
    return load_recipe("quickstart", settings)


def test_deterministic_holds_during_the_run_and_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during, step = [], Loop.step

    def watched(loop: Loop, *arguments: object) -> object:
        during.append(torch.are_deterministic_algorithms_enabled())
        if len(during) == 13:  # some operation that has no such form
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return step(loop, *arguments)

    monkeypatch.setattr(Loop, "step", watched)
    train(recipe(tmp_path / "run", 1))
    assert during and all(during) and len(during) < 13
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match=r"train\.deterministic: put_ does not have"):
        train(recipe(tmp_path / "refused", 3))
    assert not torch.are_deterministic_algorithms_enabled()
