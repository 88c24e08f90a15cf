"""Hand-made bad recipes, each of another kind: one line a fault, which names the file and the key.

Files that are no recipe at all are in ``test_recipe_hostile.py``, numbers and texts in
``test_recipe_values.py``, classes by name in ``test_recipe_names.py``.
"""

import gzip
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_recipes import SMALL, told

from robust_accel.__main__ import main
from robust_accel.exit_codes import USAGE
from robust_accel.recipe import load_recipe


def small(old: str, new: str) -> str:
    """The small recipe, in another wording."""
    assert old in SMALL
    return SMALL.replace(old, new)


# ---- one file: what it holds, and what is said of it, after its name --------------------------

CONTENTS: dict[str, tuple[str | bytes, str]] = {
    # bytes
    "utf-16 with a mark": (f"\ufeff{SMALL}".encode("utf-16-le"), "not YAML: byte 0xff at"),
    "utf-7": (small("pgd", "+AHAAZwBk-").encode(), "attack.name: '+AHAAZwBk-' is unknown"),
    "windows quotes": (b"model: {name: \x93a\x94}", "not YAML: byte 0x93 at position 14"),
    "shift-jis": ("model: {name: 日}".encode("shift-jis"), "not YAML: byte 0x93"),
    "compressed": (gzip.compress(SMALL.encode()), "not YAML: byte 0x8b at position 1"),
    "a mark inside": (f"{SMALL}\ufeffschedule: {{}}", "not YAML: line 7: "),
    "a form feed": ("model: {}\fdata: {}", "not YAML: unacceptable character #x000c"),
    "no character": (small("pgd", "p\uffffgd"), "not YAML: unacceptable character #xffff"),
    # other languages
    "toml": ("[model]\nname = 'a'\n", "not YAML: line 2: "),
    "ini": ("model.name = a\n", "a recipe is a mapping of sections, got 'model.name = a'"),
    "html": ("<!DOCTYPE html><html>404</html>", "a mapping of sections, got '<!DOCTYPE"),
    "a conflict": ("<<<<<<< HEAD\nmodel: {}\n=======\n", "not YAML: line 2: mapping values"),
    "json, a key twice": ('{"a": {"b": 1,\n "b": 2}}', "line 2: a.b: the key is there twice"),
    # keys
    "dotted keys": (f"{SMALL}train.epochs: 3\n", "train.epochs: unknown section"),
    "dotted within": (f"{SMALL}evaluate: {{'pgd.num_steps': 1}}", "evaluate.pgd.num_steps: unkn"),
    "capitals": (small("train:", "Train:"), "Train: unknown section (did you mean train?)"),
    "capitals within": (small("epochs", "EPOCHS"), "train.EPOCHS: unknown key (did you mean epoch"),
    "a dash": (small("batch_size", "batch-size"), "train.batch-size: unknown key (did you mean ba"),
    "cyrillic": (small("epochs", "\u0435pochs"), "train.\u0435pochs: unknown key (did you mean ep"),
    "a space of no width": (small("eps", "e\u200bps"), "attack.e\\u200bps: unknown key (did you m"),
    "a hard space": ("model:\n\u00a0 name: a", "\\xa0 name: unknown section"),
    "another direction": (small("eps", "\u202eeps"), "line 4: attack: a line break or a control c"),
    "a direction in a value": (small("pgd", "p\u202egd"), "line 4: attack.name: a line break or a"),
    "private characters": (small("pgd", "p\ue000gd"), r"attack.name: 'p\ue000gd' is unknown (did"),
    "a tab in a key": (f'{SMALL}evaluate: {{"e\\tps": 1}}', "evaluate: a line break or a control"),
    "an empty key": (f"{SMALL}'': 1\n", "line 7: a key that is empty"),
    "an empty key within": (f"{SMALL}evaluate: {{'': 1}}", "line 7: evaluate: a key that is empty"),
    "a null key": (f"{SMALL}~: 1\n", "~: unknown section"),
    "a number as a key": (f"{SMALL}1: {{}}\n", "1: unknown section"),
    "a truth value as a key": (f"{SMALL}evaluate: {{true: 1}}", "evaluate.true: unknown key"),
    "a quoted merge key": (f"{SMALL}evaluate: {{'<<': {{eps: 1}}}}", "evaluate.<<: unknown key"),
    "merge of a list": ("a: &a {}\nb: &b {}\nmodel: {<<: [*a, *b]}", "line 3: model.<<: merge key"),
    "a long key within": (f"{SMALL}evaluate: {{{'k' * 1000}: 1}}", "characters): unknown key"),
    "quotes in a key": (f"{SMALL}evaluate: {{'a\"b''c': 1}}", "evaluate.a\"b'c: unknown key"),
    "twice in flow, deep": (
        f"{SMALL}evaluate: {{pgd: {{num_steps: 1, num_steps: 2}}}}",
        "line 7: evaluate.pgd.num_steps: the key is there twice",
    ),
    "twice in a block": ("train:\n  epochs: 1\n  epochs: 2\n", "line 3: train.epochs: the key is"),
    "twice, once quoted": ("model: {'name': a, name: b}", "line 1: model.name: the key is there t"),
    "twice, once escaped": (r'model: {name: a, "n\x61me": b}', "model.name: the key is there twic"),
    "twice, with a space": (f"{SMALL}train : {{}}\n", "line 7: train: the key is there twice"),
    "base twice": (f"{SMALL}base: a\nbase: b\n", "line 8: base: the key is there twice"),
    "unknown sections": ("".join(f"k{i}: 1\n" for i in range(999)), "k0: unknown section"),
    # aliases
    "an alias of a section": (f"{SMALL.strip()}\nevaluate: &a {{pgd: *a}}", "*a refers to what it"),
    "an alias of another kind": (
        small("{lr: 0.03}", "&o {lr: 0.03}") + "schedule: *o\n",
        "schedule.lr: unknown key",
    ),
    "an anchor twice": (
        small("{lr: 0.03}", "{lr: &a 0.1, weight_decay: &a -1, eps: *a}"),
        "optimizer.weight_decay: -1 is not allowed",
    ),
    # of another kind than wanted
    "a list for a section": (small("{lr: 0.03}", "[lr, 0.03]"), "optimizer: must be a mapping of"),
    "a text for a section": (small("{name: pgd, eps: 0.2}", "pgd"), "attack: must be a mapping of"),
    "a flag for a section": (f"{SMALL}communication: true", "communication: must be a mapping of"),
    "a list for a name": (small("wide_resnet10_1", "[a]"), "model.name: ['a'] is not allowed"),
    "a mapping for a name": (small("pgd", "{a: b}"), "attack.name: {'a': 'b'} is unknown"),
    "a date for a number": (small("epochs: 2", "epochs: 2026-01-01"), "train.epochs: '2026-01-01'"),
    "a sexagesimal": (small("epochs: 2", "epochs: 190:20:30"), "train.epochs: '190:20:30' is not"),
    "binary": (small("epochs: 2", "epochs: 0b11"), "train.epochs: '0b11' is not allowed"),
    "underscores": (small("epochs: 2", "epochs: 1_0"), "train.epochs: '1_0' is not allowed"),
    "thousands": (small("epochs: 2", "epochs: 1'000"), "train.epochs: \"1'000\" is not allowed"),
    "other digits": (small("epochs: 2", "epochs: \u0663"), "train.epochs: '\u0663' is not allowed"),
    "wide digits": (small("0.2", "\uff18/255"), "attack.eps: '\uff18/255' is not allowed"),
    "a percentage": (small("0.2", "8%"), "attack.eps: '8%' is not allowed"),
    "half a fraction": (small("0.2", "8/"), "attack.eps: '8/' is not allowed"),
    "negative zero": (small("0.2", "-0.0"), "attack.eps: -0.0 is not allowed: input should be gr"),
    "a rate that vanishes": (small("0.03", "1e-46"), "optimizer.lr: 1e-46 is not allowed: a finit"),
    "a flag by number": (f"{SMALL}certify: {{seed: on}}", "certify.seed: 'on' is n"),
    "one of a list": (f"{SMALL}certify: {{radii: 0.5}}", "certify.radii: 0.5 is not allowed"),
    "rates in one": (small("lr: 0.03", "lr: 0.03, betas: 0.9"), "optimizer.betas: 0.9 is not allo"),
    "several for one": (small("lr: 0.03", "lr: 1, eps: [1]"), "optimizer.eps: [1] is not allowed:"),
    "a flag of an optimizer": (small("lr: 0.03", "lr: 1, foreach: maybe"), "optimizer.foreach: 'm"),
    "times": (small("epochs: 2", "epochs: 2, max_time: \u0663h"), "train.max_time: '\u0663h'"),
    "a home": (small("sklearn:digits", "~no.body/a"), "data.path: '~no.body/a' is not allowed: a"),
    # contradictions
    "classes twice": (small('digits"', 'digits", classes: [0, 0]'), "data: classes: [0, 0] names"),
    "a warm-up longer than all": (
        f"{SMALL}schedule: {{name: cosine, warmup_epochs: 99}}",
        "schedule.warmup_epochs: must be < epochs = 2, got 99",
    ),
    "milestones backwards": (
        f"{SMALL}schedule: {{name: piecewise, milestones: [3, 1]}}",
        "schedule.milestones: [3, 1] is not allowed: milestones must increase",
    ),
    "bits for one that has none": (
        f"{SMALL}communication: {{name: allreduce, bits: 8}}",
        "communication.bits: unknown key; allowed: dtype",
    ),
    "labels of nothing": (small('digits"', 'digits", unlabeled: {}'), "data: unlabeled.path is no"),
    "a size in memory": (small('digits"', 'digits", image_size: 8'), "data: image_size is for ima"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_a_file_holds(kind: str, tmp_path: Path) -> None:
    content, said = CONTENTS[kind]
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = told(path)
    assert any(said in line for line in found)
    for line in found[:100]:
        assert line.startswith(f"{path}: ")
    assert sum(map(len, found)) < 50_000


# ---- bases: the files, and what is said of which ----------------------------------------------

BASES: dict[str, tuple[dict[str, str | bytes], str]] = {
    "a loop of three": (
        {"top": "base: a", "a": "base: b", "b": "base: c", "c": "base: a"},
        "a: base: the recipe inherits from itself",
    ),
    "a loop by another name": ({"top": "base: ./sub/../top"}, "top: base: "),
    "a key twice below": ({"top": "base: a", "a": "train: {b: 1, b: 2}"}, "a: line 1: train.b: th"),
    "no text below": ({"top": "base: a", "a": b"\xff\xfe"}, "a: not YAML: byte 0xff"),
    "a fault below": (
        {"top": "base: a\noutput: x", "a": small("epochs: 2", "epochs: two")},
        "a: train.epochs: 'two' is not allowed",
    ),
    "a fault above": ({"top": "base: a\ntrain: {epochs: two}", "a": SMALL}, "top: train.epochs: '"),
    "a section that becomes a text": ({"top": "base: a\ntrain: x", "a": SMALL}, "top: train: must"),
    "a section that becomes a list": ({"top": "base: a\ndata: [1]", "a": SMALL}, "top: data: must"),
    "a section that is taken away": ({"top": "base: a\nmodel:", "a": SMALL}, "top: model: missing"),
    "a key that is taken away": ({"top": "base: a\ntrain: {epochs: }", "a": SMALL}, "top: train.e"),
    "only sections below": ({"top": "base: a", "a": "evaluate: {eps: 0.1}"}, "top: data: missing"),
    "of the web": ({"top": "base: https://a.example/a.yaml"}, "top: base: no such file: "),
    "of a hub": ({"top": "base: hf://datasets/a/b.yaml"}, "top: base: no such file: "),
    "a file's address": ({"top": "base: file:///etc/passwd"}, "top: base: no such file: "),
    "a home": ({"top": "base: ~/a.yaml"}, "top: base: no such file: "),
    "a variable": ({"top": "base: $HOME/a.yaml"}, "top: base: no such file: "),
    "a pattern": ({"top": "base: '*'", "a": SMALL}, "top: base: no such file: "),
    "two in one text": ({"top": "base: a, b", "a": SMALL, "b": SMALL}, "top: base: no such file: "),
    "a file as a folder": ({"top": "base: a/b", "a": SMALL}, "top: base: no such file: "),
    "an empty name": ({"top": "base: ''"}, "top: base: no such file: "),
    "a truth value": ({"top": "base: true"}, "top: base: no such file: "),
    "a long name": ({"top": f"base: {'x' * 256}"}, "top: base: no such file: "),
    "outside": ({"top": "base: ../../../../../../../etc/hostname"}, "hostname: a recipe is a mapp"),
    "an absolute path": ({"top": "base: /etc/hostname"}, "/etc/hostname: a recipe is a mapping of"),
    "the keyboard": ({"top": "base: /dev/stdin"}, "/dev/stdin: "),
    "the environment": ({"top": "base: /proc/self/environ"}, "/proc/self/environ: not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
def test_what_is_inherited(kind: str, tmp_path: Path) -> None:
    files, said = BASES[kind]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert any(said in line for line in told(tmp_path / "top"))


# ---- the command line ---------------------------------------------------------------------------

FORM = "is not of the form key.subkey=value"
OVERRIDES: dict[str, str] = {
    "=1": FORM,
    ".=1": FORM,
    "a.b.=1": FORM,
    "..train=1": FORM,
    "train.epochs": FORM,
    f"{'a.' * 40}b=1": FORM,
    "a=": "a: unknown section",
    "train=3": "train: must be a mapping of settings, got 3",
    "attack=pgd": "attack: must be a mapping of settings, got 'pgd'",
    "train.epochs=": "train.epochs: None is not allowed: a whole number is wanted",
    "train.epochs==2": "train.epochs: '=2' is not allowed",
    "train.epochs=[1]": "train.epochs: [1] is not allowed",
    "train.epochs.more=1": "train.epochs: {'more': 1} is not allowed",
    "train.epochs=[1, 2": "train.epochs: not YAML: line ",
    "train.epochs={a: {b: ": "train.epochs: not YAML: line ",
    "train.epochs='": "train.epochs: not YAML: line 1: while scanning a quoted scalar",
    "train.epochs=1 000": "train.epochs: '1 000' is not allowed",
    "train.epochs=\uff11\uff12": "train.epochs: '\uff11\uff12' is not allowed",
    "train.epochs=\u202e1": r"train.epochs: a line break or a control character is not allowed",
    "\udcff=1": r"a line break or a control character is not allowed, got '\udcff'",
    "train.\udcff=1": r"a line break or a control character is not allowed, got 'train.\udcff'",
    "a\nb.c=1": r"a line break or a control character is not allowed, got 'a\nb.c'",
    "train.e\u0301poch=1": "train.e\u0301poch: unknown key (did you mean epochs?)",
    "base=other.yaml": "base: unknown section",
    "output={a: 1}": "output: must be a folder, got {'a': 1}",
    "output=~nobody.at.all/runs": "output: '~nobody.at.all/runs' is not allowed: a ~ stands",
    "attack.name=' '": "attack.name: ' ' is unknown",
    "attack.eps=8:255": "attack.eps: '8:255' is not allowed",
    "optimizer.lr=2^64": "optimizer.lr: '2^64' is not allowed",
    "train.max_time=1h-5m": "train.max_time: '1h-5m' is not allowed",
    "data.classes={0: 1}": "data.classes: {'0': 1} is not allowed",
    "train.awp=0.005": "train.awp: 0.005 is not allowed",
    "train.awp.gama=1": "train.awp.gama: unknown key (did you mean gamma?)",
    "evaluate.sanity=[1]": "evaluate.sanity: [1] is not allowed: true or false is wanted",
    "model.options=[1]": "model.options: [1] is not allowed",
    "communication={name: qsgd, bits: '8'}": "communication.bits: '8' is not allowed",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_what_the_command_line_says(override: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    found = told(path, override)
    assert any(OVERRIDES[override] in line for line in found)
    for line in found:
        assert line.startswith("command line: ")


# ---- classes by name ----------------------------------------------------------------------------

CALL = "\n    def __call__(self, loss_fn, x, *, generator=None):\n        return x\n"
MODULES: dict[str, tuple[str, str]] = {
    "an error without words": (
        "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
        "cannot be imported: E: <a E that cannot be shown>",
    ),
    "an endless error": ("raise ValueError('x' * 10**7)", "cannot be imported: ValueError: xxx"),
    "an error that clears": ("raise ValueError('\\x1b[2J\\udc80')", r"ValueError: \x1b[2J\udc80"),
    "all files closed": ("import os\nos.closerange(3, 4096)", "it ends the process (status 0)"),
    "a thread": (
        "import threading\nthreading.Timer(3, print).start()\nraise OSError",
        "cannot be imported: OSError",
    ),
    "a zero byte": ("class A: pass\0", "SyntaxError: source code string cannot contain null bytes"),
    "no such encoding": ("# coding: nothing\n", "SyntaxError: unknown encoding: nothing"),
    "an object without words": (
        "class B:\n    def __repr__(self): raise SystemExit(3)\nA = B()",
        "is no class, but <a B that cannot be shown>",
    ),
    "a metaclass": (
        "class M(type):\n    def __getattribute__(cls, name): raise RuntimeError('m')\n"
        f"class A(metaclass=M):{CALL}",
        "cannot be imported: RuntimeError: m",
    ),
    "abstract": (
        f"import abc\nclass A(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\n{CALL}",
        "Can't instantiate abstract class A",
    ),
    "a protocol": (f"from typing import Protocol\nclass A(Protocol):{CALL}", "cannot be instantia"),
    "not awaited": (f"class A:{CALL.replace('def', 'async def')}", "no method __call__(loss_fn, x"),
    "a number made": (f"class A:\n    def __new__(cls): return 5\n{CALL}", "gives 5, no instance"),
    "nothing made": (f"class A:\n    def __new__(cls): return None\n{CALL}", "gives None, no inst"),
    "an error of its own": (
        f"class E(BaseException): pass\nclass A:\n    def __init__(self): raise E('b')\n{CALL}",
        "attack: E: b",
    ),
    "endless calls": (f"class A:\n    def __init__(self): self.__init__()\n{CALL}", "RecursionErr"),
    "keys that are wanted": (f"class A:\n    def __init__(self, s): ...\n{CALL}", "argument: 's'"),
    "circular": ("from {name} import nothing", "cannot import name 'nothing' from partially init"),
}  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a user's module, another one in each test."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"kinds_{os.path.basename(tmp_path)}"
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", MODULES)
def test_what_a_users_class_does(kind: str, module: str, tmp_path: Path) -> None:
    body, said = MODULES[kind]
    (tmp_path / f"{module}.py").write_text(body.replace("{name}", module))
    text = small("{name: pgd, eps: 0.2}", f"{{name: '{module}:A'}}")
    (tmp_path / "own.yaml").write_text(f"{text}evaluate: {{norm: linf, eps: 0.2}}\n")
    (found,) = told(tmp_path / "own.yaml")
    assert found.startswith(f"{tmp_path}/own.yaml: attack")
    assert said in found


@pytest.mark.parametrize(
    "name", ["json:__name__", "json:__loader__", "json:__class__", "json:JSONDecoder.decode",
             "a::b", "a/b:C", "__main__:A", ".json:A", "file:///x:A", "robust_accel.optim:LAMB"],
)  # fmt: skip
def test_names_that_are_no_attack(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(small("{name: pgd, eps: 0.2}", f"{{name: '{name}'}}"))
    (found,) = told(path)
    assert found.startswith(f"{path}: attack.name: '{name}' ")


# ---- the command --------------------------------------------------------------------------------

SAMPLE = ["utf-16 with a mark", "unknown sections", "a tab in a key", "a home", "classes twice"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_command_says_so_and_ends(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = CONTENTS[kind]
    Path("broken.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", "broken.yaml"]) == USAGE
    printed = capsys.readouterr()
    assert printed.err.startswith("robust-accel: broken.yaml: ")
    assert said in printed.err and "Traceback" not in printed.err
    assert os.listdir() == ["broken.yaml"]


def test_the_command_says_so_of_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", os.fsdecode(b"train.\xff=1"), "train.epochs=two"]) == USAGE
    said = r"a line break or a control character is not allowed, got 'train.\udcff'"
    assert capsys.readouterr().err == f"robust-accel: command line: {said}\n"


def test_a_tilde_that_no_shell_would_expand_is_a_name_like_others(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert load_recipe(path, ["output=./~", "data.path=a/~b"]).output == Path("~")


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "my own.yaml").write_text("base: ~/base.yaml")
    recipe = load_recipe("~/my own.yaml", ["output=~/runs", "data.path=~/images"])
    assert (recipe.output, recipe.data.path) == (tmp_path / "runs", f"{tmp_path}/images")
    assert recipe.settings["output"] == f"{tmp_path}/runs"
