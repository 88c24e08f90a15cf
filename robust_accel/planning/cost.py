"""What a training step takes of one worker, measured on a few images: seconds, work, memory."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
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

from robust_accel.attacks import Attack, remembers
from robust_accel.models import create_classifier
from robust_accel.objectives import Objective
from robust_accel.optim import create_optimizer
from robust_accel.planning.pieces import Shapes, Unit, layers_of
from robust_accel.recipe import Recipe
from robust_accel.robust_model import RobustModel

logger = logging.getLogger(__name__)

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
        units: Parameters: of each layer that FSDP2 would gather by itself, and last of the rest.
        layer: Those layers' class; empty where the network has none.
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
        rounds: Of them, forwards that come first or after a backward, which has dropped all.
        losses: Of them, the backwards of the outer loss.
        has_batch_norm: Which FSDP2 cannot compute in half precision.
    """

    units: tuple[Unit, ...]
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
    layer: str = ""
    gathers: int = 2
    rounds: int = 1
    losses: int = 1
    has_batch_norm: bool = False

    @property
    def parameters(self) -> int:
        """How many, the frozen ones included."""
        return sum(unit.size for unit in self.units)

    @property
    def shapes(self) -> Shapes:
        """Of the trained ones."""
        return tuple(shape for unit in self.units for shape in unit.trained)


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
        ValueError: The model does not take such images.
    """
    assert recipe.train is not None and recipe.optimizer is not None and recipe.attack is not None
    settings = recipe.train
    channels = shape[0]
    classifier = recipe.checked(
        "model",
        lambda: create_classifier(recipe.model, num_classes=num_classes, in_chans=channels),
    ).to(device)
    if settings.channels_last:
        classifier.to(memory_format=torch.channels_last)
    attack_on, objective = _with_memory(recipe, shape, num_classes, max(most, 2 * _FEW), device)
    model = RobustModel(
        classifier,
        attack_on(0),
        objective,
        attack_mode=settings.attack_mode,
        weight_perturbation=settings.awp,
    ).train()
    optimizer = create_optimizer(classifier.model, recipe.optimizer)
    step = _Step(model, attack_on, optimizer, shape, num_classes, precision, device)
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
    layer, units = layers_of(classifier.model)
    tensors = [*model.parameters(), *model.buffers()]
    is_averaged = settings.ema_decay is not None or settings.swa_start is not None
    state = (t for values in optimizer.state.values() for t in values.values())
    return Cost(
        units=units,
        layer=layer,
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
        rounds=_rounds(passes),
        losses=_losses(passes),
        has_batch_norm=any(isinstance(m, _BatchNorm) for m in classifier.modules()),
    )


def _with_memory(
    recipe: Recipe, shape: Sequence[int], num_classes: int, most: int, device: torch.device
) -> tuple[Callable[[int], Attack], Objective]:
    """The attack on so many images, and the objective, with what they keep from step to step."""
    attack: Any = recipe.attack
    objective: Any = recipe.objective
    if remembers(objective):
        number = int(recipe.model.options.get("num_classes") or num_classes)
        objective = objective.remembering(number, device)
        objective.begin(0, lambda tensor: tensor)
    if not (kept := remembers(attack)):
        return lambda _: attack, objective
    memory = attack.remembering(torch.arange(most), tuple(shape), device)
    memory.begin(0, lambda *_: torch.Generator())
    size = _bytes(memory.state().values()) // most
    logger.warning(
        "attack: it keeps %s: %s bytes an image of a worker's share of the training set, which are "
        "not counted",
        kept,
        f"{size:,}",
    )
    return lambda number: memory.visit(attack, torch.arange(number)), objective


class _Step:
    """A training step on noise; gives the seconds of forward, backward and update."""

    def __init__(
        self,
        model: RobustModel,
        attack_on: Callable[[int], Attack],
        optimizer: torch.optim.Optimizer,
        shape: Sequence[int],
        num_classes: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.model, self.attack_on = model, attack_on
        self.optimizer, self.shape = optimizer, shape
        self.num_classes, self.device = num_classes, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def __call__(self, number: int) -> tuple[float, float, float]:
        x = torch.rand(number, *self.shape, device=self.device)
        labels = torch.randint(self.num_classes, (number,), device=self.device)
        self.model.min_max.attack = self.attack_on(number)
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
    """Its forwards and backwards, as they come."""
    found: list[str] = []

    def count(_: nn.Module, __: object, out: Tensor) -> None:
        found.append("forward")
        if out.requires_grad:
            out.register_hook(lambda _: found.append("backward"))

    handle = module.register_forward_hook(count)
    yield found
    handle.remove()


def _rounds(passes: Sequence[str]) -> int:
    """Forwards that come first, or after a backward."""
    pairs = itertools.pairwise(["backward", *passes])
    return sum(pair == ("backward", "forward") for pair in pairs)


def _losses(passes: Sequence[str]) -> int:
    """Backwards that come last."""
    return len([*itertools.takewhile("backward".__eq__, reversed(passes))])


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
