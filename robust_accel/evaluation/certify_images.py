"""Certified radii of many images: the recipe's ``certify`` section, the record, the field's log."""

from dataclasses import asdict
from datetime import timedelta
from decimal import ROUND_DOWN, Context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Len, Lt
from pydantic import model_validator
from torch import Tensor

from robust_accel.data import ImageSet, derived_seed
from robust_accel.evaluation.bench import Bench, Unit
from robust_accel.evaluation.certify import (
    Sequential,
    SmoothedClassifier,
    certified_accuracy,
    lower_bound,
    radius_of,
)
from robust_accel.evaluation.ledger import Record
from robust_accel.evaluation.outcomes import global_state_kept
from robust_accel.files import write_text
from robust_accel.settings import (
    Number,
    OptionalPixels,
    PathText,
    RowNumbers,
    Settings,
    Whole,
    default,
)
from robust_accel.statistics import wilson_interval

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # the field's log


class CertifySettings(Settings):
    """How radii are certified, see ``evaluation/certify.py``.

    Args:
        sigma: Standard deviation of the noise in pixel units, > 0; the training objective's when
            not given.
        method: ``cohen`` takes n samples an image; ``sequential`` stops as soon as ``radii`` are
            decided, with the same guarantee.
        radii: In pixel units, >= 0: those of the table, and those that ``sequential`` decides; it
            knows nothing below the smallest.
        n0, n: Samples that guess the class, and at most so many that bound its probability.
        alpha: Probability with which a certificate may be wrong, in (0, 1).
        images: Certify at most so many images; all when null.
        skip: Certify every so many-th image (the field's logs take every 20th).
        batch_size: Noisy copies that go through the model at a time.
        precision: Of the model, for every sample alike.
        ids: The images instead of all, as ``evaluate.ids``.
        seed: Of the noise.
    """

    sigma: OptionalPixels = default(None)
    method: Literal["cohen", "sequential"] = "cohen"
    radii: Annotated[tuple[Annotated[Number, Ge(0)], ...], Len(1)] = (
        0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    )  # fmt: skip
    n0: Annotated[Whole, Ge(1)] = 100
    n: Annotated[Whole, Ge(1)] = 100_000
    alpha: Annotated[Number, Gt(0), Lt(1)] = 0.001
    images: Annotated[Whole, Ge(1)] | None = None
    skip: Annotated[Whole, Ge(1)] = 1
    ids: PathText | RowNumbers | None = None
    batch_size: Annotated[Whole, Ge(1)] = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[Whole, Ge(0)] = 0

    @model_validator(mode="after")
    def _enough(self) -> "CertifySettings":
        if self.n < self.n0:
            raise ValueError(f"n: {self.n} is fewer than n0: {self.n0}")
        return self

    def index(self, images: ImageSet) -> Tensor:
        """Which images are certified: [N]."""
        return torch.arange(0, len(images), self.skip)[: self.images]

    @property
    def about(self) -> dict[str, Any]:
        """What decides a record of given images, plain values."""
        shared = self.model_dump(mode="json", exclude={"images", "skip", "batch_size", "ids"})
        if self.method == "sequential":  # looks are at multiples of it
            shared["batch_size"] = self.batch_size
        return {"name": "certify", **shared}

    @property
    def about_image(self) -> dict[str, Any]:
        """What decides an image's certificate: of fixed samples, no radius that is asked for."""
        about = self.about
        if self.method == "cohen":
            del about["radii"]
        return about

    @property
    def largest_radius(self) -> float:
        """The radius of an image whose every sample is its class."""
        assert self.sigma is not None
        alpha = self.alpha if self.method == "cohen" else self.alpha / 2
        return float(radius_of(lower_bound(self.n, self.n, alpha), self.sigma))

    @property
    def doubt(self) -> str | None:
        """Which radii no image can reach; None where all are within reach."""
        far = [f"{radius:g}" for radius in self.radii if radius > self.largest_radius]
        if not far:
            return None
        return (
            f"certify.radii: {', '.join(far)} cannot be certified by {self.n} samples at sigma "
            f"{self.sigma:g} and alpha {self.alpha:g}: the largest radius is "
            f"{self.largest_radius:.4f}; more samples (certify.n) or a larger sigma go further"
        )


