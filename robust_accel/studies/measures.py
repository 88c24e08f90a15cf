"""What a column of a study can show: one number of one run, of the measurement that was asked for.

A run folder may hold more than one measurement of a kind (other images, other steps). A number is
taken only from the one that the recipe of the study asks for; else there is none.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import accumulate
from typing import Any

from robust_accel.data import Ids, selection_of
from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.corruptions import first_of_each
from robust_accel.evaluation.unions import attack_of_union
from robust_accel.files import as_json
from robust_accel.recipe import Recipe
from robust_accel.reporting.views import Row, Run, known_points, pick, refused_by_name
from robust_accel.settings import listed, parse_number
from robust_accel.training.facts import held_out_attack

Measured = Callable[[Run, Recipe], float | None]
Line = dict[str, Any]


def _clean(run: Run, recipe: Recipe) -> float | None:
    return _percent(run, recipe, {"name": "none"}, recipe.evaluate.images)


def _pgd(run: Run, recipe: Recipe) -> float | None:
    settings = recipe.evaluate
    if settings.pgd is None:
        return None
    parts = [attacker_of(one).about for one in settings.threat_models()]
    about = parts[0] if settings.balls is None else attack_of_union(parts)
    return _percent(run, recipe, about, settings.images)


def _autoattack(run: Run, recipe: Recipe) -> float | None:
    settings = recipe.evaluate
    attack = {"name": "autoattack", "version": settings.autoattack, "search": settings.search}
    return _percent(run, recipe, attack, settings.autoattack_images or settings.images)


def _corruptions(key: str) -> Measured:
    """Of the mean over the corruptions, severities and images that the recipe names."""

    def measured(run: Run, recipe: Recipe) -> float | None:
        settings, own = recipe.evaluate, recipe.evaluate.corruption_settings
        if not settings.corruptions:
            return None
        asked = as_json({"corruptions": own.names, "severities": own.severities})
        asked["reference"] = own.reference and {name: own.reference[name] for name in own.names}
        source = as_json({"path": own.path} if own.path else recipe.data.source())
        kind = "all" if own.path else selection_of(recipe.data, settings.ids)
        kind = first_of_each(own.images or settings.images, kind)
        row = pick(
            row
            for row in run.of("corruptions")
            if {**row["attack"], **asked} == row["attack"]
            and row["seed"] == settings.seed
            and row["images"].get("source") == source
            and _is_kind(row, kind)
        )
        return None if row is None or row.get(key) is None else 100 * row[key]

    return measured


def _percent(run: Run, recipe: Recipe, attack: Row, images: int | None) -> float | None:
    """Accuracy in percent, of the row with this attack."""
    balls = [{"norm": one.norm, "eps": one.eps} for one in recipe.evaluate.threat_models()]
    threat = balls[0] if recipe.evaluate.balls is None else {"union": balls}
    row = pick(
        row
        for row in run.of("accuracy", attack["name"])
        if _is_of(row, recipe, attack, images)
        and (attack["name"] == "none" or row["threat_model"] == threat)
    )
    return None if row is None or row["accuracy"] is None else 100 * row["accuracy"]


def _is_of(row: Row, recipe: Recipe, attack: Row, images: int | None) -> bool:
    """Whether a row is of an attack with all its settings, by the seed and images asked for.

    Its ball stands apart, as ``threat_model``; which attacks AutoAttack has follows.
    """
    asked = {
        key: value for key, value in as_json(attack).items() if key not in ("norm", "eps", "union")
    }
    follows = ("attacks", "num_targets", "apgd_restarts")
    by = {k: v for k, v in row["attack"].items() if k not in follows}
    by_attack = asked == by
    is_of = by_attack and row["seed"] == recipe.evaluate.seed
    return is_of and _from(row, recipe, recipe.evaluate.ids) and _on(row, images)


def _from(row: Row, recipe: Recipe, ids: Ids) -> bool:
    """Whether a row is of the test images, or of those of them that are listed."""
    is_from = row["images"].get("source") == as_json(recipe.data.source())
    return is_from and _is_kind(row, selection_of(recipe.data, ids))


def _is_kind(row: Row, kind: str) -> bool:
    """Whether a row is of these images, but for bad ones."""
    found = str(row["images"].get("kind", "all"))
    return found == kind or re.fullmatch(re.escape(kind) + r", \d+ bad left out", found) is not None


def _on(row: Row, images: int | None) -> bool:
    """Whether a row is of so many images, or of all where there are no more."""
    number, about = row["images"]["n"], row["images"]
    is_all = about.get("selection") == about.get("kind", "all")
    return number == images or (is_all and (images is None or images > number))


def _from_report(key: str, scale: float = 1.0) -> Measured:
    def measured(run: Run, _: Recipe) -> float | None:
        value = run.report.get(key)
        return None if value is None else scale * float(value)

    return measured


def _seconds(key: str, so_far: Callable[[list[Line]], list[float]]) -> Measured:
    """Of an epoch by the report, scaled to what its steps take after the log's first line.

    What comes before is left out, where there are more lines: first steps compile and connect.

    Args:
        so_far: Lines of ``metrics.jsonl`` -> the seconds up to each, in whatever unit.
    """
    in_all = _from_report(key)

    def measured(run: Run, recipe: Recipe) -> float | None:
        value = in_all(run, recipe)
        with refused_by_name(run.folder):
            lines = [line for line in run.folder.read_metrics() if "images_per_second" in line]
            if not value or len(lines) < 2:
                return value
            seconds, steps = so_far(lines), [line["step"] for line in lines]
            later = (seconds[-1] - seconds[0]) / (steps[-1] - steps[0])
            return float(value * later / (seconds[-1] / steps[-1]))

    return measured


def _of_training(lines: list[Line]) -> list[float]:
    before = [0, *(line["step"] for line in lines)]
    took = [(line["step"] - start) / line["images_per_second"]
            for start, line in zip(before, lines, strict=False)]  # fmt: skip
    return list(accumulate(took))


def _counted(key: str) -> Callable[[list[Line]], list[float]]:
    return lambda lines: [line[key] for line in lines]


def _sent(found: Measured) -> Measured:
    """Of what processes send one another: of one by itself nothing is measured."""

    def measured(run: Run, recipe: Recipe) -> float | None:
        return None if run.report.get("num_processes") == 1 else found(run, recipe)

    return measured


def held_out(run: Run, recipe: Recipe) -> float | None:
    """Robust accuracy in percent on the split that is held out of train, of the weights kept."""
    assert recipe.train is not None
    with refused_by_name(run.folder):
        found = run.report.get("best_against_last", {})
        kept = found.get(recipe.train.select)
        if kept is None or found.get("attack") != held_out_attack(recipe):
            return None
        return 100 * float(kept)


def _certified(row: Row, skip: int, images: int | None) -> bool:
    """Whether a certificate is of every so many-th image, of so many as asked for or all."""
    if skip > 1:
        number, selection = row["images"]["n"], str(row["images"].get("selection"))
        return selection.startswith(f"one in {skip},") and (images is None or number <= images)
    return "one in" not in str(row["images"].get("selection")) and _on(row, images)


MEASURES: dict[str, Measured] = {
    "clean": _clean,
    "pgd": _pgd,
    "autoattack": _autoattack,
    "held_out": held_out,
    "corruption_error": _corruptions("mean_error"),
    "mce": _corruptions("mce"),
    "seconds": _seconds("train_seconds_per_epoch", _of_training),
    "communication": _sent(_seconds("comm_seconds_per_epoch", _counted("comm_seconds"))),
    "exposed_communication": _sent(
        _seconds("comm_exposed_seconds_per_epoch", _counted("comm_exposed_seconds"))
    ),
    "megabytes": _sent(_from_report("bytes_sent_per_step", 1e-6)),
    "memory": _from_report("peak_memory_bytes", 2.0**-20),
    "steps": _from_report("steps"),
}
"""By name: accuracies and corruptions' errors in percent (``mce``: of the reference's); seconds an
epoch, without the steps up to the log's first line; MB (10^6 bytes) that a process sends a step,
and nothing of one by itself; MiB. With a point: ``certified 0.25`` (radius), ``pgd eps 4/255``,
``pgd num_steps 50`` (sweeps). Of several balls ``pgd`` and ``autoattack`` are the union's; ``pgd
l1`` is in one of them."""

_POINT = re.compile(r"(certified|pgd eps|pgd num_steps) (\S+)")
_IN_ONE = re.compile(r"(pgd|autoattack) (linf|l2|l1)")
_KEYS = {"pgd eps": "eps", "pgd num_steps": "num_steps", "certified": "radius"}


def check_measure(name: str) -> str:
    """The name of a measure.

    Raises:
        ValueError: There is no such measure.
    """
    point = _POINT.fullmatch(name)
    if point is not None:
        parse_number(point[2])
    elif name not in MEASURES and _IN_ONE.fullmatch(name) is None:
        points = "certified R, pgd eps E, pgd num_steps K; pgd or autoattack and a norm"
        raise ValueError(f"a measure is wanted: {listed(MEASURES)}, {points}")
    return name


def is_asked(name: str, recipe: Recipe, commands: Collection[str]) -> bool:
    """Whether a measure can ever be there: by what a training's recipe and its commands measure.

    Args:
        name: Checked by ``check_measure``.
        commands: Those that follow the training.
    """
    settings = recipe.evaluate
    if in_one := _IN_ONE.fullmatch(name):
        if in_one[2] not in [one.norm for one in settings.threat_models()]:
            return False
        name = in_one[1]
    if point := _POINT.fullmatch(name):
        key, values = _KEYS[point[1]], tuple[float, ...]()
        if key == "radius":
            values = recipe.certify.radii if "certify" in commands else ()
        elif settings.sweep is not None and settings.pgd is not None:
            values = getattr(settings.sweep, key)
        return parse_number(point[2]) in values
    asked = {
        "pgd": settings.pgd,
        "autoattack": settings.autoattack,
        "held_out": recipe.data.validation_size,
        "corruption_error": settings.corruptions,
        "mce": settings.corruptions and settings.corruption_settings.reference,
    }
    return bool(asked.get(name, True))


def measure(name: str, run: Run, recipe: Recipe) -> float | None:
    """A measure of a run; None where it was not measured.

    Args:
        name: Checked by ``check_measure``.
        recipe: What the study asked for.
    """
    if in_one := _IN_ONE.fullmatch(name):
        name, own = in_one[1], recipe.evaluate.threat_models()
        if in_one[2] not in [one.norm for one in own]:
            return None
        recipe = replace(recipe, evaluate=next(one for one in own if one.norm == in_one[2]))
    point = _POINT.fullmatch(name)
    if point is None:
        with refused_by_name(run.folder):
            found = MEASURES[name](run, recipe)
            return None if found is None else float(found)
    return dict(curve(_KEYS[point[1]], run, recipe)).get(parse_number(point[2]))


def curve(key: str, run: Run, recipe: Recipe) -> list[tuple[float, float]]:
    """Points (eps, num_steps or radius; accuracy in percent) of the sweep or certificate asked for.

    Args:
        key: ``eps``, ``num_steps`` or ``radius``.
    """
    with refused_by_name(run.folder):
        return [(float(at), float(percent)) for at, percent in _curve(key, run, recipe)]


def _curve(key: str, run: Run, recipe: Recipe) -> list[tuple[float, float]]:
    if key == "radius":
        asked_for, number = as_json(recipe.certify.about), recipe.certify.images
        row = pick(
            row
            for row in run.of("certificate")
            if row["attack"] == asked_for
            and _from(row, recipe, recipe.certify.ids)
            and _certified(row, recipe.certify.skip, number)
        )
        return [(point["radius"], 100 * point["accuracy"]) for point in known_points(row)]
    settings = recipe.evaluate
    found: dict[float, float] = {}
    for value in () if settings.sweep is None else getattr(settings.sweep, key):
        at = {"num_steps": int(value)} if key == "num_steps" else {"eps": value}
        eps, attack = at.get("eps", settings.eps), attacker_of(settings, **at).about
        row = pick(
            row
            for row in run.of("sweep", attack["name"])
            if row["point"]["key"] == key
            and row["point"]["value"] == value
            and row["threat_model"] == {"norm": settings.norm, "eps": eps}
            and _is_of(row, recipe, attack, settings.images)
        )
        if row is not None:
            found[value] = 100 * row["accuracy"]
    return sorted(found.items())
