"""From one worker's step to many machines': sums that can be done by hand."""

from dataclasses import replace

import pytest
import torch

from robust_accel import QSGD, AllReduce
from robust_accel.comm.traffic import Machines
from robust_accel.planning.cost import Cost
from robust_accel.planning.estimate import (
    DEVICES,
    PROTOCOLS,
    Engine,
    Job,
    at_speed,
    engines,
    estimates,
)
from robust_accel.planning.pieces import Unit

CPU = torch.device("cpu")
MIB = 2**20
LAYER = Unit(((96, 1024),))
COST = Cost(
    units=(LAYER, LAYER, Unit(((64, 1024),))), weights=MIB, gradients=MIB, state=2 * MIB,
    average=0, kept=1000.0, flops=3e9, convolutions=0, forward=0.02, backward=0.01, update=0.005,
    images=8,
)  # fmt: skip
IMAGES = 10_000  # bytes of ten


def by_name(machines: Machines, micro_batches: int = 1, **changes: object) -> dict[str, Engine]:
    cost, half = replace(COST, **changes), bool(changes.get("fixed"))
    job = Job(cost, machines, 1e6, 10, micro_batches, half)
    return {one.name: one for one in engines(job, AllReduce())}


def seconds(job: Job, collective: object = None) -> dict[str, float]:
    protocol = collective or AllReduce()
    found = estimates(job, engines(job, AllReduce()), {"it": protocol})
    return {one.engine: one.step for one in found}


@pytest.mark.parametrize(("rate", "exposed"), [(1e6, 2 * MIB * 3 / 4 / 1e6 - 0.04), (1e9, 0.0)])
def test_a_step_is_its_passes_and_what_the_last_backward_does_not_hide(
    rate: float, exposed: float
) -> None:
    job = Job(COST, Machines(4, 1), rate, 4, 3)
    found = [o for o in estimates(job, engines(job, AllReduce()), PROTOCOLS) if o.engine == "DDP"]
    assert found[0].traffic.leaving == 2 * MIB * 3 / 4
    assert found[0].step == pytest.approx(3 * 4 * 0.03 + exposed + 0.005)
    assert all(one.step <= found[0].step for one in found)


def test_a_cpu_worker_hides_nothing() -> None:
    job = Job(COST, Machines(4, 1), 1e6, 4, 3, timed_on=CPU)
    one, *_ = estimates(job, engines(job, AllReduce()), {"fp32": AllReduce()})
    wire = one.traffic.leaving / 1e6 + one.traffic.seconds
    assert one.traffic.seconds > 0
    assert one.step == pytest.approx(3 * 4 * 0.03 + 0.005 + wire)


def test_zero_hides_nothing_and_sends_its_weights_and_each_micro_batch() -> None:
    found = seconds(Job(COST, Machines(4, 1), 1e6, 4, 3))
    passes, exchange, weights = 3 * 4 * 0.03, 2 * MIB * 3 / 4 / 1e6, MIB * 3 / 4 / 1e6
    assert found["ZeRO 1"] == pytest.approx(passes + exchange + weights + 0.005 / 4)
    assert found["ZeRO 2"] == pytest.approx(passes + 3 * exchange + weights + 0.005 / 4)


@pytest.mark.parametrize("device", [None, CPU])
def test_fsdp2_sends_half_of_the_gradients_and_its_weights_while_it_computes(
    device: torch.device | None,
) -> None:
    """At 1 MB/s the link is what all waits for; a CPU, whose reduce-scatter is two, adds."""
    job = Job(replace(COST, gathers=4, rounds=2), Machines(4, 1), 1e6, 4, timed_on=device)
    (one,) = (e for e in engines(job, AllReduce()) if e.name == "FSDP2")
    assert one.leaving == (4 * 3 / 4 + 2 * 1 / 4) * MIB * 3 / 4  # layers, and the rest
    (step,) = (e for e in estimates(job, [one], {"fp32": AllReduce()}))
    rounds = 2 if device == CPU else 1
    assert step.traffic.leaving == rounds * MIB * 3 / 4
    link = (one.leaving + step.traffic.leaving) / 1e6 + step.traffic.seconds
    passes = 4 * 0.03 if device == CPU else 0.0
    assert step.step == pytest.approx(passes + link + 0.005 / 4)


def test_a_fast_link_is_hidden_but_for_what_nothing_hides() -> None:
    job = Job(COST, Machines(4, 1), 1e9, 4)
    found, passes = seconds(job), 4 * 0.03
    assert found["DDP"] == pytest.approx(passes + 0.005)
    assert found["FSDP2"] == pytest.approx(passes + 0.005 / 4)
    once = MIB * 3 / 4 / 1e9
    assert found["FSDP2, keep_gathered"] == pytest.approx(passes + once + 0.005 / 4)


def test_hsdp_averages_pieces_between_machines() -> None:
    job = Job(COST, Machines(4, 2), 1e6, 4)
    held = [one for one in engines(job, AllReduce()) if one.name == "HSDP"]
    for collective in (AllReduce(), QSGD(bits=8, compile=False)):
        (one,) = estimates(job, held, {"it": collective})
        alone = Job(COST, Machines(4, 1), 1e6, 4)
        ddp, *_ = estimates(alone, engines(alone, AllReduce()), {"it": collective})
        assert one.traffic.leaving == pytest.approx(ddp.traffic.leaving, rel=0.01)


def test_sides_are_the_same_where_no_mean_is_sent_back() -> None:
    job = Job(COST, Machines(4, 2), 1e6, 4)
    one, two = (seconds(job, QSGD(bits=8, sides=n))["FSDP2"] for n in (1, 2))
    assert one == two


