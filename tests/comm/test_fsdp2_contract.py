"""compress_gradients on FSDP2: replicas and machines, what it tells, and what it refuses."""

import logging
import os
from unittest import mock

import processes
import pytest
import torch
from fsdp2_training import (
    Recorder,
    backward,
    get,
    grads,
    mean_gradient,
    mesh_of,
    refusal,
    resnet,
    sharded,
    train,
    vit,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from robust_accel import PGD, RobustModel
from robust_accel.comm import QSGD, AllReduce, compress_gradients
from robust_accel.comm.fsdp2 import has_hooks

NEW = pytest.mark.skipif(not has_hooks(), reason="this torch's FSDP2 takes no reduce-scatter")

# ------------------------------------------------------------------------------ scenarios


def machines(rank, world_size):
    """One model on two machines of two processes each, by what the launcher says."""
    os.environ["GROUP_RANK"] = str(rank // 2)
    recorder, model = Recorder(QSGD(bits=8)), sharded(vit())
    compression = compress_gradients(model, recorder)
    backward(model, rank, 0)
    compression.close()
    del os.environ["GROUP_RANK"]
    meter = compression.meter
    return {
        "mean": grads(model),
        "exact": mean_gradient(vit, world_size, 0),
        "inside": meter.bytes_inside_machine,
        "between": meter.bytes_sent - meter.bytes_inside_machine,
        "sharded": sum(call["rows"].numel() for call in recorder.calls),
    }


def replicas(rank, world_size):
    """Two replicas on two shards each, on one machine, and on a machine each."""
    results = {}
    for name in ("one machine", "two machines"):
        os.environ["GROUP_RANK"] = str(rank // 2 if name == "two machines" else 0)
        mesh = mesh_of(2, 2, names=("replicate", "shard"))
        model = sharded(vit(), mesh["shard"])
        compression = compress_gradients(model, QSGD(bits=8), group=mesh["replicate"].get_group())
        backward(model, rank, 0)
        own = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])
        compression.close()
        meter = compression.meter
        results[name] = {
            "mean": grads(model),
            "shard": own.clone(),
            "exact": mean_gradient(vit, world_size, 0),
            "inside": meter.bytes_inside_machine,
            "sent": meter.bytes_sent,
        }
    del os.environ["GROUP_RANK"]
    mesh = mesh_of(2, 2, names=("replicate", "shard"))
    other = vit()
    if rank >= 2:
        other.head.bias.data += 1
    group = mesh["replicate"].get_group()
    results["refused"] = {
        "native": refusal(lambda: compress_gradients(sharded(vit(), mesh), QSGD())),
        "alone": refusal(lambda: compress_gradients(sharded(vit(), mesh["shard"]), QSGD())),
        "differ": refusal(
            lambda: compress_gradients(sharded(other, mesh["shard"]), QSGD(), group=group)
        ),
    }
    return results


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def told(rank, world_size):
    """What the first step logs; and one on gradients that went another way."""
    handler, logger = Lines(), logging.getLogger("robust_accel.comm.fsdp2")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = sharded(resnet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compress_gradients(model, QSGD(bits=4))
    train(model, optimizer, range(2), rank)
    lines = list(handler.lines)
    model = sharded(resnet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    default = _fsdp2s_own(model)
    compress_gradients(model, QSGD(bits=4))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(default)
    lines.append(refusal(lambda: train(model, optimizer, range(1), rank)))
    return lines


def _fsdp2s_own(model):
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    return DefaultReduceScatter()


def inside_of_a_wrapper(rank, world_size):
    """RobustModel of a sharded model: the attack sends nothing."""
    recorder = Recorder(QSGD(bits=8))
    model = RobustModel(sharded(vit()), PGD(eps=0.1, num_steps=2))
    compression = compress_gradients(model, recorder)
    g = torch.Generator().manual_seed(rank)
    x, labels = torch.rand(6, 3, 8, 8, generator=g), torch.randint(7, (6,), generator=g)
    model(x, labels=labels)["loss"].backward()
    return len(recorder.calls), compression.steps


def closed(rank, world_size):
    model = sharded(vit())
    compression = compress_gradients(model, QSGD())
    backward(model, rank, 0)
    compression.close()
    return refusal(lambda: backward(model, rank, 1))


class NoScatter:
    def exchanges(self, *arguments):
        return AllReduce().exchanges(*arguments)


def refused(rank, world_size):
    mesh = mesh_of()
    found = {}
    model = sharded(vit())
    compress_gradients(model, QSGD())
    found["twice"] = refusal(lambda: compress_gradients(model, QSGD()))
    found["no scatter"] = refusal(lambda: compress_gradients(sharded(vit()), NoScatter()))
    partly = vit()
    fully_shard(partly.blocks[0], mesh=mesh)
    found["partly"] = refusal(lambda: compress_gradients(partly, QSGD()))
    group = torch.distributed.group.WORLD
    found["group"] = refusal(lambda: compress_gradients(sharded(vit()), QSGD(), group=group))
    old = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    found["FSDP1"] = refusal(lambda: compress_gradients(old, QSGD()))
    both = mesh_of(1, world_size, names=("shard", "tensor"))
    parallel = parallelize_module(nn.Linear(8, 8), both["tensor"], ColwiseParallel())
    fully_shard(parallel, mesh=both["shard"])
    found["tensor"] = refusal(lambda: compress_gradients(parallel, QSGD()))
    several = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(several[0], mesh=mesh)
    fully_shard(several, mesh=mesh_of(world_size, 1, names=("a", "b"))["a"])
    found["several"] = refusal(lambda: compress_gradients(several, QSGD()))
    return found


def old_torch(rank, world_size):
    with mock.patch("robust_accel.comm.fsdp2.has_hooks", return_value=False):
        return refusal(lambda: compress_gradients(sharded(vit()), QSGD()))


# ------------------------------------------------------------------------------ tests

TWO = [old_torch, *([told, inside_of_a_wrapper, closed, refused] if has_hooks() else [])]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes.run([machines, replicas], 4, tmp_path_factory.mktemp("four"))


def test_a_torch_that_is_too_old_is_refused(two):
    for said in get(two, old_torch):
        assert "on FSDP2 needs torch 2.9 or newer, found " + torch.__version__ in said


@NEW
def test_the_first_exchange_is_told_and_none_is_an_error(two):
    for line, error in get(two, told):
        assert "exchanged by QSGD(bits=4" in line and "each shard's by its worker of 2" in line
        assert "has not exchanged" in error


@NEW
def test_an_attack_sends_nothing(two):
    assert get(two, inside_of_a_wrapper) == [(3, 1)] * 2


@NEW
def test_a_closed_exchange_trains_no_more(two):
    assert all("gradient compression was closed" in said for said in get(two, closed))


REFUSED = {
    "twice": "by compress_gradients already: call it once",
    "no scatter": "NoScatter has no scatter(), by which FSDP2's gradients are exchanged",
    "partly": "is trained, but in no module that fully_shard has got",
    "group": "sharded over 2 of 2 processes, and group has the ranks [0, 1]",
    "FSDP1": "does not support FSDP1 (FullyShardedDataParallel): use FSDP2",
    "tensor": "does not support FSDP2 with tensor parallelism: weight lies on 2 dimensions",
    "several": "supports FSDP2 on one mesh for all modules, got 2",
}


@NEW
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(two, what):
    for found in get(two, refused):
        assert REFUSED[what] in found[what]
        assert "\n" not in found[what]


@NEW
@pytest.mark.long
def test_only_machines_exchange_quantised_gradients(four):
    results = get(four, machines)
    for r in results:
        assert (r["mean"] - r["exact"]).norm() < 0.02 * r["exact"].norm()
        assert torch.equal(r["mean"], results[0]["mean"])
        # fp32 of half to the other process here; 8 bits of a quarter to the other machine
        assert r["inside"] == 4 * r["sharded"] / 2
        # and the vectors, in fp32
        assert r["sharded"] / 4 < r["between"] < 1.8 * r["sharded"] / 4


@NEW
@pytest.mark.long
def test_replicas_decode_the_same_bytes(four):
    results = get(four, replicas)
    for name in ("one machine", "two machines"):
        for r in (result[name] for result in results):
            assert (r["mean"] - r["exact"]).norm() < 0.03 * r["exact"].norm()
        for a, b in ((0, 2), (1, 3)):
            assert torch.equal(results[a][name]["shard"], results[b][name]["shard"])
    for result in results:
        one, two = (result[f"{n} machine{'s' * (n == 'two')}"] for n in ("one", "two"))
        assert one["inside"] == 0 < two["inside"]  # fp32 within a machine
        assert one["sent"] < two["sent"]
        # as many bytes between the replicas of a shard
        assert two["sent"] - two["inside"] < one["sent"]


@NEW
@pytest.mark.long
def test_replicas_that_cannot_be_are_refused(four):
    for result in get(four, replicas):
        found = result["refused"]
        assert "cannot replace FSDP2's own all-reduce between replicas" in found["native"]
        assert "sharded over 2 of 4 processes, and group has the ranks" in found["alone"]
        assert "replicas of the model differ" in found["differ"]
