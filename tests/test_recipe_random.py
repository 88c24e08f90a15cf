"""Recipes at random: each builds, or is refused in lines that a person can read."""

import random
from typing import Any

import pytest
import yaml
from bad_recipes import at_once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_accel.plain_yaml import RecipeError, parse, plain
from robust_accel.recipe import DEFAULTS, SECTIONS, Recipe, _recipe, recipe_of_use
from robust_accel.recipe_file import RECIPES, RecipeValues, find_recipe

REAL = [
    "quickstart", "cifar10/awp", "cifar10/dat_pgd", "cifar10/smooth_ddn", "cifar10/cpu_pseudo",
    "cifar10/rst", "cifar10/trades", "finetune/cifar10", "imagenet/dat_lsgd", "imagenet/fast_at",
]  # fmt: skip
DUMPER = getattr(yaml, "CDumper", yaml.Dumper)  # with tags of Python's own
KEYS = sorted({key for spec in SECTIONS.values() for key in getattr(spec, "model_fields", spec)})
KEYS += ["name", "base", "output", "norm", "eps", "bits", "sides", "sigma", "gamma", "", "a.b", "x"]
NAMES = ["pgd", "none", "fgsm-rs", "n-fgsm", "ddn", "trades", "mart", "smoothing", "qsgd", "sgd"]
NAMES += ["allreduce", "adamw", "lamb", "cosine", "cyclic", "onecycle", "piecewise", "constant"]
NAMES += ["os:system", "math:sin", "no_such:Thing", ":", "linf", "l2", "auto", "bf16", "best"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=12),
    st.sampled_from(NAMES),
    st.sampled_from(["8/255", "1/0", "no", "010", "1:30", "nan", "inf", "1e-400", "x" * 5000]),
    st.dates(),
    st.binary(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), scalars), inner, max_size=4),
    ),
    max_leaves=8,
)


def mutated(recipe: dict[Any, Any], number: int, draw: Any) -> dict[Any, Any]:
    """The recipe with values replaced, taken out, and put where there were none."""
    for _ in range(number):
        node: Any = recipe
        key = draw(st.sampled_from(sorted(map(str, node)) or ["x"]))
        while isinstance(node.get(key), dict) and node[key] and draw(st.integers(0, 9)) > 0:
            node = node[key]
            key = draw(st.sampled_from(sorted(map(str, node))))
        match draw(st.integers(0, 3)):
            case 0:
                node.pop(key, None)
            case 1:
                node[draw(st.one_of(st.sampled_from(KEYS), scalars))] = draw(values)
            case _:
                node[key] = draw(values)
    return recipe


@st.composite
def texts(draw: Any) -> str:
    """Real recipes, mutated as values, and now and then as text."""
    values = RecipeValues({})
    values.read(find_recipe(draw(st.sampled_from(REAL))))
    recipe = mutated(plain(values.values), draw(st.integers(0, 4)), draw)
    text = yaml.dump(recipe, Dumper=DUMPER, allow_unicode=draw(st.booleans()))
    if draw(st.integers(0, 3)) == 0:
        chosen = random.Random(draw(st.integers(0, 2**32)))
        for _ in range(chosen.randrange(1, 5)):
            at = chosen.randrange(len(text) + 1)
            text = text[:at] + chosen.choice("{}[]:,-#&*!|>'\"%@`~?\n\t\0 0.e<\\") + text[at + 1 :]
    return text


def built_or_refused(text: str) -> None:
    try:
        with at_once():
            tree = parse(text, "recipe")
            if not isinstance(tree, dict):
                return
            for use in (trained, used):
                use(tree)
    except RecipeError as error:
        lines = str(error).split("\n")
        for line in lines:
            assert line.isprintable()
            assert 5 < len(line) <= 4000


def trained(tree: dict[str, Any]) -> None:
    found = RecipeValues(DEFAULTS)
    found.merge(tree, "recipe")
    required = ("model", "data", "attack", "optimizer", "train", "evaluate")
    recipe = _recipe(found, SECTIONS, "runs/random", required, trust=True)
    assert isinstance(recipe, Recipe)


def used(tree: dict[str, Any]) -> None:
    required = ("model", "data", "evaluate", "certify")
    assert isinstance(recipe_of_use(tree, (), "recipe", required=required), Recipe)


CHECKED = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **CHECKED)
@given(texts())
def test_a_random_recipe_is_built_or_refused(text: str) -> None:
    built_or_refused(text)


@pytest.mark.long
@settings(max_examples=1000, **CHECKED)
@given(texts())
def test_a_thousand_random_recipes_are_built_or_refused(text: str) -> None:
    built_or_refused(text)


@settings(max_examples=100, derandomize=True, **CHECKED)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda b: b.decode("latin-1"))))
def test_a_random_text_is_read_or_refused(text: str) -> None:
    built_or_refused(text)


def test_the_real_ones_are_among_them() -> None:
    assert all((RECIPES / f"{name}.yaml").is_file() for name in REAL)
