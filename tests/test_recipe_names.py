"""Names in a recipe that is trained: a class of the family, found without calling anything."""

import itertools
import os
import signal
import sys
from pathlib import Path
from textwrap import indent

import psutil
import pytest
from bad_recipes import SMALL, at_once, faults

from robust_accel import components
from robust_accel.attacks import FGSMRS
from robust_accel.components import find_component
from robust_accel.exit_codes import Stopped
from robust_accel.messages import one_line
from robust_accel.recipe import SECTIONS, load_recipe
from robust_accel.training.stopping import Stop

FAMILIES = {"attack", "objective", "schedule", "communication"}
RECIPE = SMALL + "evaluate: {norm: linf, eps: 0.2}\n"
OWN = """
import dataclasses, enum, torch

class Attack:
    def __init__(self, eps=0.1):
        self.eps = eps
    def __call__(self, loss_fn, x, *, generator=None):
        return x

class Module(torch.nn.Module):
    def forward(self, loss_fn, x, *, generator=None):
        return x

class Static:
    @staticmethod
    def __call__(loss_fn, x, *, generator=None):
        return x

class Child(Attack):
    pass

class Nothing:
    pass

class Positional:
    def __call__(self, loss_fn, x):
        return x

class More:
    def __call__(self, loss_fn, x, labels, *, generator=None):
        return x

class Attribute:
    __call__ = None

class Raises(Attack):
    def __init__(self):
        raise KeyError("line\\nbreak")

class Exits(Attack):
    def __init__(self):
        raise SystemExit(3)

@dataclasses.dataclass
class NotPlain(Attack):
    device: object = torch.device("cpu")

class Objective:
    def inner_loss(self, classifier, x, labels): ...
    def loss(self, classifier, x, x_adv, labels): ...

class HalfObjective:
    def inner_loss(self, classifier, x, labels): ...

class OfBatches:
    def for_batch(self, x): ...

class Schedule:
    def factor(self, epoch, total_epochs): return 1.0
    def check(self, epochs): ...

class Collective:
    def exchanges(self, flat, segments, step, workers, meter): ...

def function(*args, **kwargs): ...
instance = Attack()
"""
BODIES = {
    "raises": ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    "exits": ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
    "leaves": ("import os; os._exit(0)", "cannot be imported: it ends the process (status 0)"),
    "aborts": ("import os; os.abort()", "cannot be imported: it ends the process (signal 6)"),
    "crashes": (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "cannot be imported: it ends the process (signal 11)",
    ),
    "breaks": ("raise ValueError('a\\nb')", "cannot be imported: ValueError: a b"),
    "syntax": ("class", "cannot be imported: SyntaxError: invalid syntax"),
    "empty": ("", "cannot be imported: AttributeError: module"),
    "generator": ("raise GeneratorExit", "cannot be imported: GeneratorExit"),
    "recursive": ("def f(): f()\nf()", "cannot be imported: RecursionError"),
    "late": ("def __getattr__(name): raise SystemExit", "cannot be imported: SystemExit"),
}
_number = itertools.count()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module, of another name in each test."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{os.getpid()}_{next(_number)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return name


def fault(section: str, name: str) -> str:
    """What a recipe's error says of a name."""
    with at_once(), pytest.raises(ValueError, match=r".") as refused:
        find_component(section, SECTIONS[section], name)
    return one_line(str(refused.value))


@pytest.mark.parametrize("section", sorted(FAMILIES))
def test_our_own_classes_follow_the_protocol(section: str) -> None:
    for cls in SECTIONS[section].values():
        assert find_component(section, {}, f"{cls.__module__}:{cls.__name__}") is cls


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("attack", ["Attack", "Module", "Static", "Child"]),
        ("objective", ["Objective", "OfBatches"]),
        ("schedule", ["Schedule"]),
        ("communication", ["Collective"]),
    ],
)
def test_classes_that_follow_the_protocol(
    own: str, tmp_path: Path, section: str, names: list[str]
) -> None:
    for name in names:
        recipe = load_recipe(tmp_path / "small.yaml", [f"{section}={{name: '{own}:{name}'}}"])
        assert type(getattr(recipe, section)).__name__ == name


@pytest.mark.parametrize("body", BODIES)
def test_modules_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text, said = BODIES[body]
    (tmp_path / f"broken_{body}.py").write_text(text)
    for section in FAMILIES:
        found = fault(section, f"broken_{body}:Attack")
        assert found.startswith(f"'broken_{body}:Attack' {said}")
    sys.modules.pop(f"broken_{body}", None)


@pytest.mark.parametrize("body", ["import time; time.sleep(99)", "while True: pass"])
def test_an_import_that_does_not_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(components, "_IMPORT_LIMIT_S", 0.5)
    (tmp_path / "endless.py").write_text(body)
    before = psutil.Process().children()
    assert fault("attack", "endless:A") == (
        "'endless:A' cannot be imported: it takes more than 0.5 s"
    )
    assert psutil.Process().children() == before


