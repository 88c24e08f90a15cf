"""One call that measures any module on images that are at hand."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.data import Batch, ImageSet
from robust_accel.evaluation import evaluate
from robust_accel.evaluation.arrays import as_images, as_labels
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import refresh_report
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.files import check_contained
from robust_accel.models import PixelClassifier
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder
from robust_accel.settings import checked

logger = logging.getLogger(__name__)


class TensorImages:
    """Images that are a floating point tensor [N, C, H, W] in [0, 1] already."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels
        self.shape = (x.shape[1], x.shape[2], x.shape[3])

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "TensorImages":
        return TensorImages(self.x[indices], self.labels[indices])

    def pooled(self, other: "TensorImages") -> "TensorImages":
        return TensorImages(torch.cat([self.x, other.x]), torch.cat([self.labels, other.labels]))

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        for indices in index_batches:
            yield self.x[indices].to(device), self.labels[indices].to(device)


def measure(
    model: nn.Module,
    x: Any,
    labels: Any,
    *,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    size: int | tuple[int, int] | None = None,
    other: nn.Module | None = None,
    folder: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Clean, PGD and AutoAttack accuracy of any module on pixels, as RobustBench's models are.

    Under ``accelerate launch`` every process calls it, and the work is shared.

    Args:
        model: Images [B, C, H, W] in [0, 1] to logits [B, K] (or ``.logits``). Nothing is assumed:
            a module that wants normalised images needs ``mean`` and ``std``, timm's too. Left in
            the mode that it was in.
        x: [N, C, H, W], floating point, in [0, 1]: a tensor, an array, or a list of images.
        labels: [N] class indices, or [N, 1], or one-hot [N, K]: a tensor, an array, or a list.
        mean, std: By which images are normalised inside, one number a channel or one for all; both
            or neither. Not with a ``PixelClassifier`` (``load_model``) or ``RobustModel``, which
            have their own.
        size: Height and width to which images are resized inside; eps is at x's own. The same.
        other: Of ``sanity``: another module on [0, 1], whose adversarial images are tried on this.
        folder: Where records and outcomes are kept, so that a killed evaluation goes on and nothing
            is done twice; ``robust-accel report FOLDER`` shows them.
        settings: Of ``EvaluateSettings``: ``eps="8/255"``, ``norm="linf"``,
            ``autoattack="standard"``, ``pgd={"num_steps": 20}``, ``sanity=True``, ...

    Returns:
        The records of ``evaluate``, by name, and as ``model`` what was measured, with what was done
        to images before the module saw them: ``mean``, ``std``, ``size``, and in words whose they
        are (``said``).

    Raises:
        ValueError: Model, images, labels or settings are not as said above.
    """
    given = _settings(settings, other)
    if folder is not None and RunFolder(folder).recipe.exists():
        raise ValueError(
            f"folder: {folder} holds a training run, which robust-accel evaluate measures: choose "
            "another"
        )
    if folder is not None:
        check_contained(Path(folder))
    x, labels = as_images(x), as_labels(labels)
    if len(x) != len(labels):
        raise ValueError(f"labels must be one an image, got {len(labels)} for {len(x)} images")
    classifier = _classifier(model, "model", mean=mean, std=std, size=size)
    foreign = None if other is None else _classifier(other, "other")
    accelerator = Accelerator() if accelerator is None else accelerator
    measured = [classifier] if foreign is None else [classifier, foreign]
    training = [(m, m.training) for c in measured for m in c.modules()]
    try:
        for part in measured:
            part.to(accelerator.device).eval()
        num_classes = _num_classes(classifier, x[:1].to(accelerator.device))
        images: ImageSet = TensorImages(x, _indices(labels, num_classes))
        result = evaluate(
            classifier,
            images,
            given,
            accelerator,
            num_classes=num_classes,
            folder=None if folder is None else RunFolder(folder),
            other=foreign,
            class_names=classifier.class_names,
        )
    finally:
        for module, mode in training:
            module.training = mode
    about = facts_of(classifier, type(classifier.model).__name__)
    about = {"function": result["function"], **about, "said": about["statistics"]}
    if folder is not None and accelerator.is_main_process:
        refresh_report(RunFolder(folder), model=about)
    return {"model": about} | result


def _settings(values: dict[str, Any], other: nn.Module | None) -> EvaluateSettings:
    """The settings, with a norm and an eps."""
    given = checked(EvaluateSettings, values).with_threat_model_of(None)
    if given.eps is None:
        raise ValueError("eps is missing: the radius in pixel units, like eps='8/255'")
    if given.sanity and given.sanity_settings.transfer_from is not None:
        raise ValueError(
            "sanity.transfer_from is not taken here: give the module, other=load_model(...)"
        )
    if other is not None and not given.sanity:
        raise ValueError("other is for sanity's check of another model's images: add sanity=True")
    return given


def _classifier(
    model: Any, name: str, *, mean: Any = None, std: Any = None, size: Any = None
) -> PixelClassifier:
    """The module on pixels, and nothing done to them that nobody asked for."""
    if isinstance(model, RobustModel):
        model = model.classifier  # which reads [0, 1], whatever a script feeds the wrapper
    if isinstance(model, PixelClassifier):
        if any(value is not None for value in (mean, std, size)):
            raise ValueError("mean, std and size are the PixelClassifier's own: set them there")
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} must be a module, got {type(model).__name__}: robust_accel.load_model loads "
            "a run or a timm model"
        )
    classifier = PixelClassifier(model, mean=mean, std=std, size=size)
    if "is not applied" in classifier.statistics_source:
        logger.warning("%s: %s", name, classifier.statistics_source)
    return classifier


@torch.no_grad()
def _num_classes(classifier: PixelClassifier, x: Tensor) -> int:
    """K, from one image."""
    try:
        num_classes = classifier(x).shape[1]
    except (RuntimeError, AssertionError) as error:
        shape = "x".join(map(str, x.shape[1:]))
        raise ValueError(
            f"the model does not take images of {shape} ({error}); size= resizes them inside"
        ) from error
    if num_classes < 2:
        raise ValueError("the model must have a logit for each class, two at least, got one")
    return num_classes


def _indices(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices [N], of the model's classes; labels are [N], or one-hot [N, K]."""
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"labels are one-hot of {labels.shape[1]} classes, the model has {num_classes}"
            )
        return labels.argmax(dim=1)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"labels must be 0 to {num_classes - 1}, the model's classes, got {lowest} to {highest}"
        )
    return labels
