"""Attacks of a user's own: measured in their ball, by name, anew where they change."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from shifting import KINDS, Brightness, Data, Shift
from torch import Tensor, nn

from robust_accel import PGD, EvaluateSettings, PixelClassifier, evaluate, load_run, train
from robust_accel.data import MemoryImages
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.identity import digest_of_object
from robust_accel.evaluation.own_attacks import own_attacker
from robust_accel.settings import Number, Settings

SETTINGS = EvaluateSettings(eps=0.1, pgd=None, batch_size=16)


class Wild:
    """An attack that promises more than it keeps; no pydantic model."""

    eps = 0.1

    def __init__(self, made: str) -> None:
        self.made = made

    def __call__(self, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        return {"outside": x + 0.05, "cut": x[:, :, :2], "nan": x / 0}[self.made]


class OfMean(nn.Module):
    """Class 1 of images that are brighter than 0.5 in the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    levels = torch.linspace(0.2, 0.65, 40)
    return levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(), (levels > 0.5).long()


def test_what_it_breaks_is_counted_in_its_ball(images: tuple[Tensor, Tensor]) -> None:
    x, labels = images
    attacks = [Brightness(), Brightness(shift=0.5), PGD(eps=0.05, num_steps=2)]
    found = evaluate(OfMean(), x, labels, SETTINGS, attacks=attacks)
    clean, *own = found.measurements
    assert clean.accuracy == 1 and [one.threat_model["eps"] for one in own] == [0.1, 0.1, 0.05]
    level = x[:, 0, 0, 0]
    for one, reach in zip(own, (0.1, 0.05, 0.05), strict=True):
        # from below over the edge; PGD goes down, too
        broken = (level <= 0.5) & (level + reach > 0.5)
        if one.attack["name"] == "pgd":
            broken |= (level > 0.5) & (level - reach <= 0.5)
        assert one.accuracy == 1 - broken.double().mean().item()
    assert own[0].attack["name"] == "shifting:Brightness" == own[1].attack["name"]
    assert own[0].attack["shift"] == 1 and "shifting:Brightness" in repr(found)
    assert found.pgd.threat_model["eps"] == 0.05


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (Brightness(shift=1.1), r"moved an image by 0.11 \(linf\), its eps is 0.1"),
        (Wild("outside"), r"returned pixels in \[0.*1.0"),
        (Wild("cut"), "returned .* for"),
        (lambda loss_fn, x, *, generator=None: x, "must have an eps and a norm of linf, l2, l1"),
    ],
)
def test_what_leaves_its_ball_has_no_number(attack, said, images: tuple[Tensor, Tensor]) -> None:
    x, labels = images
    if isinstance(attack, Wild):
        x = x + 0.33  # to the white
    with pytest.raises(ValueError, match=said):
        evaluate(OfMean(), x, torch.ones_like(labels), SETTINGS, attacks=[attack])


def test_nan_breaks_nothing(images: tuple[Tensor, Tensor]) -> None:
    x, labels = images
    (record,) = [
        one.record
        for one in evaluate(OfMean(), x, labels, SETTINGS, attacks=[Wild("nan")]).measurements
        if one.attack["name"] != "none"
    ]
    assert record["accuracy"] == 1 and len(record["non_finite"]["perturbations"]) == len(x)


def test_another_version_is_another_attack(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, labels = images
    known = evaluate(OfMean(), x, labels, SETTINGS, attacks=[Brightness()], folder=tmp_path)
    again = evaluate(OfMean(), x, labels, SETTINGS, attacks=[Brightness()], folder=tmp_path)
    assert [one.record["time"] for one in known.measurements] == [
        one.record["time"] for one in again.measurements
    ]

    def weaker(self: Brightness, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        return (x + 0.01).clamp(0, 1)

    changed = type(
        "Brightness", (Brightness,), {"__call__": weaker, "__module__": Brightness.__module__}
    )
    other = evaluate(OfMean(), x, labels, SETTINGS, attacks=[changed()], folder=tmp_path)
    assert other.measurements[-1].record["key"] != known.measurements[-1].record["key"]
    assert other.measurements[-1].accuracy > known.measurements[-1].accuracy


def written(kind: type, **methods: Any) -> type:
    """The class as it is when some of its methods are edited: the name and the bases stay."""
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    own = {k: v for k, v in own.items() if k not in getattr(kind, "__slots__", ())}
    return type(kind)(kind.__name__, kind.__bases__, own | methods)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_call_is_another_attack(kind: str) -> None:
    def weaker(self: Any, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        return x

    weaker.__qualname__ = f"{kind}.__call__"
    one, same, other = (
        own_attacker(written(KINDS[kind], **edited)()).about
        for edited in ({}, {}, {"__call__": weaker})
    )
    assert one == same != other


def test_what_an_attack_holds_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its class as well: the one that is made in a call, and the one that was made before."""
    before = {kind: digest_of_object(KINDS[kind]()) for kind in ("Plain", "OfPydantic", "Data")}
    monkeypatch.setattr(Shift, "by", lambda self, x, eps: x - eps)
    assert all(digest_of_object(KINDS[kind]()) != was for kind, was in before.items())
    assert digest_of_object(Data(held=[1.0])) != digest_of_object(Data(held=[2.0]))


@pytest.mark.long
def test_an_attack_is_the_same_in_another_process() -> None:
    here = [digest_of_object(kind()) for kind in KINDS.values()]
    work = "from shifting import KINDS; from robust_accel.evaluation.identity import *; "
    work += "print(*(digest_of_object(kind()) for kind in KINDS.values()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    found = subprocess.run(
        [sys.executable, "-c", work], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == here


def test_on_the_images_of_a_run(tmp_path: Path) -> None:
    measured = EvaluateSettings(images=40, autoattack=None, pgd=None, train_images=None)
    run = train("quickstart", output=tmp_path / "run", train={"max_steps": 4}, evaluate=measured)
    run = run.evaluate(EvaluateSettings(), attacks=[Brightness(eps=0.2)])
    (own,) = [one for one in run.measurements if one.attack["name"] == "shifting:Brightness"]
    assert own.images == 40 and own.accuracy <= run.clean.accuracy
    assert own in load_run(run.path).measurements
    assert "shifting:Brightness" in (run.path / "report.md").read_text()


def test_seeds_are_units_and_not_processes(images: tuple[Tensor, Tensor]) -> None:
    class Noise(Settings):
        eps: Number = 0.1

        def __call__(self, loss_fn, x: Tensor, *, generator=None) -> Tensor:
            shift = torch.empty(len(x), 1, 1, 1).uniform_(-self.eps, self.eps, generator=generator)
            return (x + shift).clamp(0, 1)

    x, labels = images
    classifier, own = PixelClassifier(OfMean()).eval(), MemoryImages((255 * x).byte(), labels)
    bench = Bench(classifier, own, Accelerator(cpu=True), batch_size=8)
    one, other = (bench.attacked(own_attacker(Noise()), bench.clean()).right for _ in range(2))
    assert one.equal(other) and not one.all()
