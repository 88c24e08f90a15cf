"""One call that measures any module on images that are at hand."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.data import Batch, ImageSet
from robust_accel.evaluation import evaluate
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder


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
    x: Tensor,
    labels: Tensor,
    *,
    folder: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Clean, PGD and AutoAttack accuracy of any module on pixels, as RobustBench's models are.

    Under ``accelerate launch`` every process calls it, and the work is shared.

    Args:
        model: Images in [0, 1] to logits [B, K] (or ``.logits``); normalisation is inside, or a
            timm model's own mean and std. Left in the mode that it was in.
        x: [N, C, H, W], floating point, in [0, 1].
        labels: [N], class indices.
        folder: Where outcomes are kept, so that a killed evaluation goes on.
        settings: Of ``EvaluateSettings``: ``eps="8/255"``, ``norm="linf"``,
            ``autoattack="standard"``, ``pgd={"num_steps": 20}``, ``sanity=True``, ...

    Returns:
        What ``report.json`` holds of a run's evaluation.

    Raises:
        ValueError: Images, labels or settings are not as said above.
    """
    given = EvaluateSettings(**settings).with_threat_model_of(None)
    if given.eps is None:
        raise ValueError("eps is missing: the radius in pixel units, like eps='8/255'")
    if not x.is_floating_point() or x.ndim != 4 or len(x) == 0 or len(x) != len(labels):
        raise ValueError(
            "x must be floating point [N, C, H, W] with one label an image, got "
            f"{x.dtype} {list(x.shape)} and labels {list(labels.shape)}"
        )
    low, high = (value.item() for value in x.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x must lie in [0, 1], got [{low:.3g}, {high:.3g}]")
    if isinstance(model, RobustModel):
        model = model.classifier  # which reads [0, 1], whatever a script feeds the wrapper
    classifier = model if isinstance(model, PixelClassifier) else PixelClassifier(model)
    accelerator = Accelerator() if accelerator is None else accelerator
    classifier.to(accelerator.device)
    training = [(m, m.training) for m in classifier.modules()]
    try:
        classifier.eval()
        with torch.no_grad():
            num_classes = classifier(x[:1].to(accelerator.device)).shape[1]
        highest = int(labels.max())
        if int(labels.min()) < 0 or highest >= num_classes:
            raise ValueError(
                f"labels must be 0 to {num_classes - 1}, the model's classes, got {highest}"
            )
        images: ImageSet = TensorImages(x.float(), labels.long())
        kept = None if folder is None else RunFolder(folder)
        return evaluate(
            classifier, images, given, accelerator, num_classes=num_classes, folder=kept
        )
    finally:
        for module, mode in training:
            module.training = mode
