"""What a training step takes of one worker, measured on a few images: seconds, work, memory."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robust_accel.attacks import remembers
from robust_accel.models import create_classifier
from robust_accel.optim import create_optimizer
from robust_accel.recipe import Recipe
from robust_accel.robust_model import RobustModel

_FEW = 2  # images that memory and work are counted on
_SECONDS = 1.0  # beyond which a step is long enough to be timed
_REPEATS = 3
_aten, _ATTENTION = torch.ops.aten, "_scaled_dot_product_flash_attention"
# attention on CPUs is not in torch's registry
_FORMULAS = flop_registry | {
    getattr(_aten, f"{_ATTENTION}_for_cpu{way}"): flop_registry[getattr(_aten, _ATTENTION + way)]
    for way in ("", "_backward")
}


@dataclass(frozen=True)
class Cost:
    """Of one worker.

    Attributes:
        shapes: Of the trained parameters.
        all_shapes: Of these and of the frozen ones.
        weights, gradients, state, average: Bytes of all parameters and buffers, of the gradients,
            of the optimizer's state, of averaged weights.
        kept: Bytes that an image keeps for the backward, at the worst moment of attack and step.
        flops: Of an image in a step, its attack included.
        convolutions: Of these, what convolutions take.
        forward, backward: Seconds an image: attack and outer loss; and the outer loss's backward.
        update: Seconds of the optimizer's step.
        images: That the seconds were measured on, at a time.
        fixed: Bytes that are kept for any number of images: weights as autocast casts them.
        gathers: Passes of a step, each forward and each backward one, that need the weights.
        has_batch_norm: Which FSDP2 cannot compute in half precision.
    """

    shapes: tuple[tuple[int, ...], ...]
    all_shapes: tuple[tuple[int, ...], ...]
    weights: int
    gradients: int
    state: int
    average: int
    kept: float
    flops: float
    convolutions: float
    forward: float
    backward: float
    update: float
    images: int
    fixed: float = 0.0
    gathers: int = 2
    has_batch_norm: bool = False

    @property
    def parameters(self) -> int:
        """How many, the frozen ones included."""
        return sum(map(math.prod, self.all_shapes))


def measure(
    recipe: Recipe,
    shape: Sequence[int],
    num_classes: int,
    most: int,
    device: torch.device,
    precision: str = "no",
) -> Cost:
    """Make the recipe's model and take a few training steps on noise.

    Args:
        shape: Of an image: [C, H, W].
        most: Images that a worker has at a time.
        precision: Accelerate's ``mixed_precision``.

    Raises:
        ValueError: The model does not take such images, or the attack or objective needs what only
            a training has.
    """
    assert recipe.train is not None and recipe.optimizer is not None and recipe.attack is not None
    for section, part in (("attack", recipe.attack), ("objective", recipe.objective)):
        if kept := remembers(part):
            raise ValueError(f"{section}: it keeps {kept} from step to step: plan for one without")
    settings = recipe.train
    channels = shape[0]
    classifier = recipe.checked(
        "model",
        lambda: create_classifier(recipe.model, num_classes=num_classes, in_chans=channels),
    ).to(device)
    if settings.channels_last:
        classifier.to(memory_format=torch.channels_last)
    model = RobustModel(
        classifier,
        recipe.attack,
        recipe.objective,
        attack_mode=settings.attack_mode,
        weight_perturbation=settings.awp,
    ).train()
    optimizer = create_optimizer(classifier.model, recipe.optimizer)
    step = _Step(model, optimizer, shape, num_classes, precision, device)
    with _saved(model) as saved, _Operations() as operations, _passes(classifier) as passes:
        step(_FEW)
    with _saved(model) as saved_of_more:
        step(2 * _FEW)
    an_image = (saved_of_more.most - saved.most) / _FEW
    images = min(most, _FEW)
    while sum(step(images)) < _SECONDS and images < most:  # few at a time are slower
        images = min(most, 2 * images)
    timed = [step(images) for _ in range(_REPEATS)]
    forward, backward, update = (median(column) for column in zip(*timed, strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    tensors = [*model.parameters(), *model.buffers()]
    is_averaged = settings.ema_decay is not None or settings.swa_start is not None
    state = (t for values in optimizer.state.values() for t in values.values())
    return Cost(
        shapes=tuple(tuple(p.shape) for p in trained),
        all_shapes=tuple(tuple(p.shape) for p in model.parameters()),
        weights=_bytes(tensors),
        gradients=_bytes(trained),
        state=_bytes(t for t in state if isinstance(t, Tensor)),
        average=_bytes(tensors) if is_averaged else 0,
        kept=an_image,
        flops=operations.flops / _FEW,
        convolutions=operations.convolutions / _FEW,
        forward=forward / images,
        backward=backward / images,
        update=update,
        images=images,
        fixed=max(0.0, saved.most - an_image * _FEW),
        gathers=len(passes),
        has_batch_norm=any(isinstance(m, _BatchNorm) for m in classifier.modules()),
    )


class _Step:
    """A training step on noise; gives the seconds of forward, backward and update."""

    def __init__(
        self,
        model: RobustModel,
        optimizer: torch.optim.Optimizer,
        shape: Sequence[int],
        num_classes: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.shape = model, optimizer, shape
        self.num_classes, self.device = num_classes, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def __call__(self, number: int) -> tuple[float, float, float]:
        x = torch.rand(number, *self.shape, device=self.device)
        labels = torch.randint(self.num_classes, (number,), device=self.device)
        marks = [self._now()]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.model(x, labels)["loss"]
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        forward, backward, update = (b - a for a, b in itertools.pairwise(marks))
        return forward, backward, update

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Operations(TorchDispatchMode):
    """Counts by torch's formulas; its own counter cannot see an attack's gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.convolutions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            own = formula(*args, **(kwargs or {}), out_val=out)
            self.flops += own
            self.convolutions += own * ("conv" in func._overloadpacket.__name__)
        return out


@dataclass
class _Saved:
    """Bytes that autograd keeps at a time, each storage once; the parameters' own are not."""

    own: set[int]
    holders: dict[int, int] = field(default_factory=dict)
    now: int = 0
    most: int = 0

    def hold(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        return _Held(self, tensor, storage.data_ptr(), storage.nbytes())


class _Held:
    def __init__(self, saved: _Saved, tensor: Tensor, place: int, size: int) -> None:
        self.saved, self.tensor, self.place, self.size = saved, tensor, place, size
        if place in saved.own:
            return
        holders = saved.holders.get(place, 0)
        saved.holders[place] = holders + 1
        saved.now += size * (not holders)
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        saved = self.saved
        if self.place in saved.own:
            return
        saved.holders[self.place] -= 1
        if not saved.holders[self.place]:
            del saved.holders[self.place]
            saved.now -= self.size


@contextmanager
def _saved(model: nn.Module) -> Iterator[_Saved]:
    saved = _Saved({p.untyped_storage().data_ptr() for p in model.parameters()})
    with saved_tensors_hooks(saved.hold, lambda held: held.tensor):
        yield saved


@contextmanager
def _passes(module: nn.Module) -> Iterator[list[str]]:
    """Each forward, and each backward that is to come."""
    found: list[str] = []

    def count(_: nn.Module, __: object, out: Tensor) -> None:
        found.extend(["forward", "backward"] if out.requires_grad else ["forward"])

    handle = module.register_forward_hook(count)
    yield found
    handle.remove()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
