"""The recipe's ``data`` section."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import model_validator

from robust_accel.settings import Flag, Number, PathText, Settings, Whole, listed


class UnlabeledSettings(Settings):
    """The recipe's ``data.unlabeled``: images without labels, or with a teacher's.

    Args:
        path: As ``data.path``, or Carmon et al.'s ``ti_500K_pseudo_labeled.pickle``, of which
            nothing but arrays is read, and whose images stay in it. Or arrays that stay in their
            file, however many: a ``.npz`` with ``image`` (uint8, [N, H, W, C]) and ``label``
            (integers, [N]; -1 is none), as EDM's images are published, or ``data`` and
            ``extrapolated_targets``; or a folder with ``images.npy`` and ``labels.npy``. A
            compressed ``.npz`` is unpacked once into the cache of ``datasets``. Not given: the
            images of the training split that ``data.train_size`` leaves out, their labels unseen.
        config, split: As of ``data``.
        image_column: Found by its feature type when not given; of arrays, the images' name.
        label_column: Labels to train on. Not given: the ``pseudo_label`` that the ``pseudo-label``
            command wrote, or none. Of arrays, the labels' name.
        min_confidence: Leave out images whose ``confidence`` is below.
        size: Use only so many images, drawn once by a fixed seed.
        fraction: Share of unlabelled images in each batch, in (0, 1). An epoch is then a pass over
            the labelled images, and the unlabelled are reshuffled at their own pace. Null pools
            both sets into one, as DAT's code does.

    Source: half of each batch is Carmon et al. 2019 (arXiv 1905.13736).
    """

    path: PathText | None = None
    config: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    min_confidence: Annotated[Number, Ge(0), Le(1)] = 0.0
    size: Annotated[Whole, Ge(1)] | None = None
    fraction: Annotated[Number, Gt(0), Lt(1)] | None = 0.5

    def refuse(self, keys: Iterable[str], where: str) -> None:
        """That keys which mean nothing somewhere have not been set.

        Raises:
            ValueError: ``key: ...``.
        """
        for key in keys:
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {value!r} is not for {where}")


class MixSettings(Settings):
    """The recipe's ``data.mix``: images of a step mixed with each other, and their labels too.

    One draw a step, as timm's ``mode: batch``, but over all processes: each image is mixed with the
    one before it in the step's order. Labels become probabilities, for the attack and the loss;
    the accuracies of training batches are then those of the class with the larger share, which
    rise and fall with the draw: lost robust accuracy is looked for on the held-out split alone.

    Args:
        mixup, cutmix: alpha of Beta(alpha, alpha), from which the share of an image is drawn;
            0 is off. Rebuffi et al. 2021 (arXiv 2103.01946) take ``cutmix: 1``.
        prob: Probability that a step is mixed.
        switch_prob: Probability of CutMix instead of mixup, where both are on; 0.5 unless given.
    """

    mixup: Annotated[Number, Ge(0), Le(100)] = 0.0
    cutmix: Annotated[Number, Ge(0), Le(100)] = 0.0
    prob: Annotated[Number, Gt(0), Le(1)] = 1.0
    switch_prob: Annotated[Number, Gt(0), Lt(1)] | None = None

    @property
    def share_of_cutmix(self) -> float:
        """Of the mixed steps."""
        if self.mixup and self.cutmix:
            return 0.5 if self.switch_prob is None else self.switch_prob
        return 1.0 if self.cutmix else 0.0

    @model_validator(mode="after")
    def _mixes(self) -> "MixSettings":
        if not (self.mixup or self.cutmix):
            raise ValueError("neither mixup nor cutmix is above 0: nothing would be mixed")
        if self.switch_prob is not None and not (self.mixup and self.cutmix):
            raise ValueError(
                f"switch_prob: {self.switch_prob:g} chooses between mixup and cutmix, of which one "
                "is 0: leave it out"
            )
        return self


class DataSettings(Settings):
    """The recipe's ``data`` section.

    Args:
        path: A data set on the hub, a local folder or parquet file that ``load_dataset`` reads,
            WebDataset's shards (``train-{0000..1023}.tar``, ``*-*.tar``, ``https://...``, see
            ``split_shards``), or ``sklearn:digits`` (scikit-learn's 8x8 digits, one fifth of them
            as test split).
        config: Name of the data set's configuration, where it has several.
        train_split, test_split: Names of the splits.
        image_column, label_column: Found by their feature types when not given.
        validation_size: Training images held out to choose checkpoints: a number, or a share < 1.
        train_size, test_size: Use only so many images of a split, drawn once by a fixed seed.
        in_memory: Decode all images once and keep them as uint8 (for small images of one size).
        augment: In memory, in batches on the device: ``crop_flip`` (pad by 4, crop, mirror),
            ``resized_crop_flip`` (random resized crop, mirror) or ``flip`` (mirror, enough where
            few epochs underfit). From files: ``timm`` (random resized crop and mirror). Or
            ``none``.
        crop_scale: The least share of an image's area that a random resized crop keeps
            (``resized_crop_flip``, ``timm``); 0.08 unless given.
        policy: Of torchvision, after ``augment``: ``rand`` (RandAugment, 2 operations of magnitude
            9), ``trivial`` (TrivialAugmentWide), or AutoAugment's policy for a data set
            (``auto_cifar10``, ``auto_imagenet``, ``auto_svhn``). The workers compute it, image by
            image, beside the training.
        cutout: After ``policy``, a black square of so many pixels a side somewhere in each image
            (in memory: in batches on the device).
        mix: After all of these, mixup and CutMix: images and labels of a step mixed with each
            other, see ``MixSettings``.
        image_size: Height and width that images from files are cropped and resized to.
        num_workers: Processes of each training process that decode images from files, or compute
            the ``policy`` of those in memory; the images are the same by any number. By 0 it does
            so itself, in its step; the policy also where processes are not forked (macOS, Windows,
            Python 3.14).
        on_bad: What to do about images that are missing, empty or cannot be decoded, have several
            frames, more than 178,956,970 pixels, transparent pixels or such of unknown range, or
            (in memory) another size; and about rows without a label, or with one that is no class.
            ``refuse`` names the first (images from files: when training or evaluation comes to
            it), ``skip`` leaves them out, says which, and counts them in the report (from files:
            each process first decodes all of them once). Of plain integers the classes are those
            below 1000, or at least half of the numbers up to which occur.
        classes: Use only the images of these classes, numbered anew in the order given.
        unlabeled: More images to train on, see ``UnlabeledSettings``. Or a list of such sources,
            each with its ``fraction`` of the batch, together below 1.
        sharding: ``global``: each epoch deals all images anew. ``fixed``: each worker keeps its
            own part, the paper's D(i), and reshuffles that.
    """

    path: PathText
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    validation_size: Annotated[Whole, Ge(0)] | Annotated[Number, Ge(0)] = 0
    train_size: Annotated[Whole, Ge(1)] | None = None
    test_size: Annotated[Whole, Ge(1)] | None = None
    in_memory: Flag = True
    augment: Literal["none", "flip", "crop_flip", "resized_crop_flip", "timm"] = "none"
    crop_scale: Annotated[Number, Gt(0), Le(1)] | None = None
    policy: Literal["rand", "trivial", "auto_cifar10", "auto_imagenet", "auto_svhn"] | None = None
    cutout: Annotated[Whole, Ge(1)] | None = None
    mix: MixSettings | None = None
    image_size: Annotated[Whole, Ge(1), Le(16384)] | None = None
    num_workers: Annotated[Whole, Ge(0), Le(1024)] = 4
    on_bad: Literal["refuse", "skip"] = "refuse"
    classes: Annotated[tuple[Annotated[Whole, Ge(0)], ...], Len(2)] | None = None
    unlabeled: UnlabeledSettings | tuple[UnlabeledSettings, ...] | None = None
    sharding: Literal["global", "fixed"] = "global"

    @property
    def extra(self) -> tuple[UnlabeledSettings, ...]:
        """The sources that ``unlabeled`` names: none, one, or those of a list."""
        if isinstance(self.unlabeled, tuple):
            return self.unlabeled
        return () if self.unlabeled is None else (self.unlabeled,)

    def source(self, kind: Literal["train", "test"] = "test") -> dict[str, Any]:
        """Where images are from, for records: path, config, split, and what else chose them."""
        keys = {"path", "config", f"{kind}_split", f"{kind}_size", "image_size", "classes"}
        found = self.model_dump(mode="json", include=keys, exclude_none=True)
        return found | {"split": found.pop(f"{kind}_split")}

    @model_validator(mode="after")
    def _fits_together(self) -> "DataSettings":
        only_in_memory = ["flip", "crop_flip", "resized_crop_flip"]
        if self.augment in (["timm"] if self.in_memory else only_in_memory):
            raise ValueError(
                f"augment: {self.augment} does not go with in_memory: {str(self.in_memory).lower()}"
                f" ({listed(only_in_memory)}: in memory; timm: from files; none: both)"
            )
        if self.crop_scale is not None and self.augment not in ("resized_crop_flip", "timm"):
            raise ValueError(
                f"crop_scale: {self.crop_scale:g} is for augment: resized_crop_flip and timm, not "
                f"for {self.augment}"
            )
        if self.in_memory == (self.image_size is not None):
            raise ValueError(
                "image_size is for images from files (in_memory: false), which need it; got "
                f"{self.image_size}"
            )
        if self.cutout is not None and self.cutout >= (self.image_size or math.inf):
            raise ValueError(
                f"cutout: a square of {self.cutout} x {self.cutout} is not smaller than the images "
                f"of {self.image_size} x {self.image_size}"
            )
        if self.validation_size > 1 and not isinstance(self.validation_size, int):
            raise ValueError(
                f"validation_size: {self.validation_size} is neither a number of images nor a "
                "share < 1"
            )
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: {list(self.classes)} names a class twice")
        if any(own.path is None for own in self.extra) and self.train_size is None:
            raise ValueError(
                "unlabeled.path is not given, so the images that data.train_size leaves out are "
                "meant, but data.train_size is not given either"
            )
        if sum(own.path is None for own in self.extra) > 1:
            raise ValueError(
                "unlabeled: the images that data.train_size leaves out are one source: give the "
                "others a path"
            )
        if isinstance(self.unlabeled, tuple):
            _check_shares([own.fraction for own in self.unlabeled])
        return self


def _check_shares(fractions: list[float | None]) -> None:
    """Refuse a list of sources that leaves no room for labelled images, or pools one."""
    found = ", ".join("null" if share is None else f"{share:g}" for share in fractions)
    if not fractions or None in fractions:
        raise ValueError(
            "unlabeled: a list needs at least one source, and a fraction of each, not null, found "
            f"[{found}]"
        )
    total = sum(share for share in fractions if share is not None)
    if total > 1 - 1e-9:
        raise ValueError(
            f"unlabeled: the fractions [{found}] are {total:g} together, and must leave a share of "
            "labelled images: below 1"
        )
