"""Verdicts of models that answer differently each time, and of numbers that are none."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, evaluate
from robust_accel.evaluation.bench import Attacker, Bench
from robust_accel.evaluation.outcomes import by_class, global_state_kept
from robust_accel.models import PixelClassifier
from robust_accel.objectives import NOT_A_NUMBER, predicted
from robust_accel.statistics import wilson_interval


class Noisy(nn.Module):
    """Right with a known probability: class 1 where the pixel and Gaussian noise are above 0.5."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, :1]
        above = pixel + self.sigma * torch.randn_like(pixel) - 0.5
        return torch.cat([-above, above], dim=1)


def grey(levels: list[int], label: int = 1) -> MemoryImages:
    pixels = torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return MemoryImages(pixels, torch.full((len(levels),), label))


def measured(model: nn.Module, images: MemoryImages, **settings: Any) -> dict[str, Any]:
    given = {"norm": "linf", "eps": 0.1, "pgd": {"num_steps": 10}, "batch_size": 100} | settings
    return evaluate(
        PixelClassifier(model).eval(),
        images,
        EvaluateSettings(**given),
        Accelerator(cpu=True),
        num_classes=2,
    )


def test_a_randomised_model_is_judged_by_the_mean_of_seeded_draws() -> None:
    """One forward pass a verdict, ANDed after the attack, would say the square of it."""
    images = grey([166] * 300)  # 0.651: right where the noise is above -0.151
    shares = {"clean_accuracy": 0.151 / 0.3, "pgd_accuracy": 0.051 / 0.3}
    found = measured(Noisy(0.3), images, draws=50)
    for key, z in shares.items():
        expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert found[key]["accuracy"] == pytest.approx(expected, abs=0.02), key
        assert found[key]["draws"] == 50
        assert found[key]["majority_accuracy"] > found[key]["accuracy"]
    again = measured(Noisy(0.3), images, draws=50)
    assert again["pgd_accuracy"]["outcomes"] == found["pgd_accuracy"]["outcomes"]


class OwnNoise(Noisy):
    """Draws from a generator that nobody else can seed."""

    def __init__(self, sigma: float) -> None:
        super().__init__(sigma)
        self.own = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, :1]
        above = pixel + self.sigma * torch.randn(pixel.shape, generator=self.own) - 0.5
        return torch.cat([-above, above], dim=1)


def test_draws_that_cannot_be_repeated_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for model, repeatable in ((Noisy(0.3), True), (OwnNoise(0.3), False)):
        caplog.clear()
        settings = EvaluateSettings(norm="linf", eps=0.1, pgd=None)
        classifier, images = PixelClassifier(model).eval(), grey([166] * 50)
        evaluate(classifier, images, settings, Accelerator(cpu=True), num_classes=2)
        assert ("numbers vary" in caplog.text) != repeatable


def test_one_draw_is_seeded_and_attacks_are_chosen_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = grey([166] * 300)
    found, again = (measured(Noisy(0.3), images, draws=1)["pgd_accuracy"] for _ in range(2))
    assert again["outcomes"] == found["outcomes"]
    assert found["draws"] == 1
    assert found["accuracy"] > 0.5  # by the same draw it were a product: 0.69 * 0.57
    assert "numbers vary" not in caplog.text


