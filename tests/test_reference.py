"""The reference has every key of every class that a recipe is built from, with what it does."""

import json
import re
from pathlib import Path

import pytest
import yaml

from robust_accel.recipe import SECTIONS, load_recipe
from robust_accel.recipe_file import RECIPES, SCHEMA, packaged_recipes
from robust_accel.reference import all_keys, members, schema

KEYS = all_keys()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.component} {key.dotted}")
def test_every_key_says_what_it_does(key) -> None:
    assert len(key.text) > 5, f"{key.dotted}: no word on it in the docstring of its class"
    assert "  " not in key.text and key.text.count("``") % 2 == 0
    assert key.text.endswith((".", ".)")), "its sentence has no end"


def test_every_key_is_there() -> None:
    known = {(key.dotted, key.component) for key in KEYS}
    for section in SECTIONS:
        for component, cls in members(section).items():
            assert {(f"{section}.{name}", component) for name in cls.model_fields} <= known
    for name in packaged_recipes():
        recipe = load_recipe(name)
        for section, values in recipe.settings.items():
            if section == "output":
                continue
            dotted = {f"{section}.{key}" for key in values}
            options = {key for key in dotted if section == "optimizer"}  # timm's have their own
            assert dotted - {key for key, _ in known} - options == set(), name


FILES = [
    path
    for path in sorted(RECIPES.rglob("*.yaml"))
    if "accelerate" not in path.parts and path.name != "study.yaml"
]


def test_the_schema_in_the_package_is_the_codes() -> None:
    written = json.loads(SCHEMA.read_text())
    assert written == schema(), "run: robust-accel schema > recipes/schema.json"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_names_the_schema_below_its_sentence(path: Path) -> None:
    lines = path.read_text().splitlines()
    named = [re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", line) for line in lines]
    (place,) = (number for number, found in enumerate(named) if found)
    assert place > 0 and all(line.startswith("# ") for line in lines[:place])
    assert (path.parent / named[place][1]).resolve() == SCHEMA.resolve()
    assert lines[0].endswith((".", ".)")), "the sentence goes on in the next line"


def test_packaged_recipes_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    for path in FILES:
        faults = [
            error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))
        ]
        assert faults == [], path


@pytest.mark.parametrize(
    "wrong", ["train: {epoks: 3}", "trian: {}", "train: {select: worst}", "data: {in_memory: 7}"]
)
def test_what_is_wrong_does_not(wrong: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(yaml.safe_load(wrong)))
