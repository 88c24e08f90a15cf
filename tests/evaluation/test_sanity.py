"""The sanity suite passes an honest model, and catches one that masks its gradients."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.commands.evaluate import evaluate_model
from robust_accel.data import MemoryImages, load_data
from robust_accel.evaluation import EvaluateSettings, evaluate
from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.sanity import (
    WhiteBox,
    _alignment,
    _gap,
    _noise,
    _steps,
    gradient_alignment,
    loss_surface,
)
from robust_accel.models import PixelClassifier
from robust_accel.recipe import load_recipe
from robust_accel.reporting.report import write_report
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_classifier
from robust_accel.training.run import train

SETTINGS = EvaluateSettings(
    norm="linf", eps=0.2, images=40, autoattack="quick", autoattack_images=20,
    sanity={"images": 60},  # type: ignore[arg-type]
)  # fmt: skip
BY = WhiteBox.of(SETTINGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "honest"
    settings = ["train.epochs=5", "attack.num_steps=3", "attack.step_size=0.1"]
    settings += ["evaluate.autoattack=null", "evaluate.pgd.num_steps=1", f"output={folder}"]
    settings += ["evaluate.train_images=null"]
    train(load_recipe("quickstart", settings))
    return folder


@pytest.fixture(scope="module")
def honest(run: Path) -> tuple[PixelClassifier, Any]:
    recipe = load_recipe("quickstart")
    images = load_data(recipe.data).test
    return load_classifier(recipe, str(run), images, 10).eval(), images


def verdicts(
    classifier: PixelClassifier,
    images: Any,
    settings: EvaluateSettings = SETTINGS,
    **options: Any,
) -> dict[str, str]:
    result = evaluate(
        classifier, images, settings, Accelerator(cpu=True), num_classes=10, **options
    )
    found = result["sanity"]
    assert found["images"]["n"] == 60
    assert all(check["sentence"].endswith((".", "here.")) for check in found["checks"])
    return {check["name"]: check["status"] for check in found["checks"]}


def test_an_honest_model_passes(honest: tuple[PixelClassifier, Any]) -> None:
    found = verdicts(*honest, other=honest[0])
    assert set(found.values()) == {"pass"}, found
    assert len(found) == 8


@pytest.mark.long  # which white-box attack it is there is looked at below
def test_an_honest_model_passes_in_l1_whatever_measures_it(
    honest: tuple[PixelClassifier, Any],
) -> None:
    """PGD finds so little there that Square finds more: the checks do not go by it."""
    settings = SETTINGS.model_copy(update={"norm": "l1", "eps": 3.0, "autoattack": None})
    found = verdicts(*honest, settings)
    assert found["black-box Square finds no more than white-box APGD"] == "pass"
    failed = {name: status for name, status in found.items() if status == "fail"}
    assert not failed


@pytest.mark.parametrize(
    ("pgd", "norm", "name"),
    [
        ({}, "linf", "PGD-10"),
        ({"restarts": 3, "step_size": 0.1}, "l2", "PGD-10"),
        ({"loss": "cw"}, "linf", "PGD-10 CW"),
        ({"attack": "apgd", "loss": "dlr"}, "l2", "APGD-10 DLR"),
        ({"loss": "cw"}, "l1", "APGD-10 CW"),
    ],
)
def test_the_white_box_attack_is_the_evaluations_or_in_l1_apgd(
    pgd: dict[str, Any], norm: str, name: str
) -> None:
    settings = EvaluateSettings(norm=norm, eps=0.2, pgd={"num_steps": 10, **pgd})  # type: ignore[arg-type]
    by = WhiteBox.of(settings)
    assert by.named(10) == name and by.key(10) == name.lower().replace("-", "_").replace(" ", "_")
    kind = {} if norm != "l1" else {"attack": "apgd", "step_size": None}
    alone = {**pgd, "restarts": 1, "num_steps": 10, "step_size": None} | kind
    same = EvaluateSettings(norm=norm, eps=0.2, pgd=alone)  # type: ignore[arg-type]
    assert by.attacker(10).about == attacker_of(same).about
    assert by.attacker(10, 0.4).about["eps"] == 0.4


def test_records_and_sentences_name_the_white_box_attack(
    honest: tuple[PixelClassifier, Any],
) -> None:
    pgd = {"attack": "apgd", "loss": "cw"}
    given: dict[str, Any] = {"norm": "linf", "eps": 0.2, "pgd": pgd, "sanity": {"images": 8}}
    settings = EvaluateSettings(images=8, **given)
    found = evaluate(*honest, settings, Accelerator(cpu=True), num_classes=10)["sanity"]
    assert found["attack"]["white_box"] == "APGD CW"
    said = {check["name"]: check for check in found["checks"]}
    steps = said["more steps never help the defender"]
    assert steps["value"].keys() == {"apgd_1_cw", "apgd_10_cw", "apgd_50_cw"}
    assert "steps of APGD CW" in steps["sentence"]
    square = said["black-box Square finds no more than white-box APGD CW"]
    assert "that APGD-50 CW did not" in square["sentence"]
    assert "AutoAttack finds little more than APGD CW" in said


class RoundedLogits(nn.Module):
    """Robust by looks: the steps of its output have no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (4 * self.model(x)).round() / 4


class RoundedInput(RoundedLogits):
    def forward(self, x: Tensor) -> Tensor:
        return self.model((8 * x).round() / 8)


