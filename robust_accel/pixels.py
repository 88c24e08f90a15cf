"""Images as a script feeds them, checked and brought to [0, 1], and back."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ROUNDING = 1 / 255  # normalising in bf16 and back is off by up to 2^-8
_OVERSHOOT = 0.1  # of bicubic resizing; what lies further out is of another range
_STRAYS = 0.1  # share of pixels that may (patches of noise: RandomErasing)


def per_channel(value: float | Sequence[float] | Tensor, name: str) -> Tensor:
    """One number, or one a channel, as a tensor [1, 1 or C, 1, 1]."""
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if tensor.ndim > 1:
        raise ValueError(f"{name} must be one number or one a channel, got {value}")
    return tensor.reshape(1, -1, 1, 1)


def pixel_statistics(
    mean: Any, std: Any, names: tuple[str, str] = ("mean", "std")
) -> tuple[Tensor, Tensor]:
    """By which pixels in [0, 1] are normalised, [1, 1 or C, 1, 1] each; 0 and 1 if not given.

    Raises:
        ValueError: Only one is given, or they are no such numbers.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"{names[0]} and {names[1]} go together, got {mean} and {std}")
    if mean is None:
        return per_channel(0.0, names[0]), per_channel(1.0, names[1])
    means, stds = per_channel(mean, names[0]), per_channel(std, names[1])
    if not bool((stds > 0).all()):
        raise ValueError(f"{names[1]} must be > 0 in each channel, got {std}")
    if not bool(means.isfinite().all() and stds.isfinite().all()):
        raise ValueError(f"{names[0]} and {names[1]} must be finite, got {mean} and {std}")
    if len({1, means.numel(), stds.numel()}) > 2:
        raise ValueError(
            f"{names[0]} and {names[1]} are of different numbers of channels: {mean}, {std}"
        )
    if bool((means > 1).any() or (stds > 1).any()):
        raise ValueError(
            f"{names[0]} and {names[1]} are those of pixels in [0, 1], got {mean} and {std}: "
            "divide by 255 what is of 0 to 255"
        )
    return means, stds


class InputSpace:
    """How a script's images are related to pixels in [0, 1].

    Args:
        mean, std: By which it has normalised them, one number or one a channel; both or neither.
        names: Of both, for messages.

    Raises:
        ValueError: See ``pixel_statistics``.
    """

    def __init__(
        self, mean: Any = None, std: Any = None, names: tuple[str, str] = ("mean", "std")
    ) -> None:
        self.normalized = mean is not None
        self.mean, self.std = pixel_statistics(mean, std, names)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._warned = False
        # images are seen to be normalised, where dark pixels are then below 0
        self._seen = not bool((self.mean > 0).any())

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std there, [1, 1 or C, 1, 1]; replicas on several devices share this object."""
        if device not in self._on:
            self._on[device] = (self.mean.to(device), self.std.to(device))
        return self._on[device]

    def script_images(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels in [0, 1] -> images as the script had them."""
        mean, std = self.statistics(x.device)
        return ((x - mean) / std).to(dtype)

    @torch.compiler.disable
    def pixels(self, x: Any, channels: int = 1) -> Tensor:
        """Images as the script has them -> [B, C, H, W] in [0, 1], fp32.

        A few pixels outside are clipped, which is said once: bicubic resizing overshoots, and
        augmentation may paint patches of noise. More of them are another range than was said.

        Args:
            channels: C, where the classifier's mean and std tell it; 1 if they do not.

        Raises:
            ValueError: They are no such images, or not in the range that was declared.
        """
        if isinstance(x, Mapping):
            raise ValueError(
                f"pixel_values must be a tensor, got a {type(x).__name__} with "
                f"{', '.join(map(str, x))}: pass its images, like model(**batch) or "
                "model(batch['pixel_values'])"
            )
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                "pixel_values must be a floating point tensor [B, C, H, W] in [0, 1] "
                f"(divide uint8 images by 255), got {found}"
            )
        channels = max(channels, self.mean.numel(), self.std.numel())
        height_first = x.shape[1] > 4 >= x.shape[3]  # no image is so narrow
        if height_first or (channels > 1 and x.shape[1] not in (1, channels)):
            wanted = f" with C = {channels} as mean and std have" if channels > 1 else ""
            raise ValueError(
                f"pixel_values must be [B, C, H, W]{wanted}, got {list(x.shape)}"
                + (": pass x.permute(0, 3, 1, 2)" if height_first else "")
            )
        # the ball is measured in fp32: bf16 is spaced 1/256 near white
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.normalized:
            self._check_normalized(x.detach())
            mean, std = self.statistics(x.device)
            x = x * std + mean
        low, high = (value.item() for value in x.detach().aminmax())
        # written so that NaN fails too
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            self._judge(x.detach(), low, high)
        return x.clamp(0, 1)

    def _check_normalized(self, x: Tensor) -> None:
        """Refuse a first batch that lies in [0, 1] as it is: eps would be that of a smaller box."""
        if self._seen:
            return
        low, high = (value.item() for value in x.aminmax())
        if 0 <= low <= high <= 1:
            raise ValueError(
                f"pixel_values lie in [{low:.3g}, {high:.3g}], and normalised by the mean and std "
                "given dark pixels would be below 0: images in [0, 1] need neither"
            )
        self._seen = True

    def _judge(self, x: Tensor, low: float, high: float) -> None:
        """Some pixels lie outside: forgive a few, refuse many."""
        far = ((x < -_OVERSHOOT) | (x > 1 + _OVERSHOOT)).float().mean().item()
        near = ((x < -_ROUNDING) | (x > 1 + _ROUNDING)).float().mean().item()
        if bool(torch.isfinite(x).all()) and far <= _STRAYS and near <= 0.5:
            if not self._warned:
                logger.warning(
                    "%.2g%% of the pixels lie outside [0, 1] (in [%.3g, %.3g]) and are clipped: "
                    "bicubic resizing and random erasing do this; otherwise the images are not "
                    "what was said",
                    100 * near,
                    low,
                    high,
                )
            self._warned = True
            return
        raise ValueError(
            f"pixel_values must lie in [0, 1], got [{low:.3g}, {high:.3g}], "
            f"{100 * near:.3g}% of them outside"
            + (
                " after undoing the normalisation: other images than the mean and std given"
                if self.normalized
                else ": pass images before normalisation, or say by which mean and std that was "
                "done (RobustModel: input_space='normalized'; make_robust: mean, std; wrap: "
                "--mean, --std)"
            )
        )
