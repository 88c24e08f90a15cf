"""DDN finds perturbations about as short as a linear model allows."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robust_accel.attacks import DDN


@pytest.fixture
def linear():
    """Two classes: the distance of an image to the border is known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]))
        model[1].bias.copy_(torch.stack([weight.sum(), torch.zeros(())]) * 1.0)
    distances = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)
    x = 0.5 + distances[:, None] * weight / weight.norm()
    model[1].bias.data[0] = 0.0  # weights sum to 0: the border goes through grey
    labels = torch.ones(4, dtype=torch.int64)
    return model, x.view(4, 3, 2, 2), labels, distances


def test_it_finds_the_shortest_perturbation_within_the_ball(linear):
    model, x, labels, distances = linear
    attack = DDN(eps=0.3, num_steps=100, init_norm=0.3)
    x_adv = attack(lambda z: cross_entropy(model(z), labels, reduction="none"), x)
    length = (x_adv - x).flatten(1).norm(dim=1)
    broken = model(x_adv).argmax(dim=1) != labels
    assert broken.tolist() == [True, True, True, False]  # 0.4 is out of the ball
    assert (length[:3] >= distances[:3] - 1e-9).all()
    assert (length[:3] <= 1.1 * distances[:3]).all()
    assert length[3] == pytest.approx(0.3, rel=1e-6)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_impossible_settings_are_refused_by_name():
    for settings in ({"eps": 0}, {"num_steps": 0}, {"gamma": 1}, {"init_norm": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DDN(**{"eps": 0.1} | settings)
    assert DDN(eps="64/255").norm == "l2"