@pytest.mark.parametrize("where", ["trial", "import", "call"])
def test_a_request_to_end_is_no_fault_of_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """SIGTERM, with the handler of training, while a user's module is imported or called."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    asks = f"import os, signal\nif os.getpid() == {os.getpid()}: os.kill({os.getpid()}, 15)\n"
    text = {
        "trial": f"import os; os.kill({os.getpid()}, 15)\nimport time; time.sleep(99)",
        "import": asks,
        "call": OWN + "\nclass Asks(Attack):\n    def __init__(self):\n" + indent(asks, " " * 8),
    }[where]
    (tmp_path / f"asks_{where}.py").write_text(text)
    before = psutil.Process().children()
    with at_once(), Stop(), pytest.raises(Stopped) as stopped:
        load_recipe(tmp_path / "small.yaml", [f"attack={{name: 'asks_{where}:Asks'}}"])
    assert stopped.value.request == signal.SIGTERM
    assert psutil.Process().children() == before


METHODS = {
    "attack": "__call__(loss_fn, x, generator=)",
    "objective": "inner_loss(classifier, x, labels)",
    "schedule": "factor(epoch, total_epochs)",
    "communication": "exchanges(flat, segments, step, workers, meter)",
}


@pytest.mark.parametrize("section", sorted(FAMILIES))
def test_what_is_no_class_of_the_family(own: str, tmp_path: Path, section: str) -> None:
    for name in (f"{own}:function", f"{own}:instance", f"{own}:torch", "os:system", "os:environ",
                 "builtins:eval", "builtins:exec", "shutil:rmtree"):  # fmt: skip
        assert fault(section, name).startswith(f"{name!r} is no class, but ")
    for name in (f"{own}:Nothing", "subprocess:Popen", "threading:Thread", "pathlib:Path",
                 "builtins:int", "enum:Enum"):  # fmt: skip
        found = fault(section, name)
        assert found == f"{name!r} cannot be the {section}: it has no method {METHODS[section]}"
    others = {"attack": "Objective", "objective": "Attack", "schedule": "Collective"}
    other = others.get(section, "Schedule")
    assert f"it has no method {METHODS[section]}" in fault(section, f"{own}:{other}")


def test_methods_take_the_protocols_arguments(own: str, tmp_path: Path) -> None:
    for name in ("Positional", "More", "Attribute"):
        assert f"no method {METHODS['attack']}" in fault("attack", f"{own}:{name}")
    found = fault("objective", f"{own}:HalfObjective")
    assert found.endswith("it has no method loss(classifier, x, x_adv, labels)")


def test_a_class_that_cannot_be_made_or_kept(own: str, tmp_path: Path) -> None:
    said = {
        "Raises": "attack: KeyError: 'line\\nbreak'",
        "Exits": "attack: SystemExit: 3",
        "NotPlain": "attack: device(type='cpu') is no plain value",
        "function": f"attack.name: '{own}:function' is no class, but <function function at",
    }
    for name, complaint in said.items():
        (found,) = faults(tmp_path / "small.yaml", f"attack={{name: '{own}:{name}'}}")
        assert found.startswith(f"command line: {complaint}")
    assert faults(tmp_path / "small.yaml", "attack={name: 'robust_accel.attacks:Attack'}")


@pytest.mark.parametrize(
    "name", ["", ":", "a:", ":a", "a:b:c", "..a:B", ".:a", "a b:C", "a\\b:c", "os.path:", "x" * 500,
             f"{'x' * 500}:A", "https://x:y", "os;system:a", "1:30", "None:None"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    for section in FAMILIES:
        assert fault(section, name).startswith("'")


def test_another_network_keeps_what_is_wanted_of_any(tmp_path: Path) -> None:
    own = "{name: resnet50, pretrained: true, new_head: true, size: 64, options: {drop_rate: 0.1}}"
    (tmp_path / "own.yaml").write_text(f"base: quickstart\nmodel: {own}\n")
    (tmp_path / "leaf.yaml").write_text("base: own.yaml\nmodel: {name: resnet18}\n")
    for found in (
        load_recipe(tmp_path / "own.yaml", ["model.name=resnet18"]),
        load_recipe(tmp_path / "leaf.yaml"),
    ):
        model = found.model
        assert (model.name, model.pretrained, model.new_head) == ("resnet18", True, True)
        assert (model.size, model.options) == (64, {})


def test_mappings_and_keys_of_one_section_are_both_taken() -> None:
    overrides = ["train.ema_decay=0.5", "train={epochs: 7, batch_size: 8}", "train.epochs=9"]
    for order in itertools.permutations(overrides):
        train = load_recipe("quickstart", order).train
        assert (train.ema_decay, train.batch_size) == (0.5, 8)
        assert train.epochs == (9 if order.index(overrides[2]) > order.index(overrides[1]) else 7)
    nested = ["data.mix.prob=0.5", "data={mix: {cutmix: 1.0}}"]
    for order in (nested, nested[::-1]):
        mix = load_recipe("quickstart", order).data.mix
        assert (mix.prob, mix.cutmix) == (0.5, 1.0)
    named = ["attack.num_steps=9", "attack={name: fgsm-rs, eps: 0.1}"]  # FGSM-RS has no steps
    assert load_recipe("quickstart", named).attack == FGSMRS(eps=0.1)
