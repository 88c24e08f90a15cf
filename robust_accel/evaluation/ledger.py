"""The ledger: every measurement is a record, appended to one file and never changed.

A record's key is the digest of its identity: the function measured, the images and labels, the
threat model, the attack with all its settings, the seed and the versions. The work of a measurement
that is not finished is kept in the same way, a unit of images a line: a unit's key is the digest of
what decides its outcome and nothing else. So whatever was interrupted goes on, a larger measurement
begins with what a smaller one has done, and nothing is ever taken from another identity.

Tables, reports, cards and pictures show what ``shown`` picks of the records.
"""

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from robust_accel.evaluation.identity import digest_of_json
from robust_accel.run_folder import RunFolder, append_line, read_lines

Record = dict[str, Any]


class Ledger:
    """Records and partial work of a folder; without one, of this object's life.

    Args:
        folder: Holds ``measurements.jsonl``, a record a line, and ``measurements/``, the partial
            work, where each process writes a file of its own and all go on from all.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._file = None if folder is None else folder / "measurements.jsonl"
        self._work = None if folder is None else folder / "measurements"
        self._units: dict[str, dict[str, Any]] | None = None

    @property
    def is_kept(self) -> bool:
        return self._work is not None

    def units(self) -> dict[str, dict[str, Any]]:
        """Outcomes of units by their keys, the same on all processes: one reads, and tells all."""
        if self._units is None:
            lines: list[dict[str, Any]] = []
            if self._work is not None and self._accelerator.is_main_process:
                for path in sorted(self._work.glob("process-*.jsonl")):
                    lines += read_lines(path)
            found = gather_object(lines) if self._accelerator.num_processes > 1 else lines
            self._units = {line.pop("key"): line for line in found}
        return self._units

    def keep(self, key: str, outcome: dict[str, Any]) -> None:
        """Write down this process's unit as soon as it is known."""
        if self._work is not None:
            self._work.mkdir(parents=True, exist_ok=True)
            path = self._work / f"process-{self._accelerator.process_index}.jsonl"
            append_line(path, {"key": key} | outcome)

    def record(self, key: str, about: dict[str, Any]) -> Record:
        """The record of a finished measurement; appended if there is none of that key.

        Args:
            key: The digest of its identity.
            about: The identity, the result, and what else is worth knowing: plain values.
        """
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = plain({"key": key, **about, "time": time})
        if self._file is None or not self._accelerator.is_main_process:
            return record
        for old in read_records(self._file.parent):
            if old["key"] == key:
                return old
        self._file.parent.mkdir(parents=True, exist_ok=True)
        append_line(self._file, record)
        return record


def refresh_report(
    folder: RunFolder, *, model: dict[str, Any] | None = None, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``report.json`` anew from the ledger.

    Args:
        model: What the folder's model is, with its ``function``; as it was when not given.
        facts: How it was trained; as they were when not given.

    Returns:
        What the file holds.
    """
    report = folder.read_report() if facts is None else dict(facts)
    report["model"] = report["model"] if model is None else model
    report["measurements"] = shown(read_records(folder.path), report["model"]["function"])
    folder.write_report(report)
    return report


def plain(record: Record) -> Record:
    """As JSON has it: tuples are lists, and what is not finite is null."""
    return json.loads(json.dumps(record), parse_constant=lambda _: None)


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, the oldest first."""
    path = folder / "measurements.jsonl"
    return read_lines(path) if path.exists() else []


def shown(records: Iterable[Record], function: str, *, everything: bool = False) -> list[Record]:
    """What views show of a model: per attack, threat model and kind of images one record.

    That of the most images stands, of as many the latest; no row is of another function.

    Args:
        records: The oldest first.
        function: Digest of the model in question.
        everything: All of its records.

    Returns:
        Rows: records without the outcomes of single images.
    """
    own = [record for record in records if record["function"] == function]
    best: dict[str, Record] = {}
    for number, record in enumerate(own):
        images = record["images"]
        point = record.get("point", {})
        kind = [record[k] for k in ("purpose", "attack", "threat_model")]
        kind += [point.get("key"), point.get("value"), images["source"], images["kind"]]
        key = str(number) if everything else digest_of_json(kind)
        old = best.pop(key, None)  # or the dictionary would keep the older one's place
        larger = old is None or images["n"] >= old["images"]["n"]
        best[key] = record if larger or old is None else old
    return [{k: v for k, v in record.items() if k != "outcomes"} for record in best.values()]
