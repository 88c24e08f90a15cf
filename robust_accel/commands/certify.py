"""The certify command: certified L2 radii of a run or any timm checkpoint under Gaussian noise."""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from robust_accel.data import ImageSet, load_test, seeded_generator
from robust_accel.evaluation.certify import (
    Certificate,
    Sequential,
    SmoothedClassifier,
    certified_accuracy,
)
from robust_accel.evaluation.settings import CertifySettings
from robust_accel.models import PixelClassifier
from robust_accel.provenance import digest_of
from robust_accel.reporting.report import write_report
from robust_accel.run_folder import RunFolder, append_line, read_lines
from robust_accel.trained_model import load_classifier, recipe_of

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # the field's log


def certify_model(model: str, overrides: Sequence[str] = ()) -> RunFolder:
    """Certify test images, and write the log, ``report.json`` and ``report.md``.

    ``certify/certify.tsv`` has a row an image in the field's columns; ``certify/process-*.jsonl``
    hold the same as it comes, with the samples that each image took, so that a killed run goes on.
    An image's noise follows from (seed, image): the log does not depend on how many processes
    there were.

    Args:
        model: A run folder, a timm model's name or ``local-dir:FOLDER``.
        overrides: ``section.key=value``; ``certify.sigma`` is the objective's if it has one.

    Raises:
        ValueError: Settings are out of range, or the folder's log is of another model, sigma, seed
            or number of samples: it is left as it was.
    """
    recipe = recipe_of(
        model,
        overrides,
        required=("model", "data", "certify"),
        defaults={"output": f"runs/certify-{Path(model).name}"},
    )
    settings, folder = recipe.certify, RunFolder(recipe.output)
    images, num_classes = recipe.checked("data", lambda: load_test(recipe.data))
    indices = list(range(0, len(images), settings.skip))[: settings.images]
    classifier = load_classifier(recipe, model, images, num_classes).eval()
    log = CertifyLog(folder.certify, settings, classifier, images)
    accelerator = Accelerator()
    classifier.to(accelerator.device)
    rows = log.rows(accelerator)
    certify_images(classifier, images, indices, settings, accelerator, log, rows)
    rows = log.rows(accelerator)
    if accelerator.is_main_process:
        log.write_table([rows[i] for i in indices])
        report = folder.read_report()
        report["certified"] = summary(settings, [rows[i] for i in indices])
        folder.write_report(report)
        write_report(folder)
    accelerator.wait_for_everyone()
    return folder


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
