"""report.json for people: report.md, a figure of the training, and runs side by side."""

from pathlib import Path
from typing import Any

import yaml

from robust_accel.run_folder import RunFolder

ACCURACIES = {
    "clean_accuracy": "clean",
    "pgd_accuracy": "PGD",
    "autoattack_accuracy": "AutoAttack",
}


def write_report(folder: RunFolder) -> str:
    """Write ``report.md`` and ``training.png`` from ``report.json`` and ``metrics.jsonl``.

    Returns:
        The Markdown text.
    """
    report = folder.read_report()
    if not report:
        raise ValueError(f"{folder.path}: no report.json: nothing was measured there yet")
    lines = [f"# {folder.path.name}", "", comparison_table([folder.path]), ""]
    if _plot_training(folder):
        lines += ["![Training](training.png)", ""]
    lines += ["## How it was made", "", "| | |", "|---|---|"]
    facts = {key: value for key, value in report.items() if key not in {*ACCURACIES, "recipe"}}
    lines += [f"| {key} | {value} |" for key, value in _flat(facts)]
    if "recipe" in report:
        recipe = yaml.safe_dump(report["recipe"], sort_keys=False)
        lines += ["", "## Recipe", "", "```yaml", recipe.strip(), "```"]
    text = "\n".join(lines) + "\n"
    (folder.path / "report.md").write_text(text)
    return text


def comparison_table(paths: list[Path]) -> str:
    """Accuracies of runs, one row a run, as a Markdown table."""
    rows = [["run", *(f"{name} (%)" for name in ACCURACIES.values()), "threat model", "s/epoch"]]
    for path in paths:
        report = RunFolder(path).read_report()
        if not report:
            raise ValueError(f"{path}: no report.json: nothing was measured there yet")
        rows.append([path.name, *(_percent(report.get(key)) for key in ACCURACIES)])
        threat, seconds = report["threat_model"], report.get("train_seconds_per_epoch")
        rows[-1] += [f"{threat['norm']}, eps {threat['eps']:.4g}"]
        rows[-1] += ["" if seconds is None else f"{seconds:.1f}"]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


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


def _plot_training(folder: RunFolder) -> bool:
    """Draw loss and accuracies over training; whether there was anything to draw."""
    metrics = folder.read_metrics()
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "validation_robust_accuracy" in line]
    if not steps:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss")
    curves = [("clean", "tab:green"), ("robust", "tab:red")]
    for kind, color in curves:
        right.plot(
            [s["epoch"] for s in steps],
            [100 * s[f"{kind}_batch_accuracy"] for s in steps],
            color=color,
            alpha=0.35,
            label=f"{kind}, training batch",
        )
        if validations:
            right.plot(
                [v["epoch"] for v in validations],
                [100 * v[f"validation_{kind}_accuracy"] for v in validations],
                color=color,
                marker="o",
                markersize=3,
                label=f"{kind}, held-out split",
            )
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    right.legend(fontsize=8)
    figure.savefig(folder.path / "training.png", dpi=120)
    pyplot.close(figure)
    return True
