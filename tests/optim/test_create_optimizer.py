"""Optimizers by name: what reaches them, and what is refused before a run starts."""

import math

import pytest
import timm.optim
import torch
from torch import nn

from robust_accel.optim import LAMB, OptimizerSettings, create_optimizer, with_defaults


def build(**settings) -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    return create_optimizer(model, OptimizerSettings(**{"lr": 0.1, **settings}))


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Dimensions of the parameters -> their weight decay."""
    return {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


def test_lamb_is_ours_and_gets_its_options():
    optimizer = build(weight_norm_clamp=[0.0, 5.0], exclude_1d=True, weight_decay="1/1000")
    assert type(optimizer) is LAMB
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["exclude_1d"]) == (0.1, 0.001, True)
    assert list(group["weight_norm_clamp"]) == [0.0, 5.0]


def test_sgd_is_nesterov_and_momentum_is_classical():
    sgd, momentum = build(name="sgd", momentum=0.8), build(name="momentum", momentum=0.7)
    assert type(sgd) is type(momentum) is torch.optim.SGD
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"]) == (True, 0.8)
    assert (momentum.defaults["nesterov"], momentum.defaults["momentum"]) == (False, 0.7)
    assert build(name="sgd").defaults["momentum"] == 0.9  # timm's, torch has 0
    assert build(name="sgd", nesterov=False).defaults["nesterov"] is False


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_weight_decay_is_on_every_parameter(name):
    assert decays(build(name=name, weight_decay=0.05)) == {1: 0.05, 4: 0.05}


def test_filter_bias_and_bn_spares_vectors():
    optimizer = build(name="adamw", weight_decay=0.05, filter_bias_and_bn=True)
    assert decays(optimizer) == {1: 0.0, 4: 0.05}


def test_numbers_that_yaml_reads_as_text():
    texts = {"lr": "1e-3", "weight_decay": "1e-4", "eps": "1e-7", "betas": ["9/10", 1e-1]}
    settings = OptimizerSettings.model_validate({"name": "adamw", **texts})
    defaults = create_optimizer(nn.Linear(2, 2), settings).defaults
    assert (defaults["lr"], defaults["eps"], list(defaults["betas"])) == (1e-3, 1e-7, [0.9, 0.1])


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    settings = OptimizerSettings(lr=0.1)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        create_optimizer(model, settings)
    model[1].requires_grad_(True)
    optimizer = create_optimizer(model, settings)
    assert optimizer.param_groups[0]["params"] == list(model[1].parameters())


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"]))
def test_every_optimizer_of_timm_is_checked_and_built(name):
    settings = OptimizerSettings(name=name, lr=0.1, weight_decay=1e-4)
    if timm.optim.get_optimizer_info(name).second_order:
        with pytest.raises(ValueError, match="second derivatives"):
            with_defaults(settings)
    else:
        with_defaults(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sdg"}, r"^name: 'sdg' is not allowed: no optimizer .* \(did you mean sgd"),
        ({"name": "lookahead_sgd"}, "'lookahead_sgd' is not allowed: no optimizer"),
        ({"name": "sgd", "eps": 1e-8}, "optimizer.eps is not an option of sgd; allowed: .*nester"),
        ({"name": "adamw", "beta": 1}, r"optimizer.beta is not .* adamw \(did you mean betas\?\)"),
        ({"name": "adamw", "momentum": 0.9}, "optimizer.momentum is not an option of adamw"),
        ({"weight_clamp": 1}, r"optimizer.weight_clamp is not .*weight_norm_clamp.*; allowed: bet"),
        ({"filter_bias_and_bn": True}, "optimizer.filter_bias_and_bn is not an option of lamb"),
        ({"params": []}, "optimizer.params is not an option of lamb"),
        ({"weight_norm_clamp": [1, 0]}, "'lamb' refuses its options: weight_norm_clamp must be"),
        ({"weight_norm_clamp": 10}, "weight_norm_clamp: 10 is not allowed: a list is wanted, like"),
        ({"eps": "tiny"}, "optimizer.eps: 'tiny' is not allowed: a finite number"),
        ({"name": "adamw", "betas": [0.9, 1.5]}, "'adamw' refuses its options: .*1.5"),
        ({"name": "sgd", "momentum": -1}, "'sgd' refuses its options: .*momentum.*-1"),
        (
            {"name": "sgd", "filter_bias_and_bn": 1},
            "filter_bias_and_bn: 1 is not .*: true or false",
        ),
        ({"name": "sgd", "momentum": True}, "optimizer.momentum: True is not allowed: a finite"),
        ({"name": "sgd", "momentum": math.nan}, "optimizer.momentum: nan is not allowed: a finite"),
        ({"name": "adamw", "betas": [0.9, math.inf]}, r"optimizer.betas: \[0.9, inf\] is not allo"),
        ({"name": "adamw", "betas": []}, "'adamw' refuses its options"),
    ],
)
def test_what_cannot_work_is_refused_without_a_model(settings, message):
    with pytest.raises(ValueError, match=message):
        with_defaults(OptimizerSettings(lr=0.1, **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="apex and bitsandbytes may be installed")
@pytest.mark.parametrize("name", ["fusedlamb", "bnbadam"])
def test_an_optimizer_whose_package_is_missing(name):
    with pytest.raises(ValueError, match=f"{name} is not available here"):
        with_defaults(OptimizerSettings(name=name, lr=0.1))


@pytest.mark.parametrize("values", [{"lr": 0}, {"lr": "fast"}, {"lr": 1, "weight_decay": -1}, {}])
def test_learning_rate_and_decay_have_ranges(values):
    with pytest.raises(ValueError, match=r"^(lr|weight_decay): "):
        OptimizerSettings(**values)


def _plain(optimizer: torch.optim.Optimizer) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.defaults.items()}


@pytest.mark.parametrize("name", ["lamb", "sgd", "momentum", "adamw", "lion", "lars", "adafactor"])
def test_settings_with_every_default_build_the_same_optimizer(name: str) -> None:
    """A run's recipe says what its optimizer did, whatever later versions have as defaults."""
    given = OptimizerSettings(name=name, lr=0.1, weight_decay=1e-4)
    whole = with_defaults(given)
    assert with_defaults(whole) == whole
    model = nn.Linear(2, 2)
    one, other = (_plain(create_optimizer(model, settings)) for settings in (given, whole))
    assert one == other
    assert len(whole.model_extra or {}) > 1
    assert OptimizerSettings(**whole.model_dump(mode="json")) == whole


def test_layers_are_those_of_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of the stand-in that has one."""
    whole = with_defaults(OptimizerSettings(lr=0.1, layer_decay=0.5))
    assert whole.layer_decay == 0.5
    assert caplog.messages == []


def test_defaults_do_not_stand_over_what_was_given() -> None:
    whole = with_defaults(OptimizerSettings(lr=0.1, betas=(0.8, 0.9)))
    assert whole.model_extra is not None
    assert list(whole.model_extra["betas"]) == [0.8, 0.9]
    assert whole.model_extra["eps"] == create_optimizer(nn.Linear(2, 2), whole).defaults["eps"]
