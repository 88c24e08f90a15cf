"""The ledger: every measurement is a record, appended to one file and never changed.

A record's key is the digest of its identity: the function measured, the images and labels, the
threat model, the attack with all its settings, the seed and the versions. The work of a measurement
that is not finished is kept in the same way, a unit of images a line: a unit's key is the digest of
what decides its outcome and nothing else. So whatever was interrupted goes on, a larger measurement
begins with what a smaller one has done, and nothing is ever taken from another identity. Not so
AutoAttack's: its units are cut from all survivors, so that of more images all are others.

Tables, reports, cards and pictures show what ``shown`` picks of the records.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from robust_accel.comm.heartbeat import Heartbeat
from robust_accel.evaluation.identity import digest_of_json, same_answers
from robust_accel.evaluation.records import FunctionLine, RecordLine, UnitLine, check
from robust_accel.files import append_line, as_json, read_lines
from robust_accel.run_folder import RunFolder

Record = dict[str, Any]

# what two records have in common of which one may stand for the other
_KIND = ("purpose", "attack", "threat_model", "point", "seed", "draws", "batch_size")


class _Outcome(dict[str, Any]):
    """Of a unit, as a file says; what is asked for and not there is the file's fault."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"measurements: an outcome has no {key}: it is of another kind than asked")


class Ledger:
    """Records and partial work of a folder; without one, of this object's life.

    Args:
        folder: Holds ``measurements.jsonl``, a record a line, and ``measurements/``, the partial
            work, where each process writes a file of its own and all go on from all.
        absent: Processes that do not see the folder. The first one writes their work down when all
            units are done that were dealt at once; if it is killed before, theirs is done again.
    """

    def __init__(
        self, folder: Path | None, accelerator: Accelerator, absent: Sequence[int] = ()
    ) -> None:
        self._accelerator, self._absent = accelerator, absent
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
                    found = read_lines(path)
                    check(UnitLine, found, str(path))
                    lines += found
            told = told_to_all(lines, self._accelerator)
            self._units = {line.pop("key"): _Outcome(line) for line in told}
        return self._units

    def function(self, digest: str, answers: list[list[float]]) -> str:
        """The digest of a function, or another if one of this digest has answered otherwise.

        A digest sees what can be read of a model. Where two models look alike and are not, their
        answers to the same images (see ``identity.answers``) tell them apart.
        """
        found: list[str] = []
        if self._work is not None and self._accelerator.is_main_process:
            path = self._work / "functions.jsonl"
            known = read_lines(path) if path.exists() else []
            check(FunctionLine, known, str(path))
            alike = [line for line in known if line["digest"] == digest]
            found = [line["function"] for line in alike if same_answers(line["answers"], answers)]
            if not found:
                found = [digest_of_json([digest, len(alike)]) if alike else digest]
                line = {"digest": digest, "function": found[0], "answers": answers}
                append_line(path, line)
        return told_to_all(found, self._accelerator)[0] if self.is_kept else digest

    def keep(self, key: str, outcome: dict[str, Any]) -> None:
        """Write down this process's unit as soon as it is known."""
        if self._work is not None and self._accelerator.process_index not in self._absent:
            path = self._work / f"process-{self._accelerator.process_index}.jsonl"
            append_line(path, {"key": key} | outcome)

    def keep_of_absent(self, outcomes: dict[str, tuple[int, dict[str, Any]]]) -> None:
        """Write down what processes have done that could not.

        Args:
            outcomes: By key, with the process whose it is.
        """
        if self._accelerator.is_main_process:
            for key, (process, outcome) in outcomes.items():
                if process in self._absent:
                    self.keep(key, outcome)

    def record(self, key: str, about: dict[str, Any]) -> Record:
        """The record of a finished measurement; appended if there is none of that key.

        Args:
            key: The digest of its identity.
            about: The identity, the result, and what else is worth knowing: plain values.
        """
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = as_json({"key": key, **about, "time": time})
        if self._file is None:
            return record
        found: list[Record] = []
        if self._accelerator.is_main_process:
            known = read_lines(self._file) if self._file.exists() else []
            found = [old for old in known if old.get("key") == key][:1]
            if not found:
                append_line(self._file, record)
                found = [record]
        return told_to_all(found, self._accelerator)[0]


def told_to_all(items: list[Any], accelerator: Accelerator) -> list[Any]:
    """All processes' items, on all of them; who has less to do waits for the others."""
    if accelerator.num_processes == 1:
        return items
    if Heartbeat.current is not None:
        Heartbeat.current.meet()
    return gather_object(items)


def records_in(found: Any) -> list[Record]:
    """The records among results, in whichever lists and mappings."""
    if isinstance(found, dict) and "purpose" in found:
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [record for part in parts for record in records_in(part)]


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


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, the oldest first, as they can be shown.

    Raises:
        ValueError: One of them is none.
    """
    path = folder / "measurements.jsonl"
    found = read_lines(path) if path.exists() else []
    check(RecordLine, found, str(path))
    return found


def shown(found: Iterable[Record], function: str, *, everything: bool = False) -> list[Record]:
    """What views show of a model: records that no other stands for.

    Another stands for a record if it is of the same attack, threat model and seed, and its images
    are the record's, or these and more; an earlier one only if it is of the same versions. No row
    is of another function.

    Args:
        found: Records, the oldest first.
        function: Digest of the model in question.
        everything: All of its records.

    Returns:
        Rows: records without the outcomes of single images.
    """
    rows: list[tuple[str, set[str], Record]] = []
    for record in found:
        if record["function"] != function:
            continue
        kind = digest_of_json([record.get(key) for key in _KIND])
        images, versions = set(record["outcomes"]["image"]), record["versions"]
        alike = [] if everything else [row for row in rows if row[0] == kind]
        if any(images < more and old["versions"] == versions for _, more, old in alike):
            continue
        rows = [row for row in rows if row not in alike or not row[1] <= images]
        rows.append((kind, images, record))
    return [{k: v for k, v in record.items() if k != "outcomes"} for _, _, record in rows]
