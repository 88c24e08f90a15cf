"""A few adversarial images, kept to be looked at."""

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from robust_accel.attack_context import attack_context
from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import under_attack
from robust_accel.evaluation.settings import EvaluateSettings, PGDSettings
from robust_accel.models import PixelClassifier
from robust_accel.run_folder import RunFolder

NUMBER = 8


def keep_examples(
    classifier: PixelClassifier,
    images: ImageSet,
    right: torch.Tensor,
    settings: EvaluateSettings,
    accelerator: Accelerator,
    folder: RunFolder,
) -> None:
    """Attack the first images that are right, and write them as safetensors.

    ``x`` and ``x_adv`` [n, C, H, W] in [0, 1], ``labels``, ``clean_predictions`` and
    ``adversarial_predictions`` [n].
    """
    indices = right.nonzero().flatten()[:NUMBER]
    if not accelerator.is_main_process or len(indices) == 0:
        return
    pgd = settings.pgd or PGDSettings()
    attack = under_attack(settings.make_pgd(pgd.num_steps, pgd.step_size))
    ((x, labels),) = images.batches([indices], accelerator.device)
    with attack_context(classifier, "eval"):
        x_adv = attack(classifier, x, labels, settings.seed)
        with torch.no_grad():
            clean, adversarial = (classifier(z).argmax(dim=1) for z in (x, x_adv))
    found = {
        "x": x,
        "x_adv": x_adv,
        "labels": labels,
        "clean_predictions": clean,
        "adversarial_predictions": adversarial,
    }
    folder.path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in found.items()}, folder.examples)
