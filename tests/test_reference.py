"""The reference has every key of every class that a recipe is built from, with what it does."""

import json
import re

import pytest
import yaml

from robust_accel.recipe import SECTIONS, load_recipe
from robust_accel.recipe_file import RECIPES, SCHEMA, packaged_recipes
from robust_accel.reference import all_keys, members, schema

KEYS = all_keys()


def fault_of(text: str) -> str | None:
    if len(text) <= 5:
        return "no word on it in the docstring of its class"
    if "  " in text or text.count("``") % 2:
        return f"two spaces, or half of a quotation: {text}"
    return None if text.endswith((".", ".)")) else f"its sentence has no end: {text}"


def test_every_key_says_what_it_does() -> None:
    assert len(KEYS) > 200
    found = {f"{key.component} {key.dotted}": fault_of(key.text) for key in KEYS}
    assert not {key: fault for key, fault in found.items() if fault}


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


def test_recipes_name_the_schema_below_their_sentence() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        named = [re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", line) for line in lines]
        places = [number for number, found in enumerate(named) if found]
        assert len(places) == 1 and places[0] > 0, path
        (place,) = places
        assert all(line.startswith("# ") for line in lines[:place]), path
        assert (path.parent / named[place][1]).resolve() == SCHEMA.resolve(), path
        assert lines[0].endswith((".", ".)")), f"{path}: the sentence goes on in the next line"


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
