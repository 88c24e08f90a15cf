"""Smoothing objectives against formulas written out; the same noise twice; copies in parts."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from robust_accel import PGD, RobustModel, Smoothing
from robust_accel.attacks import DDN, NoAttack

NUM_CLASSES = 4


@pytest.fixture
def problem():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 2), nn.GroupNorm(1, 5), nn.Tanh(), nn.Flatten(), nn.Linear(45, NUM_CLASSES)
    ).double()
    x = torch.rand(6, 3, 4, 4, dtype=torch.float64)
    return model, x, torch.tensor([0, 1, 2, 3, 0, 1])


def test_loss_is_the_mean_over_copies_and_the_attack_climbs_the_mean_probability(problem):
    model, x, labels = problem
    batch = Smoothing(sigma=0.3, num_noise=5).for_batch(x)
    assert batch.noise.shape == (5, *x.shape)
    assert batch.noise.std().item() == pytest.approx(0.3, rel=0.1)
    logits = torch.stack([model(x + noise) for noise in batch.noise])
    found = batch.loss(model, x, x, labels)
    by_copy = torch.stack([cross_entropy(copy, labels) for copy in logits])
    torch.testing.assert_close(found["loss"], by_copy.mean())
    mean = logits.softmax(dim=2).mean(dim=0)
    torch.testing.assert_close(found["logits"].exp(), mean)
    inner = batch.inner_loss(model, x, labels)(x)
    torch.testing.assert_close(inner, -mean[torch.arange(6), labels].log())
    soft = one_hot(labels, NUM_CLASSES).double()
    torch.testing.assert_close(batch.loss(model, x, x, soft)["loss"], found["loss"])


def test_consistency_by_hand(problem):
    model, x, labels = problem
    batch = Smoothing(sigma=0.3, num_noise=3, consistency=7.0, entropy=0.5).for_batch(x)
    p = torch.stack([model(x + noise) for noise in batch.noise]).softmax(dim=2)
    mean = p.mean(dim=0)
    kl = torch.stack([(mean * (mean / copy).log()).sum(dim=1) for copy in p]).mean()
    entropy = -(mean * mean.log()).sum(dim=1).mean()
    plain = Smoothing(sigma=0.3, num_noise=3).for_batch(x)
    plain.noise = batch.noise
    expected = plain.loss(model, x, x, labels)["loss"] + 7.0 * kl + 0.5 * entropy
    torch.testing.assert_close(batch.loss(model, x, x, labels)["loss"], expected)


def test_attack_and_update_share_their_noise():
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(48, NUM_CLASSES)

        def forward(self, z):
            seen.append(z.detach().clone())
            return self.linear(z.flatten(1))

    attack = PGD(norm="l2", eps=0.1, step_size=0.1, num_steps=2, random_start=False)
    model = RobustModel(Recorder(), attack, Smoothing(sigma=0.5, num_noise=2)).train()
    x, labels = torch.rand(4, 3, 4, 4), torch.arange(4)
    model(x, labels)
    first, second, last = seen
    # the first step starts at x: what is left is the noise; then the image alone moves
    noise = first - x.repeat(2, 1, 1, 1)
    moved = second - noise
    torch.testing.assert_close(moved[:4], moved[4:])
    torch.testing.assert_close((last - noise)[:4], (last - noise)[4:])
    assert not torch.allclose(moved[:4], x)
    seen.clear()
    model(x, labels)
    assert not torch.allclose(seen[0] - x.repeat(2, 1, 1, 1), noise)  # new noise each time


@pytest.mark.parametrize("consistency", [0.0, 3.0])
def test_copies_in_parts_have_the_same_gradient(problem, consistency):
    model, x, labels = problem
    whole = Smoothing(sigma=0.2, num_noise=5, consistency=consistency).for_batch(x)
    parts = Smoothing(
        sigma=0.2, num_noise=5, consistency=consistency, copies_at_a_time=2
    ).for_batch(x)
    parts.noise = whole.noise
    grads = [
        torch.autograd.grad(batch.loss(model, x, x, labels)["loss"], list(model.parameters()))
        for batch in (whole, parts)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    x_adv = x.clone().requires_grad_()
    inner = [batch.inner_loss(model, x, labels)(x_adv).sum() for batch in (whole, parts)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, x_adv)[0] for loss in inner))


def test_copies_in_parts_count_once_for_batchnorm():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, NUM_CLASSES))
    x, labels = torch.rand(4, 3, 4, 4), torch.arange(4)
    batch = Smoothing(sigma=0.2, num_noise=4, copies_at_a_time=2).for_batch(x)
    loss = batch.loss(model, x, x, labels)["loss"]
    before = model[0].running_mean.clone()
    assert model[0].num_batches_tracked == 2
    loss.backward()
    assert model[0].num_batches_tracked == 2  # two parts, not four with their recomputation
    assert model[0].running_mean.equal(before)


def test_the_wrapper_trains_by_any_of_them():
    x, labels = torch.rand(4, 3, 4, 4), torch.arange(4)
    for attack in (NoAttack(), DDN(eps=0.2, num_steps=3), PGD(norm="l2", eps=0.2, step_size=0.1)):
        for settings in ({}, {"num_noise": 3, "consistency": 1.0}, {"num_noise": 2}):
            model = nn.Sequential(nn.Flatten(), nn.Linear(48, NUM_CLASSES))
            robust = RobustModel(model, attack, Smoothing(sigma=0.1, **settings)).train()
            out = robust(x, labels)
            out["loss"].backward()
            assert out["logits"].shape == (4, NUM_CLASSES)
            assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"sigma": 0},
        {"sigma": -1},
        {"num_noise": 0},
        {"consistency": 1},
        {"consistency": -1},
        {"entropy": -1},
    ],
)
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Smoothing(**{"sigma": 0.1} | settings)
