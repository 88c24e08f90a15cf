"""What somebody else has written: told on one line, cut where it is long, and what is meant."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST_VALUE = 120
_LONGEST_LINE = 4000  # timm has many optimizers
# What makes a terminal or an editor do or hide something, and is in no name of anything: line
# breaks and other control characters, directions, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str, longest: int = _LONGEST_LINE) -> str:
    """The text on one line, of at most so many characters; what cannot be printed is escaped."""
    text = cut(text, longest)
    text = " ".join(re.split(r"[ \t]*[\r\n]+[ \t]*", text.strip()))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A value as Python writes it, on one line and cut."""
    return one_line(_text_of(value, repr), _LONGEST_VALUE)


def told(error: BaseException) -> str:
    """An error's kind and what it says, whatever a user's own makes of ``str``."""
    return f"{type(error).__name__}: {_text_of(error, str)}"


def _text_of(value: Any, write: Callable[[Any], str]) -> str:
    try:
        return write(value)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:  # ``Stopped``
            raise
        return f"<a {type(value).__name__} that cannot be shown>"


def cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 30]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """The text of several lines, without what ``UNPRINTABLE`` finds but tabs and line feeds."""
    keep = lambda found: found[0] if found[0] in "\t\n" else "\N{REPLACEMENT CHARACTER}"  # noqa: E731
    return UNPRINTABLE.sub(keep, text)


def is_setting(argument: str) -> bool:
    """Whether a word of the command line is ``key.subkey=value``."""
    return "=" in argument and not argument.startswith("-")


def close_to(name: object, known: Iterable[str], most: int = 1) -> str:
    """`` (did you mean ...?)`` with the names that are close, capitals or not, or nothing."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(cut(str(name)).lower(), list(by_lower), n=most)
    close = [by_lower[other] for other in found]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