def test_memory_is_shared_out_by_engine() -> None:
    found = {name: one.memory for name, one in by_name(Machines(2, 2)).items()}
    gathered = MIB / 4 + MIB * 3 / 8  # the rest, and a layer
    assert found["DDP"] == 5 * MIB + IMAGES
    assert found["ZeRO 1"] == MIB * (1 + 1 + 0.5 + 0.25) + IMAGES
    assert found["ZeRO 2"] == MIB * (1 + 0.25 + 0.5 + 0.25) + IMAGES
    assert found["FSDP2"] == MIB * 3 / 4 + MIB  # at validation: no gradients, a copy
    assert found["FSDP2, keep_gathered"] == MIB * (4 / 4 + 1) + IMAGES
    assert found["HSDP"] == MIB * 4 / 2 + gathered + IMAGES
    alone = by_name(Machines(1, 1))
    assert [*alone] == ["DDP", "ZeRO 1", "ZeRO 2"]  # nobody to share with
    assert alone["ZeRO 2"].memory == alone["DDP"].memory


def test_memory_of_pieces_is_that_of_the_worst_moment() -> None:
    def one(machines: Machines, micro_batches: int = 1, **changes: object) -> Engine:
        return by_name(machines, micro_batches, **changes)["FSDP2"]

    many = Machines(32, 1)
    plain, averaged = one(many), one(many, average=MIB, kept=0)
    assert (plain.worst, plain.memory) == ("validation", MIB * (1 + 3 / 32))
    assert (averaged.worst, averaged.memory) == ("start", 2 * MIB)  # both are whole before the cut
    assert one(Machines(1, 2)).worst == "step"
    # between micro-batches each worker has the gradient of all
    grown = one(many, 2).moments["step"] - plain.moments["step"]
    assert grown == pytest.approx(MIB * (1 - 1 / 32))
    assert one(many, 3).memory == one(many, 2).memory > plain.memory


def test_weights_stay_gathered_in_the_precision_of_computing_and_nothing_is_cast() -> None:
    single, half = (by_name(Machines(2, 2), fixed=cast) for cast in (0, MIB / 2))
    for name in ("DDP", "ZeRO 2"):  # cast, by autocast
        assert half[name].memory - single[name].memory == MIB / 2
    saved = {n: single[n].moments["step"] - half[n].moments["step"] for n in single}
    assert saved["FSDP2"] == saved["HSDP"] == (MIB / 4 + MIB * 3 / 8) / 2
    assert saved["FSDP2, keep_gathered"] == MIB / 2
    assert half["FSDP2"].leaving == single["FSDP2"].leaving / 2


def test_frozen_weights_are_gathered_as_well() -> None:
    frozen = tuple(Unit(unit.trained, unit.trained) for unit in COST.units)
    both = replace(COST, units=frozen)
    assert both.parameters == 2 * COST.parameters and both.shapes == COST.shapes
    for name in ("FSDP2", "FSDP2, keep_gathered"):
        own = by_name(Machines(4, 1), gathers=1)[name].leaving
        assert by_name(Machines(4, 1), gathers=1, units=frozen)[name].leaving == 2 * own


def test_weights_leave_a_machine_where_they_are_gathered_across() -> None:
    found = {n: one.leaving for n, one in by_name(Machines(2, 2), 3, gathers=22, rounds=11).items()}
    assert found["FSDP2"] == 3 * (22 * 3 / 4 + 11 / 4) * MIB * 3 / 4
    assert found["FSDP2, keep_gathered"] == 3 * MIB * 3 / 4
    assert found["HSDP"] == found["DDP"] == 0
    assert found["ZeRO 1"] == found["ZeRO 2"] == MIB * 3 / 4  # once, after the step
    assert not any(one.leaving for one in by_name(Machines(1, 4), 3).values())


def test_one_unit_is_gathered_once_a_round() -> None:
    whole = (Unit(COST.shapes),)
    found = by_name(Machines(4, 1), gathers=22, rounds=11, units=whole)["FSDP2"]
    assert found.leaving == 11 * MIB * 3 / 4


def test_weights_are_gathered_in_the_bits_that_are_asked_for() -> None:
    job = Job(COST, Machines(4, 1), 1e6, 4)
    bits = [
        {e.name: e.leaving for e in engines(job, c)}["FSDP2, keep_gathered"]
        for c in (AllReduce(), QSGD(weight_bits=8))
    ]
    assert bits[1] == bits[0] / 4 * (1 + 4 / 256)


def test_another_device_does_the_same_work_in_its_own_time() -> None:
    found = at_speed(COST, 1e12, 1e12)
    assert found.forward + found.backward == pytest.approx(3e9 / 1e12)
    assert found.forward / found.backward == pytest.approx(2)
    assert (found.update, found.kept) == (0, COST.kept)


def test_convolutions_have_a_speed_of_their_own() -> None:
    found = at_speed(replace(COST, convolutions=2e9), 1e12, 4e12)
    assert found.forward + found.backward == pytest.approx(1e9 / 1e12 + 2e9 / 4e12)


@pytest.mark.parametrize("name", DEVICES)
def test_only_convolutions_are_left_to_tf32(name: str) -> None:
    """As torch does unless it is told otherwise: its matrices are fp32's own."""
    device = DEVICES[name]
    ratio = device.of_convolutions("fp32") / device.flops["fp32"]
    assert ratio == 1 if name == "v100" else 7 < ratio <= 8  # 156 / 19.5 and 495 / 67
    assert device.of_convolutions("bf16") == device.flops["bf16"]
