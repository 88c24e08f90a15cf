"""Several balls at once: the worst for each image, one a step that all processes draw alike."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_accel.attacks import APGD, PGD, Attack, MultiNorm
from robust_accel.data import seeded_generator
from robust_accel.min_max import Applied, MinMax
from robust_accel.objectives import Trades, cross_entropy_of
from robust_accel.recipe import load_recipe
from robust_accel.recipe_builder import RecipeError
from tests.small_runs import quick_run

BALLS: tuple[Any, ...] = (
    {"norm": "linf", "eps": 0.1},
    {"norm": "l2", "eps": 0.5},
    {"norm": "l1", "eps": 1.5},
)
X = torch.full((3, 1, 6, 6), 0.5)


def multi(**settings: Any) -> MultiNorm:
    return MultiNorm(balls=BALLS, **settings)


def test_the_worst_ball_of_each_image_is_taken() -> None:
    # a linear loss: its gain in a ball is eps times the dual norm of the slope
    slopes = torch.zeros(3, 36)
    slopes[0] = 1  # L-inf gains 3.6, L2 3, L1 1.5
    slopes[1, :10] = 1  # 1, 1.58 and 1.5
    slopes[2, :3] = 1  # 0.3, 0.87 and 1.5
    slopes = slopes.view(3, 1, 6, 6)

    def loss_fn(z: Tensor) -> Tensor:
        return (slopes * z).sum((1, 2, 3))

    found = multi(strategy="max", num_steps=20)(loss_fn, X) - X
    torch.testing.assert_close(
        (slopes * found).sum((1, 2, 3)), torch.tensor([3.6, 0.5 * 10**0.5, 1.5]), rtol=0, atol=0.01
    )
    assert Applied.of(multi(), X, X + found).largest == pytest.approx(1, abs=1e-3)


def test_losses_that_are_no_numbers_win_nothing() -> None:
    def loss_fn(z: Tensor) -> Tensor:  # NaN but in the L-inf ball
        loss = z.sum((1, 2, 3))
        return torch.where((z - X).abs().amax((1, 2, 3)) > 0.11, torch.nan, loss)

    found = multi(strategy="max", num_steps=3)(loss_fn, X)
    torch.testing.assert_close(found, X + 0.1)


@pytest.mark.parametrize(("by", "kind"), [("apgd", APGD), ("pgd", PGD)])
def test_a_step_draws_one_ball_alike_wherever_it_is_drawn(by: str, kind: type) -> None:
    attack = multi(strategy="random", by=by, num_steps=7)
    drawn: list[Any] = [attack.of_step(seeded_generator(0, 10, step)) for step in range(300)]
    assert drawn == [attack.of_step(seeded_generator(0, 10, step)) for step in range(300)]
    assert all(isinstance(one, kind) and one.num_steps == 7 for one in drawn)
    counts = Counter((one.norm, one.eps) for one in drawn)
    assert set(counts) == {(ball["norm"], ball["eps"]) for ball in BALLS}
    assert min(counts.values()) > 70
    assert multi(strategy="max").of_step(seeded_generator(0)).strategy == "max"  # type: ignore[attr-defined]


def test_training_draws_by_seed_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    perturb = MinMax._perturb

    def noting(self: MinMax, *args: Any, **kwargs: Any) -> Tensor:
        attack: Any = self.attack
        met.append(attack.norm)
        return perturb(self, *args, **kwargs)

    monkeypatch.setattr(MinMax, "_perturb", noting)
    balls = "[{norm: linf, eps: 0.2}, {norm: l2, eps: 1}, {norm: l1, eps: 2}]"
    settings = ("attack={name: multi-norm, num_steps: 1, balls: " + balls + "}",)
    settings += ("train.gradient_accumulation=2", "train.seed=3", "train.epochs=1")
    quick_run(tmp_path, *settings)
    attack: Any = load_recipe(tmp_path / "recipe.yaml").attack
    steps = len(met) // 2
    asked: list[Any] = [attack.of_step(seeded_generator(3, 10, step)) for step in range(steps)]
    assert met == [one.norm for one in asked for _ in range(2)]  # micro-batches of a step alike
    assert len(set(met)) > 1


def test_any_objective_and_a_script_of_ones_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    labels = torch.tensor([0, 1, 2])
    for strategy in ("max", "random"):
        min_max = MinMax(multi(strategy=strategy, num_steps=2), Trades())
        min_max.loss(model, X, labels)["loss"].backward()
        assert min_max.applied is not None and min_max.applied.norm == "multi-norm"
        assert "multi-norm perturbation of eps 1: median" in str(min_max.applied)
    far: Attack = multi()
    with pytest.raises(RuntimeError, match="moved an image by 2"):
        Applied.of(far, X, X + 0.2)  # outside of each
    for strategy in ("max", "random"):
        x_adv = multi(strategy=strategy)(cross_entropy_of(model, labels), X)
        Applied.of(multi(), X, x_adv)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("balls: [{norm: linf, eps: 0.1}]", r"attack\.balls: .* at least 2 items"),
        (
            "balls: [{norm: l2, eps: 0.1}, {norm: l2, eps: 1}]",
            r"attack\.balls: .*l2 is named twice, and one of its balls lies in the other",
        ),
        ("balls: [{norm: linf, eps: 8}, {norm: l2, eps: 1}]", r"balls\.0\.eps: .*at most 1"),
        ("balls: [{norm: linf}, {norm: l2, eps: 1}]", r"balls\.0\.eps: missing"),
        ("balls: [{norm: l0, eps: 1}, {norm: l2, eps: 1}]", r"balls\.0\.norm: .*'l2' or 'l1'"),
        ("eps: 0.1", r"attack\.eps: unknown key"),
    ],
)
def test_balls_that_cannot_be_are_refused(given: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", ["attack={name: multi-norm, " + given + "}"])


def test_an_eps_that_grows_is_refused() -> None:
    settings = ["attack={name: multi-norm, balls: [{norm: linf, eps: 0.1}, {norm: l2, eps: 1}]}"]
    with pytest.raises(RecipeError, match=r"eps_warmup_epochs: MultiNorm has no eps that could"):
        load_recipe("quickstart", [*settings, "train.eps_warmup_epochs=2"])
