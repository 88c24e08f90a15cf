"""Exchanges in real processes: the mean, the rounding, the bytes, and who sends to whom."""

import os

import processes
import pytest
import torch
import torch.distributed as dist
from ddp_training import PROTOCOLS, Recorder, check_mean, get, make_model, params, train, wrap

from robust_accel.comm import (
    COLLECTIVES,
    QSGD,
    AllReduce,
    Meter,
    Workers,
    collectives,
    compress_gradients,
)
from robust_accel.comm.base import run_all
from robust_accel.comm.draws import random_key
from robust_accel.comm.layout import Segment, segment

# ------------------------------------------------------------------------------ scenarios
# Each runs on every rank and returns plain data, which the tests below compare.


def reduced(protocol, flat, segments, step):
    """The mean of a gradient, beside it."""
    mean = flat.clone()
    run_all(protocol.exchanges(mean, segments, step, Workers(), Meter()))
    return mean


def half_precision_overflow(rank, world_size):
    flat = torch.full((100,), 1e6 if rank == 0 else 1.0)
    protocol = AllReduce(dtype="fp16")
    return reduced(protocol, flat, [Segment(100, 0, False)], 0)


def odd_sizes(rank, world_size):
    """Gradients smaller than the world, indivisible, empty; straight through the protocols."""
    shapes = [
        [],
        [()],
        [(1, 1)],
        [(2, 1)],
        [(0, 3)],
        [(5,), (1, 1), (0,)],
        [(257, 1)],
        [(4099, 3), (7,), (5, 5)],
    ]
    results = []
    for i, bucket in enumerate(shapes):
        segments, position = [], 0
        for shape in bucket:
            segments.append(segment(shape, position))
            position += segments[-1].size
        for name, protocol in PROTOCOLS.items():
            g = torch.Generator().manual_seed(100 * i + rank)
            flat = torch.randn(position, generator=g)
            mean = reduced(protocol, flat, segments, i)
            results.append({"name": name, "in": flat, "out": mean, "segments": segments})
    return results


def formulas(rank, world_size):
    """Bytes for a gradient that every block size and world size here divides."""
    d = 256 * 12 * 10
    results = {}
    for name, protocol in PROTOCOLS.items():
        meter = Meter()
        run_all(protocol.exchanges(torch.randn(d), [Segment(d, 0, False)], 0, Workers(), meter))
        results[name] = meter.bytes_sent
    return d, results


def equal_gradients(rank, world_size):
    """The same gradient on every rank, sent in two steps and with another seed."""
    d = 1 << 14
    flat = torch.randn(d, generator=torch.Generator().manual_seed(7))

    def error(step, **kwargs):
        protocol = QSGD(bits=4, **kwargs)
        return reduced(protocol, flat, [Segment(d, 0, False)], step) - flat

    single = QSGD(bits=4).quantizer
    segments, key = [Segment(d, 0, False)], random_key(0, 0, 0, flat.device)
    alone = single.decode(single.encode(flat, segments, key), segments) - flat
    return {
        "alone": alone,
        "one": [error(0, sides=1), error(1, sides=1), error(0, sides=1, seed=1)],
        "two": [error(0), error(1), error(0, seed=1)],
    }


def replicas(rank, world_size):
    """The error of the same gradient on every rank, each of which is a replica by itself."""
    groups = [dist.new_group([other]) for other in range(world_size)]
    flat = torch.randn(1 << 14, generator=torch.Generator().manual_seed(7))
    out, chunks = torch.empty_like(flat), [[Segment(len(flat), 0, False)]]
    QSGD(bits=4).scatter(flat[None].clone(), chunks, 0, Workers(groups[rank]), Meter(), out)
    return out - flat


class ByServers(QSGD):
    def _serving_is_cheaper(self, *_):
        return True


def both_one_sided_exchanges(rank, world_size):
    """The same gradients to all and through servers; more than one slice of them."""
    d = collectives._SLICE + 1000
    flat = torch.randn(d, generator=torch.Generator().manual_seed(rank))
    segments = [Segment(d - 300, 0, False), Segment(300, d - 300, True)]
    return [reduced(kind(bits=8, sides=1), flat, segments, 3) for kind in (QSGD, ByServers)]


