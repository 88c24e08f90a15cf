"""Reports say what was measured, on how many images, and how."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from robust_accel.reporting.report import comparison_table, write_report
from robust_accel.run_folder import RunFolder, append_line

REPORT: dict[str, Any] = {
    "threat_model": {"norm": "linf", "eps": 8 / 255},
    "clean_accuracy": {"accuracy": 0.8125, "n": 360},
    "pgd_accuracy": {"accuracy": 0.5, "n": 320, "num_steps": 20, "step_size": 0.01},
    "autoattack_accuracy": {"accuracy": 0.25, "n": 200, "version": "standard", "attacks": ["a"]},
    "train_seconds_per_epoch": 12.34,
    "seeds": {"train": 17},
}


def run(folder: Path, **changes: Any) -> RunFolder:
    folder.mkdir()
    report = {k: v for k, v in (REPORT | changes).items() if v is not None}
    RunFolder(folder).write_report(report)
    return RunFolder(folder)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    run(tmp_path / "robust")
    run(
        tmp_path / "plain",
        autoattack_accuracy=None,
        train_seconds_per_epoch=None,
        threat_model={"norm": "l2", "eps": 0.5},
        pgd_accuracy={"accuracy": 0.0, "n": 360, "num_steps": 20},
    )
    table = comparison_table([tmp_path / "robust", tmp_path / "plain"])
    head, rule, robust, plain = cells(table)
    assert head == ["run", "clean (%)", "PGD (%)", "AutoAttack (%)", "threat model", "s/epoch"]
    assert all(set(cell) == {"-"} for cell in rule)
    assert robust == [
        "robust", "81.25 (n=360)", "50.00 (20, n=320)", "25.00 (standard, n=200)",
        "linf, eps 0.03137", "12.3",
    ]  # fmt: skip
    assert plain == [
        "plain", "81.25 (n=360)", "0.00 (20, n=360)", "not measured", "l2, eps 0.5", "",
    ]  # fmt: skip
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned for plain eyes too


def test_the_report_holds_accuracies_facts_and_a_figure(tmp_path: Path) -> None:
    folder = run(tmp_path / "robust", recipe={"attack": {"eps": 0.031}})
    for step in (1, 2, 3):
        accuracies = {"clean_batch_accuracy": 0.2 * step, "robust_batch_accuracy": 0.1 * step}
        line = {"step": step, "epoch": step / 3, "loss": 1 / step} | accuracies
        append_line(folder.metrics, line)
    validation = {"validation_clean_accuracy": 0.6, "validation_robust_accuracy": 0.3}
    append_line(folder.metrics, {"step": 3, "epoch": 1.0} | validation)
    text = write_report(folder)
    assert (folder.path / "report.md").read_text() == text
    assert text.startswith("# robust\n")
    assert comparison_table([folder.path]) in text
    assert "| seeds.train | 17 |" in text
    assert "  eps: 0.031\n" in text
    assert "![Training](training.png)" in text
    with Image.open(folder.path / "training.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 10  # curves, not a blank sheet


def test_without_training_there_is_no_figure(tmp_path: Path) -> None:
    folder = run(tmp_path / "measured_only")
    assert "training.png" not in write_report(folder)
    assert not (folder.path / "training.png").exists()


def test_a_run_without_report_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "robust")
    with pytest.raises(ValueError, match=r"other: no report.json"):
        comparison_table([tmp_path / "robust", tmp_path / "other"])
    with pytest.raises(ValueError, match=r"other: no report.json"):
        write_report(RunFolder(tmp_path / "other"))


def test_the_model_gets_a_card_that_states_threat_model_and_measurements(tmp_path: Path) -> None:
    selection = {"weights": "best", "epoch": 3, "metric": "PGD-10 accuracy", "n": 100}
    folder = run(
        tmp_path / "robust",
        recipe={"attack": {"eps": 0.031}},
        selection=selection | {"split": "held out of train"},
        parameters_digest="ab12",
    )
    folder.model.mkdir()
    config = {"architecture": "preact_resnet18", "pretrained_cfg": {"mean": [0.5], "std": [0.25]}}
    (folder.model / "config.json").write_text(json.dumps(config))
    write_report(folder)
    card = (folder.model / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "timm"
    assert "L-infinity, eps = 0.03137 (8/255) on pixels in [0, 1]" in body
    assert "| 81.25 | 360 | none | images as they are |" in body
    assert "| 50.00 | 320 | PGD | 20 steps of 0.01, 1 random start |" in body
    assert "| 25.00 | 200 | AutoAttack | standard: a |" in body
    assert "of epoch 3, by PGD-10 accuracy on 100 images held out of train" in body
    assert "- digest of the weights (SHA-256): ab12" in body
    assert "mean 0.5, std 0.25" in body
    assert "import robust_accel" in body
    assert "  eps: 0.031\n" in body


def test_runs_of_several_seeds_get_a_mean_with_its_interval(tmp_path: Path) -> None:
    for seed, share in enumerate((0.50, 0.52, 0.54)):
        recipe = {"train": {"seed": seed, "lr": 1}, "output": f"runs/{seed}"}
        accuracy = {"accuracy": share, "n": 100}
        run(tmp_path / str(seed), recipe=recipe, pgd_accuracy=accuracy)
    other = {"train": {"seed": 3, "lr": 2}, "output": "runs/3"}
    run(tmp_path / "3", recipe=other)
    table = cells(comparison_table([tmp_path / str(seed) for seed in range(4)]))
    assert [row[0] for row in table[2:]] == ["0", "1", "2", "3", "mean of 3"]
    # standard error 2 / sqrt(3), t(0.975, 2) = 4.302653
    assert table[-1][2] == "52.00 +- 4.97"
