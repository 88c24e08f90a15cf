"""Values of recipes: numbers that nothing can use are refused, and texts are what is written."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import pytest
from bad_recipes import SMALL, told
from pydantic import TypeAdapter, ValidationError

from robust_accel.optim import OptimizerSettings, with_defaults
from robust_accel.plain_yaml import dump, parse, plain
from robust_accel.recipe import SECTIONS, load_recipe
from robust_accel.settings import MOST, Settings


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def fault(source: Path, *overrides: str) -> str:
    return "\n".join(told(source, *overrides))


# ---- every field ------------------------------------------------------------------------------


def settings_in(spec: Any) -> Iterator[type[Settings]]:
    """A class of settings, and those that its fields hold."""
    yield spec
    for field in spec.model_fields.values():
        for member in (field.annotation, *get_args(field.annotation)):
            if isinstance(member, type) and issubclass(member, Settings):
                yield from settings_in(member)


CLASSES = {
    cls: None
    for spec in SECTIONS.values()
    for own in (spec.values() if isinstance(spec, Mapping) else [spec])
    for cls in settings_in(own)
}
FIELDS = {
    f"{cls.__name__}.{key}": TypeAdapter(Annotated[(field.annotation, *field.metadata, "")])
    for cls in CLASSES
    for key, field in cls.model_fields.items()
}


def takes(adapter: TypeAdapter, value: object) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def test_the_walk_sees_the_settings() -> None:
    assert len(FIELDS) > 100
    assert {"AWP.gamma", "QSGD.seed", "PGDSettings.step_size", "SweepSettings.eps"} <= set(FIELDS)


USELESS = [math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 10**400, 10**60, -(10**60)]
USELESS += [np.float32("nan"), np.float64("inf")]
NO_NUMBERS = ["inf", "nan", ".inf", "1/0", "0/0", "1e400", "1e-400", "1/2/3", "1e300", "a/b"]


def test_no_field_takes_a_number_that_nothing_can_use() -> None:
    alone = [tried for value in USELESS for tried in (value, [value], [1, value])]
    texts = [tried for text in NO_NUMBERS for tried in (text, [text, text])]
    found = {}
    for name, adapter in FIELDS.items():
        tried = alone if takes(adapter, "some text") else alone + texts
        found[name] = [value for value in tried if takes(adapter, value)]
    assert not {name: taken for name, taken in found.items() if taken}


def test_truth_values_and_numbers_are_not_one_another() -> None:
    for name, adapter in FIELDS.items():
        cls, key = name.split(".")
        annotation = next(c for c in CLASSES if c.__name__ == cls).model_fields[key].annotation
        flag = annotation is bool or "bool" in str(annotation)
        text = flag or takes(adapter, "some text")
        assert takes(adapter, True) == takes(adapter, False) == flag, name
        assert takes(adapter, "no") == takes(adapter, "On") == text, name
        assert not takes(adapter, [True]), name
        if flag:
            numbers = (0, 1, 1.0, "1", "0", "t", "")
            assert not any(takes(adapter, value) for value in numbers), name


def test_whole_numbers_fit_into_32_bits() -> None:
    whole = {
        name: adapter
        for name, adapter in FIELDS.items()
        if takes(adapter, 2) and not takes(adapter, 0.3) and not takes(adapter, 1.3)
    }
    assert len(whole) > 20
    for name, adapter in whole.items():
        tried = (MOST + 1, 2**64, 1e21, -1, 2.5, "2")
        assert not any(takes(adapter, value) for value in tried), name
        assert takes(adapter, 2.0) and takes(adapter, np.int64(2)), name


@pytest.mark.parametrize("name", ["lamb", "sgd", "momentum", "adamw", "lion", "rmsprop", "muon"])
def test_options_of_optimizers_are_of_the_kind_of_their_defaults(name: str) -> None:
    whole = with_defaults(OptimizerSettings(name=name, lr=0.1)).model_extra or {}
    for key, default in whole.items():
        useless = [math.nan, math.inf, -math.inf, 1e300, "1e400"]
        if isinstance(default, list):
            useless = [[value, *default[1:]] for value in useless]
        elif isinstance(default, bool):
            useless += [1, 0.5, "maybe"]
        elif isinstance(default, int | float):
            useless += [True]
        else:
            continue
        for value in useless:
            with pytest.raises(ValueError, match=f"optimizer.{key}|refuses its options"):
                with_defaults(OptimizerSettings(name=name, lr=0.1, **{key: value}))


@pytest.mark.parametrize(
    "key",
    ["output", "data.path", "data.unlabeled.path", "model.name", "model.checkpoint",
     "evaluate.ids", "evaluate.sanity.transfer_from"],
)  # fmt: skip
def test_paths_are_those_that_a_file_can_have(small: Path, key: str) -> None:
    longest = "/".join(["x" * 255] * 15)
    others = ["data.train_size=9", "evaluate.eps=0.1"]
    load_recipe(small, [*others, f"{key}={longest}"])
    for text, said in (
        ("a/" + "x" * 256, "a name in a path has at most 255 bytes, not 256"),
        ("é" * 128, "a name in a path has at most 255 bytes, not 256"),
        (f"{longest}/{longest}", "a path has at most 4096 bytes, not 7,679"),
    ):
        (fault,) = told(small, *others, f"{key}={text}")
        assert fault.startswith(f"command line: {key}: '") and said in fault


def test_the_longest_folder_is_a_model_by_its_name(small: Path) -> None:
    name = f"local-dir:{'x' * 255}"
    assert load_recipe(small, [f"model.name={name}"]).model.name == name
    assert "at most 255 bytes, not 256" in fault(small, f"model.name={name}x")


def test_options_of_models_are_finite(small: Path) -> None:
    for value in (".inf", ".nan", "[1, .inf]", "{a: .nan}"):
        said = fault(small, f"model.options={{drop_rate: {value}}}")
        assert said.startswith("command line: model.options: {'drop_rate': ")
        assert "finite numbers are wanted" in said


NUMBERS = [
    ("train.seed=18446744073709551616", "train.seed: 18446744073709551616 is not allowed: input s"),
    ("train.seed=4294967296", "train.seed: 4294967296 is not allowed"),
    ("train.seed=-1", "train.seed: -1 is not allowed"),
    ("train.seed=true", "train.seed: True is not allowed: a whole number is wanted"),
    ("train.seed='5'", "train.seed: '5' is not allowed: a whole number is wanted"),
    ("train.epochs=1e21", "train.epochs: 1e+21 is not allowed"),
    ("train.epochs=1:30", "train.epochs: '1:30' is not allowed: a whole number is wanted"),
    ("train.epochs=.nan", "train.epochs: nan is not allowed: a whole number"),
    ("train.epochs=1.5", "train.epochs: 1.5 is not allowed: a whole number"),
    (f"train.epochs={'9' * 5000}", "(5,002 characters) is not allowed: a whole number"),
    ("evaluate.batch_size=1e21", "evaluate.batch_size: 1e+21 is not allowed"),
    ("evaluate.seed=18446744073709551616", "evaluate.seed: 18446744073709551616"),
    ("certify.seed=18446744073709551616", "certify.seed: 18446744073709551616"),
    ("certify.batch_size=1e21", "certify.batch_size: 1e+21"),
    ("communication={name: qsgd, seed: 18446744073709551616}", "communication.seed: 184467440737"),
    ("communication={name: qsgd, sides: true}", "communication.sides: True is not allowed"),
    ("communication={name: qsgd, bits: 8.5}", "communication.bits: 8.5 is not allowed"),
    ("data.num_workers=1000000000", "data.num_workers: 1000000000 is not allowed"),
    ("data.in_memory=0", "data.in_memory: 0 is not allowed: true or false is wanted"),
    ("attack.eps=1e-400", "attack.eps: '1e-400' is not allowed: a finite number that fp32 can"),
    ("attack.eps=1e400", "attack.eps: '1e400' is not allowed: a finite number"),
    ("attack.eps=1e-42", "attack.eps: 1e-42 is not allowed: a finite number that fp32 can"),
    ("attack.eps=inf", "attack.eps: 'inf' is not allowed"),
    ("attack.eps=-.inf", "attack.eps: -inf is not allowed"),
    ("attack.eps=8/0", "attack.eps: '8/0' is not allowed"),
    ("attack.eps=true", "attack.eps: True is not allowed"),
    ("attack.num_steps=true", "attack.num_steps: True is not allowed"),
    ("optimizer.lr=.nan", "optimizer.lr: nan is not allowed"),
    ("optimizer.betas=[0.9, .nan]", "optimizer.betas: [0.9, nan] is not allowed: a finite"),
    ("schedule={name: piecewise, milestones: [1, .inf]}", "schedule.milestones.1: inf is not"),
    ("evaluate.sweep.eps=[.inf]", "evaluate.sweep.eps.0: inf is not allowed"),
    ("evaluate.ids=[1e21]", "evaluate.ids.0: 1e+21 is not allowed"),
    ("model.mean=[.nan, 1, 1]", "model.mean.0: nan is not allowed"),
]


@pytest.mark.parametrize(("override", "said"), NUMBERS)
def test_such_numbers_are_refused_before_anything(small: Path, override: str, said: str) -> None:
    found = fault(small, override)
    assert found.startswith("command line: ")
    assert said in found
    key, value = override.split("=", 1)
    section, key = key.split(".", 1) if "." in key else (key, "")
    if "." in key or not key:
        return
    small.write_text(f"base: {small.parent}/base.yaml\n{section}: {{{key}: {value}}}")
    (small.parent / "base.yaml").write_text(SMALL)
    assert said in fault(small)  # and in a file


# ---- texts ------------------------------------------------------------------------------------

WRITTEN = ["010", "1:30", "no", "on", "1e5", "0x10", "true", ".inf", "1.50", "2026-01-01", "-0"]
WRITTEN += ["1e400", "7", "+7", "1_000", "=", "&a", "*.parquet", "@x", "a: b", "a # b", "!x", "- a"]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_key_that_wants_text_takes_what_is_written(
    small: Path, tmp_path: Path, text: str
) -> None:
    keys = ["output", "data.path", "data.test_split", "model.checkpoint", "evaluate.ids"]
    keys += ["evaluate.sanity.transfer_from"]
    recipe = load_recipe(small, [f"{key}={text}" for key in keys])
    assert recipe.output == Path(text)
    assert (recipe.data.path, recipe.data.test_split, recipe.model.checkpoint) == (text,) * 3
    assert recipe.evaluate.ids == recipe.evaluate.sanity_settings.transfer_from == text
    assert recipe.settings["output"] == recipe.settings["data"]["path"] == text
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").settings == recipe.settings
    for quoted in (f'data.path="{text}"', f"data.path='{text}'", f"data.path= {text} "):
        assert load_recipe(small, [quoted]).data.path == text


@pytest.mark.parametrize("text", WRITTEN[:15])
def test_it_does_in_a_file_too(small: Path, text: str) -> None:
    small.write_text(SMALL + f"evaluate: {{sanity: {{transfer_from: {text}}}}}\noutput: {text}\n")
    recipe = load_recipe(small)
    assert recipe.output == Path(text)
    assert recipe.evaluate.sanity_settings.transfer_from == text


def test_null_is_nothing_and_quotes_make_it_a_text(small: Path) -> None:
    for nothing in ("null", "~", ""):
        recipe = load_recipe(small, [f"output={nothing}", f"model.checkpoint={nothing}"])
        assert recipe.output == Path("runs/small")
        assert recipe.model.checkpoint is None
        assert "data.path: None is not allowed" in fault(small, f"data.path={nothing}")
    assert load_recipe(small, ["output='null'"]).output == Path("null")


def test_numbers_and_truth_values_are_those_of_yaml_1_2(small: Path) -> None:
    overrides = ["train.epochs=010", "train.log_every=0o17", "train.max_steps=1e3"]
    overrides += ["data.validation_size=0x10", "data.in_memory=YES", "train.compile=False"]
    recipe = load_recipe(small, overrides)
    train = recipe.settings["train"]
    assert (train["epochs"], train["log_every"], train["max_steps"]) == (10, 15, 1000)
    assert recipe.data.validation_size == 16
    assert recipe.data.in_memory is True
    assert train["compile"] is False
    assert type(train["max_steps"]) is int


@pytest.mark.parametrize(
    "value",
    [
        *WRITTEN, "", "null", "~", "é", "a'b", 'a"b', " a ", "0o17", "1e-5", "<<", "x: y", "%a",
        0, -5, 2**70, 1.5, 1e-5, 1e22, True, None, [], {}, [[1, "2"], {"a": None}],
    ],
)  # fmt: skip
def test_what_is_saved_reads_as_the_same_by_either_version(value: Any) -> None:
    import yaml

    text = dump({"a": value, "b": {"c": [value]}})
    assert plain(parse(text, "saved")) == yaml.safe_load(text) == {"a": value, "b": {"c": [value]}}
