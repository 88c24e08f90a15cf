"""The plan command: what it prints, and what it refuses before it measures anything."""

import re

import pytest

from robust_accel import AllReduce
from robust_accel.__main__ import _parser, main
from robust_accel.comm.traffic import Machines
from robust_accel.commands import plan
from robust_accel.planning import cost as cost_module
from robust_accel.planning.cost import Cost
from robust_accel.planning.estimate import DEVICES, PAYS, PROTOCOLS, Job, engines, estimates
from robust_accel.planning.pieces import Unit

FEW = ("train.batch_size=64", "attack.num_steps=1", "attack.step_size=0.2")


def by_engine(said: str) -> dict[str, dict[str, str]]:
    """Of the second table: the columns of each engine."""
    lines = [line.strip("| ").split("|") for line in said.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    (start,) = (i for i, line in enumerate(cells) if line[0] == "engine")
    return {row[0]: dict(zip(cells[start], row, strict=True)) for row in cells[start + 2 :]}


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_SECONDS", 1e9)


@pytest.mark.usefixtures("_soon")
def test_a_slow_link_and_no_link(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("plan", "quickstart", *FEW, "--quiet", "--device", "v100", "--efficiency", "0.5")
    assert main([*common, "--nodes", "4", "--gpus", "2", "--link", "1mbit"]) == 0
    said = capsys.readouterr().out
    assert "77,562 parameters" in said and "batch 64 = 4 x 2 workers x 8 images" in said
    steps = {k: float(v) for k, v in by_engine(said)["DDP"].items() if k.startswith("step (s)")}
    fp32, fp16, one, two, four = steps.values()
    assert fp32 > fp16 > two > four and fp32 > one > two
    assert "Choose DDP and 4 bits, 2 sides: " in said and "times as fast as fp32" in said
    assert re.search(r"v100 at 7\.85 TFLOPS \(50% of published\)", said)
    assert "FSDP2 gathers the network layer by layer (PreActBlock)" in said
    assert main([*common, "--nodes", "1", "--gpus", "8", "--link", "1mbit"]) == 0
    said = capsys.readouterr().out
    assert "Choose DDP and fp32: " in said and "does not pay here: nothing leaves a machine" in said


@pytest.mark.usefixtures("_soon")
def test_on_machines_like_this_one_an_engine_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", *FEW, "--quiet", "--nodes", "4", "--link", "1gbit"]) == 0
    said = capsys.readouterr().out
    assert {row["fits"] for row in by_engine(said).values()} == {"yes"}
    assert re.search(r"^Choose (DDP|ZeRO 1|ZeRO 2) and ", said, re.MULTILINE)


LAYER = Unit(((512, 512),))
COST = Cost(
    units=5 * (LAYER,), weights=5 << 20, gradients=5 << 20, state=10 << 20,
    average=0, kept=1e5, flops=1e9, convolutions=0, forward=0.02, backward=0.01, update=0.0,
    images=8, gathers=22, rounds=11,
)  # fmt: skip


@pytest.mark.parametrize("rate", [1e5, 1e7, 1e9, 1e12])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_no_engine_and_protocol_that_fit_are_much_faster_than_those_advised(
    rate: float, micro_batches: int
) -> None:
    job = Job(COST, Machines(4, 2), rate, 8, micro_batches)
    held = engines(job, AllReduce())
    found = estimates(job, held, PROTOCOLS)
    sizes = sorted(one.memory for one in held)
    for space in (sizes[0] - 1, *(size + 1 for size in sizes)):
        fits = {one.name: plan._fits(one, space, {}) for one in held}
        said = plan._advice(found, fits, job.machines, space, 64)
        possible = [one for one in found if fits[one.engine] == "yes"]
        if space < sizes[0]:
            assert said.startswith("No engine that takes this recipe fits") and not possible
            continue
        named = re.match(r"Choose (.+) and (.+): (\S+) s a step", said)
        assert named is not None
        steps = [
            one.step
            for one in possible
            if one.engine == named[1] and one.protocol.startswith(named[2])
        ]
        assert steps and max(steps) == min(steps) == pytest.approx(float(named[3]), rel=0.01)
        assert steps[0] <= PAYS * min(one.step for one in possible)
        small = ", ".join(name for name, fit in fits.items() if fit == "no")
        assert said.endswith(f"do not fit: {small}.") or not small or "does not pay" in said


@pytest.mark.usefixtures("_soon")
def test_auto_is_half_precision_where_the_device_is_faster_by_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
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
@pytest.mark.usefixtures("_soon")
def test_what_fsdp2_refuses_does_not_fit(
    capsys: pytest.CaptureFixture[str], settings: list[str], refused: str | None
) -> None:
    words = ["--quiet", "--nodes", "2", "--gpus", "2", "--link", "1gbit", "--device", "a100"]
    assert main(["plan", "quickstart", *FEW, *settings, *words]) == 0
    said = capsys.readouterr().out
    fits = {name: row["fits"] for name, row in by_engine(said).items()}
    assert fits["DDP"] == fits["ZeRO 2"] == "yes"
    in_pieces = {fits[name] for name in ("FSDP2", "FSDP2, keep_gathered", "HSDP")}
    assert in_pieces == ({"refused"} if refused else {"yes"})
    assert ("FSDP2 and HSDP refuse this recipe" in said) == bool(refused)
    assert refused is None or refused in said
    tf32 = "at 2.34, of convolutions 18.7 TFLOPS (12% of published)"
    assert (tf32 in said) == (settings == ["train.precision=fp32"])


@pytest.mark.usefixtures("_soon")
def test_what_only_fsdp2_can_is_not_planned_by_copies(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["communication={name: qsgd, weight_bits: 8}", "--quiet", "--device", "v100"]
    words += ["--nodes", "2", "--gpus", "2", "--link", "1gbit"]
    assert main(["plan", "quickstart", *FEW, *words]) == 0
    said = capsys.readouterr().out
    refused = {name for name, row in by_engine(said).items() if row["fits"] == "refused"}
    assert refused == {"DDP", "ZeRO 1", "ZeRO 2"}
    assert "DDP and ZeRO refuse this recipe: " in said and "Choose HSDP and " in said


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
