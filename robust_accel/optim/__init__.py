"""Outer minimisation, step (A4): LAMB of this package, timm's other optimizers, and schedules."""

import inspect
from typing import Annotated, Any

import timm.optim
from pydantic import ConfigDict, Field
from torch import nn
from torch.optim import Optimizer

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
from robust_accel.settings import Number, Settings, close_to, parse_fraction

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

    name: str = "lamb"
    lr: Annotated[Number, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0
    layer_decay: Annotated[Number, Field(gt=0, le=1)] | None = None


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
        if not isinstance(filtered, bool):
            raise ValueError(f"filter_bias_and_bn must be true or false, got {filtered!r}")
        if settings.layer_decay is not None:
            params, filtered = _by_layer(model, settings, filtered), False
        if settings.name == "lamb":
            return LAMB(params, **common, **options)
        # given a list, timm makes no groups: every parameter decays
        return timm.optim.create_optimizer_v2(
            model if filtered else params, opt=settings.name, **common, **options
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
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
    optimizer = create_optimizer(nn.Linear(2, 2), settings)
    known = _known_options(settings.name) - _HOW_NOT_WHAT - settings.model_fields_set
    defaults = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in optimizer.defaults.items()
        if key in known and value is not None
    }
    return settings.model_copy(update=defaults)


def _options(settings: OptimizerSettings) -> dict[str, Any]:
    """The further options, numbers in text read as numbers, each known to the optimizer's class."""
    known = _known_options(settings.name)
    options = dict(settings.model_extra or {})
    for key in options:
        if key not in known:
            raise ValueError(
                f"optimizer.{key} is not an option of {settings.name}"
                f"{close_to(key, known, 3)}; allowed: {', '.join(sorted(known))}"
            )
    return {key: _number(value) for key, value in options.items()}


def _known_options(name: str) -> set[str]:
    common = {"self", "params", "lr", "weight_decay"}
    if name == "lamb":
        return set(inspect.signature(LAMB.__init__).parameters) - common
    names = [str(known) for known in timm.optim.list_optimizers()]
    if name not in names:
        raise ValueError(
            f"optimizer.name: unknown optimizer {name!r}{close_to(name, names, 3)};"
            f" allowed: {', '.join(names)}"
        )
    if timm.optim.get_optimizer_info(name).second_order:
        raise ValueError(f"optimizer.name: {name} needs second derivatives; training makes none")
    try:
        cls = timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:  # apex and bitsandbytes, without their package
        raise ValueError(f"optimizer.name: {name} is not available here: {error}") from error
    parameters = inspect.signature(cls).parameters.values()
    keywords = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    return (keywords | {"filter_bias_and_bn"}) - common


def _number(value: Any) -> Any:
    """YAML reads 1e-8 as text: read text as a number where it is one, within lists too."""
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return float(parse_fraction(value))  # type: ignore[arg-type]
    except ValueError:
        return value
