"""Protocols in FSDP2, in real processes: the mean, the rounding, the bytes, and whose blocks."""

import itertools

import processes
import pytest
import torch
from fsdp2_training import (
    MODELS,
    Recorder,
    backward,
    full,
    get,
    grads,
    in_parts,
    mean_gradient,
    mesh_of,
    params,
    sharded,
    train,
    vit,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm import QSGD, AllReduce, compress_gradients
from robust_accel.comm.fsdp2 import has_hooks

pytestmark = pytest.mark.skipif(
    not has_hooks(), reason="this torch's FSDP2 takes no reduce-scatter"
)
BITS = [16, 8, 4, 2]
PROTOCOLS = {f"{b}bit": QSGD(bits=b) for b in BITS} | {
    "paper": QSGD(norm="l2", block_size=None),
    "whole": QSGD(norm="l2", block_size="whole"),
}

# ------------------------------------------------------------------------------ scenarios
# Each runs on every rank and returns plain data, which the tests below compare.


def trajectories(rank, world_size):
    results = {}
    for name, make in MODELS.items():
        for engine in ("DDP", "FSDP2", "fp32", "8bit"):
            model = make()
            if engine == "DDP":
                model = DistributedDataParallel(model, broadcast_buffers=False)
            else:
                model = sharded(model)
            if engine == "fp32":
                compress_gradients(model)
            elif engine == "8bit":
                compress_gradients(model, QSGD(bits=8))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            results[name, engine] = train(model, optimizer, range(3), rank)
    return results


def exchanged(rank, world_size):
    """One gradient by each protocol: the mean, bytes, and what was asked of the protocol."""
    results = {"exact": mean_gradient(vit, world_size, 0)}
    for name, protocol in PROTOCOLS.items():
        model, recorder = sharded(vit()), Recorder(protocol)
        compression = compress_gradients(model, recorder)
        backward(model, rank, 0)
        results[name] = {
            "mean": grads(model),
            "bytes": compression.meter.bytes_sent,
            "bytes of calls": sum(call["bytes"] for call in recorder.calls),
            "seconds": compression.meter.seconds,
            "calls": len(recorder.calls),
            "shapes": [tuple(p.shape) for p in model.parameters()],
        }
    model = sharded(vit())
    compression = compress_gradients(model)
    backward(model, rank, 0)
    results["fp32"] = {"mean": grads(model), "bytes": compression.meter.bytes_sent}
    return results


def repeated(rank, world_size):
    """The same batch again and again: only the rounding differs."""

    def loss(rank, model):
        g = torch.Generator().manual_seed(rank)
        return model(torch.randn(4, 50, generator=g)).square().mean()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(50, 43, bias=False), nn.Linear(43, 5, bias=False))

    every = []
    for other in range(world_size):
        model = make()
        loss(other, model).backward()
        every.append(grads(model))
    results = {"exact": torch.stack(every).double().mean(0)}
    for bits in (8, 4):
        model = fully_shard(make(), mesh=mesh_of())
        compress_gradients(model, QSGD(bits=bits))
        means = []
        for _ in range(40):
            model.zero_grad()
            loss(rank, model).backward()
            means.append(grads(model))
        results[bits] = torch.stack(means)
    return results


class Sums(nn.Module):
    """Each of its tensors has a gradient of one number: 1, 2, ... times its own."""

    def __init__(self, number, *shapes, inner=None):
        super().__init__()
        self.number, self.inner = number, inner
        self.last = nn.Parameter(torch.zeros(shapes[-1]))  # FSDP2 takes children first
        self.tensors = nn.ParameterList(torch.zeros(shape) for shape in shapes[:-1])
        self.tied = self.tensors

    def forward(self, used):
        tensors = [*self.tensors, self.last][:used]
        total = sum(self.number * (i + 1) * p.sum() for i, p in enumerate(tensors))
        return total if self.inner is None else total + self.inner(used)


SHAPES = (5, 3), (7,), (3, 24), (9, 2, 3), (5000,)  # the third is cut along its columns
INNER = (4, 4), (1,), (2, 300)


