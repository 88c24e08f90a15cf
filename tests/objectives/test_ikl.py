"""DKL and IKL against the sums over pairs of classes, and against the KL that DKL stands for."""

from pathlib import Path

import pytest
import torch
from small_runs import quick_run, same, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softmax

from robust_accel.attacks import NoAttack
from robust_accel.min_max import MinMax
from robust_accel.objectives import IKL, Trades

NUM_CLASSES = 5
CPU = torch.device("cpu")


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    x = torch.rand(6, 3, 2, 2)
    return model, x, (x + 0.3 * torch.randn_like(x)).clamp(0, 1), torch.tensor([0, 1, 2, 3, 4, 0])


def plain(clean: Tensor, logits: Tensor, weights: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """wMSE and the soft cross-entropy as sums over pairs of classes."""
    pairs = clean[:, :, None] - clean[:, None, :]
    others = logits[:, :, None] - logits[:, None, :]
    others = others if symmetric else others.detach()
    of_pairs = weights[:, :, None] * weights[:, None, :]
    distance = (of_pairs * (pairs - others) ** 2).sum((1, 2)) / 4
    soft = -(softmax(clean, dim=1).detach() * log_softmax(logits, dim=1)).sum(dim=1)
    return distance.mean(), soft.mean()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("batchnorm", ["apart", "together"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_sum_over_pairs_of_classes(problem, symmetric, batchnorm) -> None:
    model, x, x_adv, labels = problem
    objective = IKL(alpha=3, beta=7, weights="image", symmetric=symmetric, batchnorm=batchnorm)
    out = objective.loss(model, x, x_adv, labels)
    clean, logits = model(x), model(x_adv)
    distance, soft = plain(clean, logits, softmax(clean, dim=1).detach(), symmetric)
    expected = cross_entropy(clean, labels) + 3 * soft + 7 * distance
    torch.testing.assert_close(out["loss"], expected)
    for own, grad in zip(gradients(out["loss"], model), gradients(expected, model), strict=True):
        torch.testing.assert_close(own, grad)


def test_dkl_has_the_gradient_of_trades(problem) -> None:
    model, x, x_adv, labels = problem
    dkl = IKL(alpha=6, beta=6, weights="image", symmetric=False).loss(model, x, x_adv, labels)
    trades = Trades(beta=6).loss(model, x, x_adv, labels)
    for own, grad in zip(
        gradients(dkl["loss"], model), gradients(trades["loss"], model), strict=True
    ):
        torch.testing.assert_close(own, grad)


def test_the_attack_is_that_of_trades(problem) -> None:
    model, x, x_adv, labels = problem
    for loss in ("kl", "cross_entropy"):
        ours = IKL(attack_loss=loss, weights="image").inner_loss(model, x, labels)
        torch.testing.assert_close(
            ours(x_adv), Trades(attack_loss=loss).inner_loss(model, x, labels)(x_adv)
        )


@pytest.mark.parametrize("soft", [False, True])
def test_weights_are_the_class_means_of_the_epoch_before(problem, soft) -> None:
    model, x, x_adv, labels = problem
    shares = one_hot(labels, NUM_CLASSES).float()
    if soft:
        shares = 0.7 * shares + 0.3 * shares.roll(1, dims=0)
        labels = shares
    objective = IKL(temperature=2).remembering(NUM_CLASSES, CPU)

    def matches(means: Tensor) -> None:
        clean, logits = model(x), model(x_adv)
        distance, soft_loss = plain(clean, logits, shares @ means, True)
        expected = cross_entropy(clean, labels) + 4 * soft_loss + 20 * distance
        found = objective.loss(model, x, x_adv, labels)["loss"]
        torch.testing.assert_close(found, expected)

    matches(torch.full((NUM_CLASSES, NUM_CLASSES), 1 / NUM_CLASSES))  # the first epoch
    for _ in range(2):  # two batches, each counted once
        objective.inner_loss(model, x, labels)
    predictions = softmax(model(x).detach() / 2, dim=1)
    means = shares.T @ predictions / shares.sum(dim=0)[:, None]
    objective.begin(1, lambda sums: 2 * sums)  # another process has met the same
    matches(means)
    objective.begin(2, lambda sums: sums)  # no image was seen: they stay
    matches(means)


@pytest.mark.parametrize("soft", [False, True])
def test_class_means_are_of_full_precision_under_autocast(problem, soft) -> None:
    model, x, x_adv, labels = problem
    shares = one_hot(labels, NUM_CLASSES).float()
    if soft:
        shares = labels = 0.7 * shares + 0.3 * shares.roll(1, dims=0)
    objective = IKL(alpha=0, beta=1, temperature=2).remembering(NUM_CLASSES, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        objective.inner_loss(model, x, labels)
        clean, logits = model(x).detach(), model(x_adv).detach()
    expected = shares.T @ softmax(clean.float() / 2, dim=1)
    assert clean.dtype == torch.bfloat16
    torch.testing.assert_close(objective.sums, expected, rtol=1e-6, atol=1e-7)
    objective.begin(1, lambda sums: sums)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.loss(model, x, x_adv, labels)["distance"]
    expected, _ = plain(clean.float(), logits.float(), shares @ objective.means, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_prediction_that_is_no_number_spoils_no_class(problem) -> None:
    model, x, _, labels = problem
    objective = IKL().remembering(NUM_CLASSES, CPU)
    x = x.clone()
    x[2] = torch.nan
    objective.inner_loss(model, x, labels)
    objective.begin(1, lambda sums: sums)
    assert objective.means.isfinite().all()
    assert objective.means[2].equal(torch.full((NUM_CLASSES,), 1 / NUM_CLASSES))


def test_only_the_training_loop_can_keep_class_means() -> None:
    with pytest.raises(ValueError, match="keeps the mean prediction of each class"):
        MinMax(NoAttack(), IKL())
    MinMax(NoAttack(), IKL(weights="image"))


def test_processes_that_become_fewer_share_the_sums(problem) -> None:
    model, x, _, labels = problem
    parts = [IKL().remembering(NUM_CLASSES, CPU) for _ in range(3)]
    for part, images in zip(parts, x.split(2), strict=True):
        part.inner_loss(model, images, labels[:2])
    fewer = [IKL().remembering(NUM_CLASSES, CPU) for _ in range(2)]
    for part in fewer:
        part.load([other.state() for other in parts], 2)
    total = sum(part.sums for part in parts)
    torch.testing.assert_close(sum(part.sums for part in fewer), total)


SMALL_IKL = ("objective={name: ikl, beta: 5, alpha: 2}",)


@pytest.mark.long
def test_each_setting_has_an_effect(tmp_path: Path) -> None:
    ends = []
    for i, more in enumerate(("alpha=2", "temperature=1", "weights=image", "attack_loss=cw")):
        quick_run(tmp_path / str(i), *SMALL_IKL, f"objective.{more}")
        ends.append(weights(tmp_path / str(i)))
    assert not any(same(ends[0], other) for other in ends[1:])
