"""Which test images a classifier gets right, clean or attacked: one flag an image."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from robust_accel.attack_context import attack_context
from robust_accel.attacks import Attack
from robust_accel.data import Batch, ImageSet
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier

Perturb = Callable[[PixelClassifier, Tensor, Tensor, int], Tensor]
"""classifier, x [B, C, H, W] in [0, 1], labels [B], seed of the unit -> images to classify."""


def clean(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The images as they are."""
    return x


def under_attack(attack: Attack, restarts: int = 1) -> Perturb:
    """Perturb by one of this package's attacks on the cross-entropy.

    From the second restart on, only images that are still right are attacked.
    """

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        x_adv, left = x, torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            own = labels[left]

            def loss_fn(images: Tensor, own: Tensor = own) -> Tensor:
                return cross_entropy(classifier(images), own, reduction="none")

            found = attack(loss_fn, x[left], generator=generator)
            x_adv = found if restart == 0 else x_adv.index_copy(0, left, found)
            if restart < restarts - 1:
                with torch.no_grad():
                    left = left[classifier(found).argmax(dim=1) == own]
                if len(left) == 0:
                    break
        return x_adv

    return perturb


def correct_flags(
    classifier: PixelClassifier,
    images: ImageSet,
    perturb: Perturb,
    settings: EvaluateSettings,
    accelerator: Accelerator,
    *,
    num_images: int | None = None,
    among: Tensor | None = None,
    title: str = "",
) -> Tensor:
    """Flags [N] of the first N images, the same on all processes and for any number of them.

    The images are cut into units of ``settings.batch_size``; each has its own seed and goes to
    one process. An image is right only if the prediction is right before and after ``perturb``.

    Args:
        num_images: N; all when not given.
        among: [N], bool: images known to be wrong already, which are not attacked again.
    """
    num_images = min(num_images or len(images), len(images))
    flags = torch.zeros(num_images, dtype=torch.int64, device=accelerator.device)
    with attack_context(classifier, "eval"):
        for unit, indices, (x, labels) in _own_units(
            images, num_images, settings.batch_size, accelerator, title
        ):
            with torch.no_grad():
                right = classifier(x).argmax(dim=1) == labels
            if among is not None:
                right &= among.to(right.device)[indices]
            if perturb is not clean and right.any():
                # only images that are right can be broken: attack no others
                x_adv = perturb(classifier, x[right], labels[right], settings.seed + 1000 * unit)
                with torch.no_grad():
                    right[right.clone()] = classifier(x_adv).argmax(dim=1) == labels[right]
            flags[indices] = right.long()
    return reduce(flags, "sum").bool().cpu()  # each image was one process's: the sum is exact


@torch.no_grad()
def predictions(
    classifier: PixelClassifier, images: ImageSet, batch_size: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Predicted classes [N] and their probabilities [N], the same on all processes."""
    classes = torch.zeros(len(images), dtype=torch.int64, device=accelerator.device)
    confidence = torch.zeros(len(images), device=accelerator.device)
    with attack_context(classifier, "eval"):
        for _, indices, (x, _) in _own_units(
            images, len(images), batch_size, accelerator, "predictions"
        ):
            confidence[indices], classes[indices] = classifier(x).softmax(dim=1).max(dim=1)
    return reduce(classes, "sum").cpu(), reduce(confidence, "sum").cpu()


def _own_units(
    images: ImageSet, num_images: int, batch_size: int, accelerator: Accelerator, title: str
) -> Iterator[tuple[int, Tensor, Batch]]:
    """This process's units of work: their number, the images' indices, and the images."""
    units = torch.arange(num_images).split(batch_size)
    mine = range(accelerator.process_index, len(units), accelerator.num_processes)
    batches = images.batches([units[u] for u in mine], accelerator.device)
    progress = tqdm(
        zip(mine, batches, strict=True),
        total=len(mine),
        desc=title,
        leave=False,
        disable=not accelerator.is_local_main_process or len(mine) < 2,
    )
    for unit, batch in progress:
        yield unit, units[unit].to(accelerator.device), batch


def accuracy(flags: Tensor) -> dict[str, float | int]:
    """Share of right images and their number."""
    return {"accuracy": flags.double().mean().item(), "n": len(flags)}
