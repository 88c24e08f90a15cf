"""make_robust: a script's own model, changed in place, attacks its images while it trains."""

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import disable
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree

from robust_accel.attack_context import AttackMode
from robust_accel.attacks import Attack
from robust_accel.integrations.witness import Witness
from robust_accel.min_max import MinMax
from robust_accel.models import PixelClassifier, logits_of
from robust_accel.objectives import AWP, Objective
from robust_accel.pixels import InputSpace
from robust_accel.robust_model import ROBUST, refuse_robust_inside

_KEY = ROBUST
_WRAPPERS = ("torch.nn.parallel", "deepspeed.")  # modules of their classes
_MULTI = ("regression", "multi_label_classification")  # of transformers' problem_type
_LABELS = ("labels", "label", "targets", "target", "y")
# the models that are being attacked in this thread: DataParallel's replicas have one each
_inside: ContextVar[tuple[int, ...]] = ContextVar("inside", default=())


def make_robust(
    model: nn.Module,
    attack: Attack,
    objective: Objective | None = None,
    *,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    attack_mode: AttackMode = "eval",
    weight_perturbation: AWP | None = None,
) -> nn.Module:
    """Let a model attack its own images whenever it is called in training mode.

    It stays the same object, with the same parameters, keys and methods: optimizers, checkpoints,
    ``save_pretrained`` and a moving average need to know nothing of it. In eval mode it is the
    model as it was. In training mode

    - ``model(images)`` returns what the model returns, at the attacked images: the script goes on
      to its own loss. Labels being unknown, the attack leads away from the model's own predictions
      (no label leaks into it).
    - ``model(images, labels=labels)``, where the model's ``forward`` has a parameter named so (as
      transformers' have), returns the objective's ``loss`` and ``logits``, as attributes and keys
      (as a tuple where the call says ``return_dict=False``).

    No module is kept: what is called is what is attacked, so that copies, DataParallel's replicas,
    pickled and spawned models attack with their own weights. ``torch.save(model)`` of the whole
    object keeps that too, and loading it needs this package; a state dict and ``save_pretrained``
    are plain. A script that trains the model past its forward (``forward_features``, a submodule)
    or in eval mode is told so at the first backward, see ``Witness``.

    Args:
        model: Any module from images [B, C, H, W] to logits [B, K] or to an output or mapping with
            ``logits``, before ``accelerator.prepare``, DDP, FSDP2 or DeepSpeed gets it.
        attack, objective, attack_mode, weight_perturbation: See ``RobustModel``. Another objective
            than plain adversarial training needs a model that is given labels.
        mean, std: By which the script normalises its images, one number or one a channel, so that
            eps is in pixel units. Left out, the images are in [0, 1] when the model gets them.

    Returns:
        The same model.

    Raises:
        ValueError: It is robust already, classifies in no way known here, or mean and std are not
            both given; at the first batch: images are not as was said.
    """
    given, model = model, getattr(model, "_orig_mod", model)  # inside of torch.compile(model)
    name = type(model).__name__
    refuse_robust_inside(model)
    if "forward" in model.__dict__ or type(model).__module__.startswith(_WRAPPERS):
        raise ValueError(
            f"{name} is wrapped or prepared already: call make_robust on the model itself, before "
            "accelerator.prepare, DistributedDataParallel or DeepSpeed"
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in _MULTI:
        raise ValueError(f"{name} is no single-label classifier: {problem}")
    min_max = MinMax(
        attack, objective, attack_mode=attack_mode, weight_perturbation=weight_perturbation
    )
    training = RobustTraining(model, min_max, InputSpace(_numbers(mean), _numbers(std)))
    Witness.place(model, training)
    _attach(model, training)
    return given


def robust_training(model: nn.Module) -> "RobustTraining | None":
    """What ``make_robust`` has given to the model, inside of torch.compile too."""
    while "_orig_mod" in model.__dict__.get("_modules", {}):
        model = model._orig_mod  # type: ignore[assignment]
    return model.__dict__.get(_KEY)


class Output(dict[str, Any]):
    """``loss``, ``logits`` and the objective's parts, as keys, attributes and by their place."""

    def __getitem__(self, key: Any) -> Any:
        by_place = isinstance(key, int | slice)
        return tuple(self.values())[key] if by_place else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None


# DDP looks for tensors in what a forward returns by this: one that it does not find it ignores
_pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="robust_accel.Output",
)


