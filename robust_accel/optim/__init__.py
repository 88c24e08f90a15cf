"""Outer minimisation, step (A4): LAMB of this package, timm's other optimizers, and schedules."""

import inspect
from typing import Annotated, Any

import timm.optim
from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, ConfigDict
from torch import nn
from torch.optim import Optimizer

from robust_accel.messages import close_to, cut, shown
from robust_accel.optim.lamb import LAMB, Piece
from robust_accel.optim.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Cyclic,
    OneCycle,
    Piecewise,
    Schedule,
    make_scheduler,
)
from robust_accel.settings import Number, Settings, listed, parse_flag, parse_number

__all__ = [
    "LAMB",
    "SCHEDULES",
    "Constant",
    "Cosine",
    "Cyclic",
    "OneCycle",
    "OptimizerSettings",
    "Piece",
    "Piecewise",
    "Schedule",
    "create_optimizer",
    "make_scheduler",
    "with_defaults",
]


def _known_name(name: str) -> str:
    names = sorted({"lamb", *map(str, timm.optim.list_optimizers())})
    if name not in names:
        raise ValueError(
            f"no optimizer has this name{close_to(name, names, 3)}; allowed: {listed(names)}"
        )
    return name


_HOW_NOT_WHAT = {"foreach", "fused", "capturable", "differentiable", "verbose"}  # same result


class OptimizerSettings(Settings):
    """The recipe's ``optimizer`` section; any further key is an option of the optimizer's class.

    Args:
        name: ``lamb`` (this package's), or one of timm's (``timm.optim.list_optimizers()``). Two
            of timm's names are torch's SGD: ``sgd`` with Nesterov momentum, ``momentum`` with the
            classical one of the paper's SGD baselines. Unlike torch, both have momentum 0.9
            unless the option ``momentum`` says otherwise.
        lr: Learning rate > 0.
        weight_decay: >= 0, on every parameter, as the paper and its peers do. To spare BatchNorm
            and biases: ``exclude_1d: true`` for LAMB (which then does not adapt them either), or
            ``filter_bias_and_bn: true`` for timm's optimizers (timm's own default).
        layer_decay: For fine-tuning: each layer learns at this share, in (0, 1], of the rate of
            the layer above it; ``lr`` is the classifier's.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, AfterValidator(_known_name)] = "lamb"
    lr: Annotated[Number, Gt(0)]
    weight_decay: Annotated[Number, Ge(0)] = 0.0
    layer_decay: Annotated[Number, Gt(0), Le(1)] | None = None


def create_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Build the named optimizer over the model's trainable parameters.

    Args:
        model: With ``layer_decay``, a timm model, which knows its layers.
        settings: The recipe's.

    Raises:
        ValueError: Unknown name or option, impossible value, or nothing to train.
    """
    params: list[Any] = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ValueError("optimizer: the model has no parameter that requires a gradient")
    options = _options(settings)
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    try:
        filtered = options.pop("filter_bias_and_bn", False)
        if settings.layer_decay is not None:
            params, filtered = _by_layer(model, settings, filtered), False
        if settings.name == "lamb":
            return LAMB(params, **common, **options)
        # given a list, timm makes no groups: every parameter decays
        return timm.optim.create_optimizer_v2(
            model if filtered else params, opt=settings.name, **common, **options
        )
    except Exception as error:  # each has its own for an option that it cannot use
        raise ValueError(f"optimizer {settings.name!r} refuses its options: {error}") from error


def _by_layer(
    model: nn.Module, settings: OptimizerSettings, filter_bias_and_bn: bool
) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate that falls from the classifier to the first layer."""
    assert settings.layer_decay is not None
    groups = timm.optim.param_groups_layer_decay(
        model,
        weight_decay=settings.weight_decay,
        weight_decay_exclude_1d=filter_bias_and_bn,
        layer_decay=settings.layer_decay,
    )
    # as the rate itself: only timm's own schedulers would read the scale
    return [{**group, "lr": settings.lr * group.pop("lr_scale")} for group in groups]


def with_defaults(settings: OptimizerSettings) -> OptimizerSettings:
    """The settings with every option that the optimizer fills in itself, LAMB's betas, say.

    Raises:
        ValueError: As ``create_optimizer`` would, without the real model: an unknown name or
            option, or an impossible value.
    """
    whole = settings.model_copy(update={"layer_decay": None})  # the stand-in has one layer
    optimizer = create_optimizer(nn.Linear(2, 2), whole)
    known = set(_known_options(settings.name)) - _HOW_NOT_WHAT - settings.model_fields_set
    defaults = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in optimizer.defaults.items()
        if key in known and value is not None
    }
    return settings.model_copy(update=defaults)


def _options(settings: OptimizerSettings) -> dict[str, Any]:
    """The further options, each known to the optimizer's class and of the kind of its default."""
    known = _known_options(settings.name)
    options = dict(settings.model_extra or {})
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"optimizer.{cut(key)} is not an option of {settings.name}"
                f"{close_to(key, known, 3)}; allowed: {', '.join(sorted(known))}"
            )
        try:
            is_flag = key in _HOW_NOT_WHAT and value is not None
            options[key] = _of_kind(value, False if is_flag else known[key])
        except ValueError as error:
            raise ValueError(f"optimizer.{key}: {shown(value)} is not allowed: {error}") from None
    return options


def _known_options(name: str) -> dict[str, Any]:
    """Names of options, and their defaults."""
    if name == "lamb":
        return _keywords(LAMB)
    if timm.optim.get_optimizer_info(name).second_order:
        raise ValueError(f"optimizer.name: {name} needs second derivatives; training makes none")
    try:
        cls = timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:  # apex and bitsandbytes, without their package
        raise ValueError(f"optimizer.name: {name} is not available here: {error}") from error
    return _keywords(cls) | {"filter_bias_and_bn": False}


def _keywords(cls: Any) -> dict[str, Any]:
    return {
        p.name: p.default
        for p in inspect.signature(cls).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name not in ("params", "lr", "weight_decay")
    }


def _of_kind(value: Any, default: Any) -> Any:
    """An option as its default is: a flag, a number, or several; YAML reads 9/10 as text.

    Raises:
        ValueError: It is no such, or a number that fp32 cannot hold.
    """
    if isinstance(value, list | tuple):
        if isinstance(default, bool | int | float):
            raise ValueError("one value is wanted, no list")
        parts = default if isinstance(default, tuple) else [None]
        return [_of_kind(item, parts[min(i, len(parts) - 1)]) for i, item in enumerate(value)]
    if isinstance(default, tuple) and value is not None:
        raise ValueError(f"a list is wanted, like {list(default)}")
    if isinstance(default, bool):
        return parse_flag(value)
    if isinstance(default, int | float):
        found = parse_number(value)
        return value if isinstance(value, int) else found
    if isinstance(value, str):
        try:
            return parse_number(value)
        except ValueError:
            return value
    return parse_number(value) if isinstance(value, float) else value
