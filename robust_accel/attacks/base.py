"""The protocol that every attack follows, and the one place that differentiates in the input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
"""x: [B, C, H, W] in [0, 1] -> losses [B], the function that an attack climbs."""


class JudgedLoss(Protocol):
    """A ``LossFn`` that can tell, from the same forward pass, which images are predicted wrongly.

    ``robust_accel.objectives.cross_entropy_of(model, labels)`` is one.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [0, 1] -> losses [B]."""
        ...

    def judged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [B], and whether the prediction is wrong: [B], bool."""
        ...


class Attack(Protocol):
    """Maps images to adversarial images; knows neither the model nor the labels.

    What it promises is checked on the first batch of a training: with an attribute ``eps`` (and
    ``norm``, L-inf if it has none), no image is moved further, or than ``reach`` if it has that,
    and some are moved, unless ``may_stay`` is true. Two more attributes speak of its settings:
    ``fault``, ``key: ...``, is an error in a recipe and a warning in a script, ``doubt`` a warning.

    One that keeps something of each image says what in ``remembers``, and has ``remembering`` to
    make room for it (see ``FGSMPGI``). One with a method ``regularized(classifier, out)`` adds to
    what the objective has returned.
    """

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv: shape, dtype and device of x, in [0, 1], detached.

        Some attacks (DDN) refuse a ``loss_fn`` that is no ``JudgedLoss``.
        """
        ...


def remembers(part: object) -> str:
    """What an attack or an objective keeps between steps; empty if nothing."""
    return str(getattr(part, "remembers", ""))


class Seen:
    """What the gradients were that attacks have taken in a block of ``gradients_seen``.

    Attributes:
        calls: How many gradients of a batch were taken.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._nonzero: Tensor | None = None
        self._non_finite: dict[int, Tensor] = {}  # by the number of images of a call

    @property
    def any_nonzero(self) -> bool:
        """Whether any of them was anywhere neither zero nor NaN."""
        return self._nonzero is not None and bool(self._nonzero)

    def non_finite(self, images: int) -> Tensor:
        """Whose loss or gradient was NaN or infinite in any call: [images], bool, on the CPU.

        Args:
            images: Of the batch that was attacked. Which of them a call on fewer or more was about
                cannot be told: if it has met such a value, all are marked.
        """
        found = torch.zeros(images, dtype=torch.bool)
        for number, flags in self._non_finite.items():
            found |= flags.cpu() if number == images else flags.any().cpu()
        return found

    def _add(self, finite: Tensor, grad: Tensor) -> None:
        self.calls += 1
        nonzero, non_finite = (grad.abs() > 0).any(), ~finite  # NaN is not > 0
        self._nonzero = nonzero if self._nonzero is None else self._nonzero | nonzero
        before = self._non_finite.get(len(non_finite))
        self._non_finite[len(non_finite)] = non_finite if before is None else before | non_finite


_SCALE = 256.0  # of losses in fp16: keeps gradients down to 2e-10, and up to 256
_seen: ContextVar[Seen | None] = ContextVar("seen", default=None)


@contextmanager
def gradients_seen() -> Iterator[Seen]:
    """Collects what each gradient is that an attack takes in the block."""
    seen = Seen()
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def input_gradient(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Gradient of the summed loss in x, see ``loss_and_input_gradient``."""
    return loss_and_input_gradient(loss_fn, x)[1]


def loss_and_input_gradient(loss_fn: LossFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B], detached, and the gradient of their sum in x, [B, C, H, W].

    Summed, not averaged, and scaled under fp16 autocast: else it underflows to sign(0). So that no
    pixel keeps the others from moving, an entry that is NaN is 0 and an infinite one, which still
    tells a direction, as long as the image's longest other; ``gradients_seen`` tells of both. No
    parameter's gradient is touched.

    Raises:
        RuntimeError: Under ``torch.inference_mode``.
        ValueError: ``loss_fn`` does not return one number an image.
    """
    loss, _, grad = _differentiated(lambda z: (loss_fn(z), None), x)
    return loss, grad


def verdict_and_input_gradient(loss_fn: LossFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Whether predictions are wrong [B], bool, and the gradient as above, from one forward pass.

    Raises:
        ValueError: ``loss_fn`` is no ``JudgedLoss``.
    """
    judged: Callable[[Tensor], tuple[Tensor, Tensor]] | None = getattr(loss_fn, "judged", None)
    if judged is None:
        raise ValueError(
            "this attack must see which images are predicted wrongly, and a plain function of "
            "losses does not tell: pass robust_accel.objectives.cross_entropy_of(model, labels), "
            "or an object that also has judged(x) -> (losses [B], wrong [B])"
        )
    _, wrong, grad = _differentiated(judged, x)
    assert wrong is not None
    return wrong, grad


def judged_and_input_gradient(loss_fn: LossFn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], whether predictions are wrong [B], and the gradient, from one forward pass.

    Of a plain ``LossFn``, which cannot tell, no prediction is wrong.
    """
    judged = getattr(loss_fn, "judged", lambda z: (loss_fn(z), None))
    loss, wrong, grad = _differentiated(judged, x)
    return loss, torch.zeros_like(loss, dtype=torch.bool) if wrong is None else wrong, grad


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Of a loss in x; scaled within, where in fp16 that of an image that is learnt underflows."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.half:
        return torch.autograd.grad(_SCALE * loss, x)[0] / _SCALE
    return torch.autograd.grad(loss, x)[0]


def _differentiated(
    judged: Callable[[Tensor], tuple[Tensor, Tensor | None]], x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses [B], what came with them, and the gradient of the losses' sum in x."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an attack needs gradients, which torch.inference_mode() rules out: use "
            "torch.no_grad() around it instead"
        )
    with torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        loss, wrong = judged(x)
        loss = loss.float()
        if loss.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss an image, [{len(x)}], got {list(loss.shape)}: an "
                "attack climbs x -> cross_entropy(model(x), labels, reduction='none'), not a model"
            )
        grad = _gradient(loss.sum(), x)
    loss, seen = loss.detach(), _seen.get()
    finite = grad.isfinite()
    if seen is not None:
        seen._add(finite.flatten(1).all(dim=1) & loss.isfinite(), grad)
    return loss, wrong, _as_numbers(grad, finite)


def _as_numbers(grad: Tensor, finite: Tensor) -> Tensor:
    """NaN as 0, and infinite entries as long as the image's longest other; 1 if there is none."""
    most = torch.where(finite, grad, 0).flatten(1).abs().amax(dim=1).view(-1, 1, 1, 1)
    most = torch.where(most > 0, most, 1)
    return grad.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).clamp(-most, most)
