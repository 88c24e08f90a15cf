"""A report on a disk that is full is said in a sentence, and the one before is whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
from disks import fill
from reporting_rows import clean, pgd, write_run, write_whole

from robust_accel.__main__ import main
from robust_accel.exit_codes import UNWRITABLE, USAGE


@pytest.mark.parametrize(
    ("left", "at"),
    [
        (0, "figures/autoattack_0.png"),
        pytest.param(1_000_000, "report.html", marks=pytest.mark.long),
    ],
)
def test_a_report_on_a_full_disk(
    disk: Callable[..., Path], capsys: pytest.CaptureFixture[str], left: int, at: str
) -> None:
    folder = write_whole(disk(14_000_000) / "run")
    assert main(["report", str(folder.path)]) == 0
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert len(before) > 20
    folder.write_report(folder.read_report() | {"doubts": ["it would say something else"]})
    before[folder.report] = folder.report.read_bytes()
    fill(folder.path.parent / "filler", left)
    capsys.readouterr()
    assert main(["report", str(folder.path)]) == UNWRITABLE
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == (
        f"robust-accel: {folder.path / at} cannot be written: No space left on device; what was "
        "there before is there still"
    )
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    for path in before.keys() - set((folder.path / "figures").iterdir()):  # these may be new
        assert after[path] == before[path], path


@pytest.mark.parametrize(
    ("option", "why"), [("rw", "No space left on device"), ("ro", "Read-only file system")]
)
def test_an_export_is_refused_before_anything_is_drawn(
    disk: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    why: str,
) -> None:
    folder, file = write_run(tmp_path / "run", [clean(), pgd()]), disk(100_000, option) / "rows.csv"
    if option == "rw":
        file.write_text("as it was")
        fill(file.with_name("filler"))
    assert main(["report", str(folder.path), "--csv", str(file)]) == USAGE
    said = capsys.readouterr().err.strip()
    assert said == f"robust-accel: --csv: {file.parent} cannot be written: {why}"
    assert not (folder.path / "report.md").exists()
    assert option == "ro" or file.read_text() == "as it was"


def test_a_folder_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_whole(tmp_path / "run")
    (folder.path / "figures").write_text("no folder")
    assert main(["report", str(folder.path)]) == UNWRITABLE
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"robust-accel: {folder.path / 'figures'}/")
    assert said.endswith(": Not a directory")