def certify_images(bench: Bench, index: Tensor, settings: CertifySettings) -> Record:
    """Certify images, each by noise that follows from (seed, image).

    Args:
        bench: With the settings' seed.
        index: [N], of the images.

    Returns:
        The record: ``accuracy`` in the L2 ball of the smallest radius, if it is within reach,
        ``radii``, ``curve``, ``abstained`` where it is known, ``samples_per_image``.
    """
    assert settings.sigma is not None
    smoothed = SmoothedClassifier(
        bench.classifier, settings.sigma, settings.batch_size, bf16=settings.precision == "bf16"
    )
    rule = Sequential(settings.radii, settings.n, settings.alpha, settings.sigma)

    def compute(unit: Unit, x: Tensor, labels: Tensor) -> dict[str, Any]:
        noise, own = (derived_seed(settings.seed, unit.number, i) for i in range(2))
        generator = torch.Generator(x.device).manual_seed(noise)
        with global_state_kept(own):  # a model's own noise is not that of the certificate
            if settings.method == "sequential":
                found = smoothed.certify_sequentially(x[0], settings.n0, rule, generator)
            else:
                found = smoothed.certify(x[0], settings.n0, settings.n, settings.alpha, generator)
        return asdict(found)

    units = [Unit(i, torch.tensor([i])) for i in index.tolist()]
    found = bench.share(settings.about_image, units, compute, "certify")
    columns = {key: [one[key] for one in found] for key in ("radius", "samples", "seconds")}
    predicted = [one["predict"] for one in found]
    labels = bench.images.labels[index].tolist()
    per_image = {"label": labels, "prediction": predicted, **columns}
    spent = {key: sum(one[key] for one in found) for key in ("seconds", "forward_passes")}
    every = settings.skip > 1
    selection = f"one in {settings.skip}, {len(index)} images" if every else None
    result = summary(settings, per_image)
    about = settings.about | {"norm": "l2", "eps": min(settings.radii)}
    return bench.keep("certificate", about, index, result, per_image, spent, selection)


def write_table(path: Path, record: Record) -> None:
    """The field's log: tab-separated, a row an image; radii to three digits, rounded down."""
    columns = record["outcomes"]
    lines = ["\t".join(COLUMNS)]
    names = ("index", "label", "prediction", "radius", "seconds")
    for row in zip(*(columns[name] for name in names), strict=True):
        index, label, predict, radius, seconds = row
        shown = (index, label, predict, rounded_down(radius), int(predict == label))
        lines.append("\t".join(map(str, (*shown, timedelta(seconds=seconds)))))
    write_text(path, "\n".join(lines) + "\n")


def rounded_down(radius: float) -> str:
    """Three digits of a radius, never more than it is: what is written must hold."""
    if radius <= 0:
        return "0.0"
    digits = Context(prec=3, rounding=ROUND_DOWN).create_decimal_from_float(radius)
    return f"{digits.normalize():f}"


def summary(settings: CertifySettings, per_image: dict[str, list[Any]]) -> dict[str, Any]:
    """Certified accuracy at the radii, and the curve as far as it is known.

    A sequential certificate stops when the radii that are asked for and within reach are decided:
    below the smallest and beyond the largest of them nothing is known.
    """
    radius = np.asarray(per_image["radius"])
    predicted, labels = (np.asarray(per_image[key]) for key in ("prediction", "label"))
    correct = predicted == labels
    number, asked = len(radius), sorted(settings.radii)
    if settings.method == "sequential":
        first, last = asked[0], max([r for r in asked if r <= settings.largest_radius], default=0.0)
    else:  # of fixed samples, each radius is the image's own
        first, last = 0.0, max(radius.max(), *asked)
    curve = np.linspace(first, last, 101).tolist() if first <= last else []
    radii = [
        {
            "radius": r,
            "accuracy": a,
            "interval": list(wilson_interval(a, number)),
            "reachable": r <= settings.largest_radius,
        }
        for r, a in zip(asked, certified_accuracy(asked, correct, radius), strict=True)
    ]
    result = {"radii": radii, "samples_per_image": float(np.mean(per_image["samples"]))}
    if radii[0]["reachable"]:
        result |= {key: radii[0][key] for key in ("accuracy", "interval")}
    if curve:
        shares = certified_accuracy(curve, correct, radius)
        result["curve"] = {"radius": curve, "accuracy": shares}
    if first == 0:
        result["abstained"] = float((predicted < 0).mean())
    return result
