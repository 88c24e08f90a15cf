"""The plan command: what it prints, and what it refuses before it measures anything."""

import re

import pytest

from robust_accel.__main__ import _parser, main
from robust_accel.planning import cost as cost_module
from robust_accel.planning.estimate import DEVICES

FEW = ("train.batch_size=64", "attack.num_steps=1", "attack.step_size=0.2")


def test_a_slow_link_and_no_link(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(cost_module, "_SECONDS", 1e9)
    common = ("plan", "quickstart", *FEW, "--quiet", "--device", "v100", "--efficiency", "0.5")
    assert main([*common, "--nodes", "4", "--gpus", "2", "--link", "1mbit"]) == 0
    said = capsys.readouterr().out
    assert "77,562 parameters" in said and "batch 64 = 4 x 2 workers x 8 images" in said
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    speedups = {row[1]: float(row[8]) for row in rows if len(row) == 10 and row[8][:1].isdigit()}
    assert speedups["fp32"] == 1 < speedups["8 bits, 2 sides"] < speedups["4 bits, 2 sides"]
    assert "Fastest: 4 bits, 2 sides" in said and "DDP fits into 32 GiB" in said
    assert re.search(r"v100 at 7\.85 TFLOPS \(50% of published\)", said)
    assert main([*common, "--nodes", "1", "--gpus", "8", "--link", "1mbit"]) == 0
    assert "does not pay here: nothing leaves a machine" in capsys.readouterr().out


def test_auto_is_half_precision_where_the_device_is_faster_by_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "_SECONDS", 1e9)

    def said(device: str, precision: str) -> list[str]:
        words = ["--quiet", "--nodes", "4", "--link", "1mbit", "--device", device]
        assert main(["plan", "quickstart", *FEW, f"train.precision={precision}", *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert said("v100", "auto") == said("v100", "fp32") != said("v100", "bf16")
    assert said("h100", "auto") == said("h100", "bf16") != said("h100", "fp32")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["train.precision=bf16"], "bf16 is not possible with FSDP2 and BatchNorm"),
        (["train.precision=fp16"], "fp16 is not possible with FSDP2"),
        (["train.precision=fp32"], None),
    ],
)
def test_what_fsdp2_refuses_does_not_fit(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    refused: str | None,
) -> None:
    monkeypatch.setattr(cost_module, "_SECONDS", 1e9)
    words = ["--quiet", "--nodes", "2", "--gpus", "2", "--link", "1gbit", "--device", "a100"]
    assert main(["plan", "quickstart", *FEW, *settings, *words]) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    fits = {row[1]: row[4] for row in rows if len(row) == 8}
    assert fits["DDP"] == fits["ZeRO 2"] == "yes"
    in_pieces = {fits[name] for name in ("FSDP2", "FSDP2, keep_gathered", "HSDP")}
    assert in_pieces == ({"refused"} if refused else {"yes"})
    assert ("FSDP2 and HSDP refuse this recipe" in said) == bool(refused)
    assert refused is None or refused in said
    tf32 = "at 2.34, of convolutions 18.7 TFLOPS (12% of published)"
    assert (tf32 in said) == (settings == ["train.precision=fp32"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--link", "fast"], "a rate as 100mbit, 1gbit or 25gbit is wanted, got 'fast'"),
        (["--link", "0gbit"], "got '0gbit'"),
        (["--nodes", "0"], "--nodes"),
        (["--image", "3x32"], "channels, height and width are wanted"),
        (["--efficiency", "2"], "a number above 0, at most 1, is wanted"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_words_that_mean_nothing_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "quickstart", "--nodes", "2", "--link", "1gbit", *words])
    assert said in capsys.readouterr().err


def test_a_batch_that_cannot_be_dealt_names_those_that_can(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "quickstart", "train.batch_size=100", "--nodes", "3", "--link", "1gbit"]
    assert main([*words, "--gpus", "2", "train.gradient_accumulation=2"]) == 2
    said = capsys.readouterr().err
    assert "train.batch_size: 100 is no multiple of 6 workers x 2 micro-batches: 96, 108" in said


def test_the_devices_are_those_that_are_known() -> None:
    for name in DEVICES:
        words = ["plan", "quickstart", "--nodes", "1", "--link", "1gbit", "--device", name]
        assert _parser().parse_args(words).device == name
