"""Error on corrupted images (Hendrycks and Dietterich 2019, arXiv 1903.12261).

Each corruption is a record, over all its severities; and their mean is one, whose identity is that
of its parts.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from robust_accel.data import ImageSet
from robust_accel.data.corrupted import (
    Corrupted,
    GeneratedImages,
    check_generated,
    check_published,
    generator_version,
    labels_by_folder,
    published,
)
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.identity import digest_of_json
from robust_accel.evaluation.ledger import Ledger, Record
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.statistics import wilson_interval

logger = logging.getLogger(__name__)


_OF_ALL = ("function", "seed", "draws", "batch_size", "device", "hardware", "num_processes")
"""What the mean's record has of its parts'."""


def first_of_each(number: int | None, kind: str) -> str:
    """A record's ``images.kind``: so many of each severity, of images of a kind; None: of all."""
    if number is None:
        return kind
    return f"first {number} of each severity" + ("" if kind == "all" else f" of {kind}")


class CorruptionEvaluation:
    """The error of a classifier on corrupted images.

    Args:
        settings: With ``corruptions``.
        images: The test images; published ones are read as these are.
        num_classes: Of the data.
        class_names: Of the classifier's outputs.
        positions: The classifier's number of each class of the data, see ``match_classes``.
        source, kind: Where the test images are from, and which of them they are, see ``Bench``.

    Raises:
        ValueError: ``evaluate.corruptions.key: ...``: what is asked for is not to be had.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        images: ImageSet,
        *,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        source: dict[str, Any] | None = None,
        kind: str = "all",
    ) -> None:
        self.own, self.images, self.seed = settings.corruption_settings, images, settings.seed
        self.number = self.own.images or settings.images
        self.source, self.kind, self.by = source or {}, kind, "published images"
        path, self._positions = self.own.path, positions
        self._about: dict[str, Any] = {
            "like": images,
            "num_classes": num_classes,
            "labels_of": labels_by_folder(class_names, num_classes, positions, str(path)),
        }
        try:
            if path is None:
                check_generated(images)
                self.by = generator_version()
                return
            if self.source.get("classes"):
                raise ValueError(
                    f"path: {path} has images of all classes, of which data.classes chooses some"
                )
            self.source, self.kind = {"path": path}, "all"
            check_published(path, self.own.names, self.own.severities, **self._about)
        except ValueError as error:
            raise ValueError(f"evaluate.corruptions.{error}") from error
        finally:
            self.kind = first_of_each(self.number, self.kind)

    def run(self, bench: Bench) -> dict[str, Record | dict[str, Record]]:
        """The records: ``corruption``, by name, and ``corruptions``, their mean.

        Args:
            bench: Of the test images.
        """
        found: dict[str, Record] = {}
        for name in self.own.names:
            found[name] = self._record(name, bench)
            error = 100 - 100 * found[name]["accuracy"]
            logger.info("%s: error %.2f%%, %s", name, error, self.by)
        mean = self._mean(found, bench.ledger)
        logger.info("corruptions: %s", mean_text(mean))
        return {"corruption": found, "corruptions": mean}

    def _corrupted(self, name: str) -> Corrupted:
        severities = self.own.severities
        if self.own.path is not None:
            try:
                return published(
                    self.own.path,
                    name,
                    severities,
                    self.number,
                    positions=self._positions,
                    **self._about,
                )
            except ValueError as error:
                raise ValueError(f"evaluate.corruptions.{error}") from error
        number = min(self.number or len(self.images), len(self.images))
        made = GeneratedImages(self.images, name, severities, number, self.seed)
        return Corrupted(made, torch.tensor(severities).repeat_interleave(number))

    def _record(self, name: str, bench: Bench) -> Record:
        corrupted = self._corrupted(name)
        bench = bench.on(corrupted.images, self.source, self.kind)
        outcomes = bench.clean()
        by_severity: list[dict[str, Any]] = []
        for severity in self.own.severities:
            share = outcomes.share[corrupted.severity == severity].double()
            accuracy, n = share.mean().item(), len(share)
            interval = list(wilson_interval(accuracy, n))
            by_severity.append(
                {"severity": severity, "n": n, "accuracy": accuracy, "interval": interval}
            )
        attack: dict[str, Any] = {"name": "corruption", "corruption": name}
        attack |= {"severities": list(self.own.severities), "by": self.by}
        mean = sum(one["accuracy"] for one in by_severity) / len(by_severity)
        # no interval of the mean: the images of all severities are of the same clean ones
        about: dict[str, Any] = {"accuracy": mean, "interval": None, "clean_accuracy": None}
        about |= {"by_severity": by_severity}
        return bench.record("corruption", attack, outcomes, outcomes, **about)

    def _mean(self, parts: dict[str, Record], ledger: Ledger) -> Record:
        """Means over corruptions, each the mean over its severities."""
        reference, first = self.own.reference, next(iter(parts.values()))
        rows, errors = [], {name: 1 - record["accuracy"] for name, record in parts.items()}
        for name, record in parts.items():
            row = {"corruption": name, "error": errors[name], "by_severity": record["by_severity"]}
            if reference is not None:
                row |= {"reference": reference[name], "ce": errors[name] / reference[name]}
            rows.append(row)
        attack = {
            "name": "corruptions",
            "corruptions": list(parts),
            "severities": list(self.own.severities),
            "by": self.by,
            "reference": None if reference is None else {name: reference[name] for name in parts},
        }
        result = {"mean_error": sum(errors.values()) / len(errors)}
        result["accuracy"] = 1 - result["mean_error"]
        if reference is not None:
            result["mce"] = sum(row["ce"] for row in rows) / len(rows)
        number = first["by_severity"][0]["n"]
        digest = digest_of_json([record["images"]["digest"] for record in parts.values()])
        key = digest_of_json([attack, [record["key"] for record in parts.values()]])[:16]
        about = {name: first[name] for name in _OF_ALL if name in first}
        about |= {"purpose": "corruptions", "attack": attack, "threat_model": None}
        about |= {"images": first["images"] | {"n": number, "digest": digest}, **result}
        about |= {"by_corruption": rows, "versions": first["versions"]}
        for name in ("seconds", "forward_passes"):
            about[name] = sum(record[name] for record in parts.values())
        return ledger.record(key, about | {"outcomes": {"image": first["outcomes"]["image"]}})


def mean_text(record: Record) -> str:
    """Which mean it is, over what, and of whose images."""
    attack = record["attack"]
    over = f"{_times(attack['corruptions'], 'corruption', 'corruptions')} x "
    over += _times(attack["severities"], "severity", "severities")
    text = f"mean error {100 * record['mean_error']:.2f}% ({over}, n={record['images']['n']} each)"
    if "mce" in record:
        text += f"; mCE {100 * record['mce']:.2f}% of the reference errors given"
    return f"{text}; {attack['by']}"


def _times(found: Sequence[Any], one: str, more: str) -> str:
    return f"{len(found)} {one if len(found) == 1 else more}"
