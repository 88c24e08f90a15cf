"""The run folder: what a run writes, where, and how nothing in it is lost."""

import json
from pathlib import Path
from typing import Any

import yaml

from robust_accel.files import read_lines, write_json, write_text


class RunFolder:
    """Paths of ``runs/<name>`` and safe writing into it.

    ::

        recipe.yaml       resolved settings
        metrics.jsonl     one line a log interval, one a validation
        checkpoints/      step-N: full state, exact resume; best.safetensors: weights with the best
                          robust accuracy on the held-out split
        model/            timm folder: config.json, model.safetensors, README.md (its card)
        measurements.jsonl  the ledger: one record a measurement, with the outcome of each image;
                          measurements/: the work under way, a file a process, and what
                          functions of one digest answered
        certify/          certify.tsv: the field's log of the last certification
        examples.safetensors  a few images before and after the attack
        report.json       how the model was made, and the ledger's rows of this model
        report.md, report.html, figures/  the same for people
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.model = self.path / "model"
        self.certify = self.path / "certify"
        self.examples = self.path / "examples.safetensors"
        self.report = self.path / "report.json"

    def check(self, settings: dict[str, Any], *, resume: bool) -> bool:
        """Whether a run is to be continued here.

        Raises:
            ValueError: The folder holds a run and ``resume`` is not asked for, or the run that it
                holds was started from other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output: {self.path} is no folder: choose another")
        if not self.recipe.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"output: {self.path} holds files that are no run: choose another")
            return False
        if not resume:
            raise ValueError(
                f"output: {self.path} already holds a run: --resume continues it, "
                "output=FOLDER chooses another"
            )
        started = yaml.safe_load(self.recipe.read_text())
        now = yaml.safe_load(yaml.safe_dump(settings))  # as it was saved: a tuple became a list
        # what a run may change on the way: when it stops, how it is measured and where it lies
        for values in (started, now):
            for key in ("max_time", "timeout"):
                (values.get("train") or {}).pop(key, None)
        changed = _differences(started, now, ignored={"evaluate", "certify", "output"})
        if changed:
            raise ValueError(
                f"output: {self.path} was started with other settings: {'; '.join(changed)}"
            )
        return bool(self.steps())

    def steps(self) -> list[Path]:
        """Complete checkpoints, the newest last."""
        return sorted(self.checkpoints.glob("step-*"))

    def read_report(self) -> dict[str, Any]:
        return json.loads(self.report.read_text()) if self.report.exists() else {}

    def write_report(self, report: dict[str, Any]) -> None:
        write_json(self.report, report)

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics) if self.metrics.exists() else []

    def truncate_metrics(self, step: int, *, validated: bool = True) -> None:
        """Drop lines after the step that a run continues from: they will be written again.

        Args:
            validated: Whether that step's validation is done.
        """
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        if not validated:
            kept = [
                line
                for line in kept
                if line["step"] < step or "validation_robust_accuracy" not in line
            ]
        lines = [json.dumps(line) + "\n" for line in kept]
        write_text(self.metrics, "".join(lines))


def _differences(old: Any, new: Any, ignored: set[str], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix[:-1]}: {old!r}, now {new!r}"]
    return [
        line
        for key in sorted({*old, *new} - (ignored if not prefix else set()))
        for line in _differences(old.get(key), new.get(key), ignored, f"{prefix}{key}.")
    ]
