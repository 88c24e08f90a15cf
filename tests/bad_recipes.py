"""A small recipe, and what is said of one that is broken."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import load_recipe

SMALL = """
model: {name: wide_resnet10_1}
data: {path: "sklearn:digits"}
attack: {name: pgd, eps: 0.2}
optimizer: {lr: 0.03}
train: {epochs: 2, batch_size: 64}
"""


@contextmanager
def ending() -> Iterator[None]:
    """Ends what hangs."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)  # of a machine that does other things
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def at_once(calls: int = 1_000_000) -> Iterator[None]:
    """Holds what is computed to so many calls, too: a second of a slow machine."""

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls -= event in ("call", "c_call")

    with ending():
        sys.setprofile(count)
        try:
            yield
        finally:
            sys.setprofile(None)
    assert calls > 0


def told(source: str | Path, *overrides: str, **options: Any) -> list[str]:
    """The lines of a recipe's error, of which each is one."""
    with ending(), pytest.raises(RecipeError) as refused:
        load_recipe(source, overrides, **options)
    lines = str(refused.value).split("\n")
    for line in lines:
        assert line.isprintable()
        assert 10 < len(line) <= 4000
    return lines


def faults(source: str | Path, *overrides: str) -> list[str]:
    """As ``told``, of a recipe that may be hostile: counting calls takes its time."""
    with at_once():
        return told(source, *overrides)
