"""report.json for people: report.md with its pictures, and runs side by side."""

import json
from pathlib import Path
from typing import Any

import yaml

from robust_accel.reporting.figures import (
    draw_certified,
    draw_examples,
    draw_surface,
    draw_sweep,
    draw_training,
)
from robust_accel.reporting.model_card import model_card
from robust_accel.run_folder import RunFolder
from robust_accel.statistics import t_interval

ACCURACIES = {
    "clean_accuracy": "clean",
    "pgd_accuracy": "PGD",
    "autoattack_accuracy": "AutoAttack",
}


def write_report(folder: RunFolder) -> str:
    """Write ``report.md``, its pictures, and the model's card from what the run folder holds.

    Returns:
        The Markdown text.
    """
    report = folder.read_report()
    if not report:
        raise ValueError(f"{folder.path}: no report.json: nothing was measured there yet")
    lines = [f"# {folder.path.name}", "", comparison_table([folder.path]), ""]
    lines += _picture("Training", draw_training(folder))
    lines += _picture("Accuracy against eps and steps", draw_sweep(folder, report))
    lines += _sweep_tables(report)
    lines += _picture("Adversarial images, with predictions", draw_examples(folder))
    lines += _sanity_table(report)
    lines += _picture("Loss around an image", draw_surface(folder, report))
    lines += certified_table(report)
    lines += _picture("Certified accuracy", draw_certified(folder, report))
    lines += ["## How it was made", "", "| | |", "|---|---|"]
    shown = {*ACCURACIES, "recipe", "sweep", "sanity", "certified"}
    facts = {key: value for key, value in report.items() if key not in shown}
    for name in ACCURACIES:  # how each was measured
        about = {k: v for k, v in report.get(name, {}).items() if k not in ("accuracy", "n")}
        facts |= {name: about} if about else {}
    if "certified" in report:
        facts["certified"] = {
            k: v for k, v in report["certified"].items() if k not in ("accuracy", "curve")
        }
    lines += [f"| {key} | {value} |" for key, value in _flat(facts)]
    if "recipe" in report:
        recipe = yaml.safe_dump(report["recipe"], sort_keys=False)
        lines += ["", "## Recipe", "", "```yaml", recipe.strip(), "```"]
    text = "\n".join(lines) + "\n"
    (folder.path / "report.md").write_text(text)
    config = folder.model / "config.json"
    if config.exists():
        card = model_card(report, folder.path.name, json.loads(config.read_text()))
        (folder.model / "README.md").write_text(card)
    return text


def _picture(title: str, path: Path | None) -> list[str]:
    return [] if path is None else [f"![{title}]({path.name})", ""]


def _sweep_tables(report: dict[str, Any]) -> list[str]:
    lines = []
    for key, curve in report.get("sweep", {}).items():
        if curve:
            lines += [f"| {key} | PGD accuracy (%) | n |", "|---|---|---|"]
            lines += [f"| {p[key]:.4g} | {100 * p['accuracy']:.2f} | {p['n']} |" for p in curve]
            lines.append("")
    return lines


def certified_table(report: dict[str, Any]) -> list[str]:
    """Certified accuracy at each radius, as lines of Markdown."""
    found = report.get("certified")
    if found is None:
        return []
    radii = [f"{point['radius']:.4g}" for point in found["accuracy"]]
    accuracies = [f"{100 * point['accuracy']:.2f}" for point in found["accuracy"]]
    return [
        f"Certified accuracy (%) at L2 radii, sigma {found['sigma']:.4g}, {found['images']} images,"
        f" alpha {found['alpha']:g}, {found['method']}: {found['samples_per_image']:.0f} samples an"
        f" image of at most {found['n0'] + found['n']}",
        "",
        "| radius | " + " | ".join(radii) + " | abstained |",
        "|" + "---|" * (len(radii) + 2),
        "| | " + " | ".join(accuracies) + f" | {100 * found['abstained']:.2f} |",
        "",
    ]


def _sanity_table(report: dict[str, Any]) -> list[str]:
    if "sanity" not in report:
        return []
    found = report["sanity"]
    lines = [f"## Is the number too good? ({found['images']} images)", ""]
    lines += ["| check | verdict | |", "|---|---|---|"]
    lines += [f"| {c['name']} | {c['status']} | {c['sentence']} |" for c in found["checks"]]
    return [*lines, ""]


def comparison_table(paths: list[Path]) -> str:
    """Accuracies of runs, one row a run, as a Markdown table.

    Runs that differ in nothing but the seed also get a row of their mean, with the half width of
    its 95% t-interval.
    """
    rows = [["run", *(f"{name} (%)" for name in ACCURACIES.values()), "threat model", "s/epoch"]]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        report = RunFolder(path).read_report()
        if not report:
            raise ValueError(f"{path}: no report.json: nothing was measured there yet")
        rows.append([path.name, *(_percent(report.get(key)) for key in ACCURACIES)])
        threat, seconds = report.get("threat_model"), report.get("train_seconds_per_epoch")
        rows[-1] += ["" if threat is None else f"{threat['norm']}, eps {threat['eps']:.4g}"]
        rows[-1] += ["" if seconds is None else f"{seconds:.1f}"]
        if "recipe" in report:
            groups.setdefault(_but_for_the_seed(report["recipe"]), []).append(report)
    rows += [_mean_row(reports) for reports in groups.values() if len(reports) > 1]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def _but_for_the_seed(recipe: dict[str, Any]) -> str:
    """What runs of several seeds have in common."""
    recipe = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items() if k != "output"}
    for section in ("train", "communication"):
        recipe.get(section, {}).pop("seed", None)
    return json.dumps(recipe, sort_keys=True, default=str)


def _mean_row(reports: list[dict[str, Any]]) -> list[str]:
    row = [f"mean of {len(reports)}"]
    for key in ACCURACIES:
        values = [100 * report[key]["accuracy"] for report in reports if report.get(key)]
        if len(values) < len(reports):
            row.append("")
            continue
        interval = t_interval(values)
        row.append(f"{interval.mean:.2f} +- {interval.high - interval.mean:.2f}")
    return [*row, "", ""]


def _percent(measured: dict[str, Any] | None) -> str:
    """An accuracy with its number of images and what attacked."""
    if measured is None:
        return "not measured"
    how = measured.get("version") or (f"{measured['num_steps']}" if "num_steps" in measured else "")
    about = ", ".join(filter(None, [how, f"n={measured['n']}"]))
    return f"{100 * measured['accuracy']:.2f} ({about})"


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested report by dotted key."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict)
        leaves += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return leaves
