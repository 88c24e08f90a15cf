"""The parts of a report, in their order: report.md and report.html show the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from robust_accel.evaluation.corruptions import mean_text
from robust_accel.reporting.charts import (
    Chart,
    certified_chart,
    confusions,
    examples,
    surfaces,
    sweep_charts,
    sweep_curves,
    training_charts,
    waterfalls,
)
from robust_accel.reporting.tables import Table, measurement_table
from robust_accel.reporting.views import (
    Row,
    Run,
    about,
    accuracy_text,
    attack_text,
    attack_title,
    difference,
    finding,
    images_text,
    interval_text,
    percent,
    plain,
    quoted,
    same_attack,
    settings_text,
    source_text,
    threat_text,
    which_images,
)
from robust_accel.settings import eps_text

_WORST = 10  # classes of the table


@dataclass(frozen=True)
class Section:
    """A heading with sentences, tables, charts and a block of text, each where there is any."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    block: str = ""
    alert: bool = field(default=False, kw_only=True)

    @property
    def is_empty(self) -> bool:
        return not (self.texts or self.tables or self.charts or self.block)


def sections(run: Run) -> list[Section]:
    """What there is to say of a run, but for the table of its accuracies."""
    found = [
        _non_finite(run),
        Section("Doubts", run.report.get("doubts") or (), alert=True),
        _autoattack(run),
        _warnings(run),
        _randomized(run),
        _certified(run),
        _corruptions(run),
        _sweeps(run),
        Section("Adversarial images, with predictions", charts=examples(run)),
        _classes(run),
        *_sanity(run),
        Section("Training", charts=training_charts(run)),
        _best_against_last(run),
        _gap(run),
        Section("Measurements", tables=[measurement_table(run.rows)] if run.rows else ()),
        _facts(run),
        _recipe(run),
    ]
    return [section for section in found if not section.is_empty]


def _non_finite(run: Run) -> Section:
    texts = []
    for row in run.rows:
        if finding(row):
            where = "; ".join(
                f"{kind}: {', '.join(map(str, positions[:10]))}"
                + (f" and {len(positions) - 10} more" if len(positions) > 10 else "")
                for kind, positions in row["non_finite"].items()
                if positions
            )
            texts.append(
                f"{about(run, row)} ({row['purpose']}): {finding(row)} (positions of images: "
                f"{where})"
            )
    return Section("Numbers that were not finite", texts, alert=True)


def _autoattack(run: Run) -> Section:
    tables = []
    for row in run.of("accuracy", "autoattack"):
        if after := row.get("after"):
            lines = [["clean, the same images", percent(row["clean_accuracy"]), ""]]
            lines += [[a["attack"], percent(a["accuracy"]), str(a["broken"])] for a in after]
            head = ["after", "accuracy (%)", "images broken"]
            tables.append(Table(head, lines, about(run, row)))
    return Section("AutoAttack, attack by attack", tables=tables, charts=waterfalls(run))


def _warnings(run: Run) -> Section:
    texts = [f"{about(run, row)}: {text}" for row in run.rows for text in row.get("warnings", ())]
    return Section("Warnings of the attacks", texts, alert=True)


def _randomized(run: Run) -> Section:
    rows = [row for row in run.rows if row.get("draws") and row.get("accuracy") is not None]
    head = ["attack", "threat model", "n", "draws", "mean (%)", "majority of the draws (%)"]
    lines = []
    for row in rows:
        majority = row.get("majority_accuracy")
        line = [attack_text(row["attack"]), threat_text(row.get("threat_model"))]
        number = f"{row['images']['n']}{which_images(run, row['images'])}"
        line += [number, str(row["draws"]), accuracy_text(row)]
        lines.append([*line, "" if majority is None else percent(majority)])
    text = (
        "The model answers at random: each accuracy is the mean over draws of its noise, beside "
        "the accuracy of the class that most draws predict."
    )
    return Section("A randomised model", [text] * bool(rows), [Table(head, lines)] * bool(rows))


def certified_tables(run: Run) -> list[Table]:
    """Certified accuracy at each radius, a table a certificate."""
    tables = []
    for row in run.of("certificate"):
        attack = row["attack"]
        lines = [
            [
                eps_text(p["radius"]) if p["radius"] else "0",
                percent(p["accuracy"]) if p.get("reachable", True) else "out of reach",
                interval_text(p["interval"]) if p.get("reachable", True) else "",
            ]
            for p in row.get("radii", ())
        ]
        if "abstained" in row:
            lines.append(["abstained", percent(row["abstained"]), ""])
        caption = f"{settings_text(attack)}, {images_text(run, row)}"
        if "samples_per_image" in row:
            most = attack["n0"] + attack["n"]
            caption += f"; {row['samples_per_image']:.0f} samples an image of at most {most}"
        head = ["L2 radius", "certified accuracy (%)", "95% interval (%)"]
        tables.append(Table(head, lines, caption))
    return tables


def _certified(run: Run) -> Section:
    return Section("Certified accuracy", (), certified_tables(run), certified_chart(run))


