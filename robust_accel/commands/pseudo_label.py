"""The pseudo-label command: a teacher labels images, for ``data.unlabeled`` to read."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.table import embed_table_storage
from torch import Tensor

from robust_accel.commands import say
from robust_accel.data import (
    CONFIDENCE,
    LABELED_FILES,
    PSEUDO_LABEL,
    ImageSet,
    identity_of,
    load_to_label,
)
from robust_accel.data.array_files import write_npz
from robust_accel.data.array_images import CLASS_NAMES
from robust_accel.evaluation import predictions
from robust_accel.files import check_path, written_whole
from robust_accel.messages import shown
from robust_accel.trained_model import load_classifier, recipe_of
from robust_accel.training.disk import check_writable
from robust_accel.training.peers import check_same_images, together


def run(options: argparse.Namespace) -> int:
    with together():
        found = pseudo_label(options.model, options.out, options.data, options.settings)
    say(f"{options.out}: {found['n']} images, mean confidence {found['mean_confidence']:.3f}")
    return 0


def pseudo_label(
    model: str, out: str | Path, data: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Label images by a model's clean predictions, and write both.

    Args:
        model: A run folder, a timm model's name, or ``local-dir:FOLDER``.
        out: A ``.parquet`` file: the images as they were, ``pseudo_label`` (with the classes'
            names, where the model knows them) and ``confidence`` (the probability of that class,
            in [0, 1]). Or a ``.npz`` file, which training maps and does not hold in memory:
            ``image`` (uint8, [N, H, W, C], as the model saw them), ``label`` (int64, [N]),
            ``confidence`` and ``class_names`` (a list in JSON, as bytes). Written by one process in
            one move, never over another.
        data: A data set of the hub, a folder, or a file of rows, as ``data.unlabeled.path`` takes
            them; no pickle, arrays or shards. Not given: the images that the run's
            ``data.train_size`` left out of its training split.
        overrides: ``section.key=value``, such as ``data.unlabeled.split=test``.

    Returns:
        ``n`` and ``mean_confidence``.

    Raises:
        ValueError: ``section.key: ...``, before anything is labelled.
    """
    try:
        out = Path(check_path(str(out)))
    except ValueError as error:
        raise ValueError(f"--out: {shown(str(out))} is not allowed: {error}") from None
    if out.suffix not in _WRITERS or os.path.lexists(out):
        found = f"does not end in {' or '.join(_WRITERS)}"
        found = "is there already" if os.path.lexists(out) else found
        raise ValueError(f"--out: {out} {found}: choose another name")
    check_writable(out.parent, "--out")
    if data is not None:
        # the size that the run took of its own source is no part of this one
        overrides = [f"data.unlabeled.path={data}", "data.unlabeled.size=null", *overrides]
    recipe = recipe_of(
        model,
        overrides,
        required=("model", "data"),
        optional=("evaluate",),
        defaults={"data": {"path": data}},
    )
    number = recipe.model.num_classes
    rows, images = recipe.checked("data", lambda: load_to_label(recipe.data, num_classes=number))
    classifier = load_classifier(recipe, model, images, 2)
    accelerator = Accelerator()
    recipe.checked(
        "data", lambda: check_same_images(lambda: identity_of(unlabeled=images), accelerator)
    )
    classifier.to(accelerator.device).eval()
    classes, confidence = predictions(classifier, images, recipe.evaluate.batch_size, accelerator)
    if accelerator.is_main_process:
        labels = _Labels(classes, confidence, classifier.class_names)
        _WRITERS[out.suffix](rows, images, labels, out)
    accelerator.wait_for_everyone()
    return {"n": len(rows), "mean_confidence": confidence.mean().item()}


class _Labels(NamedTuple):
    """A teacher's: [N] each, and the classes' names, where it knows them."""

    classes: Tensor
    confidence: Tensor
    names: Sequence[str] | None


def _write_parquet(rows: datasets.Dataset, _: ImageSet, labels: _Labels, out: Path) -> None:
    labeled = rows.add_column(PSEUDO_LABEL, labels.classes.numpy()).add_column(
        CONFIDENCE, labels.confidence.numpy()
    )
    if labels.names is not None:  # by which a student finds them among its own
        feature = datasets.ClassLabel(names=list(labels.names))
        labeled = labeled.cast_column(PSEUDO_LABEL, feature)
    # the bytes of images that lie in files of their own, or the parquet would hold paths
    whole = labeled.with_format("arrow").map(embed_table_storage, batched=True)
    with written_whole(out) as temporary:
        whole.with_format(None).to_parquet(str(temporary))


def _write_npz(_: datasets.Dataset, images: ImageSet, labels: _Labels, out: Path) -> None:
    classes, confidence, names = labels
    batches = images.batches(torch.arange(len(images)).split(_AT_A_TIME), torch.device("cpu"))
    pixels = (x.mul(255).round().byte().permute(0, 2, 3, 1).numpy() for x, _ in batches)
    channels, height, width = images.shape
    arrays: dict[str, Any] = {
        "image": ((len(images), height, width, channels), pixels),
        "label": (tuple(classes.shape), [classes.long().numpy()]),
        "confidence": (tuple(confidence.shape), [confidence.numpy()]),
    }
    if names is not None:
        text = np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8)
        arrays[CLASS_NAMES] = (text.shape, [text])
    write_npz(out, arrays)


_WRITERS = dict(zip(LABELED_FILES, (_write_parquet, _write_npz), strict=True))
_AT_A_TIME = 1024  # images
