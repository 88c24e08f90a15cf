"""Recipes as text: a safe part of YAML, bounded, of which every fault is one line.

A recipe is a mapping of text, numbers, true, false, null, lists and mappings, by the rules of YAML
1.2 (its core schema): ``no``, ``1:30`` and ``2026-01-01`` are text, and ``010`` is ten. A value
that is no text keeps how it was written, for keys that want text: ``output: 010`` is the folder
``010``. Nothing is built from tags, and nothing but regular files is opened.
"""

import copy
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from robust_accel.messages import UNPRINTABLE, cut, one_line, shown

MOST_BYTES = 1 << 20
MOST_LEVELS = 32
_MOST_VALUES = 20_000  # longer lists of test images have files of their own
_MOST_KEYS = 1000
_MOST_DIGITS = 100
MOST_FAULTS = 100  # that are told at once

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {text: text.lower() == "true" for text in ("true", "True", "TRUE")}
_BOOLEANS |= dict.fromkeys(("false", "False", "FALSE"), False)
_WHOLE = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_DECIMAL = re.compile(r"([-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?))(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")

# libyaml's parser reads a megabyte in a fraction of a second; both give the same events
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecipeError(ValueError):
    """A recipe that cannot run: one line a fault, with file, key, what was found and allowed."""

    def __init__(self, *faults: str) -> None:
        more = len(faults) - MOST_FAULTS
        last = [f"... and {more} faults more"] * (more > 0)
        super().__init__("\n".join([*map(one_line, faults[:MOST_FAULTS]), *last]))


@dataclass(frozen=True)
class Written:
    """A number or a truth value, and how it was written."""

    value: bool | int | float
    text: str


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping that a file holds; numbers and truth values as ``Written``.

    Raises:
        RecipeError: It cannot be read, or is no such mapping, or too large.
    """
    values = parse(_text_of(Path(path)), str(path))
    if not isinstance(values, dict):
        found = shown(plain(values))
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {found}")
    return values


def read_plain(path: str | Path) -> dict[str, Any]:
    """The same, of plain values.

    Raises:
        RecipeError: As ``read_recipe``.
    """
    return plain(read_recipe(path))


def parse(text: str, source: str) -> Any:
    """The value of a YAML document.

    Args:
        source: Where it is from, for errors.

    Raises:
        RecipeError: ``source: line N: key: what was found, what is allowed``.
    """
    return _Composer(text, source).document()


def parse_setting(text: str, source: str) -> Any:
    """A value of the command line: YAML where it begins like a list, a mapping or a quoted text.

    Raises:
        RecipeError: As ``parse``.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, source)
    refuse_unprintable(text, source)
    return scalar(text)


def refuse_unprintable(text: str, source: str) -> None:
    """Raise RecipeError where a text holds what ``UNPRINTABLE`` finds."""
    if UNPRINTABLE.search(text):
        said = f"a line break or a control character is not allowed, got {shown(text)}"
        raise RecipeError(f"{source}: {said}")


def scalar(text: str) -> str | Written | None:
    """What a text without quotes stands for."""
    if text in _NULL:
        return None
    value = _BOOLEANS[text] if text in _BOOLEANS else number(text)
    return text if value is None else Written(value, text)


def number(text: str) -> int | float | None:
    """The number that a text is; None for others, and where no float comes near to it."""
    if len(text) <= _MOST_DIGITS:
        if _WHOLE.fullmatch(text):
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
        if special := _SPECIAL.fullmatch(text):
            return float(special[1] + special[2])
    decimal = _DECIMAL.fullmatch(text)
    if decimal is None:
        return None
    value = float(text)
    vanished = value == 0 and re.search("[1-9]", decimal[1])
    return None if vanished or math.isinf(value) else value


