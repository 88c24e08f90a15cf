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
    at_speed,
    engines,
    estimates,
    gathered_bytes,
)

CPU = torch.device("cpu")
MIB = 2**20
COST = Cost(
    shapes=((256, 1024),), all_shapes=((256, 1024),), weights=MIB, gradients=MIB, state=2 * MIB,
    average=0, kept=1000.0, flops=3e9, convolutions=0, forward=0.02, backward=0.01,
    update=0.005, images=8,
)  # fmt: skip


@pytest.mark.parametrize(("rate", "exposed"), [(1e6, 2 * MIB * 3 / 4 / 1e6 - 0.04), (1e9, 0.0)])
def test_a_step_is_its_passes_and_what_the_last_backward_does_not_hide(
    rate: float, exposed: float
) -> None:
    found = estimates(COST, Machines(4, 1), rate, 4, 3, PROTOCOLS, None)
    base = found[0]
    assert base.traffic.leaving == 2 * MIB * 3 / 4
    assert base.wire == pytest.approx(base.traffic.leaving / rate)
    assert base.exposed == pytest.approx(exposed)
    assert base.step == pytest.approx(3 * 4 * 0.03 + exposed + 0.005)
    assert all(one.step <= base.step for one in found)


def test_a_cpu_worker_hides_nothing() -> None:
    (one,) = estimates(COST, Machines(4, 1), 1e6, 4, 3, {"fp32": AllReduce()}, CPU)
    assert one.traffic.seconds > 0
    assert one.exposed == one.wire + one.traffic.seconds


def by_name(
    machines: Machines, micro_batches: int = 1, cost: Cost = COST, half: bool = False
) -> dict[str, Engine]:
    found = engines(cost, machines, 10, micro_batches, AllReduce(), half=half)
    return {one.name: one for one in found}


def test_memory_is_shared_out_by_engine() -> None:
    found = {name: one.memory for name, one in by_name(Machines(2, 2)).items()}
    assert found["DDP"] == 5 * MIB + 10_000
    assert found["ZeRO 1"] == MIB * (1 + 1 + 0.5 + 0.25) + 10_000
    assert found["ZeRO 2"] == MIB * (1 + 0.25 + 0.5 + 0.25) + 10_000
    assert found["FSDP2"] == MIB * 4 / 4 + 10_000
    assert found["FSDP2, keep_gathered"] == MIB * (4 / 4 + 1) + 10_000
    assert found["HSDP"] == MIB * 4 / 2 + 10_000
    alone = by_name(Machines(1, 1))
    assert "HSDP" not in alone
    assert alone["ZeRO 2"].memory == alone["DDP"].memory
    assert alone["FSDP2"].memory == 4 * MIB + 10_000  # nothing is there twice


def test_weights_stay_gathered_in_the_precision_of_computing_and_nothing_is_cast() -> None:
    cast = replace(COST, fixed=MIB / 2)  # by autocast, for the other engines
    half = {n: e.memory for n, e in by_name(Machines(2, 2), cost=cast, half=True).items()}
    single = {n: e.memory for n, e in by_name(Machines(2, 2)).items()}
    assert half["DDP"] - single["DDP"] == half["ZeRO 2"] - single["ZeRO 2"] == MIB / 2
    assert [half[name] - single[name] for name in ("FSDP2", "HSDP")] == [0, 0]
    kept = "FSDP2, keep_gathered"
    assert half[kept] - half["FSDP2"] == MIB / 2 and single[kept] - single["FSDP2"] == MIB


def test_frozen_weights_are_gathered_as_well() -> None:
    frozen = replace(COST, all_shapes=((256, 1024), (256, 1024)))
    assert frozen.parameters == 2 * COST.parameters
    for collective in (AllReduce(), QSGD(weight_bits=8)):
        own, both = (gathered_bytes(cost, collective, half=False) for cost in (COST, frozen))
        assert both == 2 * own


def test_weights_leave_a_machine_where_they_are_gathered_across() -> None:
    cost = replace(COST, gathers=22)
    found = {name: one.leaving for name, one in by_name(Machines(2, 2), 3, cost).items()}
    assert found["FSDP2"] == 3 * 22 * MIB * 3 / 4
    assert found["FSDP2, keep_gathered"] == 3 * MIB * 3 / 4
    assert found["HSDP"] == found["DDP"] == 0
    assert not any(one.leaving for one in by_name(Machines(1, 4), 3, cost).values())


def test_weights_are_gathered_in_the_bits_that_are_asked_for() -> None:
    assert gathered_bytes(COST, AllReduce(), half=True) == MIB / 2
    assert gathered_bytes(COST, QSGD(weight_bits=8), half=False) == MIB / 4 * (1 + 4 / 256)


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
