"""What LAMB says of parameters that DeepSpeed has replaced by flat ones."""

import pytest
import torch
from torch import nn

from robust_accel.optim import LAMB


def test_each_stage_of_zero_is_told_what_it_can_do() -> None:
    optimizer = LAMB([nn.Parameter(torch.ones(4, 5))], lr=0.1)
    flat = nn.Parameter(torch.ones(20))
    flat.grad = torch.ones(20)
    optimizer.param_groups[0]["params"] = [flat]
    advice = r"under ZeRO 1 and 2 call robust_accel\.compress_gradients.*ZeRO 3.*use FSDP2"
    with pytest.raises(RuntimeError, match=advice):
        optimizer.step()