def layouts(rank, world_size):
    """With all tensors, and with two of each module."""
    recorder = Recorder(QSGD(bits=8))
    model, mesh = Sums(1.0, *SHAPES, inner=Sums(100.0, *INNER)), mesh_of()
    fully_shard(model.inner, mesh=mesh)
    fully_shard(
        model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (3, 24) else None
    )
    compress_gradients(model, recorder)
    model(9).backward()
    whole = [full(p.grad) for p in [*model.tensors, model.last, *model.inner.parameters()]]
    model.zero_grad()
    model(2).backward()
    return recorder.calls, whole, [p.grad is None for p in model.parameters()]


def reductions(rank, world_size):
    """FSDP2's own types and factors, by itself and with ours of 16 bits."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    half = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    results = {}
    for name, options in {"bf16": {"mp_policy": policy}, "fp16": {"mp_policy": half}}.items():
        for protocol in (None, AllReduce(), QSGD(bits=16)):
            model = sharded(vit(), **options)
            compression = None if protocol is None else compress_gradients(model, protocol)
            backward(model, rank, 0)
            sent = 0 if compression is None else compression.meter.bytes_sent
            results[name, str(protocol)] = grads(model), sent
    for name in ("factor", "sum"):
        model = sharded(vit())
        for module in (model, *model.blocks):
            if name == "factor":  # gloo itself cannot do this one
                module.set_gradient_divide_factor(5.0)
            else:
                module.set_force_sum_reduction_for_comms(True)
        compress_gradients(model, QSGD(bits=16))
        backward(model, rank, 0)
        results[name] = grads(model)
    return results


def accumulated(rank, world_size):
    """Three micro-batches, of which the last is sent; and the three by hand."""
    model, recorder = sharded(vit()), Recorder(QSGD(bits=16))
    compression = compress_gradients(model, recorder)
    for step in range(3):
        model.set_requires_gradient_sync(step == 2)
        backward(model, rank, step)
    exact = sum(mean_gradient(vit, world_size, step) for step in range(3))
    return grads(model), exact, len(recorder.calls), compression.steps


def resumed(rank, world_size):
    """Three steps with 4 bits; two, and one more in what goes on from there."""
    return [in_parts(rank, QSGD(bits=4), *parts) for parts in ([range(3)], [range(2), range(2, 3)])]


def spoilt(rank, world_size):
    """One number of one rank's gradient is none."""
    results = {}
    for name, protocol in {"fp32": AllReduce(), **PROTOCOLS}.items():
        for number in (float("nan"), float("inf")):
            model = nn.Linear(300, 6)
            fully_shard(model, mesh=mesh_of())
            compress_gradients(model, protocol)
            x = torch.ones(2, 300)
            x[0, 7] = number if rank == 1 else 1.0
            model(x).sum().backward()
            gradient = model.weight.grad.full_tensor()
            results[name, number] = gradient[:, 7].isfinite().any().item()
    return results


# ------------------------------------------------------------------------------ tests

TWO = [trajectories, exchanged, repeated, layouts, accumulated]
FOUR = [*TWO, reductions, resumed, spoilt]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes.run(FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.long)])
def ranks(request):
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_ddps_trajectory(ranks, name):
    for result in get(ranks, trajectories):
        ddp, plain, ours = (result[name, e] for e in ("DDP", "FSDP2", "fp32"))
        assert torch.equal(plain, ours), "the counted reduce-scatter is not FSDP2's own"
        moved = (ddp - params(MODELS[name]())).norm()
        assert (ours - ddp).norm() < 1e-4 * moved
        assert 1e-4 * moved < (result[name, "8bit"] - ddp).norm() < 0.2 * moved


