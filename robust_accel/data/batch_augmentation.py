"""Augmentation of images in memory: batches on the device, each image by a draw of its own.

The key of a draw is (seed, epoch, image): the same on any number of processes, and after an
interruption.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2 import Transform

from robust_accel.data.augmentation import check_cutout, policy_transform, seeded
from robust_accel.data.orders import uniforms
from robust_accel.data.settings import DataSettings

PAD = 4
CROP_SCALE = 0.08  # of timm and torchvision, as is
_STRETCH = math.log(4 / 3)  # at most, of the log of a crop's width by its height
Shift = Literal["flip", "crop_flip"]
Augment = Literal["none", "flip", "crop_flip", "resized_crop_flip"]


@dataclass(frozen=True)
class BatchAugmentation:
    """What becomes of images that are trained on: crops, then a policy, then cutout.

    Attributes:
        augment, crop_scale, cutout: See ``DataSettings``; of a batch at once, on the device.
        policy: Of each image, on the CPU; then all of it is.
        seed: Of all draws.
        num_workers: Processes that make batches beside the training, for a policy.
    """

    augment: Augment = "none"
    seed: int = 0
    crop_scale: float = CROP_SCALE
    policy: Transform | None = None
    cutout: int | None = None
    num_workers: int = 0

    @classmethod
    def of(
        cls, settings: DataSettings, shape: tuple[int, int, int], seed: int
    ) -> "BatchAugmentation":
        """As the settings say of images in memory, C, H, W.

        Raises:
            ValueError: ``cutout: ...``: the square does not fit into the image.
        """
        check_cutout(settings.cutout, *shape[1:])
        augment: Augment = "none" if settings.augment == "timm" else settings.augment
        scale = CROP_SCALE if settings.crop_scale is None else settings.crop_scale
        policy = policy_transform(settings)
        workers = 0 if policy is None else settings.num_workers
        return cls(augment, seed, scale, policy, settings.cutout, workers)

    @property
    def shifts(self) -> bool:
        """Whether a batch needs ``shifts``, which each kind of set draws in its own way.

        Runs that go on keep the crops that they began with.
        """
        return self.augment in ("flip", "crop_flip")

    def __call__(
        self,
        x: Tensor,
        indices: Tensor,
        epoch: int,
        device: torch.device,
        shifts: Tensor | None = None,
    ) -> Tensor:
        """Augment a batch.

        Args:
            x: uint8 [B, C, H, W].
            indices: The images' numbers in their set, [B].
            device: Where it is wanted; by a policy the result is on the CPU all the same.
            shifts: Of ``flip`` and ``crop_flip``, see ``augmented``: [B, 3].
        """
        height, width = x.shape[2:]
        if self.policy is not None:
            device = torch.device("cpu")
        x = x.to(device).contiguous()
        if self.augment == "resized_crop_flip":
            drawn = uniforms(indices, 5, self.seed, epoch, 9)
            x = resized(x, crop_boxes(drawn, height, width, self.crop_scale))
        elif self.augment != "none":
            assert shifts is not None
            x = augmented(x, shifts.to(x.device), self.augment)
        if self.policy is not None:
            x = _each(x, self.policy, indices, self.seed, epoch)
        if self.cutout is not None:
            places = torch.tensor([height - self.cutout + 1, width - self.cutout + 1])
            corners = (uniforms(indices, 2, self.seed, epoch, 10) * places).long()
            x = cut_out(x, corners.to(device), self.cutout)
        return x


PLAIN = BatchAugmentation()


def augmented(x: Tensor, draws: Tensor, augment: Shift) -> Tensor:
    """Mirrored where that is drawn, and cropped to the old size after padding by 4 zeros.

    Args:
        x: [B, C, H, W].
        draws: Row, column and whether to mirror: [B, 3] of integers.
        augment: ``flip`` mirrors alone.
    """
    batch, channels, height, width = x.shape
    row, column, flip = draws[:, 0:1], draws[:, 1:2], draws[:, 2:3].bool()  # [B, 1]
    if augment == "flip":
        return torch.where(flip[:, :, None, None], x.flip(3), x)
    rows = row + torch.arange(height, device=x.device)  # [B, H]
    steps = torch.arange(width, device=x.device)
    columns = column + torch.where(flip, steps.flip(0), steps)  # [B, W]
    padded = pad(x, (PAD,) * 4)
    return padded[
        torch.arange(batch, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def crop_boxes(draws: Tensor, height: int, width: int, scale: float) -> Tensor:
    """Random crops of an image, as of torchvision's ``RandomResizedCrop``.

    A crop has a share of the area from ``scale`` to 1, and a width of 3/4 to 4/3 of its height:
    less or more where it would not fit otherwise.

    Args:
        draws: From [0, 1), [B, 5].

    Returns:
        Top, left, height, width, and whether to mirror: [B, 5] of int64.
    """
    size, stretch, top, left, flip = draws.unbind(dim=1)
    share, square = scale + (1 - scale) * size, math.log(width / height)
    fits = {"min": square + share.log(), "max": square - share.log()}
    least, most = (torch.full_like(share, end).clamp(**fits) for end in (-_STRETCH, _STRETCH))
    ratio = torch.exp(least + (most - least) * stretch)
    tall = (share * height * width / ratio).sqrt().round().clamp(1, height)
    wide = (share * height * width * ratio).sqrt().round().clamp(1, width)
    top, left = top * (height - tall + 1), left * (width - wide + 1)
    return torch.stack([top, left, tall, wide, 2 * flip], dim=1).long()


def resized(x: Tensor, boxes: Tensor) -> Tensor:
    """Crops, resized to the old size (bilinear), and mirrored where that is drawn.

    Args:
        x: uint8 [B, C, H, W].
        boxes: See ``crop_boxes``.
    """
    height, width = x.shape[2:]
    top, left, tall, wide, flip = boxes.to(x.device, torch.float32).unbind(dim=1)
    rows = _places(top, tall, height)[:, :, None].expand(-1, -1, width)
    columns = _places(left, wide, width)
    columns = torch.where(flip[:, None] > 0, columns.flip(1), columns)[:, None].expand_as(rows)
    grid = torch.stack([columns, rows], dim=3)  # [B, H, W, 2]
    found = grid_sample(x.float(), grid, mode="bilinear", align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where along a side of the image a crop's new pixels lie, from -1 to 1: [B, size].

    Args:
        start, length: Of the crop, in pixels: [B].
        size: Of the image.
    """
    pixels = torch.arange(size, device=start.device) + 0.5
    middles = pixels * length[:, None] / size
    inside = torch.minimum(middles.clamp(min=0.5), length[:, None] - 0.5)
    return 2 * (start[:, None] + inside) / size - 1


def cut_out(x: Tensor, corners: Tensor, side: int) -> Tensor:
    """A black square in each image.

    Args:
        x: [B, C, H, W].
        corners: The upper row and left column of the squares, [B, 2] of integers.
    """
    rows = torch.arange(x.shape[2], device=x.device) - corners[:, :1]  # [B, H]
    columns = torch.arange(x.shape[3], device=x.device) - corners[:, 1:]
    in_rows, in_columns = ((n >= 0) & (n < side) for n in (rows, columns))
    return x.masked_fill(in_rows[:, None, :, None] & in_columns[:, None, None, :], 0)


def _each(x: Tensor, policy: Transform, indices: Tensor, seed: int, epoch: int) -> Tensor:
    """Each image by its own draw: x [B, C, H, W], uint8, on the CPU."""
    found = []
    for image, index in zip(x, indices.tolist(), strict=True):
        with seeded(seed, epoch, index):
            found.append(policy(image))
    return torch.stack(found)
