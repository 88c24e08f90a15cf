"""Signs that a robust number is too good: checks that an honest model passes.

They follow Athalye et al. 2018 (arXiv 1802.00420) and Carlini et al. 2019 (arXiv 1902.06705):
gradients that mislead an attack are found by attacks that need none, or by what more effort does.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from robust_accel.attack_context import attack_context
from robust_accel.attacks.base import input_gradient
from robust_accel.attacks.norms import ORDERS, ascent_direction, project, random_start
from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.autoattack import square_attack
from robust_accel.evaluation.bench import Attacker, Bench
from robust_accel.evaluation.identity import digest_of_function
from robust_accel.evaluation.ledger import Record
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.records import attack_text
from robust_accel.evaluation.settings import EvaluateSettings, PGDSettings
from robust_accel.models import PixelClassifier

logger = logging.getLogger(__name__)

Status = Literal["pass", "warn", "fail", "not run"]

_SURFACE_POINTS = 21
_TINY = 1e-300  # no gradient of fp32 is as short


@dataclass(frozen=True)
class Check:
    """One check: its verdict, what was measured, and what that means."""

    name: str
    status: Status
    value: dict[str, float]
    sentence: str


@dataclass(frozen=True)
class WhiteBox:
    """The gradient attack of the checks, from one start: of the kind and loss of ``evaluate.pgd``.

    Its steps are as long as the rule there says.
    """

    settings: EvaluateSettings

    @classmethod
    def of(cls, settings: EvaluateSettings) -> "WhiteBox":
        """In L1 it is APGD: PGD is so weak there that Square finds more on an honest model."""
        if settings.norm != "l1":
            return cls(settings)
        pgd = (settings.pgd or PGDSettings()).model_copy(update={"attack": "apgd"})
        return cls(settings.model_copy(update={"pgd": pgd}))

    def attacker(self, num_steps: int, eps: float | None = None) -> Attacker:
        """Of so many steps, in the ball of ``evaluate.eps`` or of another radius."""
        eps = self.settings.eps if eps is None else eps
        return attacker_of(self.settings, num_steps=num_steps, eps=eps, restarts=1)

    def named(self, num_steps: int | None = None) -> str:
        """As reports have it: ``PGD-10``, ``APGD-50 CW``; ``PGD`` of no number of steps."""
        pgd = self.settings.pgd or PGDSettings()
        steps = {} if num_steps is None else {"num_steps": num_steps}
        return attack_text({"name": pgd.attack, "loss": pgd.loss, **steps})

    def key(self, num_steps: int) -> str:
        """The same in a record: ``pgd_10``."""
        return self.named(num_steps).lower().replace("-", "_").replace(" ", "_")


def sanity(
    bench: Bench,
    settings: EvaluateSettings,
    *,
    autoattack: tuple[Outcomes, Outcomes] | None = None,
    other: PixelClassifier | None = None,
) -> Record:
    """Run all checks on the first ``settings.sanity.images`` images.

    Args:
        autoattack: ``evaluate.pgd`` and AutoAttack on the same images, if they were measured.
        other: A model whose adversarial images are tried on this one.

    Returns:
        The record, with ``checks`` and ``surface``.
    """
    number = min(settings.sanity_settings.images, len(bench.images))
    right = bench.clean(number)
    tried: list[Outcomes] = [right]

    def survivors(attacker: Attacker, title: str, before: Outcomes = right) -> Outcomes:
        tried.append(bench.attacked(attacker, before, title=title))
        return tried[-1]

    by = WhiteBox.of(settings)
    after = {n: survivors(by.attacker(n), by.named(n)) for n in (1, 10, 50)}
    by_steps = {n: outcomes.right for n, outcomes in after.items()}
    # what both leave
    white_box = after[50].after(torch.arange(number), after[10].verdicts, after[10].chosen)
    # from any image to the grey one
    large = 0.5 * math.prod(bench.images.shape) ** (1 / ORDERS[settings.norm or ""])
    square, transferred = square_attack(settings, 500), None
    if other is not None:
        foreign = _transferred(other, by.attacker(20), bench.images.shape)
        transferred = survivors(foreign, "transfer").right
    checks = [
        _steps(by_steps, by),
        _large_eps(survivors(by.attacker(50, large), f"eps {large:.3g}").right, large),
        _noise(survivors(_random_noise(settings), "noise").right, by_steps[10], by),
        _square(white_box.right, survivors(square, "Square", white_box).right, by),
        _transfer(white_box.right, transferred),
        _alignment(gradient_alignment(bench, settings, number)),
        _gap(autoattack, WhiteBox(settings)),
        _finite(tried),
    ]
    for check in checks:
        logger.info("%7s  %s: %s", check.status.upper(), check.name, check.sentence)
    result = {
        "checks": [asdict(check) for check in checks],
        "surface": loss_surface(bench, settings),
    }
    about: dict[str, Any] = {"name": "sanity", "norm": settings.norm, "eps": settings.eps}
    if by.named() != "PGD":
        about["white_box"] = by.named()
    shape = bench.images.shape
    about["transfer_from"] = None if other is None else digest_of_function(other, shape)
    about["compared"] = None if autoattack is None else [o.digest for o in autoattack]
    return bench.keep("sanity", about, right.index, result, {}, {})


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def _slack(flags: Tensor) -> float:
    """What chance may do between two attacks: 1% of the images, but at least two images."""
    return max(0.01, 2 / len(flags))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _steps(by_steps: dict[int, Tensor], by: WhiteBox) -> Check:
    shares = {n: _share(flags) for n, flags in by_steps.items()}
    ordered = list(shares.values())
    slack = _slack(by_steps[1])
    falls = all(b <= a + slack for a, b in pairwise(ordered))
    told = ", ".join(f"{_percent(share)} after {n}" for n, share in shares.items())
    return Check(
        "more steps never help the defender",
        "pass" if falls else "fail",
        {by.key(n): share for n, share in shares.items()},
        f"accuracy is {told} steps of {by.named()}"
        + ("." if falls else ": longer attacks break less, so gradients do not lead anywhere."),
    )


def _large_eps(flags: Tensor, eps: float) -> Check:
    share = _share(flags)
    ok = share <= _slack(flags)
    return Check(
        "a large eps breaks everything",
        "pass" if ok else "fail",
        {"eps": eps, "accuracy": share},
        f"with eps {eps:.3g}, where every image can be made any other, {_percent(share)} survive"
        + ("." if ok else ": the attack does not work on this model."),
    )


def _noise(noise: Tensor, attacked: Tensor, by: WhiteBox) -> Check:
    by_noise, by_gradient = _share(noise), _share(attacked)
    ok = by_gradient <= by_noise + _slack(noise)
    return Check(
        "gradients beat random noise",
        "pass" if ok else "fail",
        {"noise": by_noise, by.key(10): by_gradient},
        f"{_percent(by_noise)} survive the worst of {_DRAWS} random perturbations, "
        f"{_percent(by_gradient)} {by.named(10)}"
        + ("." if ok else ": gradients are worse than guessing."),
    )


def _square(white_box: Tensor, both: Tensor, by: WhiteBox) -> Check:
    more = _share(white_box) - _share(both)
    status: Status = "pass" if more <= 2 * _slack(both) else "fail"
    return Check(
        f"black-box Square finds no more than white-box {by.named()}",
        status,
        {"white_box": _share(white_box), "with_square": _share(both)},
        f"Square breaks {_percent(more)} of the images that {by.named(50)} did not"
        + ("." if status == "pass" else ": it needs no gradients, so these are masked."),
    )


def _transfer(white_box: Tensor, transferred: Tensor | None) -> Check:
    name = "images made for another model are no stronger"
    if transferred is None:
        return Check(name, "not run", {}, "no other model was given (sanity.transfer_from).")
    own, foreign = _share(white_box), _share(transferred)
    ok = own <= foreign + _slack(transferred)
    return Check(
        name,
        "pass" if ok else "fail",
        {"white_box": own, "transfer": foreign},
        f"{_percent(foreign)} survive another model's images, {_percent(own)} their own"
        + ("." if ok else ": its own gradients mislead."),
    )


def _alignment(cosine: float) -> Check:
    status: Status = "pass" if cosine >= 0.4 else "warn" if cosine >= 0.2 else "fail"
    return Check(
        "input gradients agree nearby",
        status,
        {"cosine": cosine},
        f"the cosine of the gradients at x and at x + noise is {cosine:.2f}"
        + (
            "."
            if status == "pass"
            else ": the loss is bent within the ball, as after catastrophic overfitting or without"
            " adversarial training; one-step attacks say nothing here."
        ),
    )


def _finite(tried: Sequence[Outcomes]) -> Check:
    lost = {image for o in tried for images in o.non_finite.values() for image in images}
    return Check(
        "all numbers are finite",
        "fail" if lost else "pass",
        {"images": len(lost)},
        f"{len(lost)} images met NaN or Inf in logits or gradients"
        + (": the attacks above are weaker there than they look." if lost else "."),
    )


def _gap(measured: tuple[Outcomes, Outcomes] | None, by: WhiteBox) -> Check:
    pgd = by.named()
    name = f"AutoAttack finds little more than {pgd}"
    if measured is None:
        return Check(name, "not run", {}, f"AutoAttack and {pgd} were not both measured.")
    number = min(len(outcomes.index) for outcomes in measured)
    by_pgd, by_autoattack = (_share(outcomes.right[:number]) for outcomes in measured)
    gap = by_pgd - by_autoattack
    status: Status = "pass" if gap <= 0.1 else "warn" if gap <= 0.2 else "fail"
    return Check(
        name,
        status,
        {"pgd": by_pgd, "autoattack": by_autoattack},
        f"{pgd} leaves {_percent(by_pgd)}, AutoAttack {_percent(by_autoattack)} of {number}"
        + ("." if status == "pass" else f": quote AutoAttack, {pgd} is weak on this model."),
    )


_DRAWS = 10


def _random_noise(settings: EvaluateSettings) -> Attacker:
    """The worst of some random perturbations of the largest length."""

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        assert settings.norm is not None and settings.eps is not None
        generator = torch.Generator(x.device).manual_seed(seed)
        worst, highest = x, torch.full((len(x),), -torch.inf, device=x.device)
        for _ in range(_DRAWS):
            noise = random_start(x, 1.0, settings.norm, generator)
            step = settings.eps * ascent_direction(noise, settings.norm)
            noisy = project(x + step, x, settings.eps, settings.norm)
            with torch.no_grad():
                loss = cross_entropy(classifier(noisy), labels, reduction="none")
            worse = loss > highest
            worst = torch.where(worse.view(-1, 1, 1, 1), noisy, worst)
            highest = torch.where(worse, loss, highest)
        return worst

    about = {"name": "noise", "draws": _DRAWS, "norm": settings.norm, "eps": settings.eps}
    return Attacker(about, perturb)


def _transferred(
    other: PixelClassifier, attacker: Attacker, shape: tuple[int, int, int]
) -> Attacker:
    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        with attack_context(other, "eval"):
            return attacker.perturb(other, x, labels, seed)

    about = {"name": "transfer", "from": digest_of_function(other, shape), "by": attacker.about}
    return Attacker(about, perturb)


def gradient_alignment(bench: Bench, settings: EvaluateSettings, number: int) -> float:
    """Mean cosine of the input gradients at x and at x + noise, uniform in the ball.

    Source: Andriushchenko and Flammarion 2020 (arXiv 2007.02617): it falls to about zero when
    one-step training overfits its attack. Images without a gradient at one of the points take no
    part.
    """
    assert settings.norm is not None and settings.eps is not None
    device, classifier = bench.accelerator.device, bench.classifier
    generator = torch.Generator(device).manual_seed(settings.seed)
    cosines = []
    indices = torch.arange(number).split(settings.batch_size)
    with attack_context(classifier, "eval"):
        for x, labels in bench.images.batches(indices, device):

            def loss_fn(z: Tensor, own: Tensor = labels) -> Tensor:
                return cross_entropy(classifier(z), own, reduction="none")

            noisy = x + random_start(x, settings.eps, settings.norm, generator)
            here, there = (input_gradient(loss_fn, z).flatten(1) for z in (x, noisy.clamp(0, 1)))
            known = here.any(dim=1) & there.any(dim=1)
            pair = (here[known].double(), there[known].double())
            cosines.append(cosine_similarity(*pair, eps=_TINY))
    found = torch.cat(cosines)
    return found.sum().item() / max(len(found), 1)


def loss_surface(bench: Bench, settings: EvaluateSettings, number: int = 4) -> dict[str, Any]:
    """Mean loss on the plane of the gradient's and a random direction, out to twice eps.

    Returns:
        ``axis`` (multiples of eps) and ``loss[i][j]`` at axis[i] along the gradient's direction
        and axis[j] along the random one.
    """
    assert settings.norm is not None and settings.eps is not None
    device, classifier = bench.accelerator.device, bench.classifier
    generator = torch.Generator(device).manual_seed(settings.seed)
    axis = torch.linspace(-2, 2, _SURFACE_POINTS)
    indices = torch.arange(min(number, len(bench.images)))
    ((x, labels),) = bench.images.batches([indices], device)

    def loss_fn(z: Tensor) -> Tensor:
        return cross_entropy(classifier(z), labels, reduction="none")

    with attack_context(classifier, "eval"):
        ascent = ascent_direction(input_gradient(loss_fn, x), settings.norm)
        aside = ascent_direction(random_start(x, 1.0, settings.norm, generator), settings.norm)
        with torch.no_grad():
            loss = [
                [
                    loss_fn((x + settings.eps * (a * ascent + b * aside)).clamp(0, 1)).mean().item()
                    for b in axis.tolist()
                ]
                for a in axis.tolist()
            ]
    return {"axis": axis.tolist(), "loss": loss}
