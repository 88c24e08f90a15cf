"""Pages that are made when the site is built: read off the package, so that none is behind it."""

import argparse
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import robust_accel
from robust_accel.__main__ import _parser, main
from robust_accel.recipe import SECTIONS
from robust_accel.reference import Key, about, all_keys, members


def on_files(files: Files, config: Any) -> Files:
    pages = {
        "keys": _keys(),
        "commands": _commands(),
        "recipes": _recipes(),
        "python": _python(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "paper/index.md", content=_paper()))
    return files


def _paper() -> str:
    """The map of the paper, which lies beside its recipes."""
    text = (Path(__file__).parent.parent / "recipes/paper/README.md").read_text()
    return text.replace("../../docs/paper/", "").replace("../../docs/", "../")


def _keys() -> str:
    """Every setting of a recipe."""
    keys = all_keys()
    parts = ["# Recipe keys", "Each setting, by section; `robust-accel explain KEY` says the same."]
    for section in SECTIONS:
        parts.append(f"## {section}")
        own = [key for key in keys if key.dotted.split(".")[0] == section]
        for component in members(section):
            if component:
                parts.append(f"### {section}: {component}")
            parts.append(about(section, component).replace("``", "`"))
            parts.append(_table([key for key in own if key.component == component]))
        named = dict.fromkeys(key.component for key in own if key.component not in members(section))
        for component in named:  # the optimizer's own options; a family's name
            parts.append(f"### {section}: {component}" if component else "")
            parts.append(_table([key for key in own if key.component == component]))
    parts += ["## output", _table([key for key in keys if key.dotted == "output"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(keys: list[Key]) -> str:
    if not keys:
        return ""
    rows = [
        f"| `{key.dotted.split('.', 1)[-1]}` | {_cell(key.text)} | {_cell(key.allowed)} | "
        + (f"`{_cell(key.default)}` |" if key.default else "must be given |")
        for key in keys
    ]
    return "\n".join(["| key | | allowed | default |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def _commands() -> str:
    parts = ["# Commands"]
    for name, parser in _parsers(_parser()):
        parts.append(f"## {name}" if name else "")
        parts.append(f"```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


def _parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from _parsers(inner, f"{name} {verb}".strip())


def _recipes() -> str:
    with redirect_stdout(StringIO()) as told:
        main(["recipes"])
    text = "`robust-accel recipe show NAME` prints all settings of one, with where each is from."
    return f"# Packaged recipes\n\n{text}\n\n```text\n{told.getvalue().strip()}\n```\n"


def _python() -> str:
    """The public names, by their own docstrings."""
    parts = ["# Python", "All of these are imported from `robust_accel`."]
    for name in robust_accel.__all__:
        found = getattr(robust_accel, name)
        parts.append(f"::: {found.__module__}.{name}")
    return "\n\n".join(parts) + "\n"
