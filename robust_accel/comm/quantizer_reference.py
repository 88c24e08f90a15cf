"""The paper's quantiser of one vector, not packed: ``quantizer.py`` is tested against this."""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Q(g): 32 bits for the norm, a sign and one of s + 1 levels an element."""

    norm: Tensor  # a scalar
    sign: Tensor  # [d], -1, 0 or 1
    level: Tensor  # [d], integers in [0, s]: s xi of (A6)


def quantize(g: Tensor, s: int, draws: Tensor, norm: Tensor | None = None) -> Quantized:
    """Equations (A5) and (A6) of DAT.

    Args:
        g: [d].
        s: Levels; the paper's is 2^bits.
        draws: [d], uniform in [0, 1).
        norm: Of g; the paper's L2 norm when not given.
    """
    norm = g.norm() if norm is None else norm
    position = s * g.abs() / torch.where(norm > 0, norm, 1)  # [d], in [0, s]
    low = position.floor()
    level = low + (draws < position - low)  # one up, as likely as the position is far from l
    return Quantized(norm, g.sign(), level)


def dequantize(q: Quantized, s: int) -> Tensor:
    """[d], whose mean over the draws is g."""
    return q.norm * q.sign * q.level / s
