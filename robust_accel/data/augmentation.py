"""Augmentation by torchvision's transforms, of an image or of a step's images, drawn by a key.

The key is (seed, epoch, image) or (seed, epoch, step), never a process's own state: the same on any
number of processes, and after an interruption.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from robust_accel.data.settings import DataSettings, MixSettings

_POLICIES = {
    "rand": v2.RandAugment,
    "trivial": v2.TrivialAugmentWide,
    "auto_cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "auto_imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "auto_svhn": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
}


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's and torch's CPU generators by the key, and put their states back."""
    state, own = random.getstate(), torch.default_generator.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    # not torch.manual_seed, which seeds the GPUs' generators, too: attacks draw from these
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        torch.default_generator.set_state(own)


def policy_transform(settings: DataSettings) -> v2.Transform | None:
    """``data.policy`` on an image, uint8 [C, H, W]; None if it is not set."""
    return None if settings.policy is None else _POLICIES[settings.policy]()


def image_transform(settings: DataSettings) -> v2.Transform | None:
    """``data.policy`` and ``data.cutout`` on an image from a file; None if neither is set."""
    policy, side, size = policy_transform(settings), settings.cutout, settings.image_size
    steps = [] if policy is None else [policy]
    if side is not None:
        assert size is not None
        share = side**2 / size**2
        steps.append(v2.RandomErasing(p=1, scale=(share, share), ratio=(1, 1)))
    return v2.Compose(steps) if steps else None


def check_cutout(side: int | None, height: int, width: int) -> None:
    """Refuse a square that does not fit into images.

    Raises:
        ValueError: ``cutout: ...``.
    """
    if side is not None and side >= min(height, width):
        raise ValueError(
            f"cutout: a square of {side} x {side} is not smaller than the images of {height} x "
            f"{width}"
        )


class Mixing:
    """Mixes each image of a step with the one before it, by one draw a step, and labels likewise.

    Args:
        settings: Which mixing, how often and how strong.
        num_classes: K.
        seed: Of the draws.

    Source: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899, whose label follows the area that is
    in the image. Both are torchvision's.
    """

    def __init__(self, settings: MixSettings, num_classes: int, seed: int) -> None:
        self.settings, self.num_classes, self.seed = settings, num_classes, seed
        self._cutmix = v2.CutMix(alpha=settings.cutmix or 1.0, num_classes=num_classes)
        self._mixup = v2.MixUp(alpha=settings.mixup or 1.0, num_classes=num_classes)

    def __call__(self, x: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Mix a part of a step.

        Args:
            x: [1 + B, C, H, W] in [0, 1]; the first is the one before the part's own.
            labels: [1 + B], classes.
            key: What the step's draw follows from, beside the seed.

        Returns:
            Images [B, C, H, W] and labels [B, K], probabilities.
        """
        with seeded(self.seed, *key):
            if torch.rand(()) < self.settings.prob:
                cut = torch.rand(()) < self.settings.share_of_cutmix
                x, labels = (self._cutmix if cut else self._mixup)(x, labels)
            else:
                labels = one_hot(labels, self.num_classes).float()
        return x[1:].clamp(0, 1), labels[1:]  # a mean of two whites may round beyond one
