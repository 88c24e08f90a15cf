"""Any module on images that are at hand: accuracy under attack, certified radii."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import Unpack

from robust_accel.attack_context import is_whole
from robust_accel.attacks import Attack
from robust_accel.comm.deepspeed import is_engine
from robust_accel.comm.heartbeat import TIMEOUT, Heartbeat
from robust_accel.data import Batch, ImageSet
from robust_accel.evaluation import evaluate
from robust_accel.evaluation.arrays import as_images, as_labels
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.certify_images import CertifySettings, certify_images
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import Ledger, refresh_report, told_to_all
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.files import check_contained
from robust_accel.models import PixelClassifier
from robust_accel.provenance import digest_of
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder

logger = logging.getLogger(__name__)


Statistic: TypeAlias = float | Sequence[float] | Tensor | None


class How(TypedDict, total=False):
    """What else ``robust_accel.evaluate`` and ``certify`` take, and say what it means."""

    mean: Statistic
    std: Statistic
    size: int | tuple[int, int] | None
    folder: str | Path | None
    accelerator: Accelerator | None


class TensorImages:
    """Images that are a floating point tensor [N, C, H, W] in [0, 1] already; labels on the CPU."""

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
    images: Any,
    labels: Any,
    settings: EvaluateSettings,
    *,
    attacks: Sequence[Attack] = (),
    other: nn.Module | None = None,
    **how: Unpack[How],
) -> dict[str, Any]:
    """Clean, PGD and AutoAttack accuracy of any module on pixels, see ``robust_accel.evaluate``.

    Every process passes the same images and labels.

    Args:
        settings: With an eps, or balls.
        attacks: Further ones, each in its own ball.
        other: Of ``sanity``: another module on [0, 1], whose adversarial images are tried on this.

    Returns:
        The records of ``evaluate``, by name, and as ``model`` what was measured, with what was done
        to images before the module saw them: ``mean``, ``std``, ``size``, and in words whose they
        are (``said``).

    Raises:
        ValueError: Model, images, labels or settings are not as said above.
    """
    given = _complete(settings, other)
    foreign = None if other is None else _classifier(other, "other")
    with _on_pixels(model, images, labels, foreign, **how) as ready:
        result = evaluate(
            ready.classifier,
            ready.images,
            given,
            ready.accelerator,
            num_classes=ready.num_classes,
            folder=ready.folder,
            other=foreign,
            attacks=attacks,
        )
        return {"model": ready.about(result["function"])} | result


def certify(
    model: nn.Module, images: Any, labels: Any, settings: CertifySettings, **how: Unpack[How]
) -> dict[str, Any]:
    """Certified L2 radii of any module on pixels, see ``robust_accel.certify``.

    Every process passes the same images and labels.

    Returns:
        ``certificate``, the record of ``certify_images``, and ``model`` as of ``measure``.

    Raises:
        ValueError: Model, images, labels or settings are not as said above.
    """
    if settings.sigma is None:
        raise ValueError(
            "sigma is missing: the noise's standard deviation in pixel units, like 0.25"
        )
    if settings.ids is not None:
        raise ValueError("ids are not taken here: give the images that are meant")
    if settings.doubt:
        logger.warning(settings.doubt)
    with _on_pixels(model, images, labels, None, **how) as ready:
        record = certify_images(ready.bench(settings.seed), settings.index(ready.images), settings)
        return {"model": ready.about(record["function"]), "certificate": record}


@dataclass(frozen=True)
class _Ready:
    """A module in eval mode on the accelerator's device, and images that it takes."""

    classifier: PixelClassifier
    images: ImageSet
    num_classes: int
    accelerator: Accelerator
    folder: RunFolder | None

    def bench(self, seed: int) -> Bench:
        folder = None if self.folder is None else self.folder.path
        return Bench(
            self.classifier,
            self.images,
            self.accelerator,
            batch_size=1,
            seed=seed,
            ledger=Ledger(folder, self.accelerator),
        )

    def about(self, function: str) -> dict[str, Any]:
        """What was measured; a folder's report has it, too."""
        facts = facts_of(self.classifier, type(self.classifier.model).__name__)
        about = {"function": function, **facts, "said": facts["statistics"]}
        if self.folder is not None and self.accelerator.is_main_process:
            refresh_report(self.folder, model=about)
        return about


