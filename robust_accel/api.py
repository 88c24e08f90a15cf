"""The commands as functions: what they give is shown as a table, and can be computed with.

A terminal shows results as text, a notebook as HTML.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from robust_accel.attacks import Attack
from robust_accel.commands.certify import certify_model
from robust_accel.commands.evaluate import evaluate_model
from robust_accel.evaluation import any_module
from robust_accel.evaluation.any_module import How
from robust_accel.evaluation.certify_images import CertifySettings
from robust_accel.evaluation.ledger import records_in
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier
from robust_accel.recipe import Section, as_section, load_recipe
from robust_accel.recipe_file import as_overrides
from robust_accel.reporting.tables import Table, comparison, short_table
from robust_accel.reporting.views import (
    Row,
    accuracy_text,
    attack_text,
    pick,
    read_runs,
    threat_text,
    tidy,
)
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_model
from robust_accel.training import run as training


@dataclass(frozen=True, repr=False)
class Measurement:
    """One number, and what it was measured by.

    Attributes:
        purpose: ``accuracy``, ``certificate``, ``train``, ``sweep``, ``sanity``,
            ``corruption``, ``corruptions`` (their mean).
        attack: Its ``name`` and all its settings; ``{"name": "none"}`` of clean images.
        threat_model: ``norm`` and ``eps`` in pixel units, where there is one; a list of these as
            ``union`` of images that withstand an attack in each.
        accuracy: In [0, 1]; a certificate's in the ball of its smallest radius.
        interval: Wilson's, 95%.
        images: How many.
        record: All that is known: seed, images' digest, seconds, hardware, versions, radii, ...
    """

    purpose: str
    attack: dict[str, Any]
    threat_model: dict[str, Any] | None
    accuracy: float | None
    interval: tuple[float, float] | None
    images: int
    record: dict[str, Any] = field(compare=False)

    @classmethod
    def of(cls, row: Row) -> "Measurement":
        interval = row.get("interval")
        return cls(
            row["purpose"],
            row["attack"],
            row.get("threat_model"),
            row.get("accuracy"),
            (interval[0], interval[1]) if interval else None,
            row["images"]["n"],
            row,
        )

    def __repr__(self) -> str:
        about = filter(None, (attack_text(self.attack), threat_text(self.threat_model)))
        return f"{', '.join(about)}: {accuracy_text(self.record)}% of {self.images} images"


@dataclass(frozen=True, repr=False)
class Measured:
    """What was measured of a model.

    Attributes:
        model: Which one: its digest (``function``), and whose mean, std and size it has.
        measurements: Every number.
        asked: Keys of the records that the call asked for: these are quoted first.
    """

    model: dict[str, Any]
    measurements: tuple[Measurement, ...]
    asked: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False)

    @property
    def clean(self) -> Measurement | None:
        """Accuracy on images as they are."""
        return self._quoted(lambda row: row["attack"]["name"] == "none")

    @property
    def pgd(self) -> Measurement | None:
        """Of several attacks by PGD or APGD that of the most images, then of the most steps, then
        the latest: of several balls their union, see ``against``.
        """
        return self._quoted(lambda row: row["attack"]["name"] in ("pgd", "apgd"))

    @property
    def autoattack(self) -> Measurement | None:
        """``standard`` before ``rand`` before ``quick``; of several balls their union."""
        return self._quoted(lambda row: row["attack"]["name"] == "autoattack")

    @property
    def certificate(self) -> Measurement | None:
        """``record["radii"]`` has the certified accuracy at each radius."""
        return self._quoted(lambda row: True, "certificate")

    def against(self, norm: str) -> "Measured":
        """What was measured in balls of one norm: ``linf``, ``l2`` or ``l1``."""
        own = (one for one in self.measurements if (one.threat_model or {}).get("norm") == norm)
        return Measured(self.model, tuple(own), asked=self.asked)

    def _quoted(self, wanted: Callable[[Row], bool], purpose: str = "accuracy") -> Any:
        rows = [one.record for one in self.measurements if one.purpose == purpose]
        rows = [row for row in rows if wanted(row)]
        row = pick(row for row in rows if row.get("key") in self.asked) or pick(rows)
        return None if row is None else Measurement.of(row)

    def _table(self) -> Table:
        return short_table([one.record for one in self.measurements])

    def __repr__(self) -> str:
        return self._table().markdown()

    def _repr_html_(self) -> str:
        return self._table().html()


@dataclass(frozen=True, repr=False)
class Run(Measured):
    """A run folder: a training, and what was measured of its model.

    Attributes:
        path: Of the folder.
        report: ``report.json``: how the weights were made, and all rows.
    """

    path: Path
    report: dict[str, Any] = field(compare=False)

    def load(self) -> PixelClassifier:
        """Its model, see ``load_model``."""
        return load_model(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``: one a log interval, one a validation."""
        return RunFolder(self.path).read_metrics()

    def evaluate(self, settings: EvaluateSettings, *, attacks: Sequence[Attack] = ()) -> "Run":
        """Measure the model on the run's own test images; what was measured before is not again.

        Args:
            settings: Those that are given; all others are the run's.
            attacks: Further ones, see the function ``evaluate``.

        Returns:
            The run, whose ``pgd`` and so on are those that these settings ask for.
        """
        overrides = as_overrides({"evaluate": as_section("evaluate", settings)})
        return _asked(*evaluate_model(str(self.path), overrides, attacks=attacks))

    def certify(self, settings: CertifySettings) -> "Run":
        """The same for certified radii."""
        overrides = as_overrides({"certify": as_section("certify", settings)})
        return _asked(*certify_model(str(self.path), overrides))

    def _table(self) -> Table:
        return comparison(read_runs([self.path]))