@pytest.mark.parametrize(
    "mask", [RoundedLogits, pytest.param(RoundedInput, marks=pytest.mark.long)]
)
def test_a_model_that_masks_its_gradients_is_caught(
    honest: tuple[PixelClassifier, Any], mask: type[RoundedLogits]
) -> None:
    classifier, images = honest
    settings = SETTINGS.model_copy(update={"autoattack": None})
    found = verdicts(PixelClassifier(mask(classifier)), images, settings, other=classifier)
    for name in (
        "a large eps breaks everything",
        "images made for another model are no stronger",
        "black-box Square finds no more than white-box PGD",
    ):
        assert found[name] == "fail", found


def flags(right: int) -> Tensor:
    return torch.arange(100) < right


def outcomes(right: int) -> Outcomes:
    share = flags(right).double()
    return Outcomes(torch.arange(100), torch.ones(100).long(), flags(right).long(), share, share)


def test_more_steps_that_help_are_caught() -> None:
    assert _steps({1: flags(60), 10: flags(50), 50: flags(50)}, BY).status == "pass"
    assert _steps({1: flags(50), 10: flags(50), 50: flags(60)}, BY).status == "fail"


def test_noise_and_gaps_are_judged_by_their_size() -> None:
    assert _noise(flags(60), flags(62), BY).status == "pass"  # two images are chance
    assert _noise(flags(60), flags(63), BY).status == "fail"
    for robust, status in ((50, "pass"), (45, "warn"), (35, "fail")):
        assert _gap((outcomes(60), outcomes(robust)), BY).status == status
    assert _gap(None, BY).status == "not run"
    for cosine, status in ((0.9, "pass"), (0.3, "warn"), (0.1, "fail")):
        assert _alignment(cosine).status == status


def test_alignment_and_surface_of_a_linear_loss(honest: tuple[PixelClassifier, Any]) -> None:
    """The gradient of a linear model with two classes points the same way everywhere."""
    _, images = honest
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    images = type(images)(images.images[:32], images.labels[:32] % 2)
    classifier = PixelClassifier(linear)
    bench = Bench(classifier, images, Accelerator(cpu=True), batch_size=250)
    assert gradient_alignment(bench, SETTINGS, 32) == pytest.approx(1, abs=1e-5)
    surface = loss_surface(bench, SETTINGS)
    assert surface["axis"][0] == -2 and surface["axis"][-1] == 2
    rising = [row[10] for row in surface["loss"]]  # along the gradient
    assert rising == sorted(rising)
    x = images.images[:4].float() / 255
    loss = nn.functional.cross_entropy(classifier(x), images.labels[:4])
    assert surface["loss"][10][10] == pytest.approx(loss.item(), rel=1e-5)


class Sure(nn.Module):
    """Two classes by the pixels' sum, so sure of light images that their gradient is tiny or 0."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(dim=1)
        return torch.stack([-total, total], dim=1)


def test_alignment_is_of_directions_and_of_images_that_have_one() -> None:
    pixels = torch.tensor([10, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    images = MemoryImages(pixels.expand(3, 1, 8, 8), torch.ones(3, dtype=torch.int64))
    bench = Bench(PixelClassifier(Sure()), images, Accelerator(cpu=True), batch_size=2)
    assert gradient_alignment(bench, SETTINGS, 3) == pytest.approx(1)
    images.images.fill_(255)
    assert gradient_alignment(bench, SETTINGS, 3) == 0


def test_a_training_refuses_another_models_images_before_anything_is_spent(tmp_path: Path) -> None:
    given = [f"output={tmp_path / 'run'}", "evaluate.sanity.transfer_from=runs/other"]
    with pytest.raises(ValueError, match=r"evaluate\.sanity\.transfer_from: runs/other is for"):
        train(load_recipe("quickstart", given))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_the_command_sweeps_checks_and_draws(run: Path, pictures: None) -> None:
    settings = [
        "evaluate.images=40",
        "evaluate.sweep.eps=[0.2, 0.05, 0.1]",
        "evaluate.sweep.num_steps=[5, 1]",
        "evaluate.sanity.images=20",
        f"evaluate.sanity.transfer_from={run}",
        "evaluate.pgd.num_steps=10",
        "evaluate.pgd.restarts=2",
    ]
    folder, _ = evaluate_model(str(run), settings)
    rows = folder.read_report()["measurements"]

    def curve(key: str) -> list[tuple[float, float]]:
        points = [r for r in rows if r["purpose"] == "sweep" and r["point"]["key"] == key]
        assert all(r["images"]["n"] == 40 for r in points)
        return [(r["point"]["value"], r["accuracy"]) for r in points]

    eps, steps = curve("eps"), curve("num_steps")
    assert [value for value, _ in eps] == [0.05, 0.1, 0.2]
    accuracies = [accuracy for _, accuracy in eps]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[-1]
    assert [value for value, _ in steps] == [1, 5]
    assert steps[0][1] >= steps[1][1]
    attacks = [r["attack"] for r in rows if r["purpose"] == "accuracy"]
    assert {"name": "pgd", "num_steps": 10, "restarts": 2}.items() <= attacks[-1].items()
    (checks,) = [r["checks"] for r in rows if r["purpose"] == "sanity"]
    assert len(checks) == 8
    text = write_report(RunFolder(run))
    for name in ("training_loss", "sweep_eps_linf", "sweep_steps", "examples", "loss_surface_0"):
        assert f"](figures/{name}.png)" in text
        assert (run / "figures" / f"{name}.png").stat().st_size > 1000
    assert re.search(r"\| a large eps breaks everything +\| pass ", text)