def test_all_ranks_gather_the_same_parameters(ranks):
    results = get(ranks, trajectories)
    for key, value in results[0].items():
        if key[1] != "DDP":
            assert all(torch.equal(value, other[key]) for other in results[1:])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_means_lie_within_the_rounding(ranks, name):
    for result in get(ranks, exchanged):
        error = (result[name]["mean"] - result["exact"]).norm() / result["exact"].norm()
        assert error < {"16bit": 1e-4, "8bit": 0.02, "4bit": 0.3, "2bit": 2.0}.get(name, 0.15)
        assert error > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_means_are_unbiased(ranks, bits):
    result = get(ranks, repeated)[0]
    draws, exact = result[bits].double(), result["exact"]
    assert ((draws.std(0) > 0).sum()) > 1000, "hardly anything was rounded"
    # along all ones, and along signs: sums of many elements, of a normal law
    signs = torch.randint(2, (60, len(exact)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs[0] = 1
    along = draws @ signs.double().T  # [draws, directions]
    z = (along.mean(0) - signs.double() @ exact) / along.std(0) * len(draws) ** 0.5
    assert z.abs().max() < 4.5
    assert 0.4 < float(z.square().mean()) < 1.9


def test_bytes_follow_the_formula(ranks):
    m = len(ranks)
    for result in get(ranks, exchanged):
        shapes = result["8bit"]["shapes"]
        padded = [-(-s[0] // m) * torch.Size(s[1:]).numel() for s in shapes]
        # gloo's reduce-scatter is an all-reduce
        assert result["fp32"]["bytes"] == 2 * (m - 1) * 4 * sum(padded)
        for bits in BITS:
            block = 256 if bits >= 8 else 128
            chunk = sum(
                4 * n if len(s) == 1 else -(-n // block) * (4 + block * bits // 8)
                for s, n in zip(shapes, padded, strict=True)
            )
            found = result[f"{bits}bit"]
            assert found["bytes"] == found["bytes of calls"] == (m - 1) * chunk
            assert found["calls"] == 3  # two blocks, the rest
            assert found["seconds"] > 0


def test_blocks_follow_tensors(ranks):
    m = len(ranks)
    for rank, (calls, whole, _) in enumerate(get(ranks, layouts)):
        spans = []
        for call, shapes, number in zip(calls[:2], (SHAPES, INNER), (1.0, 100.0), strict=True):
            assert call["rows"].shape[0] == len(call["chunks"]) == m
            for row, chunk in zip(call["rows"], call["chunks"], strict=True):
                assert len(chunk) == len(shapes)
                pieces = row.split([s.size for s in chunk])
                for i, (piece, s, shape) in enumerate(zip(pieces, chunk, shapes, strict=True)):
                    own = number * (i + 1)
                    assert ((piece == own) | (piece == 0)).all(), "another tensor's gradient"
                    assert s.raw == (shape in ((7,), (1,)))
                    spans.append((s.position, s.position + s.size))
            found = call["out"].split([s.size for s in call["chunks"][rank]])
            for i, piece in enumerate(found):
                near = piece.sub(number * (i + 1)).abs() <= number * (i + 1) / 100
                assert (near | (piece == 0)).all()
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        expected = [i + 1.0 for i in range(5)] + [300.0, 100.0, 200.0]
        for tensor, number in zip(whole, expected, strict=True):
            assert (tensor - number).abs().max() <= number / 100


def test_tensors_without_a_gradient_have_none(ranks):
    for calls, _, without in get(ranks, layouts):
        assert len(calls) == 4
        assert sum(without) == 4  # two of eight are used in each module
        for call in calls[2:]:  # which two, FSDP2 does not say
            assert {len(chunk) for chunk in call["chunks"]} == {1}


@pytest.mark.long
def test_reduce_types_and_factors_are_fsdp2s(four):
    for result in get(four, reductions):
        exact = get(four, exchanged)[0]["exact"]
        for name, tolerance in (("bf16", 0.02), ("fp16", 0.002)):
            own, counted, ours = (g for (n, *_), (g, _) in pairs(result) if n == name)
            assert (own - counted).norm() < 1e-3 * own.norm()
            assert (ours - exact).norm() < tolerance * exact.norm()
            sent = [n for (key, *_), (_, n) in pairs(result) if key == name]
            assert sent[1] < 0.6 * get(four, exchanged)[0]["fp32"]["bytes"]
        assert (result["factor"] * 5 / len(four) - exact).norm() < 1e-3 * exact.norm()
        assert (result["sum"] - exact).norm() < 1e-3 * exact.norm()


def pairs(result):
    return [(key, value) for key, value in result.items() if isinstance(key, tuple)]


def test_gradient_accumulation_sends_once(ranks):
    for found, exact, calls, steps in get(ranks, accumulated):
        assert (calls, steps) == (3, 1)
        assert (found - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.long
def test_resumed_training_equals_an_uninterrupted_one(four):
    for (straight, state), (again, state_again) in get(four, resumed):
        assert torch.equal(straight, again)
        assert state == state_again == {"steps": 3, "calls": [3] * 3, "rounding": 3}


@pytest.mark.long
def test_what_is_not_finite_reaches_its_owner(four):
    for result in get(four, spoilt):
        assert result and not any(result.values())
