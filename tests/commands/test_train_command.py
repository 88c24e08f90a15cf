"""What the train command shows."""

from pathlib import Path

import pytest

from robust_accel.__main__ import main

SMALL = ("quickstart", "train.max_steps=2", "evaluate.images=20", "evaluate.autoattack=null")


def test_its_last_lines_say_where_all_is_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    assert main(["train", *SMALL, f"output={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("attacked" in line for line in lines) == 1  # of the first step
    assert any(line.startswith("step 2 loss=") for line in lines)  # no bar: lines
    report, model, following = lines[-3:]
    assert Path(report.removeprefix("report: ")).is_file()
    assert (Path(model.removeprefix("model and its card: ")) / "README.md").is_file()
    assert following.endswith(f"robust-accel evaluate '{folder}' evaluate.autoattack=standard")


def test_quiet_leaves_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", *SMALL, f"output={tmp_path / 'run'}", "--quiet", "evaluate.eps=0.1"]
    assert main(given) == 0
    shown = capsys.readouterr()
    assert {line[0] for line in shown.out.splitlines()} == {"|"}
    assert shown.err.startswith("trained against linf, eps 0.2; measured against linf, eps 0.1")


def test_a_misspelt_command_is_told_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trian", "quickstart"])
    assert "(did you mean train?)" in capsys.readouterr().err


def test_help_has_every_command_with_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main_help = _help([], capsys)
    for name in ("train", "wrap", "evaluate", "certify", "report", "study", "explain", "check"):
        assert f"  {name} " in main_help
        assert "Example: " in _help([name], capsys)


def _help(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out
