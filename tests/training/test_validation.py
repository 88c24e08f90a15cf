"""What a validation measures is what it says: which attack, which weights, which images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small_runs import SMALL, quick_run, run
from torch.nn.functional import cross_entropy

from robust_accel.attacks import APGD, PGD
from robust_accel.data import Data
from robust_accel.evaluation.accuracy import under_attack
from robust_accel.evaluation.bench import Bench
from robust_accel.models import PixelClassifier
from robust_accel.recipe import Recipe, load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.facts import doubts_of
from robust_accel.training.parts import classifier_for, read_data

KINDS = ("clean", "robust", "one_step")
HELD_OUT = "validation_{}_accuracy"


def last_line(folder: Path, kind: str = "clean") -> dict[str, Any]:
    lines = [line for line in RunFolder(folder).read_metrics() if HELD_OUT.format(kind) in line]
    return lines[-1]


def made(folder: Path, settings: tuple[str, ...]) -> tuple[Recipe, Data, PixelClassifier]:
    """A run's recipe and data, and its network with the weights that the run has trained last."""
    recipe = load_recipe("quickstart", [*SMALL, *settings])
    data = read_data(recipe)
    classifier = classifier_for(recipe, data).eval()
    state = load_file(RunFolder(folder).steps()[-1] / "model.safetensors")
    own = {key: value for key, value in state.items() if key.startswith("classifier.")}
    classifier.load_state_dict({key.partition(".")[2]: value for key, value in own.items()})
    return recipe, data, classifier


def shares(recipe: Recipe, data: Data, classifier: PixelClassifier, attack: Any) -> list[float]:
    """Of the held-out images: right as they are, under an attack, and after one step by hand."""
    everything = [torch.arange(len(data.validation))]
    ((x, labels),) = data.validation.batches(everything, torch.device("cpu"))
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(classifier(z), labels), z)
    stepped = (x + 0.2 * gradient.sign()).clamp(0, 1)
    clean = classifier(x).argmax(dim=1) == labels
    one_step = clean & (classifier(stepped).argmax(dim=1) == labels)
    bench = Bench(
        classifier,
        data.validation,
        Accelerator(cpu=True),
        batch_size=recipe.evaluate.batch_size,
        seed=recipe.evaluate.seed,
    )
    robust = bench.attacked(under_attack(attack), bench.clean()).right
    return [flags.double().mean().item() for flags in (clean, robust, one_step)]


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_it_attacks_as_the_evaluation_does_and_by_one_step(tmp_path: Path, attack: str) -> None:
    settings = (f"evaluate.pgd.attack={attack}", "train.epochs=2", "evaluate.train_images=null")
    settings += ("train.validation_steps=4",)
    report = run(tmp_path, *settings)
    recipe, data, classifier = made(tmp_path, settings)
    pgd = PGD(eps=0.2, num_steps=4, step_size=0.125)
    by = {"pgd": pgd, "apgd": APGD(eps=0.2, num_steps=4)}[attack]
    line = last_line(tmp_path)
    assert [line[HELD_OUT.format(kind)] for kind in KINDS] == shares(recipe, data, classifier, by)
    assert report["best_against_last"]["attack"] == f"{attack.upper()}-4"
    assert line["validation_robust_accuracy"] <= line["validation_one_step_accuracy"]
    assert not [key for key in line if "raw" in key]


@pytest.mark.parametrize("average", ["train.ema_decay=0.9", "train.swa_start=1"])
def test_raw_weights_are_measured_beside_their_average(tmp_path: Path, average: str) -> None:
    settings = (average, "train.epochs=2", "evaluate.train_images=null", "train.validation_steps=4")
    run(tmp_path, *settings)
    recipe, data, classifier = made(tmp_path, settings)
    by, line = PGD(eps=0.2, num_steps=4, step_size=0.125), last_line(tmp_path)
    raw = [line[f"validation_raw_{kind}_accuracy"] for kind in KINDS]
    assert raw == shares(recipe, data, classifier, by)
    assert line["validation_raw_images"] == len(data.validation) == 144
    classifier.load_state_dict(load_file(RunFolder(tmp_path).steps()[-1] / "ema.safetensors"))
    measured = [line[HELD_OUT.format(kind)] for kind in KINDS]
    assert measured == shares(recipe, data, classifier, by) != raw


@pytest.mark.parametrize(
    ("attack", "is_one_step"),
    [
        ("{name: n-fgsm, eps: 0.2}", True),
        ("{name: fgsm-rs, eps: 0.2}", True),
        ("{name: fgsm-pgi, eps: 0.2}", True),
        ("{name: pgd, eps: 0.2, num_steps: 1}", True),
        ("{name: pgd, eps: 0.2, num_steps: 2}", False),
        ("{name: none}", False),
    ],
)
def test_one_step_attacks_without_held_out_images_are_doubted(
    attack: str, is_one_step: bool
) -> None:
    settings = [f"attack={attack}", "evaluate.eps=0.2", "data.validation_size=0"]
    found = doubts_of(load_recipe("quickstart", settings))
    assert (len(found) == 1) == is_one_step and all("validation_size" in doubt for doubt in found)
    assert doubts_of(load_recipe("quickstart", [*settings[:2], "data.validation_size=9"])) == []


def test_the_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ("attack={name: n-fgsm, eps: 0.2}", "data.validation_size=0", "train.max_steps=1")
    (doubt,) = quick_run(tmp_path, *settings)["doubts"]
    assert "only held-out images show it" in doubt and doubt in caplog.messages