def machines(rank, world_size):
    """Two machines of two processes, by what the launcher says."""
    os.environ["GROUP_RANK"] = str(rank // 2)
    results = {}
    for name in ("8bit-1side", "8bit-2side", "4bit-2side"):
        recorder = Recorder(PROTOCOLS[name])
        model = wrap(make_model())
        comp = compress_gradients(model, recorder)
        train(model, range(3), rank, delay=True)
        results[name] = {
            "params": params(model),
            "calls": recorder.calls,
            "bytes": comp.meter.bytes_sent,
            "inside": comp.meter.bytes_inside_machine,
        }
        comp.close()
    return results


def uneven_machines(rank, world_size):
    os.environ["GROUP_RANK"] = str(rank // 2)
    workers = Workers.of(None, parent=None)
    del os.environ["GROUP_RANK"]
    return workers.node is None and workers.peers is None and workers.size == world_size


# ------------------------------------------------------------------------------ tests

TWO = [odd_sizes, formulas, equal_gradients, replicas]
THREE = [*TWO, half_precision_overflow, both_one_sided_exchanges, uneven_machines]


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.long), 3])
def ranks(request):
    """Three by default: no size here is theirs."""
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes.run([machines], 4, tmp_path_factory.mktemp("four"))


def test_half_precision_overflow_reaches_every_rank(three):
    for mean in get(three, half_precision_overflow):
        assert mean.isinf().all()


def test_odd_sizes(ranks):
    for same in zip(*get(ranks, odd_sizes), strict=True):
        name, segments = same[0]["name"], same[0]["segments"]
        check_mean(name, segments, [r["in"] for r in same], [r["out"] for r in same])


def test_rounding_is_independent_across_ranks_steps_sides_and_seeds(ranks):
    result = get(ranks, equal_gradients)[0]
    m = len(ranks)
    one = result["alone"].square().mean()  # the error of one quantisation
    # M independent errors averaged; rounded again, the mean is on one of two neighbouring levels
    # without bias, which is the law of a single quantisation
    for name, expected in (("one", 1 / m), ("two", 1.0)):
        errors = result[name]
        for e in errors:
            assert float(e.square().mean() / one) == pytest.approx(expected, rel=0.06)
        for other in errors[1:]:
            correlation = (errors[0] * other).mean() / errors[0].square().mean()
            # both round towards the same two neighbours, but not together
            assert abs(correlation) < 5 / len(other) ** 0.5


def test_replicas_round_independently(ranks):
    errors = torch.stack(get(ranks, replicas))
    of_mean = errors.mean(0).square().mean() / errors.square().mean()
    assert float(of_mean) == pytest.approx(1 / len(ranks), rel=0.06)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_bytes_follow_the_formulas(ranks, name):
    m = len(ranks)
    for d, results in get(ranks, formulas):
        if "bit" in name:
            bits = int(name.split("bit")[0])
            payload = d * bits / 8 + 4 * d / (256 if bits >= 8 else 128)
            one_sided = (m - 1) * payload
            if "1side" in name:  # through servers that answer in fp32, where that is cheaper
                one_sided = min(one_sided, (m - 1) / m * (payload + 4 * d))
        elif "paper" in name:
            # 32 + d + bd bits, with a norm for each of the M pieces that servers take
            norms = 1 if "1side" in name else m
            one_sided = (m - 1) * (4 * norms + d / 8 + d)
        else:
            one_sided = (m - 1) * d * (4 if name == "fp32" else 2)
        expected = one_sided if "1side" in name else 2 * one_sided / m
        assert results[name] == expected


def test_both_one_sided_exchanges_give_the_same_mean(three):
    means = [mean for r in get(three, both_one_sided_exchanges) for mean in r]
    assert all(torch.equal(means[0], mean) for mean in means[1:])
    assert means[0].std() > 0.5 / 3**0.5


@pytest.mark.parametrize("name", ["8bit-1side", "8bit-2side", "4bit-2side"])
def test_only_machines_exchange_quantised_gradients(four, name):
    runs = [r[name] for r in get(four, machines)]
    assert all(torch.equal(runs[0]["params"], run["params"]) for run in runs)
    size = params(make_model()).numel()
    for same in zip(*(run["calls"] for run in runs), strict=True):
        # two machines: at most the rounding of two workers' exchange
        check_mean(name, same[0]["segments"], [c["in"] for c in same], [c["out"] for c in same])
    for run in runs:
        inside, between = run["inside"], run["bytes"] - run["inside"]
        # fp32 to one other process and back, of half of the gradient each; padding on top
        assert 3 * 4 * size <= inside < 1.2 * 3 * 4 * size
        assert 0 < between < 0.4 * inside


def test_uneven_machines_are_one_group(three):
    assert all(get(three, uneven_machines))


# ------------------------------------------------------------------------------ one process


def test_settings_name_the_allowed_values():
    assert COLLECTIVES["qsgd"](bits=4, sides=1).bits == 4
    with pytest.raises(ValueError, match="16, 8, 4 or 2"):
        QSGD(bits=7)
    with pytest.raises(ValueError, match="fp32"):
        AllReduce(dtype="fp8")
    with pytest.raises(ValueError, match="bit"):
        QSGD(bit=8)
    for bad in ({"block_size": 0}, {"sides": 3}, {"seed": -1}, {"norm": "l1"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: .* is not allowed"):
            QSGD(**bad)
