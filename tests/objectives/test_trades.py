"""TRADES and MART against formulas and gradients derived by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from robust_accel import PGD, RobustModel
from robust_accel.objectives import Mart, Trades

NUM_CLASSES = 5


@pytest.fixture
def linear():
    """A linear model, for which gradients can be written down; double precision."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES)).double()
    x = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    x_adv = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    return model, x, x_adv, torch.tensor([0, 1, 2, 3, 4, 0])


def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).detach().softmax(dim=1)


def gradient(model: nn.Module, result: dict[str, Tensor]) -> Tensor:
    return torch.autograd.grad(result["loss"], model[1].weight)[0]


@pytest.mark.parametrize("batchnorm", ["apart", "together"])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_gradient_by_hand(linear, beta, online, batchnorm):
    """d KL(p || q) / d logits of q is q - p; of p it is p (log p/q - KL)."""
    model, x, x_adv, labels = linear
    p, q = probabilities(model, x), probabilities(model, x_adv)
    flat, flat_adv = x.flatten(1), x_adv.flatten(1)
    ratio = (p / q).log()
    kl = (p * ratio).sum(dim=1, keepdim=True)
    by_clean = p - one_hot(labels, NUM_CLASSES)
    if not online:
        by_clean = by_clean + beta * p * (ratio - kl)
    expected = (by_clean.T @ flat + beta * (q - p).T @ flat_adv) / len(x)

    result = Trades(beta=beta, online_targets=online, batchnorm=batchnorm).loss(
        model, x, x_adv, labels
    )
    torch.testing.assert_close(gradient(model, result), expected)
    torch.testing.assert_close(result["divergence"], kl.mean())
    torch.testing.assert_close(result["clean_loss"], cross_entropy(model(x), labels).detach())
    torch.testing.assert_close(result["logits"], model(x_adv))


def test_trades_attack_climbs_the_divergence_from_one_clean_prediction(linear):
    model, x, x_adv, labels = linear
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    inner = Trades().inner_loss(model, x, labels)
    assert len(calls) == 1
    p, q = probabilities(model, x), probabilities(model, x_adv)
    calls.clear()
    x_adv.requires_grad_()
    value = inner(x_adv)
    (found,) = torch.autograd.grad(value.sum(), x_adv)
    assert len(calls) == 1  # the clean prediction is not made again
    torch.testing.assert_close(value.detach(), (p * (p / q).log()).sum(dim=1))
    torch.testing.assert_close(found.flatten(1), (q - p) @ model[1].weight.detach())


def test_the_attack_may_lead_away_from_the_prediction_instead(linear):
    model, x, x_adv, labels = linear
    inner = Trades(attack_loss="cross_entropy").inner_loss(model, x, torch.full_like(labels, -1))
    expected = cross_entropy(model(x_adv), model(x).argmax(dim=1), reduction="none")
    torch.testing.assert_close(inner(x_adv), expected)


def test_an_unsure_prediction_made_surer_raises_the_divergence_and_not_the_cross_entropy():
    """Why ``attack_loss`` exists: from 0.6, 0.99 diverges more than 0.4, the other class."""
    model = nn.Identity()
    unsure, surer, flipped = (torch.tensor([[p, 1 - p]]).log() for p in (0.6, 0.99, 0.4))
    kl, ce = (
        Trades(attack_loss=a).inner_loss(model, unsure, None) for a in ("kl", "cross_entropy")
    )
    assert kl(surer) > kl(flipped)
    assert ce(surer) < ce(flipped)


def test_images_without_a_label_take_part_in_the_divergence_only(linear):
    model, x, x_adv, labels = linear
    some = labels.clone()
    some[3:] = -1
    result = Trades(beta=2.0).loss(model, x, x_adv, some)
    expected = cross_entropy(model(x[:3]), labels[:3])
    expected = expected + 2.0 * Trades().loss(model, x, x_adv, labels)["divergence"]
    torch.testing.assert_close(result["loss"], expected)
    none = Trades(beta=2.0).loss(model, x, x_adv, torch.full((6,), -1))
    torch.testing.assert_close(none["loss"].detach(), 2.0 * none["divergence"])


