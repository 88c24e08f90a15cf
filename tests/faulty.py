"""An objective that meets NaN and Inf, for recipes: ``objective.name=faulty:Faulty``."""

from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from robust_accel.objectives import Adversarial


class Faulty(Adversarial):
    """Adversarial training that meets NaN or Inf in some of its calls, a call a micro-batch.

    Args:
        at: The calls, from 1.
        rank: The process that does; all when not given.
        where: The loss and so its gradient; the ``value`` of the loss alone; the ``gradient``
            alone; a ``weight``, or a ``buffer`` of BatchNorm, which is then what it is. Nowhere,
            but the last bias is made ``huge``: finite, and all classes are alike; or the loss is
            ``steep``, so that the step is far too long whatever engine keeps the weights.
    """

    at: tuple[int, ...] = ()
    rank: int | None = None
    where: Literal["loss", "value", "gradient", "weight", "buffer", "huge", "steep"] = "loss"
    number: Literal["nan", "inf"] = "nan"
    _calls: int = PrivateAttr(default=0)

    def loss(self, classifier: Any, x: Tensor, x_adv: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = super().loss(classifier, x, x_adv, labels)
        self._calls += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self._calls not in self.at:
            return out
        for module in classifier.modules():
            if isinstance(module, FSDPModule):  # what is gathered is not what is kept; on all ranks
                module.reshard()
        if self.rank not in (None, rank):
            return out
        number = float(self.number)
        if self.where == "loss":
            return out | {"loss": out["loss"] * number}
        if self.where == "steep":
            return out | {"loss": out["loss"] * 1000}
        if self.where == "value":
            return out | {"loss": out["loss"] + number}
        if self.where == "gradient":
            out["logits"].register_hook(lambda gradient: gradient * number)
        elif self.where == "buffer":
            variances = (b for n, b in classifier.named_buffers() if "running_var" in n)
            next(variances).data.fill_(number)
        else:
            *_, bias = classifier.parameters()
            kept = bias.to_local() if isinstance(bias, DTensor) else bias
            kept.data.fill_(3e19 if self.where == "huge" else number)
        return out