def train(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    model: Section | None = None,
    data: Section | None = None,
    attack: Section | None = None,
    objective: Section | None = None,
    optimizer: Section | None = None,
    schedule: Section | None = None,
    communication: Section | None = None,
    train: Section | None = None,
    evaluate: Section | None = None,
    certify: Section | None = None,
) -> Run:
    """Train by a recipe, measure, and leave a run folder; see the command ``train``.

    Args:
        recipe: A YAML file, or a packaged recipe's name.
        output: The run folder; the recipe's, or ``runs/NAME``, when not given.
        resume: Continue the run that the folder holds; start it if there is none.
        model, data, attack, objective, optimizer, schedule, communication, train, evaluate,
            certify: What replaces the recipe's: a section as a mapping, like
            ``train={"epochs": 3}``, or as settings, like ``attack=PGD(eps="8/255")``.

    Raises:
        ValueError: ``section.key: ...``, before anything is spent.
        FloatingPointError: Numbers are not finite: nothing of them is kept.
    """
    given = {
        "model": model,
        "data": data,
        "attack": attack,
        "objective": objective,
        "optimizer": optimizer,
        "schedule": schedule,
        "communication": communication,
        "train": train,
        "evaluate": evaluate,
        "certify": certify,
    }
    settings: dict[str, Any] = {
        key: as_section(key, value) for key, value in given.items() if value is not None
    }
    if output is not None:
        settings["output"] = str(output)
    known = load_recipe(recipe, layers=[("train()", settings)])
    found = training.train(known, resume=resume)
    if RunFolder(known.output).report.exists():
        return load_run(known.output)
    # on a machine without the first one's disk
    return Run(
        **vars(_measured({"model": {"function": found["function"]}} | found)),
        path=known.output,
        report=found,
    )


def load_run(path: str | Path) -> Run:
    """A run folder that something was measured in; nothing of it is executed.

    Raises:
        ValueError: There is no run, or its files are not as this package writes them.
    """
    (run,) = read_runs([path])
    rows = tuple(map(Measurement.of, run.rows))
    return Run(run.model, rows, Path(path), run.report)


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any,
    settings: EvaluateSettings,
    *,
    attacks: Sequence[Attack] = (),
    other: nn.Module | None = None,
    **how: Unpack[How],
) -> Measured:
    """Clean, PGD and AutoAttack accuracy of any module on pixels, as RobustBench's models are.

    Under ``accelerate launch`` every process calls it with the same images, and the work is shared.

    Args:
        model: Images [B, C, H, W] in [0, 1] to logits [B, K] (or ``.logits``). Nothing is assumed:
            a module that wants normalised images needs ``mean`` and ``std``, timm's too. Left in
            the mode that it was in. DDP's wrapper is taken off; what is DeepSpeed's or sharded by
            FSDP is refused.
        images: [N, C, H, W], floating point, in [0, 1]: a tensor, an array, or a list of images.
        labels: [N] class indices, or [N, 1], or one-hot [N, K]: a tensor, an array, or a list.
        settings: With an eps, ``EvaluateSettings(eps="8/255", autoattack="standard")``, or with
            ``balls`` of several norms.
        attacks: Further ones, ours or of your own (an adaptive attack, say), each in its own ball:
            it gets the logits' cross-entropy to climb. What they return is held to that ball; their
            accuracies are among ``measurements``, by ``module:Class``.
        other: Of ``sanity``: another module on [0, 1], whose adversarial images are tried on this.
        how: All by name. ``mean``, ``std``: by which images are normalised inside, one number a
            channel or one for all; both or neither. Not with a ``PixelClassifier``
            (``load_model``) or ``RobustModel``, which have their own. ``size``: height and width to
            which images are resized inside; eps is at their own. The same. ``folder``: where
            records and outcomes are kept, so that a killed evaluation goes on and nothing is done
            twice; ``robust-accel report FOLDER`` shows them. ``accelerator``: the script's own, if
            it has one.

    Raises:
        ValueError: Model, images, labels or settings are not as said above.
    """
    found = any_module.measure(model, images, labels, settings, attacks=attacks, other=other, **how)
    return _measured(found)


def certify(
    model: nn.Module, images: Any, labels: Any, settings: CertifySettings, **how: Unpack[How]
) -> Measured:
    """Certified L2 radii of any module on pixels under Gaussian noise (Cohen et al. 2019).

    Args:
        model, images, labels, how: As of ``evaluate``, the same on every process.
        settings: With a sigma: ``CertifySettings(sigma=0.25, n=10_000)``.

    Returns:
        With ``certificate``, whose ``record["radii"]`` has the certified accuracies.

    Raises:
        ValueError: Model, images, labels or settings are not as said above.
    """
    return _measured(any_module.certify(model, images, labels, settings, **how))


def _asked(folder: RunFolder, records: list[Row]) -> Run:
    """The run, and what a call has asked for, also where a larger measurement stands for it."""
    run, asked = load_run(folder.path), {record["key"]: record for record in records}
    for one in run.measurements:
        asked.pop(one.record["key"], None)
    more = tuple(map(Measurement.of, tidy(list(asked.values()))))
    keys = frozenset(record["key"] for record in records)
    return replace(run, measurements=(*run.measurements, *more), asked=keys)


def _measured(found: dict[str, Any]) -> Measured:
    return Measured(found["model"], tuple(map(Measurement.of, tidy(records_in(found)))))
