"""AutoAttack is the reference's, and leaves no trace."""

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, clean, correct_flags, evaluate
from robust_accel.evaluation.autoattack import AutoAttackUnit
from robust_accel.models import PixelClassifier

CPU = torch.device("cpu")


def fitted(num_classes: int = 5, num_images: int = 24) -> tuple[PixelClassifier, MemoryImages]:
    """A linear classifier of noisy class means: some images are close to the border, some far."""
    generator = torch.Generator().manual_seed(5)
    means = torch.rand(num_classes, 1, 4, 4, generator=generator)
    labels = torch.arange(num_images) % num_classes
    noise = 0.5 * torch.randn(num_images, 1, 4, 4, generator=generator)
    pictures = (255 * (0.3 + 0.4 * means[labels] + 0.4 * noise).clamp(0, 1)).to(torch.uint8)
    linear = nn.Linear(16, num_classes)
    centres = 0.3 + 0.4 * means.flatten(1)
    with torch.no_grad():  # the nearest centre wins
        linear.weight.copy_(8 * centres)
        linear.bias.copy_(-4 * (centres**2).sum(dim=1))
    model = nn.Sequential(nn.Flatten(), linear)
    return PixelClassifier(model), MemoryImages(pictures, labels)


def settings(**options: Any) -> EvaluateSettings:
    given: dict[str, Any] = {"norm": "linf", "eps": 0.03, "autoattack": "quick", "batch_size": 24}
    return EvaluateSettings(**given | options)


def flags(given: EvaluateSettings, num_classes: int = 5) -> tuple[list[bool], list[bool]]:
    """(clean, robust)"""
    classifier, images = fitted(num_classes)
    unit = AutoAttackUnit(given, num_classes, CPU)
    accelerator = Accelerator(cpu=True)
    return tuple(  # type: ignore[return-value]
        correct_flags(classifier, images, perturb, given, accelerator).tolist()
        for perturb in (clean, unit)
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_flags_are_the_references(norm: str) -> None:
    eps = {"linf": 0.03, "l2": 0.1}[norm]
    before, after = flags(settings(norm=norm, eps=eps, seed=3))
    assert 0 < sum(after) < sum(before) < len(before)
    assert all(b for b, a in zip(before, after, strict=True) if a)
    classifier, images = fitted()
    x, labels = images.images.float() / 255, images.labels
    right = torch.tensor(before)
    # straight from the reference, which attacks the images that are right
    reference = AutoAttack(
        classifier.eval(), norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=3,
        version="custom", attacks=["apgd-ce", "apgd-t"],
    )  # fmt: skip
    reference.apgd.n_restarts = 1
    reference.apgd_targeted.n_target_classes = 4
    with torch.random.fork_rng():
        x_ref, _ = reference.run_standard_evaluation(x[right], labels[right], batch_size=24)
    robust = right.clone()
    robust[right] = classifier(x_ref).argmax(dim=1) == labels[right]
    assert after == robust.tolist()
    torch.rand(7), random.random(), np.random.rand(3)  # noqa: NPY002  (must not matter)
    unit = AutoAttackUnit(settings(norm=norm, eps=eps), 5, CPU)
    assert unit(classifier, x[right], labels[right], 3).equal(x_ref)


def test_the_attack_stays_in_the_ball_and_breaks_what_a_linear_model_must_lose() -> None:
    """A linear model's L-inf margin is known: AutoAttack may not do better, nor much worse."""
    classifier, images = fitted()
    x, labels = images.images.float() / 255, images.labels
    weight, logits = classifier.model[1].weight, classifier(x)  # type: ignore[index]
    gaps = logits.gather(1, labels[:, None]) - logits  # [B, K]
    slopes = (weight[labels][:, None] - weight[None]).abs().sum(dim=2)  # change of the gap per eps
    slopes[torch.arange(24), labels] = 1
    margins = (gaps / slopes).scatter(1, labels[:, None], torch.inf).amin(dim=1)  # without [0, 1]
    before, after = flags(settings())
    assert before == (margins > 0).tolist()
    for margin, robust in zip(margins.tolist(), after, strict=True):
        assert robust or margin < 0.03 + 1e-6  # within the ball nothing else can be broken
    unit = AutoAttackUnit(settings(), 5, CPU)
    right = torch.tensor(before)
    x_adv = unit(classifier, x[right], labels[right], 0)
    assert (x_adv - x[right]).abs().max() <= 0.03 + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    # where the clamp to [0, 1] cannot help the image, it is lost
    free = ((x > 0.03) & (x < 0.97)).flatten(1).all(dim=1)
    lost = free & right & (margins < 0.0299)
    assert lost.any()
    assert not any(robust for robust, gone in zip(after, lost.tolist(), strict=True) if gone)


def test_standard_leaves_parameters_random_streams_and_tracing_alone() -> None:
    classifier, images = fitted(num_classes=4)
    given = settings(autoattack="standard", eps=0.05)
    unit = AutoAttackUnit(given, 4, CPU)
    assert unit._attacks == ["apgd-ce", "apgd-t", "fab-t", "square"]
    unit._attacks.remove("square")  # its 5,000 queries would say nothing new here
    classifier.model[1].weight.requires_grad_(False)  # type: ignore[index]
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = np.random.get_state()  # noqa: NPY002
    traced: list[str] = []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        traced.append(event)

    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        robust = correct_flags(classifier, images, unit, given, Accelerator(cpu=True))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(previous)
    assert 0 < robust.sum() < 24
    wanted = [p.requires_grad for p in classifier.model.parameters()]
    assert wanted == [False, True]
    assert all(p.grad is None for p in classifier.parameters())
    assert torch.get_rng_state().equal(torch_before)
    assert random.getstate() == python_before
    numpy_after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after, strict=True))


def test_streams_that_an_attack_reseeds_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square reseeds numpy's too, but takes 5,000 queries to say so."""

    def reseed(self: AutoAttack, x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        return x, y

    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", reseed)
    classifier, images = fitted()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    AutoAttackUnit(settings(), 5, CPU)(classifier, images.images / 255, images.labels, 0)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index,union-attr]  # noqa: NPY002


def test_one_image_a_unit_works() -> None:
    """A unit may hold a single right image: shapes must not collapse."""
    classifier, images = fitted()
    given = settings(batch_size=1)
    unit = AutoAttackUnit(given, 5, CPU)
    single = correct_flags(classifier, images, unit, given, Accelerator(cpu=True), num_images=2)
    before = correct_flags(classifier, images, clean, given, Accelerator(cpu=True), num_images=2)
    assert before.all()
    assert single.shape == (2,)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_too_few_classes_are_refused_before_anything_is_spent(num_classes: int) -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("something was spent")

    _, images = fitted(4)
    with pytest.raises(ValueError, match=rf"evaluate\.autoattack: .* at least 4 .* {num_classes};"):
        evaluate(
            PixelClassifier(Untouchable()),
            images,
            settings(),
            Accelerator(cpu=True),
            num_classes=num_classes,
        )