def test_an_image_weighs_the_same_however_the_batch_is_cut():
    """Of 8 images one process or micro-batch holds a single labelled one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    x = torch.rand(8, 3, 2, 2)
    labels = torch.tensor([0, 1, 2, 3, 4, -1, -1, -1])
    attack = PGD(num_steps=2, random_start=False)

    def gradient(*parts: slice, num_labeled: float | None) -> torch.Tensor:
        robust = RobustModel(model, attack, Trades())
        loss = sum(robust(x[p], labels[p], num_labeled)["loss"] for p in parts) / len(parts)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    whole = gradient(slice(0, 8), num_labeled=None)
    cut = (slice(0, 4), slice(4, 8))
    torch.testing.assert_close(gradient(*cut, num_labeled=5 / 2), whole, rtol=1e-4, atol=1e-6)
    assert (gradient(*cut, num_labeled=None) - whole).norm() > 0.1 * whole.norm()


def test_probabilities_are_labels_too(linear):
    model, x, x_adv, labels = linear
    soft = one_hot(labels, NUM_CLASSES).double()
    hard = Trades(label_smoothing=0.1).loss(model, x, x_adv, labels)["loss"]
    torch.testing.assert_close(
        Trades(label_smoothing=0.1).loss(model, x, x_adv, soft)["loss"], hard
    )
    with pytest.raises(ValueError, match="MART needs class indices"):
        Mart().loss(model, x, x_adv, soft)


def test_batchnorm_sees_both_batches_apart_or_together(linear):
    _, x, x_adv, labels = linear
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, NUM_CLASSES)).double()
    for batchnorm, updates in (("apart", 2), ("together", 1)):
        model[0].reset_running_stats()
        Trades(batchnorm=batchnorm).loss(model, x, x_adv, labels)
        assert model[0].num_batches_tracked == updates


def test_mart_by_hand(linear):
    model, x, x_adv, labels = linear
    p, q = probabilities(model, x), probabilities(model, x_adv)
    rows = torch.arange(6)
    others = q.clone()
    others[rows, labels] = 0
    bce = -q[rows, labels].log() - (1.0001 - others.max(dim=1).values).log()
    kl = (p * (p / q).log()).sum(dim=1)
    expected = (bce + 5.0 * kl * (1 - p[rows, labels])).mean()
    result = Mart(beta=5.0).loss(model, x, x_adv, labels)
    torch.testing.assert_close(result["loss"].detach(), expected)
    torch.testing.assert_close(
        Mart().inner_loss(model, x, labels)(x_adv),
        cross_entropy(model(x_adv), labels, reduction="none"),
    )


def test_the_gaussian_start_leaves_where_the_divergence_is_flat():
    model = RobustModel(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5)),
        PGD(step_size=2 / 255, num_steps=1, random_start="gaussian"),
        Trades(),
    )
    x, labels = torch.rand(4, 3, 2, 2) * 0.8 + 0.1, torch.tensor([0, 1, 2, 3])
    near = model.perturb(x, labels)
    assert (near - x).abs().median() > 0.7 * 2 / 255
    assert (near - x).abs().max() <= 2 / 255 + 0.006  # six standard deviations


@pytest.mark.parametrize(
    ("objective", "settings", "named"),
    [
        (Trades, {"beta": -1}, "beta"),
        (Trades, {"batchnorm": "both"}, "batchnorm"),
        (Trades, {"attack_loss": "margin"}, "attack_loss"),
        (Mart, {"beta": -1}, "beta"),
    ],
)
def test_impossible_settings_are_refused_by_name(objective, settings, named):
    with pytest.raises(ValueError, match=named):
        objective(**settings)
