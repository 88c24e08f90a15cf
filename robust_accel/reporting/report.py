"""report.json for people: report.md with its pictures, report.html, the model's card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_accel.files import write_text
from robust_accel.models import read_config
from robust_accel.reporting.figures import draw
from robust_accel.reporting.model_card import model_card
from robust_accel.reporting.page import page
from robust_accel.reporting.sections import Section, certified_tables, sections
from robust_accel.reporting.tables import Table, comparison, escaped, fenced
from robust_accel.reporting.views import Run, read_runs, refused_by_name, tidy
from robust_accel.run_folder import RunFolder


def write_report(folder: RunFolder, *, everything: bool = False) -> str:
    """Write ``report.md``, ``report.html``, the pictures and the model's card of a run folder.

    Args:
        everything: Show also rows that a larger measurement stands for.

    Returns:
        The Markdown text.

    Raises:
        ValueError: Nothing was measured, or before there was a ledger; or the folder holds a link
            that leads out of it.
    """
    folder.check_contained()
    (run,) = read_runs([folder.path], everything=everything)
    config = tidy(read_config(folder.model)) if (folder.model / "config.json").exists() else None
    with refused_by_name(folder):
        html, text = page([run]), _markdown(run)  # the pictures, which take their time, last
        card = None if config is None else model_card(run, config)
    write_text(folder.path / "report.html", html)  # by far the largest: on a full disk all stays
    write_text(folder.path / "report.md", text)
    if card is not None:
        write_text(folder.model / "README.md", card)
    return text


def comparison_table(paths: Sequence[str | Path]) -> str:
    """Accuracies of runs, one row a run and threat model, as a Markdown table."""
    return comparison(read_runs(paths)).markdown()


def certified_table(report: dict[str, Any]) -> list[str]:
    """Certified accuracy at each radius, as lines of Markdown."""
    report = tidy(report)
    run = Run(RunFolder("."), "", report, report.get("measurements", []))
    return [line for table in certified_tables(run) for line in _table(table)]


def _markdown(run: Run) -> str:
    """The whole report; writes the pictures that it shows."""
    lines = [f"# {escaped(run.name)}", "", *_table(comparison([run]))]
    for section in sections(run):
        lines += _section(section, run.folder.path)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, folder: Path) -> list[str]:
    lines = [f"## {section.title}", ""]
    for text in section.texts:
        lines += [f"> **{escaped(text)}**" if section.alert else escaped(text), ""]
    for table in section.tables:
        lines += _table(table)
    for chart in section.charts:
        path = draw(chart, folder / "figures")
        lines += [f"![{escaped(chart.title)}](figures/{path.name})", ""]
    if section.block:
        lines += [fenced(section.block), ""]
    return lines


def _table(table: Table) -> list[str]:
    caption = [escaped(table.caption), ""] if table.caption else []
    return [*caption, table.markdown(), ""]
