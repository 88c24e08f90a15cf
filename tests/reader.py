"""What a reader of the documentation has already: names that its code blocks use.

A page imports them in a comment that is not rendered::

    <!-- invisible-code-block: python
    from reader import accelerator, mean, std, timm
    -->
"""

from typing import Any

import timm as _timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

__all__ = [
    "accelerator",
    "batches",
    "cross_entropy",
    "dictionaries",
    "labels",
    "mean",
    "model",
    "std",
    "timm",
    "x",
    "x_images",
    "x_labels",
]

accelerator = Accelerator(cpu=True)
mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
"""As a script has them."""
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
x = torch.rand(8, 1, 8, 8)
labels = model(x).argmin(dim=1)  # none is right: attacks end at once
x_images, x_labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])


class timm:  # there is no hub, and little time
    @staticmethod
    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        assert _timm.is_model(name)
        return _timm.create_model("test_resnet", **options)


def batches(size: int = 32) -> DataLoader:
    """Two images, once: (x [2, 3, size, size] in [0, 1], labels [2])."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(zip(images, torch.tensor([0, 1]), strict=True)), batch_size=2)


def dictionaries(size: int = 32) -> DataLoader:
    """The same as {"image", "label"}."""
    rows = [{"image": x, "label": label} for x, label in batches(size).dataset]
    return DataLoader(rows, batch_size=2)
