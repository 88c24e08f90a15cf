"""Code blocks of the documentation, each tried by what it is.

python
    Run, in one namespace a page. With ``# NAME.py`` in its first line it is that module, imported.
diff
    The code after it is run.
yaml
    A study is read; a recipe, or a part of one, is built. ``# PATH: ...`` in the first line is a
    file that later blocks of the page find.
sh
    Each command line is parsed: the launcher's part by the launcher, ours by ``main``, the recipe
    by the recipe reader. Nothing is trained, but it could be: each training of a page has a run
    folder of its own, and a batch that its processes can share.
text
    What a command prints: not tried.

A page marks a block that cannot be run everywhere, in a comment that is not rendered::

    <!-- skip: next "needs a hub" -->

``reader.py`` has the names that a block may take for granted.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from unittest import SkipTest

import pytest
from accelerate.commands.launch import launch_command_parser
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from torch.distributed.run import get_args_parser

from robust_accel.__main__ import main
from robust_accel.models import check_name, timm_name
from robust_accel.plain_yaml import plain, read_recipe
from robust_accel.recipe import Recipe, load_recipe, recipe_of_use
from robust_accel.recipe_file import packaged_recipes
from robust_accel.reporting.tables import Table
from robust_accel.studies.study_file import read_study

ROOT = Path(__file__).parent.parent
PASSING = ("cat", "export", "hf", "pip", "pre-commit", "wget")  # commands that others have
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Try every block of a page, from the current folder.

    Raises:
        AssertionError: The page has a block of another kind, or one is wrong.
    """
    monkeypatch.delitem(sys.modules, "reader", raising=False)  # whose objects a page may change
    for folder in (ROOT / "examples", Path.cwd()):  # PYTHONPATH=examples, or the reader's own
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("robust_accel.commands.train.run", _trained)
    monkeypatch.setattr("robust_accel.commands.check.run", _checked)
    for command in ("evaluate", "certify", "pseudo_label"):
        monkeypatch.setattr(f"robust_accel.commands.{command}.run", _measured)
    monkeypatch.setattr("robust_accel.commands.report.run", lambda options: 0)
    monkeypatch.setattr("robust_accel.commands.wrap.wrap_script", lambda *_, **__: 0)
    study = "robust_accel.commands.study"
    monkeypatch.setattr(f"{study}._run", lambda *_: ([], []))
    monkeypatch.setattr(f"{study}.write_overview", lambda *_: Table(["study"], []))
    fences = re.findall(r"^ *```(\w*)$", page.read_text(), re.MULTILINE)
    assert {*fences[::2]} <= {*KINDS} and not any(fences[1::2]), f"{page}: a block of no known kind"
    parsers = [CodeBlockParser(kind, evaluate) for kind, evaluate in KINDS.items()]
    document = Sybil([*parsers, SkipParser()]).parse(page)
    document.namespace["monkeypatch"] = monkeypatch
    for example in document:
        try:
            example.evaluate()
        except SkipTest:
            continue
        except Exception as error:
            raise AssertionError(f"{page}:{example.line}: {error}") from error


def _python(example: Example) -> None:
    named = re.match(r"# (\w+)\.py\n", str(example.parsed))
    if named is None:
        PythonEvaluator()(example)
        return
    Path(f"{named[1]}.py").write_text(example.parsed)
    sys.modules.pop(named[1], None)
    example.namespace.update(vars(import_module(named[1])))


def _diff(example: Example) -> None:
    lines = str(example.parsed).splitlines()
    after = "\n".join(line[1:] for line in lines if line[:1] in ("+", " "))
    exec(compile(after, example.path, "exec"), example.namespace)


