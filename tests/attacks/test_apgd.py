"""APGD beside the authors' implementation and PGD, and the losses that attacks may climb."""

import json
from pathlib import Path

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust_accel.attacks import APGD, PGD
from robust_accel.attacks.apgd import _checkpoints
from robust_accel.attacks.base import gradients_seen
from robust_accel.objectives import Adversarial, climbed, cross_entropy_of, predicted
from robust_accel.recipe import load_recipe
from robust_accel.training.run import train

RADII = {"linf": 0.2, "l2": 1.0, "l1": 2.0}
LOSSES = {"cross_entropy": "ce", "dlr": "dlr"}  # ours and theirs


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that knows the digits, and 300 of them that it knows."""
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        i = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:256]
        noisy = (x[i] + 0.3 * torch.randn_like(x[i])).clamp(0, 1)
        loss = nn.functional.cross_entropy(model(noisy), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (predicted(model(x)) == y).nonzero()[:300, 0]
    return model.eval().requires_grad_(False), x[right], y[right]


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_breaks_what_the_authors_code_breaks(trained, norm, loss):
    model, x, y = trained
    eps = RADII[norm]
    theirs = APGDAttack(
        model, n_iter=20, norm=norm.capitalize(), eps=eps, loss=LOSSES[loss], device="cpu"
    )
    x_adv = theirs.perturb(x, y)
    ours = APGD(norm=norm, eps=eps)(climbed(model, y, loss), x)
    broken = [predicted(model(z)) != y for z in (ours, x_adv)]
    assert 0.2 < broken[0].float().mean() < 0.98  # else nothing would be compared
    more = broken[0].float().mean() - broken[1].float().mean()  # starts and gains differ
    assert -0.02 <= more <= (0.05 if norm == "l1" else 0.02)
    assert (broken[0] == broken[1]).float().mean() >= 0.92


@pytest.mark.parametrize("norm", RADII)
def test_it_climbs_higher_than_pgd_of_as_many_gradients(trained, norm):
    model, x, y = trained
    loss_fn = cross_entropy_of(model, y)
    by_pgd, by_apgd = (
        attack(lambda z: loss_fn(z), x)  # a plain function: the highest loss alone counts
        for attack in (
            PGD(norm=norm, eps=RADII[norm], num_steps=21),
            APGD(norm=norm, eps=RADII[norm]),
        )
    )
    assert loss_fn(by_apgd).mean() > 1.01 * loss_fn(by_pgd).mean()


def test_one_wrong_point_is_better_than_a_higher_loss():
    x = torch.full((20, 1, 8, 8), 0.5)

    class Contrary:
        """Says that only images close to where they were are predicted wrongly."""

        def __call__(self, z: Tensor) -> Tensor:
            return (z - x).abs().flatten(1).mean(1)

        def judged(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self(z), (z - x).abs().flatten(1).mean(1) < 0.06

    contrary = Contrary()
    free = APGD(eps=0.1)(contrary.__call__, x)
    steered = APGD(eps=0.1)(contrary, x)
    assert (contrary(free) > 0.06).all()
    assert (contrary(steered) < 0.06).float().mean() > 0.9


def test_gradients_and_checkpoints():
    with gradients_seen() as seen:
        APGD(num_steps=7)(lambda z: z.flatten(1).sum(1), torch.rand(2, 3, 4, 4))
    assert seen.calls == 8
    # p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 of the way
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_margins_are_as_defined_whatever_the_labels_form():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.5, 2.0, 1.0, 1.5]], requires_grad=True)
    y = torch.tensor([0, 2])
    cw = climbed(lambda z: logits, y, "cw")
    assert cw(None).tolist() == [-1.0, 1.0]  # the largest other minus the label's
    dlr = climbed(lambda z: logits, y, "dlr")
    assert dlr(None).tolist() == pytest.approx([-1 / 2, 1 / 1])
    assert cw.judged(None)[1].tolist() == [False, True]
    soft = nn.functional.one_hot(y, 4) * 0.7 + 0.075
    assert climbed(lambda z: logits, soft, "cw")(None).equal(cw(None))
    (grad,) = torch.autograd.grad(cw(None).sum(), logits)
    assert grad.tolist() == [[-1, 0, 1, 0], [0, 1, -1, 0]]
    with pytest.raises(ValueError, match="dlr needs three classes, here are 2"):
        climbed(lambda z: logits[:, :2], torch.tensor([0, 1]), "dlr")(None)


def test_training_climbs_the_loss_that_was_asked_for(trained):
    model, x, y = trained
    ends = [
        PGD(eps=0.1, random_start=False)(Adversarial(attack_loss=loss).inner_loss(model, x, y), x)
        for loss in ("cross_entropy", "cw", "dlr")
    ]
    expected = [
        PGD(eps=0.1, random_start=False)(climbed(model, y, loss), x)
        for loss in ("cross_entropy", "cw", "dlr")
    ]
    assert all(map(torch.equal, ends, expected))
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("key", ["objective.attack_loss", "evaluate.pgd.loss"])
def test_too_few_classes_are_refused_before_training(key: str, tmp_path: Path) -> None:
    settings = [f"output={tmp_path / 'run'}", "data.classes=[3, 8]", "evaluate.autoattack=null"]
    recipe = load_recipe("quickstart", [*settings, f"{key}=dlr"])
    with pytest.raises(ValueError, match=f"{key}: dlr ranks three classes, the model has 2"):
        train(recipe)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_recipe_trains_and_measures_by_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def settings(*more: str) -> list[str]:
        return [
            f"output={tmp_path}", "train.epochs=1", "train.validate_every=1",
            "attack={name: apgd, eps: 0.2, num_steps: 2}", "objective.attack_loss=cw",
            "evaluate.autoattack=null", "evaluate.train_images=null", "evaluate.images=50", *more,
        ]  # fmt: skip

    with pytest.raises(ValueError, match=r"evaluate\.pgd\.step_size: .*apgd chooses the lengths"):
        load_recipe("quickstart", settings("evaluate.pgd={attack: apgd, step_size: 0.1}"))
    recipe = load_recipe("quickstart", settings("evaluate.pgd={attack: apgd, loss: dlr}"))
    caplog.set_level("INFO")
    train(recipe)
    rows = json.loads((tmp_path / "report.json").read_text())["measurements"]
    (row,) = [row for row in rows if row["attack"]["name"] != "none"]
    assert (row["attack"]["name"], row["attack"]["loss"]) == ("apgd", "dlr")
    assert "(APGD-20 DLR, n=50)" in (tmp_path / "report.md").read_text()
    assert "apgd_dlr_accuracy: " in caplog.text