def plain(tree: Any) -> Any:
    """A copy in which numbers and truth values are what they are."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree.value if isinstance(tree, Written) else tree


def with_texts(tree: dict[str, Any], places: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """Plain values, but as they were written at these places.

    Args:
        places: Of keys and indices; what is neither is passed over.
    """
    values = plain(tree)
    for place in places:
        written: Any = tree
        node: Any = values
        for part in place:
            within = (
                part in written
                if isinstance(written, dict)
                else (isinstance(written, list) and isinstance(part, int) and part < len(written))
            )
            if not within:
                continue
            if isinstance(written[part], Written):
                node[part] = written[part].text
                break
            written, node = written[part], node[part]
    return values


def refuse_other(value: Any) -> None:
    """Raise ValueError where there is a value that is not plain."""
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_other(inner)
            if type(key) is not str:
                raise ValueError(f"the key {shown(key)} is no text")
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_other(inner)
    elif value is not None and type(value) not in (str, bool, int, float):
        raise ValueError(f"{shown(value)} is no plain value")


def dump(values: dict[str, Any]) -> str:
    """Plain values as YAML that reads as the same by 1.1 and 1.2."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_OTHER_BASE, _DECIMAL):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def _text_of(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
            raise RecipeError(f"{path}: {kind} is not allowed: a recipe is a regular file")
        # of the kernel's files some would wait for ever
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if content is None or len(content) > MOST_BYTES:
        raise RecipeError(f"{path}: larger than the {MOST_BYTES:,} bytes that a recipe may have")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {content[error.start]:#x} at position {error.start}"
        raise RecipeError(f"{path}: not YAML: {where} is no UTF-8 text") from None


class _Composer:
    """Turns the events of a parser into values, and counts them."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.num_values = self.num_keys = 0
        self.anchors: dict[str, tuple[Any, int] | None] = {}  # None while it is being read
        self.events = yaml.parse(text, Loader=_Loader)

    def document(self) -> Any:
        try:
            next(self.events)  # of the stream
            event = next(self.events)
            if isinstance(event, yaml.StreamEndEvent):
                return None
            value = self._value(next(self.events), "", 0)
            next(self.events)  # end of the document
            event = next(self.events)
            if not isinstance(event, yaml.StreamEndEvent):
                self._fault(event, "", "a second document: a recipe is one")
            return value
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = "" if mark is None else f"line {mark.line + 1}: "
            said = ", ".join(filter(None, (error.context, error.problem)))
            raise RecipeError(f"{self.source}: not YAML: {line}{said}") from None
        except (yaml.YAMLError, UnicodeError) as error:
            raise RecipeError(f"{self.source}: not YAML: {error}") from None

    def _value(self, event: Any, dotted: str, level: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, dotted)
        self._refuse_tag(event, dotted)
        before = self.num_values
        self._count(event, dotted, 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            text = self._printable(event, dotted)
            value = scalar(text) if event.implicit[0] else text
        elif level == MOST_LEVELS:
            self._fault(event, dotted, f"nested deeper than {MOST_LEVELS} levels")
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(dotted, level)
        else:
            value = self._mapping(dotted, level)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.num_values - before
        return value

    def _sequence(self, dotted: str, level: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, f"{dotted}.{len(values)}", level + 1))
        return values

    def _mapping(self, dotted: str, level: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._fault(event, dotted, "a key that is no text")
            self._refuse_tag(event, dotted)
            key = self._printable(event, dotted)
            if not key:
                self._fault(event, dotted, "a key that is empty")
            place = f"{dotted}.{key}" if dotted else key
            if key == "<<" and event.implicit[0]:
                self._fault(event, place, "merge keys are not allowed: base names another recipe")
            if key in values:
                self._fault(event, place, "the key is there twice")
            self.num_keys += 1
            if self.num_keys > _MOST_KEYS:
                self._fault(event, place, f"more than the {_MOST_KEYS} keys that a recipe may have")
            values[key] = self._value(next(self.events), place, level + 1)
        return values

    def _alias(self, event: Any, dotted: str) -> Any:
        if event.anchor not in self.anchors:
            self._fault(event, dotted, f"not YAML: there is no anchor &{event.anchor} before it")
        found = self.anchors[event.anchor]
        if found is None:
            self._fault(event, dotted, f"*{event.anchor} refers to what it is a part of")
        value, size = found
        self._count(event, dotted, size)
        return copy.deepcopy(value)

    def _count(self, event: Any, dotted: str, size: int) -> None:
        self.num_values += size
        if self.num_values > _MOST_VALUES:
            said = f"more than the {_MOST_VALUES:,} values that a recipe may have"
            self._fault(event, dotted, said)

    def _refuse_tag(self, event: Any, dotted: str) -> None:
        if event.tag is not None:
            tag = cut(event.tag.replace("tag:yaml.org,2002:", "!!"))
            said = f"the tag {tag} is not allowed: quotes make a text"
            self._fault(event, dotted, said)

    def _printable(self, event: Any, dotted: str) -> str:
        if UNPRINTABLE.search(event.value):
            said = f"a line break or a control character is not allowed, got {shown(event.value)}"
            self._fault(event, dotted, said)
        return event.value

    def _fault(self, event: Any, dotted: str, message: str) -> NoReturn:
        line = event.start_mark.line + 1
        key = f"{cut(dotted)}: " if dotted else ""
        raise RecipeError(f"{self.source}: line {line}: {key}{message}")
