"""Recipe files: YAML, inherited by ``base:``, overridden on the command line."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_accel.messages import close_to, cut, shown
from robust_accel.plain_yaml import (
    MOST_LEVELS,
    RecipeError,
    Written,
    parse_setting,
    plain,
    read_recipe,
    refuse_unprintable,
)

RECIPES = next(
    folder / "recipes"
    for folder in (Path(__file__).parent, Path(__file__).parent.parent)  # wheel, repository
    if (folder / "recipes").is_dir()
)
SCHEMA = RECIPES / "schema.json"
"""What ``robust-accel schema`` prints: recipes name it in their head, for editors."""

LAUNCH = "accelerate"
"""The folder of Accelerate's configurations, for ``accelerate launch --config_file FILE``."""

_MOST_BASES = 8
_OWN = {"model": ("options",)}
"""What belongs to the component that a section names, where not all of it does: pretrained weights,
a new classifier and the size of images are wanted of any network."""


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given as a path or as the name of a packaged one."""
    own = Path(os.path.expanduser(source))
    for candidate in (own, RECIPES / source, RECIPES / f"{source}.yaml"):
        if os.path.exists(candidate) and not candidate.is_dir():
            return candidate
    close = close_to(source, packaged_recipes(), 3)
    said = f"no such file, nor a packaged recipe{close}; robust-accel recipes lists them"
    raise RecipeError(f"{cut(str(source))}: {said}")


def name_of(path: Path) -> str:
    """A packaged recipe's name (``cifar10/dat_pgd``); of another file what it is called."""
    path, packaged = path.resolve(), RECIPES.resolve()
    if path.is_relative_to(packaged):
        return str(path.relative_to(packaged).with_suffix(""))
    return path.stem


def beside(path: Path, source: str, key: str) -> Path:
    """Path of a recipe that a file names: beside that file, or a packaged one's name.

    Raises:
        RecipeError: There is none; it names the file and the key.
    """
    source = os.path.expanduser(source)
    for folder in (path.parent, RECIPES):
        for candidate in (folder / source, folder / f"{source}.yaml"):
            if os.path.exists(candidate) and not candidate.is_dir():
                return candidate
    where = cut(str(path.parent / source))
    raise RecipeError(f"{path}: {key}: no such file: {where}, nor a packaged recipe")


def packaged_recipes() -> list[str]:
    """Names of the packaged recipes that can be trained."""
    names = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
    return [
        name
        for name in names
        if "/_" not in f"/{name}" and Path(name).parts[0] != LAUNCH and Path(name).name != "study"
    ]


def launch_configurations() -> list[str]:
    """Names of the packaged files for ``accelerate launch``."""
    return sorted(f"{LAUNCH}/{path.stem}" for path in (RECIPES / LAUNCH).glob("*.yaml"))


def origin_of(origins: dict[str, str], dotted: str) -> str:
    """Where a key, or the nearest section above it, was set; else the recipe itself."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
    return next((origins[p] for p in prefixes if p in origins), "recipe")


def as_overrides(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Plain values as a command line has them: ``section.key=value``."""
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in settings.items()
        for key, value in values.items()
    ]


def laid_over(old: Any, new: Any) -> Any:
    """Two values of one key: of mappings both, where they have a key in common the new one's."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: laid_over(old.get(key), value) for key, value in new.items()}


class RecipeValues:
    """A recipe as values, as they were written, and where each of them was set."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = copy.deepcopy(dict(defaults))
        # dotted key -> file, or "command line"; "" -> the recipe's file
        self.origins: dict[str, str] = {}

    def read(self, path: Path, seen: tuple[Path, ...] = ()) -> None:
        """Merge a file over its bases."""
        if path.resolve() in seen:
            raise RecipeError(f"{path}: base: the recipe inherits from itself")
        if len(seen) > _MOST_BASES:
            raise RecipeError(f"{path}: base: more than {_MOST_BASES} recipes above one another")
        values = read_recipe(path)
        base = values.pop("base", None)
        if isinstance(base, Written):
            base = base.text
        if base is not None:
            if not isinstance(base, str):
                raise RecipeError(f"{path}: base: must be one file, got {shown(plain(base))}")
            self.read(beside(path, base, "base"), (*seen, path.resolve()))
        self.merge(values, str(path))
        self.origins[""] = str(path)

    def override(self, overrides: Sequence[str]) -> None:
        """Merge ``key.subkey=value`` settings of the command line."""
        tree: dict[str, Any] = {}
        for text in overrides:
            dotted, equals, value = text.partition("=")
            keys = dotted.split(".")
            if not equals or not all(keys) or len(keys) > MOST_LEVELS:
                said = "is not of the form key.subkey=value"
                raise RecipeError(f"command line: {shown(text)} {said}")
            refuse_unprintable(dotted, "command line")
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    said = f"{key} is set to {shown(plain(node))} there too"
                    raise RecipeError(f"command line: {shown(text)}: {said}")
            found = parse_setting(value, f"command line: {cut(dotted)}")
            is_named = isinstance(found, dict) and "name" in found  # and so begins afresh
            node[keys[-1]] = found if is_named else laid_over(node.get(keys[-1]), found)
        self.merge(tree, "command line")

    def merge(self, values: dict[str, Any], origin: str) -> None:
        self.values = self._merged(self.values, values, origin, "")

    def _merged(self, old: Any, new: dict[str, Any], origin: str, prefix: str) -> dict[str, Any]:
        # another component by name starts its section afresh: its settings are its own
        merged = dict(old) if isinstance(old, dict) else {}
        if prefix and new.get("name", merged.get("name")) != merged.get("name"):
            for name in [n for n in merged if n in _OWN.get(prefix[:-1], merged)]:
                del merged[name]
                stale = [k for k in self.origins if f"{k}.".startswith(f"{prefix}{name}.")]
                for key in stale:  # or a key missing now would be blamed on the file that had it
                    del self.origins[key]
        for key, value in new.items():
            dotted = f"{prefix}{key}"
            self.origins[dotted] = origin
            nested = isinstance(value, dict)
            merged[key] = (
                self._merged(merged.get(key), value, origin, f"{dotted}.") if nested else value
            )
        return merged
