"""The report command: several runs, and files that others read."""

import json
import math
from csv import DictReader
from pathlib import Path

import pytest
from reporting_rows import FUNCTION, certificate, clean, everything, pgd, write_run

from robust_accel.__main__ import main
from robust_accel.files import append_line
from robust_accel.reporting.exports import csv
from robust_accel.reporting.views import read_runs


def test_csv_has_a_line_a_row_and_nothing_is_rounded(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [*everything(), pgd(1 / 3, 999)]) for name in "ab"]
    lines = list(DictReader(csv(read_runs([run.path for run in runs])).splitlines()))
    rows = [row for run in runs for row in run.read_report()["measurements"]]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["key"] == row["key"] and int(line["images.n"]) == row["images"]["n"]
        if "accuracy" in row:
            assert math.isclose(float(line["accuracy_percent"]), 100 * row["accuracy"])
        if row["attack"]["name"] == "autoattack":
            assert json.loads(line["attack.attacks"]) == row["attack"]["attacks"]
        if row.get("threat_model"):
            assert float(line["threat_model.eps"]) == row["threat_model"]["eps"]
    assert lines[-1]["accuracy_percent"].startswith("33.3333333333")
    assert {line["run"] for line in lines} == {"a", "b"}


def test_latex_is_a_booktabs_table_with_its_text_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my_run#1", [clean(), pgd()])
    file = tmp_path / "table.tex"
    assert main(["report", str(run.path), "--latex", str(file)]) == 0
    text = file.read_text()
    assert r"\toprule" in text and r"\bottomrule" in text
    assert r"my\_run\#1" in text and r"clean (\%)" in text
    assert r"75.00 [70.28, 79.19] (PGD-20, n=360)" in text


def test_several_runs_get_one_page(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, [clean(), certificate()]).path) for name in "ab"]
    file = tmp_path / "both.html"
    assert main(["report", *runs, "--html", str(file)]) == 0
    text = file.read_text()
    assert text.count("<article") == 2 and "Side by side" in text
    assert text.count("plotly.js v") == 1


@pytest.mark.parametrize(
    ("option", "name"),
    [("--csv", "b"), ("--html", "a/report.json"), ("--latex", "table.md"), ("--csv", "no/x.csv")],
)
def test_what_is_no_such_file_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    for run in "ab":
        write_run(tmp_path / run, [clean()])
    before = (tmp_path / "a" / "report.json").read_bytes()
    assert main(["report", str(tmp_path / "a"), option, str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith(f"robust-accel: {option}: ")
    assert (tmp_path / "a" / "report.json").read_bytes() == before
    assert not (tmp_path / "a" / "report.md").exists()


def test_one_run_that_cannot_be_read_leaves_all_as_they_were(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [clean()])
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert not (tmp_path / "a" / "report.md").exists()


def test_all_shows_what_a_larger_measurement_stands_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = pgd(0.5, 100), pgd(0.4, 200)
    run = write_run(tmp_path / "run", [large])
    for row in (small, large, pgd(0.9, 300)):
        function = "another" if row["images"]["n"] == 300 else FUNCTION
        outcomes = {"image": [str(i) for i in range(row["images"]["n"])]}
        record = row | {"function": function, "outcomes": outcomes}
        append_line(run.path / "measurements.jsonl", record)
    file = tmp_path / "rows.csv"
    file.write_text("what was exported before is replaced")
    assert main(["report", str(run.path), "--csv", str(file), "--all"]) == 0
    assert len(file.read_text().splitlines()) == 3  # a head and two rows
    assert "40.00" in capsys.readouterr().out  # the table quotes the larger one
    assert main(["report", str(run.path), "--csv", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 2
