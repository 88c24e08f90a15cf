"""Recipes that are broken or hostile: one line a fault, within a second, whatever they are."""

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_recipes import SMALL, faults

from robust_accel.plain_yaml import MOST_BYTES
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import RECIPES

GOOD = (RECIPES / "quickstart.yaml").read_text()


def socket_at(path: Path) -> None:
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def chain(path: Path) -> None:
    """Ever more bases."""
    for i in range(30):
        path.with_name(f"base{i}.yaml").write_text(f"base: base{i + 1}.yaml")
    path.write_text("base: base0.yaml")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


def base_is(what: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        what(path.with_name("below.yaml"))
        path.write_text("base: below.yaml")

    return make


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a device, a pipe or a socket is not allowed"),
    "socket": (socket_at, "a device, a pipe or a socket"),
    "folder": (Path.mkdir, "no such file"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "a device, a pipe or a socket"),
    "null": (lambda path: path.symlink_to("/dev/null"), "a device, a pipe or a socket"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "a device, a pipe or a socket"),
    "memory": (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read"),
    "kernel": (lambda path: path.symlink_to("/proc/cpuinfo"), "broken.yaml: "),
    "loop": (lambda path: path.symlink_to(path.name), "no such file"),
    "nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "missing": (lambda path: None, "no such file"),
    "sparse": (sparse, "larger than the 1,048,576 bytes"),
    "bases": (chain, "more than 8 recipes above one another"),
    "base that is a pipe": (base_is(os.mkfifo), "below.yaml: a device, a pipe or a socket"),
    "base that is a device": (
        base_is(lambda path: path.symlink_to("/dev/zero")),
        "below.yaml: a device, a pipe or a socket",
    ),
    "base that is large": (base_is(sparse), "below.yaml: larger than"),
}


@pytest.mark.parametrize("kind", FILES)
def test_only_regular_files_of_a_size_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = FILES[kind]
    make(tmp_path / "broken.yaml")
    (fault,) = faults(tmp_path / "broken.yaml")
    assert said in fault


@pytest.mark.parametrize("name", ["x" * 300, "x" * 100_000, "a\nb", "a\0b", "a/" * 3000, "\udcff"])
def test_names_of_files_that_cannot_be(name: str) -> None:
    assert "no such file" in faults(name)[0]


def nested(opening: str, closing: str, levels: int) -> str:
    return "model: " + opening * levels + closing * levels


LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CONTENTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "a mapping of sections, got None"),
    "comment": ("# nothing\n", "a mapping of sections, got None"),
    "list": ("- model\n", "a mapping of sections, got ['model']"),
    "text": ("model", "a mapping of sections, got 'model'"),
    "number": ("5", "a mapping of sections, got 5"),
    "end": ("---\n...\n", "a mapping of sections, got None"),
    "zero byte": (b"model: a\0b", "not YAML"),
    "bell": (b"model: a\x07b", "not YAML"),
    "escape": (b"model: \x1b[2Jb", "not YAML"),
    "utf-16": (GOOD.encode("utf-16"), "no UTF-8 text"),
    "utf-16 without mark": (GOOD.encode("utf-16-be"), "not YAML"),
    "utf-32": (GOOD.encode("utf-32"), "no UTF-8 text"),
    "latin-1": ("model: {name: café}".encode("latin-1"), "byte 0xe9 at position 17"),
    "half a character": (b"model: \xed\xa0\x80", "no UTF-8 text"),
    "overlong": (b"model: \xc0\xaf", "no UTF-8 text"),
    "image": (b"\x89PNG\r\n\x1a\n", "no UTF-8 text"),
    "pickle": (pickle.dumps({"model": 1}), "no UTF-8 text"),
    "escaped zero": (r'model: {name: "a\0b"}', "model.name: a line break or a control character"),
    "escaped half": (r'model: {name: "\ud800"}', "not YAML: line 1"),
    "line break": ("model: {name: 'a\n\n b'}", "model.name: a line break"),
    "block": ("output: |\n  a\n  b\n", "line 1: output: a line break"),
    "key with a break": (r'"a\nb": 1', "a line break or a control character"),
    "open list": ("model: [1", "not YAML: line "),
    "open text": ("model: 'a", "not YAML: line 1: while scanning a quoted scalar"),
    "tab": ("model:\n\tname: a", "not YAML: line 2"),
    "colons": ("model: a: b", "not YAML: line 1: mapping values are not allowed"),
    "at": ("model: @a", "not YAML: line 1"),
    "directive": ("%FOO\n", "not YAML"),
    "closed twice": ("{model: 1}}", "not YAML"),
    "two documents": (f"{GOOD}\n---\nmodel: {{}}", "a second document"),
    "ten documents": ("---\n" * 10, "a second document"),
    "key twice": ("model: {name: a, name: b}", "line 1: model.name: the key is there twice"),
    "section twice": ("model: {}\ndata: {}\nmodel: {}", "line 3: model: the key is there twice"),
    "key that is a list": ("? [a]\n: 1", "line 1: a key that is no text"),
    "key that is a mapping": ("model: {{a: 1}: 2}", "model: a key that is no text"),
    "key that is an alias": ("model: &a x\n*a : 1", "a key that is no text"),
    "merge": ("a: &a {b: 1}\nmodel:\n  <<: *a", "line 3: model.<<: merge keys are not allowed"),
    "unknown alias": ("model: *a", "line 1: model: not YAML: there is no anchor &a"),
    "alias before": ("model: *a\ndata: &a 1", "there is no anchor &a before it"),
    "recursive list": ("model: &a [*a]", "model.0: *a refers to what it is a part of"),
    "recursive mapping": ("model: &a\n  b: {c: *a}", "model.b.c: *a refers to what it is a part"),
    "recursive document": ("&a\nmodel: *a", "*a refers to what it is a part of"),
    "laughs": (f"a: &a [x]\n{LAUGHS}", "more than the 20,000 values"),
    "deep lists": (nested("[", "]", 100), "nested deeper than 32 levels"),
    "deeper lists": (nested("[", "]", 100_000), "broken.yaml: "),
    "open lists": (nested("[", "", 500_000), "broken.yaml: "),
    "deep mappings": (nested("{a: ", "}", 60), "nested deeper than 32 levels"),
    "deep indentation": ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested deeper than"),
    "deep items": ("- " * 5000, "nested deeper than 32 levels"),
    "deep keys": ("? " * 5000, "a key that is no text"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(2000)), "more than the 1000 keys"),
    "unknown keys": ("".join(f"k{i}: 1\n" for i in range(900)), "k0: unknown section"),
    "many values": (f"data: {{classes: [{'1, ' * 50_000}]}}", "more than the 20,000 values"),
    "many faults": (f"{SMALL}evaluate: {{ids: [{'x, ' * 19_000}]}}", "evaluate.ids.0: 'x'"),
    "large": ("#" * (MOST_BYTES + 1), "larger than the 1,048,576 bytes"),
    "long value": (f"model: {'x' * 900_000}", "must be a mapping of settings, got 'xxxxx"),
    "long number": (f"model: {'9' * 900_000}", "must be a mapping of settings, got '99999"),
    "long key": (f"{'k' * 900_000}: 1", "not YAML"),
    "long quoted key": (f'{{"{"k" * 900}": 1}}', "(900 characters): unknown section"),
    "long anchor": (f"model: &{'a' * 100_000} b", "model: must be a mapping"),
    "long tag": (f"model: !{'a' * 100_000} b", "the tag !aaa"),
    "long base": (f"base: {'x' * 100_000}", "no such file: /"),
    "base of a list": ("base: [a, b]", "base: must be one file"),
    "base that is no name": ("base: {a: b}", "base: must be one file"),
    "base of itself": ("base: broken.yaml", "inherits from itself"),
    "base that is a folder": ("base: .", "no such file"),
    "output that is a list": (f"{SMALL}output: [a]", "output: must be a folder, got ['a']"),
}
TAGS = [
    "!!python/object/apply:os.system [touch victim]", "!!python/name:os.system ''",
    "!!python/object/new:subprocess.Popen [[touch, victim]]", "!!python/module:os ''",
    "!!python/tuple [1]", "!!binary aGVsbG8=", "!!timestamp 2026-13-45", "!!timestamp 2026-01-01",
    "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!float x", "!!int 5", "!!null ''", "!!str 5",
    "!!bool maybe", "!!map {}", "!!seq []", "!own x", "! x", "!!merge x", "!<tag:evil> x",
]  # fmt: skip


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_that_are_no_recipe(kind: str, tmp_path: Path) -> None:
    content, said = CONTENTS[kind]
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = faults(path)
    assert said in found[0]
    assert str(path) in found[0] or "command line" in found[0]


@pytest.mark.parametrize("value", TAGS)
def test_tags_build_nothing(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text(f"{SMALL}evaluate:\n  ids: {value}")
    (fault,) = faults("broken.yaml")
    assert fault.startswith("broken.yaml: line 8: evaluate.ids: the tag ")
    assert os.listdir() == ["broken.yaml"]


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_recipe(path).settings["train"]["epochs"] == 2


def test_an_alias_is_a_value_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL.replace("eps: 0.2", "eps: &eps 8/255") + "evaluate: {eps: *eps}")
    recipe = load_recipe(path)
    assert recipe.evaluate.eps == recipe.settings["attack"]["eps"] == 8 / 255