class RobustTraining:
    """How calls of one model's forward are attacked; it holds no module.

    Attributes:
        min_max: Attack and objective, which may be replaced at any time, and what they did.
        image_name, label_name: Parameters of the forward; empty where it has none.
    """

    def __init__(self, model: nn.Module, min_max: MinMax, space: InputSpace) -> None:
        self.min_max, self.space = min_max, space
        # PEFT's models pass on whatever they get to the one inside
        base = getattr(model, "get_base_model", None)
        forward = (base() if callable(base) else model).forward
        parameters = inspect.signature(forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not names:
            raise ValueError(f"{type(model).__name__}.forward names no argument that takes images")
        self.image_name = "pixel_values" if "pixel_values" in names else names[0]
        self.label_name = next((name for name in _LABELS if name in names), "")

    @property
    def inside(self) -> bool:
        """Whether this thread is in an attacked forward."""
        return id(self) in _inside.get()

    @contextmanager
    def entered(self) -> Iterator[None]:
        token = _inside.set((*_inside.get(), id(self)))
        try:
            yield
        finally:
            _inside.reset(token)

    def split(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "_Call":
        """A call's images, labels and other arguments."""
        signature = inspect.signature(_plain_class(model).forward)
        bound = signature.bind(model, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        for key, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(key, {})
            elif parameter.kind is parameter.VAR_POSITIONAL:
                more = arguments.pop(key, ())
                if len(more) > 1 or (more and self.image_name in arguments):
                    raise ValueError(f"{type(model).__name__}: only images by position")
                arguments |= dict.fromkeys([self.image_name], more[0]) if more else {}
        images, labels = arguments.pop(self.image_name, None), arguments.pop(self.label_name, None)
        return _Call(images, labels, arguments)

    def classifier(
        self, model: nn.Module, device: torch.device, **arguments: Any
    ) -> PixelClassifier:
        """The model as it was, on pixels in [0, 1] there: what an attack looks at."""
        mean, std = (values.flatten() for values in self.space.statistics(device))
        return PixelClassifier(_Plain(model, self.image_name, arguments), mean=mean, std=std)

    def forward(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """An attacked call in training mode."""
        # of transformers' Trainer, which then wants the sum over the batch divided by this
        num_items = kwargs.pop("num_items_in_batch", None)
        call = self.split(model, args, kwargs)
        _check_labels(model, call.labels)
        others = {key: value for key, value in call.arguments.items() if key != "return_dict"}
        x = self.space.pixels(call.images)
        classifier = self.classifier(model, x.device, **others)
        if call.labels is None:
            x_adv = self.min_max.adversarial(classifier, x, self._how_to_pass_labels(model))
            given = self.space.script_images(x_adv, call.images.dtype)
            return _called(model, self.image_name, given, call.arguments)
        output = Output(self.min_max.loss(classifier, x, call.labels))
        if num_items is not None:  # as the Trainer counts them, one a class of mixed labels
            output["loss"] = output["loss"] * (call.labels.ne(-100).sum() / num_items)
        if call.arguments.get("return_dict") is False:
            return output["loss"], output["logits"]
        return output

    def _how_to_pass_labels(self, model: nn.Module) -> str:
        name = type(model).__name__
        if not self.label_name:
            return (
                f"{name}.forward takes none: give it a parameter named labels, or train "
                f"RobustModel({name}, ...)(images, labels) by its loss"
            )
        return (
            f"call the model with {self.label_name} (transformers' Trainer takes them away for its "
            "label_smoothing_factor: say Adversarial(label_smoothing=...) instead)"
        )


def _check_labels(model: nn.Module, labels: Any) -> None:
    """Refuse labels by which a model of transformers would choose another loss than ours."""
    problem = getattr(getattr(model, "config", None), "problem_type", "")
    if problem is None and isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(
            f"labels of {labels.dtype} mean several classes an image to {type(model).__name__}: "
            "where they are mixed, set config.problem_type to single_label_classification"
        )


class _Call(NamedTuple):
    """What one call of the forward was given."""

    images: Any
    labels: Any
    arguments: dict[str, Any]


class _Plain(nn.Module):
    """Images to logits by the model as it was, with one call's other arguments."""

    def __init__(self, model: nn.Module, image_name: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._image_name, self._arguments = image_name, arguments

    def forward(self, x: Tensor) -> Tensor:
        output = _called(self.model, self._image_name, x, self._arguments)
        return logits_of(output, self.model)


def _called(model: nn.Module, image_name: str, x: Tensor, arguments: dict[str, Any]) -> Any:
    """What the model as it was returns."""
    if isinstance(model, FSDPModule):
        model.unshard()  # the backward of each step of the attack has sharded it again
    return _plain_class(model).forward(model, **{image_name: x}, **arguments)


# ---------------------------------------------------------------------------- the class before


class _Robust:
    """Stands before the model's own class."""

    __dict__: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _as_it_was(self):
            twin = copy.deepcopy(self, memo)
        return _attach(twin, copy.deepcopy(self.__dict__.get(_KEY), memo))

    def __copy__(self) -> Any:
        with _as_it_was(self):
            twin = copy.copy(self)
        return _attach(twin, self.__dict__.get(_KEY))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_it_was(self):
            make, args, *state = self.__reduce_ex__(protocol)
        return (_made_again, (make, args, self.__dict__.get(_KEY)), *state)

    def __prepare_scriptable__(self) -> Any:
        """Of ``torch.jit.script``: a twin as the model was."""
        model: Any = self
        if model.training:
            raise RuntimeError(
                "torch.jit.script: what is scripted attacks nothing: train the model itself, and "
                "script it in eval mode afterwards"
            )
        twin = copy.deepcopy(model)
        twin.__class__ = _plain_class(twin)
        Witness.remove(twin)
        del twin.__dict__[_KEY]
        return twin


def _attach(model: Any, training: RobustTraining | None) -> Any:
    """Put ``_Robust`` before the model's class, but for a slice of one, which has no training."""
    if training is None:
        return model
    model.__dict__[_KEY] = training
    cls = type(model)
    namespace = {"forward": _attacking(cls.forward), "__module__": cls.__module__}
    namespace |= {"__qualname__": cls.__qualname__, "_class_before": cls}
    model.__class__ = type(cls.__name__, (_Robust, cls), namespace)
    return model


def _plain_class(model: Any) -> Any:
    return type(model)._class_before


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """The model's own class for a moment, for its own ways to be copied."""
    robust = type(model)
    model.__class__ = robust._class_before
    try:
        yield
    finally:
        model.__class__ = robust


def _made_again(make: Any, args: tuple, training: RobustTraining | None) -> Any:
    return _attach(make(*args), training)


def _attacking(forward: Any) -> Any:
    """The forward of a robust model, with the signature of the model's own."""

    # torch.compile works on the model's own forward inside; an attack is no graph
    @disable(recursive=False)
    def attacked(self: Any, *args: Any, **kwargs: Any) -> Any:
        training: RobustTraining = self.__dict__[_KEY]
        if training.inside:  # the model calls itself
            return forward(self, *args, **kwargs)
        with training.entered():
            return training.forward(self, args, kwargs)

    @functools.wraps(forward)
    def attacking_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a slice of an nn.Sequential is of its class, and no model that was made robust
        if not self.training or _KEY not in self.__dict__:
            return forward(self, *args, **kwargs)
        return attacked(self, *args, **kwargs)

    # Accelerate goes back to what was wrapped when it takes its own wrappers off
    del attacking_forward.__wrapped__
    setattr(attacking_forward, "__signature__", inspect.signature(forward))  # noqa: B010
    return attacking_forward


def _numbers(value: Any) -> Any:
    """One number or a flat list of them: scripts hold mean and std as [1, C, 1, 1] as well."""
    return value.detach().flatten().tolist() if isinstance(value, Tensor) else value