@contextmanager
def _on_pixels(
    model: nn.Module,
    images: Any,
    labels: Any,
    other: PixelClassifier | None,
    *,
    mean: Statistic = None,
    std: Statistic = None,
    size: int | tuple[int, int] | None = None,
    folder: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[_Ready]:
    """Bring a module, another one and images together; modes are put back behind it."""
    if folder is not None and RunFolder(folder).recipe.exists():
        raise ValueError(
            f"folder: {folder} holds a training run, which robust-accel evaluate measures: choose "
            "another"
        )
    if folder is not None:
        check_contained(Path(folder))
    x, y = as_images(images), as_labels(labels)
    if len(x) != len(y):
        raise ValueError(f"labels must be one an image, got {len(y)} for {len(x)} images")
    classifier = _classifier(model, "model", mean=mean, std=std, size=size)
    accelerator = Accelerator() if accelerator is None else accelerator
    _check_same(x, y, accelerator)
    measured = [classifier] if other is None else [classifier, other]
    training = [(m, m.training) for c in measured for m in c.modules()]
    try:
        for part in measured:
            part.to(accelerator.device).eval()
        num_classes = _num_classes(classifier, x[:1].to(accelerator.device))
        own = TensorImages(x, _indices(y, num_classes))
        kept = None if folder is None else RunFolder(folder)
        # one may have much more to do than another, and a collective waits for so long only
        beats = nullcontext() if Heartbeat.current else Heartbeat(TIMEOUT)
        with beats:
            yield _Ready(classifier, own, num_classes, accelerator, kept)
    finally:
        for module, mode in training:
            module.training = mode


def _check_same(x: Tensor, labels: Tensor, accelerator: Accelerator) -> None:
    """Refuse images or labels that are not the same on all processes."""
    if accelerator.num_processes == 1:
        return
    own = digest_of([*x.split(1), labels])
    if len(set(told_to_all([own], accelerator))) > 1:
        raise ValueError(
            "the processes were given different images or labels: pass all of them on every "
            "process, the work is shared"
        )


def _complete(settings: EvaluateSettings, other: nn.Module | None) -> EvaluateSettings:
    """The settings, with a norm and an eps, or several."""
    given = settings.with_threat_model_of(None)
    if given.eps is None and given.balls is None:
        raise ValueError("eps is missing: the radius in pixel units, like eps='8/255'")
    for key in ("ids", "train_images"):
        if getattr(given, key) is not None:
            raise ValueError(f"{key} are not taken here: give the images that are meant")
    if given.sanity and given.sanity_settings.transfer_from is not None:
        raise ValueError(
            "sanity.transfer_from is not taken here: give the module, other=load_model(...)"
        )
    if other is not None and not given.sanity:
        raise ValueError("other is for sanity's check of another model's images: add sanity=True")
    return given


_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _classifier(
    model: Any, name: str, *, mean: Any = None, std: Any = None, size: Any = None
) -> PixelClassifier:
    """The module on pixels, and nothing done to them that nobody asked for."""
    # forwards of a wrapper wait for other processes, what torch.compile made of it too
    while isinstance(inner := getattr(model, "_orig_mod", model), _WRAPPERS):
        model = inner.module
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} must be a module, got {type(model).__name__}: robust_accel.load_model loads "
            "a run or a timm model"
        )
    if is_engine(inner) or not all(map(is_whole, model.parameters())):
        raise ValueError(
            f"{name} is DeepSpeed's or sharded by FSDP: load what accelerator.get_state_dict "
            "gathers into a plain module"
        )
    if isinstance(model, RobustModel):
        model = model.classifier  # which reads [0, 1], whatever a script feeds the wrapper
    if isinstance(model, PixelClassifier):
        if any(value is not None for value in (mean, std, size)):
            raise ValueError("mean, std and size are the PixelClassifier's own: set them there")
        return model
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
