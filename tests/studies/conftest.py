"""Studies on 8 x 8 digits, and run folders as trainings leave them, with numbers that are given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robust_accel.data import selection_of
from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.ledger import Record
from robust_accel.studies.execution import Done
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results
from robust_accel.studies.study_file import read_study
from robust_accel.studies.trial import Trial
from robust_accel.training.facts import held_out_attack

TINY = """
scales:
  tiny:
    seeds: 2
    settings:
      data: {train_size: 160, validation_size: 32}
      train: {epochs: 1, validate_every: 1, batch_size: 64, log_every: 1}
      attack: {num_steps: 1, step_size: 0.2}
      evaluate: {images: 40, train_images: null, pgd: {num_steps: 1}, autoattack: null}
"""


@pytest.fixture
def study_of(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a study file."""

    def write(text: str, scales: str = TINY) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(f"title: A study\n{text}\n{scales}")
        return path

    return write


@pytest.fixture
def plan_of(study_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a study that is given as text."""

    def make(text: str, scale: str = "tiny", *, scales: str = TINY, **options: Any) -> Plan:
        path = study_of(text, scales)
        study, found = read_study(path, scale)
        options = {"seeds": range(found.seeds)} | options
        return Plan(path, study, found, tmp_path / "runs", **options)

    return make


def leave(
    trial: Trial, done: Done, clean: float, pgd: float, held_out: float = 0.5, **more: Any
) -> None:
    """Make a finished run folder with these shares.

    Args:
        more: Facts of its report.
    """
    evaluate = trial.recipe.evaluate
    about = attacker_of(evaluate).about
    pgd_about = {key: value for key, value in about.items() if key not in ("norm", "eps")}
    threat = {"norm": evaluate.norm, "eps": evaluate.eps}
    rows: list[Record] = [
        {"attack": {"name": "none"}, "threat_model": None, "accuracy": clean},
        {"attack": pgd_about, "threat_model": threat, "accuracy": pgd},
    ]
    drawn = selection_of(trial.recipe.data, evaluate.ids)
    images = {"n": evaluate.images, "selection": f"first {evaluate.images}", "kind": drawn}
    if evaluate.images is None:
        images |= {"n": trial.recipe.data.test_size, "selection": drawn}
    images["source"] = trial.recipe.data.source()
    report = {
        "measurements": [
            {"purpose": "accuracy", "images": images, "seed": evaluate.seed, **row} for row in rows
        ],
        "best_against_last": {
            "best": held_out,
            "last": held_out,
            "attack": held_out_attack(trial.recipe),
        },
        "train_seconds_per_epoch": 2.0,
        "bytes_sent_per_step": 4e6,
        "versions": {"torch": "2"},
        **more,
    }
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "report.json").write_text(json.dumps(report))
    done.add(trial, ("train",), "done", 60.0)


def filled(plan: Plan, number: Callable[[Trial], tuple[float, ...]]) -> Results:
    """Results of a study whose trainings came out as a function says."""
    plan.root.mkdir(exist_ok=True)
    done = Done(plan.root)
    results = Results(plan, done)
    while left := [trial for trial in plan.known(results.chosen) if done.left(trial)]:
        for trial in left:
            leave(trial, done, *number(trial))
    return results