def _corruptions(run: Run) -> Section:
    tables = []
    for row in run.of("corruptions"):
        compared = "mce" in row
        severities = [str(severity) for severity in row["attack"]["severities"]]
        head = ["corruption", *(f"severity {s} (%)" for s in severities), "error (%)"]
        head += ["reference (%)", "relative (%)"] * compared
        lines = []
        for own in row["by_corruption"]:
            line = [own["corruption"], *(percent(1 - s["accuracy"]) for s in own["by_severity"])]
            line.append(percent(own["error"]))
            lines.append(line + [percent(own[key]) for key in ("reference", "ce") if compared])
        last = ["mean", *[""] * len(severities), percent(row["mean_error"])]
        lines.append([*last, "", percent(row["mce"])] if compared else last)
        tables.append(Table(head, lines, f"{mean_text(row)}, {source_text(row['images'])}"))
    return Section("Error on corrupted images", (), tables)


def _sweeps(run: Run) -> Section:
    tables = []
    for curve in sweep_curves(run):
        points = [
            [eps_text(x) if curve.key == "eps" else f"{x:.4g}", accuracy_text(row)]
            for x, row in curve.points
        ]
        tables.append(Table([curve.axis, "accuracy (%)"], points, curve.name))
    return Section("Accuracy against eps and steps", (), tables, sweep_charts(run))


def _classes(run: Run) -> Section:
    tables: list[Table] = []
    matrices: list[Row] = []
    shown: list[list[Row]] = []
    for entry in quoted(run):
        rows = [row for row in entry.rows if row.get("per_class")]
        matrices += [row for row in entry.rows if row not in matrices]
        if not rows or rows in shown:  # of clean images alone, say, beside two threat models
            continue
        shown.append(rows)
        by_class = [{found["class"]: found for found in row["per_class"]} for row in rows]
        worst = sorted(by_class[-1].values(), key=lambda c: (c["accuracy"], c["class"]))[:_WORST]
        lines = []
        for found in worst:
            line = [found.get("name") or run.class_name(found["class"])]
            for classes in by_class:
                own = classes.get(found["class"])
                line.append(f"{percent(own['accuracy'])} (n={own['n']})" if own else "")
            lines.append(line)
        head = ["class", *(f"{attack_title(row)} (%)" for row in rows)]
        number = len(by_class[-1])
        chosen = f"the {_WORST} worst of {number} classes" if number > _WORST else "all classes"
        chosen += which_images(run, rows[-1]["images"])
        caption = ", ".join(filter(None, [threat_text(entry.threat), chosen, "the worst first"]))
        tables.append(Table(head, lines, caption))
    return Section("Classes", (), tables, confusions(run, matrices))


def _sanity(run: Run) -> list[Section]:
    found = []
    for row in run.of("sanity"):
        lines = [[c["name"], c["status"], c["sentence"]] for c in row.get("checks", ())]
        threat = threat_text(row.get("threat_model"))
        caption = ", ".join(filter(None, [threat, images_text(run, row)]))
        found.append(Table(["check", "verdict", "what was seen"], lines, caption))
    return [Section("Is the number too good?", (), found, surfaces(run))]


def _best_against_last(run: Run) -> Section:
    found = run.report.get("best_against_last")
    if not found:
        return Section("")
    epoch = f" (epoch {found['best_epoch']})" if "best_epoch" in found else ""
    head = ["weights", f"{found['attack']} accuracy (%)"]
    lines = [[f"best{epoch}", percent(found["best"])], ["last", percent(found["last"])]]
    lines.append(["robust overfitting (best - last)", percent(found["best"] - found["last"])])
    caption = f"{found['n']} images, {found['split']}"
    return Section("Best weights against last", (), [Table(head, lines, caption)])


def _gap(run: Run) -> Section:
    lines = []
    for row in run.of("train"):
        if test := same_attack(row, [r for r in run.of("accuracy") if _data(r) == _data(row)]):
            gap, low, high = difference(row, test)
            lines.append(
                [
                    attack_title(row),
                    threat_text(row.get("threat_model")),
                    f"{accuracy_text(row)} (n={row['images']['n']})",
                    f"{accuracy_text(test)} (n={test['images']['n']})",
                    f"{percent(gap)} {interval_text((low, high))}",
                ]
            )
    head = ["attack", "threat model", "training images (%)", "test images (%)", "gap (%)"]
    return Section("Training images against test images", (), [Table(head, lines)] * bool(lines))


def _data(row: Row) -> list[Any]:
    """The data set that a row's images are of, whichever of its splits."""
    source = row["images"].get("source") or {}
    return [source.get(key) for key in ("path", "config")]


def _facts(run: Run) -> Section:
    shown = {"recipe", "measurements", "doubts", "best_against_last"}
    facts = {key: value for key, value in run.report.items() if key not in shown}
    lines = [[key, plain(value)] for key, value in _flat(facts) if value not in (None, "", [])]
    return Section("How it was made", (), [Table(["fact", "value"], lines)] * bool(lines))


def _recipe(run: Run) -> Section:
    recipe = run.report.get("recipe")
    text = yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else ""
    return Section("Recipe", block=text)


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested report by dotted key."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict)
        leaves += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return leaves
