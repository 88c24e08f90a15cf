"""What somebody else has written, in messages: on one line, and cut where it is long."""

import re
from typing import Any

_LONGEST_VALUE = 120
_LONGEST_LINE = 4000  # timm has many optimizers
# line breaks, other control characters, and halves of a character: in no name of anything
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Control characters but tabs and line feeds, other line ends, directions, halves of characters.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def one_line(text: str, longest: int = _LONGEST_LINE) -> str:
    """The text on one line, of at most so many characters; what cannot be printed is escaped."""
    text = cut(text, longest)
    text = " ".join(re.split(r"[ \t]*[\r\n]+[ \t]*", text.strip()))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A value as Python writes it, on one line and cut."""
    return one_line(repr(value), _LONGEST_VALUE)


def cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 30]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """Text without what makes a terminal or an editor do or hide something."""
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text)
