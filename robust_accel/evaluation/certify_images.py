"""Certified radii of many images: the recipe's ``certify`` section, the log, the summary."""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from annotated_types import Ge, Gt, Len, Lt
from pydantic import model_validator
from tqdm.auto import tqdm

from robust_accel.data import ImageSet, seeded_generator
from robust_accel.evaluation.certify import (
    Certificate,
    Sequential,
    SmoothedClassifier,
    certified_accuracy,
)
from robust_accel.models import PixelClassifier
from robust_accel.provenance import digest_of
from robust_accel.run_folder import append_line, read_lines
from robust_accel.settings import Number, Settings

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # the field's log


class CertifySettings(Settings):
    """How radii are certified, see ``evaluation/certify.py``.

    Args:
        sigma: Standard deviation of the noise in pixel units, > 0; the training objective's when
            not given.
        method: ``cohen`` takes n samples an image; ``sequential`` stops as soon as ``radii`` are
            decided, with the same guarantee.
        radii: In pixel units: those of the table, and those that ``sequential`` decides.
        n0, n: Samples that guess the class, and at most so many that bound its probability.
        alpha: Probability with which a certificate may be wrong, in (0, 1).
        images: Certify at most so many images; all when null.
        skip: Certify every so many-th image (the field's logs take every 20th).
        batch_size: Noisy copies that go through the model at a time.
        precision: Of the model, for every sample alike.
        seed: Of the noise.
    """

    sigma: Annotated[Number, Gt(0)] | None = None
    method: Literal["cohen", "sequential"] = "cohen"
    radii: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(1)] = (
        0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    )  # fmt: skip
    n0: Annotated[int, Ge(1)] = 100
    n: Annotated[int, Ge(1)] = 100_000
    alpha: Annotated[Number, Gt(0), Lt(1)] = 0.001
    images: Annotated[int, Ge(1)] | None = None
    skip: Annotated[int, Ge(1)] = 1
    batch_size: Annotated[int, Ge(1)] = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Ge(0)] = 0

    @model_validator(mode="after")
    def _enough(self) -> "CertifySettings":
        if self.n < self.n0:
            raise ValueError(f"n: {self.n} is fewer than n0: {self.n0}")
        return self


def certify_images(
    classifier: PixelClassifier,
    images: ImageSet,
    indices: Sequence[int],
    settings: CertifySettings,
    accelerator: Accelerator,
    log: "CertifyLog",
    known: dict[int, dict[str, Any]],
) -> None:
    """Certify this process's share of the images that are not known yet, row by row."""
    assert settings.sigma is not None
    smoothed = SmoothedClassifier(
        classifier, settings.sigma, settings.batch_size, bf16=settings.precision == "bf16"
    )
    rule = Sequential(settings.radii, settings.n, settings.alpha, settings.sigma)

    def certificate(x: torch.Tensor, generator: torch.Generator) -> Certificate:
        if settings.method == "sequential":
            return smoothed.certify_sequentially(x, settings.n0, rule, generator)
        return smoothed.certify(x, settings.n0, settings.n, settings.alpha, generator)

    todo = [i for i in indices if i not in known]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    batches = images.batches([torch.tensor([i]) for i in mine], accelerator.device)
    bar = tqdm(
        zip(mine, batches, strict=True),
        total=len(mine),
        desc="certify",
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    for index, (x, labels) in bar:
        start = time.perf_counter()
        seed = seeded_generator(settings.seed, index).initial_seed()
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        found = certificate(x[0], generator)
        log.append(
            accelerator,
            {
                "idx": index,
                "label": int(labels[0]),
                "predict": found.predict,
                "radius": found.radius,
                "correct": int(found.predict == int(labels[0])),
                "time": str(timedelta(seconds=time.perf_counter() - start)),
                "samples": found.samples,
            },
        )


class CertifyLog:
    """Rows of one certification, as they come, in a file a process.

    Raises:
        ValueError: The folder holds another certification.
    """

    def __init__(
        self, folder: Path, settings: CertifySettings, classifier: PixelClassifier, images: ImageSet
    ) -> None:
        weights = [*classifier.state_dict().values(), classifier.mean, classifier.std]
        self._about: dict[str, Any] = {
            "model": digest_of(weights)[:16],
            "labels": digest_of([images.labels])[:16],
            **settings.model_dump(mode="json", exclude={"images", "skip", "batch_size"}),
        }
        if settings.method == "cohen":
            del self._about["radii"]
        else:  # looks are at multiples of it
            self._about["batch_size"] = settings.batch_size
        self._folder, self._about_file = folder, folder / "about.json"
        if self._about_file.exists():
            found = json.loads(self._about_file.read_text())
            changed = [
                f"{key}: {found.get(key)!r}, now {self._about.get(key)!r}"
                for key in {**found, **self._about}
                if found.get(key) != self._about.get(key)
            ]
            if changed:
                raise ValueError(
                    f"certify: {folder} holds another certification ({'; '.join(changed)}): move "
                    "it away, or choose another output"
                )

    def rows(self, accelerator: Accelerator) -> dict[int, dict[str, Any]]:
        """What all processes have written so far, by image; read by one, told to all."""
        accelerator.wait_for_everyone()
        found: list[dict[str, Any]] = []
        if accelerator.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._about_file.write_text(json.dumps(self._about, indent=2) + "\n")
            for path in sorted(self._folder.glob("process-*.jsonl")):
                found += read_lines(path)
        return {row["idx"]: row for row in gather_object(found)}

    def append(self, accelerator: Accelerator, row: dict[str, Any]) -> None:
        append_line(self._folder / f"process-{accelerator.process_index}.jsonl", row)

    def write_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """The field's log: tab-separated, radii to three digits."""
        lines = ["\t".join(COLUMNS)]
        for row in rows:
            shown = row | {"radius": f"{row['radius']:.3}"}
            lines.append("\t".join(str(shown[column]) for column in COLUMNS))
        target = self._folder / "certify.tsv"
        temporary = target.with_suffix(".incomplete")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(target)


def summary(settings: CertifySettings, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``report.json`` says of a certification."""
    correct, radius = ([row[key] for row in rows] for key in ("correct", "radius"))
    accuracies = certified_accuracy(settings.radii, correct, radius)
    curve = np.linspace(0, max(max(radius), *settings.radii), 101).tolist()
    return {
        **settings.model_dump(mode="json", exclude={"radii", "images"}),
        "images": len(rows),
        "abstained": float(np.mean([row["predict"] < 0 for row in rows])),
        "samples_per_image": float(np.mean([row["samples"] for row in rows])),
        "accuracy": [
            {"radius": r, "accuracy": a} for r, a in zip(settings.radii, accuracies, strict=True)
        ],
        "curve": {"radius": curve, "accuracy": certified_accuracy(curve, correct, radius)},
    }
