"""The run folder: what a run writes, where, and how nothing in it is lost."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_accel.files import (
    as_json,
    check_contained,
    read_json,
    read_lines,
    write_json,
    write_text,
)
from robust_accel.locks import OWNER

_STEP = re.compile(r"step-\d+")


class RunFolder:
    """Paths of ``runs/<name>`` and safe writing into it.

    ::

        recipe.yaml       resolved settings
        metrics.jsonl     one line a log interval, one a validation
        owner.lock        while somebody writes here: who
        checkpoints/      step-N: full state, exact resume, the newest two; best.safetensors:
                          weights with the best robust accuracy on the held-out split
        model/            timm folder: config.json, model.safetensors, README.md (its card)
        measurements.jsonl  the ledger: one record a measurement, with the outcome of each image;
                          measurements/: the work under way, a file a process, and what
                          functions of one digest answered
        certify/          certify.tsv: the field's log of the last certification
        examples.safetensors  a few images before and after the attack
        report.json       how the model was made, and the ledger's rows of this model
        report.md, report.html, figures/  the same for people

    Attributes:
        absent: Processes that do not see the first one's folder, see ``processes.owned``.
    """

    absent: Sequence[int] = ()

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

    def check(self, *, resume: bool) -> bool:
        """Whether there is a run here that is to be continued.

        Raises:
            ValueError: The folder holds a run and ``resume`` is not asked for, or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output: {self.path} is no folder: choose another")
        if not self.recipe.exists():
            if self.path.is_dir() and any(path.name != OWNER for path in self.path.iterdir()):
                raise ValueError(f"output: {self.path} holds files that are no run: choose another")
            return False
        if not resume:
            raise ValueError(
                f"output: {self.path} already holds a run: --resume continues it, "
                "output=FOLDER chooses another"
            )
        return True

    def steps(self) -> list[Path]:
        """Checkpoints, the newest last; whether they are whole is not looked at."""
        found = [path for path in self.checkpoints.glob("step-*") if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def check_contained(self) -> None:
        """Refuse to write where a link would lead out of the folder: to be asked before any work.

        Raises:
            ValueError: ``output: ...``: there is such a link in it, or a pipe or device.
        """
        try:
            check_contained(self.path)
        except ValueError as error:
            raise ValueError(f"output: {error}") from None

    def read_report(self) -> dict[str, Any]:
        """``report.json``; nothing where there is none.

        Raises:
            ValueError: It cannot be read.
        """
        return read_json(self.report) if self.report.exists() else {}

    def write_report(self, report: dict[str, Any]) -> None:
        write_json(self.report, report)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Raises:
            ValueError: One of them has no step, or something that is no number.
        """
        lines = read_lines(self.metrics) if self.metrics.exists() else []
        for line in lines:
            for key, value in {"step": None, **line}.items():
                kinds = {"step": int, "nonfinite": list}.get(key, int | float | None)
                if not isinstance(value, kinds):
                    raise ValueError(f"{self.metrics}: a line's {key!r:.40} is {value!r:.40}")
        return lines

    def truncate_metrics(self, step: int, *, validated: bool = True) -> None:
        """Drop lines after the step that a run continues from: they will be written again.

        Args:
            validated: Whether that step's validation is done.
        """
        kept = [
            line
            for line in self.read_metrics()
            if line["step"] < step
            or (line["step"] == step and (validated or "validation_robust_accuracy" not in line))
        ]
        write_text(self.metrics, "".join(json.dumps(as_json(line)) + "\n" for line in kept))


def with_new_defaults(old: Any, new: Any, chosen: Any) -> Any:
    """An earlier version's settings, with those that it did not know, if they are at defaults.

    Args:
        new: All settings of today.
        chosen: Of these those that are not at their defaults.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = chosen if isinstance(chosen, list) else [{}] * len(new)
        return [with_new_defaults(*part) for part in zip(old, new, parts, strict=True)]
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old
    chosen = chosen if isinstance(chosen, dict) else {}
    return old | {
        key: with_new_defaults(old[key], value, chosen.get(key)) if key in old else value
        for key, value in new.items()
        if key in old or key not in chosen
    }


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys whose values differ, with both values in words."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix[:-1]: f"{prefix[:-1]}: {old!r}, now {new!r}"}
    return {
        name: line
        for key in sorted({*old, *new})
        for name, line in differences(old.get(key), new.get(key), f"{prefix}{key}.").items()
    }
