"""A small network, images for it, attacks that tell what they did, and what a model held before."""

import pytest
import torch
from torch import Tensor, nn

from robust_accel import PGD

EPS = 8 / 255
PGD_3 = PGD(eps=EPS, step_size=EPS / 2, num_steps=3)
FROM_X = PGD_3.model_copy(update={"random_start": False})
MODES = pytest.mark.parametrize("mode", ["eval", "train"])
CLASSES = 4


class Spy:
    """An attack that remembers what it was given and what it answered."""

    def __init__(self, attack) -> None:
        self.attack = attack
        self.x, self.x_adv = None, None

    def __call__(self, loss_fn, x, *, generator=None):
        self.loss_fn, self.x = loss_fn, x
        self.x_adv = self.attack(loss_fn, x, generator=generator)
        return self.x_adv


class Broken:
    """An attack that fails after it has used the model."""

    def __call__(self, loss_fn, x, *, generator=None):
        loss_fn(x)
        raise RuntimeError("broken attack")


def network(frozen: bool = False) -> nn.Sequential:
    """Two BatchNorms whose statistics are not those of any batch, and dropout; in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            m.train(not frozen)
    return model


def batch(num_images: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(num_images, 3, size, size, generator=generator)
    return x, torch.arange(num_images) % CLASSES


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def flags(model: nn.Module) -> list:
    return [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
