"""Which test images a classifier gets right, clean or attacked: one flag an image."""

from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel
from torch import Tensor

from robust_accel.attacks import APGD, Attack
from robust_accel.data import ImageSet
from robust_accel.evaluation.bench import Attacker, Bench, Unit
from robust_accel.evaluation.identity import digest_of_object
from robust_accel.evaluation.settings import EvaluateSettings, PGDSettings
from robust_accel.models import PixelClassifier
from robust_accel.objectives import AttackLoss, climbed, predicted


def check_loss(key: str, part: object, num_classes: int) -> None:
    """Refuse a loss that so few classes do not have.

    Args:
        key: Where it is named, like ``evaluate.pgd.loss``.
        part: The settings that hold it, if there are such.
        num_classes: The classifier's logits.

    Raises:
        ValueError: ``key: ...``.
    """
    if getattr(part, key.split(".")[-1], None) == "dlr" and num_classes < 3:
        raise ValueError(f"{key}: dlr ranks three classes, the model has {num_classes}: try cw")


def attacker_of(
    settings: EvaluateSettings,
    *,
    num_steps: int | None = None,
    eps: float | None = None,
    restarts: int | None = None,
) -> Attacker:
    """``evaluate.pgd`` (its default where there is none), or the same at another point.

    Args:
        eps: The steps are as long as the rule of ``PGDSettings`` says for this radius.
    """
    pgd = settings.pgd or PGDSettings()
    number = pgd.num_steps if num_steps is None else num_steps
    steps = settings.make_pgd(number, pgd.step_size if eps is None else None, eps)
    by_itself = APGD(norm=steps.norm, eps=steps.eps, num_steps=number)
    attack: Attack = by_itself if pgd.attack == "apgd" else steps
    return under_attack(attack, pgd.restarts if restarts is None else restarts, pgd.loss)


def under_attack(attack: Attack, restarts: int = 1, loss: AttackLoss = "cross_entropy") -> Attacker:
    """Perturb by one of this package's attacks on a loss of the logits.

    From the second restart on, only images that are still right are attacked.
    """

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        x_adv, left = x, torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            own = labels[left]
            found = attack(climbed(classifier, own, loss), x[left], generator=generator)
            x_adv = found if restart == 0 else x_adv.index_copy(0, left, found)
            if restart < restarts - 1:
                with torch.no_grad():
                    left = left[predicted(classifier(found)) == own]
                if len(left) == 0:
                    break
        return x_adv

    about: dict[str, Any] = {"settings": digest_of_object(attack)}  # of a user's own
    if isinstance(attack, BaseModel):
        about = attack.model_dump(mode="json")
    about |= {"name": type(attack).__name__.lower(), "restarts": restarts}
    if loss != "cross_entropy":
        about["loss"] = loss
    return Attacker(about, perturb)


def predictions(
    classifier: PixelClassifier, images: ImageSet, batch_size: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Predicted classes [N] and their probabilities [N], the same on all processes.

    Raises:
        ValueError: Logits are NaN or infinite.
    """
    units = [Unit(u, part) for u, part in enumerate(torch.arange(len(images)).split(batch_size))]

    @torch.no_grad()
    def compute(unit: Unit, x: Tensor, labels: Tensor) -> dict[str, Any]:
        confidence, classes = classifier(x).softmax(dim=1).max(dim=1)
        return {"classes": classes.tolist(), "confidence": confidence.tolist()}

    bench = Bench(classifier, images, accelerator, batch_size=batch_size)
    found = bench.share({}, units, compute, "predictions")
    classes = torch.tensor([c for one in found for c in one["classes"]])
    confidence = torch.tensor([c for one in found for c in one["confidence"]])
    if bad := int((~confidence.isfinite()).sum()):
        raise ValueError(f"the model answers {bad} of {len(images)} images with NaN: no labels")
    return classes, confidence
