"""Notices training that no attack has seen: past the model's forward, or in eval mode."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from robust_accel.min_max import MinMax

logger = logging.getLogger(__name__)


class NotAttacked(RuntimeError):
    """A model that should attack its images is trained on images that were not attacked."""


class _Training(Protocol):
    min_max: MinMax

    @property
    def inside(self) -> bool: ...


class Witness:
    """A forward hook of the first layer that is trained, below the model itself.

    A script may call parts of a model (``forward_features``), or train it in eval mode: then
    nothing is attacked, and nothing else would tell. The layer sees each of these calls; if a
    backward pass through one of them reaches its weights, that was training.

    - In training mode, with no batch attacked so far: the backward raises.
    - Else, and in eval mode: a warning, once, and ``accusation`` for whoever looks on.

    Also, once: a warning where nothing but the last layer is trained. It does not see what a
    compiled or scripted copy computes, layers that are trained while this one is frozen, nor
    ``torch.autograd.grad``.
    """

    def __init__(self, training: _Training, name: str, whole: bool) -> None:
        self._training, self._name = training, name
        self._whole = whole  # the layer is the model itself, whose calls in training are attacked
        self._warned = False
        self._handle: Any = None
        self._accused: tuple[int, str] | None = None  # after so many attacked calls

    @property
    def accusation(self) -> str | None:
        """What was found, unless batches were attacked since."""
        if self._accused is None or self._accused[0] != self._training.min_max.calls:
            return None
        return self._accused[1]

    @classmethod
    def place(cls, model: nn.Module, training: _Training) -> None:
        layers = [m for m in model.modules() if [*m.parameters(recurse=False)]]
        trained = [m for m in layers if any(map(_trained, m.parameters(recurse=False)))]
        below = [layer for layer in trained or layers if layer is not model]
        for layer in (below or layers)[:1]:
            witness = cls(training, type(model).__name__, whole=layer is model)
            layer.register_forward_hook(witness)
        if trained and trained == layers[-1:] != layers:
            logger.warning(
                "%s: only its last layer (%s) is trained: what lies below stays as easy to attack "
                "as it was, and little is gained",
                type(model).__name__,
                type(trained[0]).__name__,
            )

    @classmethod
    def of(cls, model: nn.Module) -> "Iterator[Witness]":
        """Those of a model, one at most."""
        for module in model.modules():
            yield from (h for h in module._forward_hooks.values() if isinstance(h, cls))

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, cls):
                    del module._forward_hooks[key]

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self._training.inside:
            return
        if self._whole and layer.training:
            return
        if torch._C._current_graph_task_id() != -1:  # recomputed for a backward: seen before
            return
        weight = next(filter(_trained, layer.parameters(recurse=False)), None)
        if weight is not None and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._passed, weight, layer.training))

    def _passed(self, weight: Tensor, training_mode: bool, grad: Tensor) -> None:
        """A backward comes through an output that was not attacked: does it reach the weight?"""
        if weight.is_leaf:
            self._let_go()  # of a backward that has raised
            self._handle = weight.register_post_accumulate_grad_hook(
                lambda _: self._accuse(training_mode)
            )
            Variable._execution_engine.queue_callback(self._let_go)

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _accuse(self, training_mode: bool) -> None:
        calls = self._training.min_max.calls
        if training_mode:
            text = (
                f"{self._name} is trained past its forward, which attacks: a part of it was called "
                f"by itself, and nothing of that was attacked ({calls} batches were, so far): call "
                "the whole model, or make_robust what the loop calls"
            )
        else:
            text = (
                f"{self._name} is trained in eval mode, in which it attacks nothing: call "
                "model.train() before training (single layers may stay in eval mode)"
            )
        if training_mode and calls == 0:
            raise NotAttacked(text)
        self._accused = (calls, text)
        if not self._warned:
            logger.warning("%s", text)
        self._warned = True


def _trained(parameter: Tensor) -> bool:
    return parameter.requires_grad
