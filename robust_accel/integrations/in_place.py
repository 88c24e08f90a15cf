"""make_robust: a script's own model, changed in place, attacks its images while it trains."""

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.compiler import disable
from torch.distributed.fsdp import FSDPModule

from robust_accel.attacks import Attack
from robust_accel.objectives import AWP, Adversarial, Objective
from robust_accel.robust_model import AttackMode, RobustModel

_KEY = "_robust_training"
_WRAPPERS = ("torch.nn.parallel", "deepspeed.")  # modules of their classes
_MULTI = ("regression", "multi_label_classification")  # of transformers' problem_type


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
      transformers' have), returns the objective's ``loss`` and ``logits``, as attributes and keys.

    Args:
        model: Any module from images [B, C, H, W] to logits [B, K] or to an output with
            ``.logits``, before ``accelerator.prepare``, DDP, FSDP2 or DeepSpeed gets it.
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
    cls: Any = type(model)
    name = cls.__name__
    if _KEY in model.__dict__ or isinstance(model, RobustModel):
        raise ValueError(f"{name} attacks its images already: call make_robust once")
    if "forward" in model.__dict__ or cls.__module__.startswith(_WRAPPERS):
        raise ValueError(
            f"{name} is wrapped or prepared already: call make_robust on the model itself, before "
            "accelerator.prepare, DistributedDataParallel or DeepSpeed"
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in _MULTI:
        raise ValueError(f"{name} is no single-label classifier: {problem}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got {mean} and {std}")
    normalised: dict[str, Any] = {}
    if mean is not None:
        numbers = {"input_mean": _numbers(mean), "input_std": _numbers(std)}
        normalised = {"input_space": "normalized", **numbers}
    robust = RobustModel(
        _Plain(model, cls.forward),
        attack,
        objective,
        attack_mode=attack_mode,
        weight_perturbation=weight_perturbation,
        **normalised,
    )
    model.__dict__[_KEY] = robust  # not a submodule: the model's keys stay its own
    namespace = {"forward": _attacking(cls.forward), "__module__": cls.__module__}
    model.__class__ = type(name, (_Robust, cls), namespace | {"__qualname__": cls.__qualname__})
    return given


def robust_training(model: nn.Module) -> RobustModel | None:
    """What ``make_robust`` has given to the model; its ``attack`` may be replaced at any time."""
    return getattr(model, "_orig_mod", model).__dict__.get(_KEY)


class Output(dict[str, Tensor]):
    """``loss``, ``logits`` and the objective's parts, as keys and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None


class _Plain(nn.Module):
    """The model as it was: what attack and objective call, with the call's other arguments."""

    def __init__(self, model: nn.Module, forward: Any) -> None:
        super().__init__()
        self.model = model
        self.arguments: dict[str, Any] = {}
        self.calls = 0
        self._forward = forward
        self._signature = inspect.signature(forward)
        names = [
            key
            for key, parameter in list(self._signature.parameters.items())[1:]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if not names:
            raise ValueError(f"{type(model).__name__}.forward names no argument that takes images")
        self.image_name = "pixel_values" if "pixel_values" in names else names[0]
        self.label_name = next((key for key in names if "label" in key or "target" in key), "")

    def split(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Images and labels of a call; the rest is kept for the calls that follow."""
        self.calls += 1
        bound = self._signature.bind(self.model, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        for key, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(key, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(key, ()):
                raise ValueError(f"{type(self.model).__name__}: only images and labels by position")
        images, labels = arguments.pop(self.image_name, None), arguments.pop(self.label_name, None)
        self.arguments = arguments
        return images, labels

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.model, FSDPModule):
            self.model.unshard()  # the backward of each step of the attack has sharded it again
        return self._forward(self.model, **{self.image_name: x}, **self.arguments)


class _Robust:
    """Stands before the model's own class."""

    __dict__: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """``torch.save(model)`` writes the plain model: this class is known nowhere else."""
        state = {key: value for key, value in self.__dict__.items() if key != _KEY}
        classes = type(self).__mro__
        return object.__new__, (classes[classes.index(_Robust) + 1],), state


def _attacking(forward: Any) -> Any:
    """The forward of a robust model, with the signature of the model's own."""

    # torch.compile works on the model's own forward inside; an attack is no graph
    @disable(recursive=False)
    @functools.wraps(forward)
    def attacking_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, *args, **kwargs)
        robust: Any = self.__dict__[_KEY]
        plain: _Plain = robust.classifier.model
        # of transformers' Trainer, which then wants the sum over the batch divided by this
        num_items = kwargs.pop("num_items_in_batch", None)
        images, labels = plain.split(args, kwargs)
        if isinstance(images, Tensor) and images.device != robust.input_mean.device:
            robust.to(images.device)
        if labels is None:
            if robust.objective != Adversarial():
                raise ValueError(
                    f"the objective {robust.objective!r} computes the loss, and needs labels: call "
                    f"the model with {plain.label_name or 'labels (its forward takes none)'}, or "
                    "keep the script's own loss with objective Adversarial()"
                )
            x_adv = robust.adversarial(images)
            return plain(x_adv)
        output = Output(robust(images, labels))
        if num_items is not None:
            output["loss"] = output["loss"] * (len(labels) / num_items)
        return output

    return attacking_forward


def _numbers(value: Any) -> Any:
    """One number or a flat list of them: scripts hold mean and std as [1, C, 1, 1] as well."""
    return value.detach().flatten().tolist() if isinstance(value, Tensor) else value
