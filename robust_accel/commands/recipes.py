"""The recipes and recipe commands: which there are, what is in one, and a copy to begin with."""

import argparse
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from robust_accel.commands import say
from robust_accel.files import write_text
from robust_accel.messages import shown
from robust_accel.recipe_file import (
    RECIPES,
    SCHEMA,
    find_recipe,
    launch_configurations,
    name_of,
    origin_of,
    packaged_recipes,
)

if TYPE_CHECKING:
    from robust_accel.recipe import Recipe

_ABOUT = ("Cost", "Reached")
"""Comments at a recipe's head: ``# Cost: ...`` and ``# Reached: ...`` (what, by whom, where)."""


def run(options: argparse.Namespace) -> int:
    """List what is packaged, one a line: what has a word in its name or its sentence."""
    names = [*packaged_recipes(), *launch_configurations()]
    found = {name: _head(RECIPES / f"{name}.yaml") for name in names}
    word = (options.word or "").lower()
    found = {
        name: head
        for name, head in found.items()
        if word in f"{name} {' '.join(head.values())}".lower()
    }
    if not found:
        raise ValueError(f"recipes: none has {shown(options.word)} in its name or its sentence")
    width = max(map(len, found)) + 2
    for name, head in found.items():
        say(f"{name:{width}}{head['']}")
        for key in _ABOUT:
            if head[key]:
                say(f"{'':{width}}{key}: {head[key]}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print all settings of a recipe, and where each was set."""
    if (launch := _launch_configuration(options)) is not None:
        say(launch.rstrip())
        return 0
    recipe = _looked_at(options)
    lines = [*_lines(recipe.settings, recipe.origins)]
    width = min(60, max(len(text) for text, _ in lines) + 2)
    for text, origin in lines:
        say(f"{text + '  ' * bool(origin):{width}}{origin and f'# {origin}'}".rstrip())
    return 0


def copy(options: argparse.Namespace) -> int:
    """Write a recipe as one file of its own: what it and its bases set, without the defaults."""
    target: Path = options.file
    if target.exists():
        raise ValueError(f"{target}: is there already: choose another file")
    if (launch := _launch_configuration(options)) is not None:
        write_text(target, launch)
        say(f"{target}: accelerate launch --config_file {shlex.quote(str(target))}")
        return 0
    recipe = _looked_at(options)
    source = find_recipe(options.recipe)
    head = [
        f"# {_head(source)['']}",
        f"# From {options.recipe} of robust-accel {version('robust-accel')}.",
        f"# yaml-language-server: $schema={SCHEMA.as_uri()}",
    ]
    write_text(target, "\n".join(head) + "\n" + _yaml(_set(recipe.settings, recipe.origins)))
    say(f"{target}: robust-accel train {shlex.quote(str(target))}")
    return 0


def _launch_configuration(options: argparse.Namespace) -> str | None:
    """The text of one of Accelerate's files, which has no settings of ours; None of a recipe."""
    source = find_recipe(options.recipe)
    if name_of(source) not in launch_configurations():
        return None
    if options.settings:
        raise ValueError(f"{options.recipe}: is for accelerate launch: it has no settings of ours")
    return source.read_text()


def _looked_at(options: argparse.Namespace) -> "Recipe":
    """The recipe, maybe a stranger's: no class that it names is imported."""
    from robust_accel.recipe import FOR_TRAINING, load_recipe  # imports torch

    required = {*FOR_TRAINING} - {"evaluate"}  # its eps may be known to such a class alone
    return load_recipe(options.recipe, options.settings, required=required, trust=False)


def _head(path: Path) -> dict[str, str]:
    """What the comments at a recipe's head say: the sentence, its cost, what was reached."""
    found = dict.fromkeys(("", *_ABOUT), "")
    for number, line in enumerate(path.read_text().splitlines()):
        entry = re.match(rf"# (?:({'|'.join(_ABOUT)}): )?(.*)", line)
        if entry is None:
            break
        if number == 0 or entry[1]:
            found[entry[1] or ""] = entry[2]
    return found


def _lines(tree: dict[str, Any], origins: dict[str, str], above: str = "") -> Any:
    """Lines of YAML, each with where it was set."""
    indent = "  " * above.count(".")
    for key, value in tree.items():
        dotted = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:", ""
            yield from _lines(value, origins, f"{dotted}.")
            continue
        origin = origin_of(origins, dotted) if _is_set(dotted, origins) else "default"
        if Path(origin).is_relative_to(RECIPES):
            origin = str(Path(origin).relative_to(RECIPES))
        text = yaml.safe_dump(_readable(value), default_flow_style=True, width=10_000).split("\n")[
            0
        ]
        yield f"{indent}{key}: {text}", origin


def _set(tree: dict[str, Any], origins: dict[str, str], above: str = "") -> dict[str, Any]:
    """What of the settings was set, and not left at its default."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if not _is_set(f"{above}{key}", origins):
            continue
        nested = isinstance(value, dict) and value
        found[key] = _set(value, origins, f"{above}{key}.") if nested else _readable(value)
    return found


def _readable(value: Any) -> Any:
    """Fractions of 255 as everybody writes them."""
    from robust_accel.settings import eps_text

    return eps_text(value) if isinstance(value, float) and "/" in eps_text(value) else value


def _is_set(dotted: str, origins: dict[str, str]) -> bool:
    return any(name == dotted or name.startswith(f"{dotted}.") for name in origins)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=100)
