"""What a terminal shows of what is logged."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from robust_accel.console import shown, shows_bars

logger = logging.getLogger("robust_accel.tests")


def say_all() -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "%s \x1b[2J", logging.getLevelName(level))
    logger.warning("mine", extra={"of_one_process": True})


@pytest.mark.parametrize(
    ("level", "rank", "out", "err"),
    [
        ("debug", "0", "DEBUG INFO", "WARNING ERROR mine"),
        ("info", "0", "INFO", "WARNING ERROR mine"),
        ("warning", "0", "", "WARNING ERROR mine"),
        ("error", "0", "", "ERROR"),
        ("debug", "1", "", "ERROR mine"),
    ],
)
def test_lines_go_out_and_warnings_to_errors_once(
    level: str,
    rank: str,
    out: str,
    err: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    with shown(level):
        say_all()
    found = capsys.readouterr()
    assert found.out.replace("\N{REPLACEMENT CHARACTER}[2J", "").split() == out.split()
    assert found.err.replace("\N{REPLACEMENT CHARACTER}[2J", "").split() == err.split()
    say_all()
    assert "INFO" not in capsys.readouterr().out


SCRIPT = "from robust_accel.console import shown, shows_bars\nwith shown(%r): print(shows_bars())"


@pytest.mark.parametrize(("level", "bars"), [("info", "True"), ("warning", "False")])
def test_bars_are_where_somebody_sees_them(level: str, bars: str) -> None:
    command = [sys.executable, "-c", SCRIPT % level]
    reader, terminal = pty.openpty()
    seen = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True, text=True)
    in_file = subprocess.run(command, capture_output=True, check=True, text=True)
    os.close(reader), os.close(terminal)
    assert (seen.stdout.strip(), in_file.stdout.strip()) == (bars, "False")


def test_one_process_draws_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # as in a notebook
    assert shows_bars()
    monkeypatch.setenv("RANK", "1")
    assert not shows_bars()
