"""Images and labels as a user has them, checked and brought to one form."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_images(x: Any) -> Tensor:
    """Images [N, C, H, W] in [0, 1], a tensor, an array or a list, as a contiguous fp32 tensor.

    Raises:
        ValueError: They are anything else; with what to do about it.
    """
    x = _tensor(x, "x")
    if x.ndim != 4 or 0 in x.shape:
        hint = ": x[None] makes a batch of one image" if x.ndim == 3 else ""
        raise ValueError(f"x must be images [N, C, H, W], got {_kind(x)}{hint}")
    if x.shape[1] > 4 >= x.shape[3]:  # no image is so narrow
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}: pass x.permute(0, 3, 1, 2)")
    if not x.is_floating_point():
        raise ValueError(
            f"x must be floating point in [0, 1], got {_kind(x)}: divide by 255 if these are pixels"
        )
    low, high = (value.item() for value in x.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        hint = ": it holds NaN"
        if low < 0:
            hint = ": undo the normalisation, and give mean= and std= for a model that wants it"
        elif high > 1:
            hint = ": divide by 255 if these are pixels"
        raise ValueError(f"x must lie in [0, 1], got [{low:.3g}, {high:.3g}]{hint}")
    return x.float().contiguous()  # AutoAttack's attacks look at memory: permuted images fail there


def as_labels(labels: Any) -> Tensor:
    """Class indices [N] or [N, 1], or one-hot [N, K], as int64 [N] or [N, K] on the CPU.

    Raises:
        ValueError: They are anything else, probabilities among them.
    """
    labels = _tensor(labels, "labels").cpu()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or 0 in labels.shape or labels.is_complex():
        raise ValueError(f"labels must be [N] class indices or one-hot [N, K], got {_kind(labels)}")
    whole = labels.long()
    wrong = whole != labels  # NaN too
    if labels.ndim == 1 and bool(wrong.any()):
        raise ValueError(f"labels must be class indices, got {labels[wrong][0].item()}")
    if labels.ndim == 2 and not bool((_one_hot(whole) & ~wrong.any(dim=1)).all()):
        raise ValueError(
            f"labels must be [N] class indices or one-hot [N, K], got {_kind(labels)} of other "
            "numbers: labels.argmax(1), if these are probabilities"
        )
    return whole


def _one_hot(rows: Tensor) -> Tensor:
    """Which rows [N, K] of integers are a single 1 among zeros."""
    return (rows.amin(dim=1) == 0) & (rows.amax(dim=1) == 1) & (rows.sum(dim=1) == 1)


def _tensor(value: Any, name: str) -> Tensor:
    """A tensor of a tensor, an array, or a list of either or of numbers."""
    try:
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        if not isinstance(value, Tensor):
            # torch takes no negative strides, which flipped arrays have
            value = torch.from_numpy(np.ascontiguousarray(np.asarray(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor, an array or a list of numbers of one shape, got "
            f"{type(value).__name__}: {error}"
        ) from error
    return value.detach()


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
