"""A recipe is checked with its data and model, and nothing is written."""

import os
from pathlib import Path

import pytest

from robust_accel.__main__ import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_would_be_trained_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "quickstart", "data.train_size=320", "train.batch_size=64"]) == 0
    said = capsys.readouterr().out
    assert "176 images to train on, 144 held out, 360 to test, 1 x 8 x 8" in said
    assert "epochs of 2 steps" in said and os.listdir() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.path=no/such/folder"], ["no/such/folder"]),
        (
            ["data.classes=[0,1]", "evaluate.autoattack=standard", "train.batch_size=5000"],
            ["train.batch_size: 5000", "needs at least 4 classes"],  # as train says
        ),
        (
            [
                "evaluate.sanity.transfer_from=runs/other",
                "data.classes=[0,1]",
                "evaluate.pgd.loss=dlr",
            ],
            [
                "evaluate.sanity.transfer_from: runs/other is for robust-accel evaluate",
                "evaluate.pgd.loss: dlr",
                "evaluate.autoattack: quick needs",
            ],
        ),
        (["train.batch_size=5000"], ["train.batch_size: 5000 exceeds the 1293 training images"]),
        (
            ["model.name=wide_resnet10_2x", "train.batch_size=5000"],
            ["train.batch_size", "model.name"],
        ),
    ],
)
def test_all_faults_are_told(
    settings: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "quickstart", *settings]) == 2
    found = capsys.readouterr().err
    assert all(text in found for text in said), found
    assert os.listdir() == []


def test_versions_and_devices_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert found.keys() >= {"torch", "timm", "accelerate", "python", "processor", "backends"}
