"""Recipe files: YAML, inherited by ``base:``, overridden on the command line; plain values."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RECIPES = next(
    folder / "recipes"
    for folder in (Path(__file__).parent, Path(__file__).parent.parent)  # wheel, repository
    if (folder / "recipes").is_dir()
)


class RecipeError(ValueError):
    """A recipe that cannot run: one line a fault, with file, key, what was found and allowed."""


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given as a path or as the name of a packaged one."""
    for candidate in (Path(source), RECIPES / source, RECIPES / f"{source}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
    names = [n for n in names if "/_" not in f"/{n}" and not n.startswith("accelerate/")]
    raise RecipeError(f"{source}: no such file, nor a packaged recipe ({', '.join(names)})")


def origin_of(origins: dict[str, str], dotted: str) -> str:
    """Where a key, or the nearest section above it, was set."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((origins[p] for p in prefixes if p in origins), "recipe")


class RecipeValues:
    """A recipe as plain values, and where each of them was set."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = copy.deepcopy(dict(defaults))
        self.origins: dict[str, str] = {}  # dotted key -> file, or "command line"

    def read(self, path: Path, seen: tuple[Path, ...] = ()) -> None:
        """Merge a file over its bases."""
        if path.resolve() in seen:
            raise RecipeError(f"{path}: base: the recipe inherits from itself")
        try:
            values = yaml.load(path.read_text(), _Loader)
        except (FileNotFoundError, IsADirectoryError):
            raise RecipeError(f"{seen[-1]}: base: no such file: {path}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not YAML: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, got {values!r}")
        base = values.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise RecipeError(f"{path}: base: must be one file, got {base!r}")
            self.read(path.parent / base, (*seen, path.resolve()))
        self.merge(values, str(path))

    def override(self, overrides: Sequence[str]) -> None:
        """Merge ``key.subkey=value`` settings of the command line."""
        tree: dict[str, Any] = {}
        for text in overrides:
            dotted, equals, value = text.partition("=")
            keys = dotted.split(".")
            if not equals or not all(keys):
                raise RecipeError(f"command line: {text!r} is not of the form key.subkey=value")
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise RecipeError(f"command line: {text!r}: {key} is set to {node!r} there too")
            try:
                node[keys[-1]] = yaml.load(value, _Loader)
            except yaml.YAMLError as error:
                raise RecipeError(f"command line: {text!r} is not YAML: {error}") from None
        self.merge(tree, "command line")

    def merge(self, values: dict[str, Any], origin: str) -> None:
        self.values = self._merged(self.values, values, origin, "")

    def _merged(self, old: Any, new: dict[str, Any], origin: str, prefix: str) -> dict[str, Any]:
        # another component by name starts its section afresh: its settings are its own
        old = old if isinstance(old, dict) else {}
        renamed = prefix and new.get("name", old.get("name")) != old.get("name")
        if renamed:
            stale = [key for key in self.origins if key.startswith(prefix)]
            for key in stale:  # or a key missing now would be blamed on the file that had it
                del self.origins[key]
        merged = {} if renamed else dict(old)
        for key, value in new.items():
            dotted = f"{prefix}{key}"
            self.origins[dotted] = origin
            nested = isinstance(value, dict)
            merged[key] = (
                self._merged(merged.get(key), value, origin, f"{dotted}.") if nested else value
            )
        return merged


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number: YAML 1.1 asks for a dot, people don't."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