class Precision(Noisy):
    """Notes whether convolutions may be of TF32."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.cudnn.allow_tf32)
        return super().forward(x)


@pytest.mark.parametrize("allowed", [True, False])
def test_verdicts_are_in_fp32(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    model = Precision(0.0)
    bench = Bench(PixelClassifier(model), grey([166]), Accelerator(cpu=True), batch_size=1)
    model.seen = set()
    bench.clean()
    assert model.seen == {False}
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_generators_of_several_gpus_are_kept_without_a_word(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    states: dict[int, Tensor] = {i: torch.tensor([i]) for i in range(2)}
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda i: states[i])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, i: states.update({i: state}))
    with global_state_kept():
        states[1] = torch.tensor([5])
    assert states == {0: torch.tensor([0]), 1: torch.tensor([1])}
    assert not recwarn.list


def test_a_model_that_answers_the_same_needs_one_draw() -> None:
    found = measured(Noisy(0.0), grey([166] * 10), draws=50)
    assert "draws" not in found["clean_accuracy"]
    assert found["clean_accuracy"]["forward_passes"] == 10
    # of each image: ten forwards in PGD, one to judge it
    assert found["pgd_accuracy"]["forward_passes"] == 10 * (10 + 1)


class Root(nn.Module):
    """Two classes by the sum of square roots: no finite gradient at black pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        total = (0 * x.flatten(1).sqrt()).sum(dim=1) + x.flatten(1).sum(dim=1)
        return torch.stack([1 - total, total - 1], dim=1)


def test_gradients_that_are_no_numbers_are_counted_and_hold_no_other_pixel() -> None:
    black = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    grey_ones = torch.full((4, 1, 2, 2), 70, dtype=torch.uint8)  # a sum of 1.1: class 1
    images = MemoryImages(torch.cat([black, grey_ones]), torch.tensor([0] * 4 + [1] * 4))
    images.images[:4, 0, 1] = 110  # half black: a sum of 0.86, class 0
    settings = {"pgd": {"num_steps": 10, "restarts": 1}, "eps": 0.1}
    found = measured(Root(), images, **settings)["pgd_accuracy"]
    assert found["accuracy"] == 0  # broken by the pixels that have a gradient
    assert set(found["non_finite"]) <= {"gradients"}


class Overflowing(nn.Module):
    """NaN for bright images, class 0 for the others."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        bad = torch.where(mean > 0.5, torch.nan, 0.0)
        return torch.stack([1 + bad, 0 * mean], dim=1)


def test_logits_that_are_no_numbers_are_no_class() -> None:
    images = grey([10, 10, 250], label=0)
    found = measured(Overflowing(), images, pgd=None)["clean_accuracy"]
    assert found["outcomes"]["prediction"] == [0, 0, NOT_A_NUMBER]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["non_finite"] == {"logits": [2]}
    assert sum(map(sum, found["confusion"])) == 2
    logits = torch.tensor([[0.0, 1.0], [torch.inf, 0.0], [torch.nan, 1.0]])
    assert predicted(logits).tolist() == [1, NOT_A_NUMBER, NOT_A_NUMBER]


def test_a_perturbation_that_is_no_image_has_broken_none() -> None:
    on = Bench(PixelClassifier(Noisy(0.0)), grey([200] * 3), Accelerator(cpu=True), batch_size=3)
    broken = Attacker({"name": "nan"}, lambda classifier, x, labels, seed: x * torch.nan)
    found = on.attacked(broken, on.clean())
    assert found.right.all()
    assert found.non_finite == {"perturbations": [0, 1, 2]}


def test_sanity_has_its_own_word_for_numbers_that_are_none() -> None:
    settings = {"sanity": {"images": 3}, "pgd": None}
    checks = measured(Overflowing(), grey([10, 10, 250], label=0), **settings)["sanity"]["checks"]
    (finite,) = [check for check in checks if check["name"] == "all numbers are finite"]
    assert (finite["status"], finite["value"]) == ("fail", {"images": 1})


@pytest.mark.parametrize(("right", "number"), [(0, 10), (5, 10), (10, 10), (271, 1000)])
def test_the_interval_is_wilsons(right: int, number: int) -> None:
    z, p = 1.959964, right / number
    centre = (p + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
    assert wilson_interval(p, number) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_classes_have_their_names_and_add_up() -> None:
    on = Bench(
        PixelClassifier(Noisy(0.0)), grey([200, 200, 10]), Accelerator(cpu=True), batch_size=3
    )
    found = by_class(on.clean(), ("dark", "bright"))
    assert found["per_class"] == [{"class": 1, "name": "bright", "n": 3, "accuracy": 2 / 3}]
    assert found["confusion"] == [[0, 0], [1, 2]]