def _yaml(example: Example) -> None:
    text = str(example.parsed)
    named = re.match(r"# ([\w./-]+\.yaml)\b", text)
    path = Path(named[1] if named else "block.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    values = plain(read_recipe(path))
    if "runs" in values:
        read_study(path, None)
    elif "base" in values:
        load_recipe(path)
    else:
        load_recipe("cifar10/at", layers=[path])


def _shell(example: Example) -> None:
    for words in _commands(str(example.parsed)):
        _try(words)


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words:
            yield words


def _try(words: list[str]) -> None:
    name, *rest = words
    if name == "robust-accel":
        assert main(rest) == 0, shlex.join(words)
    elif name == "accelerate" and rest[0] == "launch":
        _launched(launch_command_parser().parse_args(rest[1:]))
    elif name == "torchrun":
        _launched(get_args_parser().parse_args(rest))
    elif name == "srun":  # bash -c 'COMMAND', on each node
        _try(shlex.split(re.sub(r"\$\w+", "0", rest[-1])))
    elif Path(name).name == "python":
        _script(rest[0])
    elif name == "make":
        target = re.search(
            rf"^{rest[0]}:.*\n(\t.*\n)*", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        assert target is not None, rest
        for command in re.findall(r"robust-accel (train .*)", target[0]):
            _try(["robust-accel", *command.split()])
    elif name == "pip" and (extras := re.search(r"\[([\w,]+)\]", " ".join(rest))):
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {*extras[1].split(",")} <= {*known}, extras[1]
    else:
        assert name in PASSING, f"{name}: no command that is known here"


def _launched(options: argparse.Namespace) -> None:
    config = getattr(options, "config_file", None)
    assert config is None or (ROOT / config).exists() or Path(config).exists(), config
    if options.module:
        assert options.training_script == "robust_accel"
        words = list(options.training_script_args)
        if words[0] == "train":
            given = vars(options).get("num_processes") or vars(options).get("nproc_per_node")
            processes = int(given or 1)
            _shared(load_recipe(words[1], [word for word in words[2:] if "=" in word]), processes)
            if getattr(options, "machine_rank", None):
                words.append("--resume")  # the same training, on another machine
        assert main(words) == 0, words
    else:
        _script(options.training_script)


def _script(path: str) -> None:
    """A script of this repository, or of the reader's."""
    assert path in ("train.py", "my_train.py") or (ROOT / path).exists(), f"{path}: no such script"


def _shared(recipe: Recipe, processes: int) -> None:
    """A step's images can be dealt to the processes."""
    assert recipe.train is not None
    parts = processes * recipe.train.gradient_accumulation
    assert recipe.train.batch_size % parts == 0, f"{recipe.train.batch_size} images for {parts}"


def _checked(options: argparse.Namespace) -> int:
    _shared(load_recipe(options.recipe, options.settings), (options.processes or 1))
    return 0


def _trained(options: argparse.Namespace) -> int:
    folder = load_recipe(options.recipe, options.settings).output
    assert options.resume or not folder.exists(), f"{folder}: another training's"
    folder.mkdir(parents=True, exist_ok=True)
    return 0


def _measured(options: argparse.Namespace) -> int:
    """The settings of a command that uses a model; a run is that of the recipe of its name."""
    module = import_module(options.command)
    section = module.__name__.rpartition(".")[2]
    folder = Path(options.model)
    if folder.parts[0] == "runs":
        name = str(folder.relative_to("runs"))
        settings = load_recipe(name if name in packaged_recipes() else "cifar10/dat_pgd").settings
    else:
        if not options.model.startswith("local-dir:"):  # of the reader's
            timm_name(check_name(options.model))
        settings = {"model": {"name": options.model, "pretrained": True}}
    if getattr(options, "data", None):
        settings.setdefault("data", {})["path"] = options.data
    own = [section] if section in ("evaluate", "certify") else []
    recipe_of_use(settings, options.settings, options.model, required=("model", "data", *own))
    return 0


KINDS: dict[str, Callable[[Example], None]] = {
    "python": _python,
    "diff": _diff,
    "yaml": _yaml,
    "sh": _shell,
    "text": lambda example: None,
}
