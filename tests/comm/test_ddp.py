"""Protocols in DDP, in real processes: what training with them must never change."""

import contextlib
import logging
import os
import random
import time

import processes
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from robust_accel.comm import (
    COLLECTIVES,
    QSGD,
    AllReduce,
    Meter,
    Workers,
    collectives,
    compress_gradients,
)
from robust_accel.comm.kernels import random_key
from robust_accel.comm.pipeline import run_all
from robust_accel.comm.quantizer import Segment, segment

BITS = [16, 8, 4, 2]
PROTOCOLS = {
    "fp32": AllReduce(),
    "fp16": AllReduce(dtype="fp16"),
    "bf16": AllReduce(dtype="bf16"),
    **{f"{b}bit-{s}side": QSGD(bits=b, sides=s) for b in BITS for s in (1, 2)},
    "paper-1side": QSGD(bits=8, sides=1, norm="l2", block_size=None),
    "paper-2side": QSGD(bits=8, sides=2, norm="l2", block_size=None),
}
WIDTH, DEPTH = 24, 12


class Recorder:
    """Passes on to a protocol and keeps each call's gradient, segments and mean."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = []

    def exchanges(self, flat, segments, step, workers, meter):
        return [self.recorded(flat, segments, step, workers, meter)]

    def recorded(self, flat, segments, step, workers, meter):
        before, own = flat.clone(), Meter()
        for exchange in self.inner.exchanges(flat, segments, step, workers, own):
            yield from exchange
        meter.sent(own.bytes_sent - own.bytes_inside_machine)
        meter.sent(own.bytes_inside_machine, inside_machine=True)
        self.calls.append(
            {
                "in": before,
                "segments": list(segments),
                "out": flat.clone(),
                "step": step,
                "bytes": own.bytes_sent,
            }
        )


def make_model(bias=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, WIDTH)]
    for _ in range(DEPTH):
        layers += [nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=bias)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def wrap(model, **kwargs):
    return DDP(model, bucket_cap_mb=0.002, **kwargs)  # about one layer a bucket


def batch(rank, step):
    g = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(4, 3, 6, 6, generator=g)


def params(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def train(model, steps, rank, delay=False):
    rng = random.Random(rank)
    for step in steps:
        if delay and rank == 1:  # a straggler between and inside backward passes
            time.sleep(rng.random() * 0.02)
        model.zero_grad()
        out = model(batch(rank, step))
        if delay and rank == 1:
            out.register_hook(lambda g: time.sleep(rng.random() * 0.02))
        out.square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad


# ------------------------------------------------------------------------------ scenarios
# Each runs on every rank and returns plain data, which the tests below compare.


def training(rank, world_size):
    results = {}
    for name, protocol in PROTOCOLS.items():
        recorder = Recorder(protocol)
        model = wrap(make_model())
        comp = compress_gradients(model, recorder)
        train(model, range(3), rank, delay=True)
        meter = comp.meter
        results[name] = {
            "params": params(model),
            "calls": recorder.calls,
            "bytes": meter.bytes_sent,
            "seconds": meter.seconds,
            "exposed": meter.exposed_seconds,
            "steps": comp.steps,
        }
        comp.close()
    return results


def without_a_hook(rank, world_size):
    model = wrap(make_model())
    train(model, range(3), rank)
    return params(model)


def bucket_views(rank, world_size):
    model = wrap(make_model(), gradient_as_bucket_view=True)
    comp = compress_gradients(model, PROTOCOLS["8bit-2side"])
    train(model, range(3), rank)
    comp.close()
    return params(model)


def resumed(rank, world_size):
    """Two steps, then a fresh process's worth of state, then one more: as three in one go."""
    results = {}
    for name in ("4bit-1side", "4bit-2side", "paper-2side"):
        first = wrap(make_model())
        comp = compress_gradients(first, PROTOCOLS[name])
        train(first, range(2), rank)
        comp.close()
        inner = make_model()
        inner.load_state_dict(first.module.state_dict())
        second = wrap(inner)
        again = compress_gradients(second, PROTOCOLS[name])
        again.load_state_dict(comp.state_dict())
        train(second, range(2, 3), rank)
        again.close()
        results[name] = params(second)
    return results


def accumulation(rank, world_size):
    model = wrap(make_model())
    recorder = Recorder(QSGD(bits=16))
    comp = compress_gradients(model, recorder)
    for step in range(3):
        with model.no_sync() if step < 2 else contextlib.nullcontext():
            model(batch(rank, step)).square().mean().backward()
    comp.close()
    alone = make_model()
    for step in range(3):
        alone(batch(rank, step)).square().mean().backward()
    return {
        "grads": grads(model),
        "alone": grads(alone),
        "steps": comp.steps,
        "elements": sum(c["in"].numel() for c in recorder.calls),
        "size": params(model).numel(),
    }


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.sometimes, self.never = (nn.Linear(40, 40) for _ in range(3))

    def forward(self, x, both):
        return self.used(x) + (self.sometimes(x) if both else 0)


def unused_parameters(rank, world_size):
    model = wrap(Branches(), find_unused_parameters=True)
    comp = compress_gradients(model, QSGD(bits=8))
    for step in range(3):
        model.zero_grad()
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * rank + step))
        model(x, both=rank == 0).square().mean().backward()
    comp.close()
    m = model.module
    return {
        "used": m.used.weight.grad.clone(),
        "sometimes": m.sometimes.weight.grad.clone(),
        "never": m.never.weight.grad,
    }


def overflow(rank, world_size):
    """Rank 1 alone meets an infinite loss."""
    results = {}
    for name, protocol in PROTOCOLS.items():
        model = wrap(make_model())
        comp = compress_gradients(model, protocol)
        scale = float("inf") if rank == 1 else 1.0
        (model(batch(rank, 0)).square().mean() * scale).backward()
        results[name] = [bool(p.grad.isfinite().all()) for p in model.parameters()]
        comp.close()
    return results


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


def not_ddp(rank, world_size):
    try:
        compress_gradients(make_model(), QSGD())
    except ValueError as error:
        return str(error)


class Failing:
    """Raises in its third bucket, on the given ranks."""

    def __init__(self, fails):
        self.fails = fails
        self.calls = 0

    def exchanges(self, *args):
        self.calls += 1
        if self.calls == 3 and self.fails:
            raise KeyError("cable unplugged")
        return AllReduce().exchanges(*args)


def raising_everywhere(rank, world_size):
    model = wrap(make_model())
    failing = Failing(True)
    comp = compress_gradients(model, failing)
    messages = []
    for _ in range(4):  # the third bucket comes in the first step or the second
        try:
            train(model, range(1), rank)
        except RuntimeError as error:
            messages.append(str(error))
    comp.close()
    return {"messages": messages, "calls": failing.calls}


def raising_on_one_rank(rank, world_size):
    """The last scenario: rank 1 fails and leaves; nobody closes anything before exit."""
    model = wrap(make_model())
    compress_gradients(model, Failing(rank == 1))
    try:
        train(model, range(2), rank)
    except RuntimeError as error:
        return str(error)


# ------------------------------------------------------------------------------ tests

TWO = [
    training,
    without_a_hook,
    bucket_views,
    resumed,
    accumulation,
    unused_parameters,
    overflow,
    half_precision_overflow,
    odd_sizes,
    formulas,
    equal_gradients,
    not_ddp,
    raising_everywhere,
    raising_on_one_rank,
]
THREE = [
    training,
    without_a_hook,
    resumed,
    odd_sizes,
    formulas,
    equal_gradients,
    both_one_sided_exchanges,
    uneven_machines,
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return processes.run(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return processes.run(THREE, 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes.run([machines], 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[2, 3])
def ranks(request):
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


def get(ranks, scenario):
    for r, result in enumerate(ranks):
        assert scenario.__name__ in result, f"rank {r}: {result.get('error')}"
    return [result[scenario.__name__] for result in ranks]


def check_mean(name, segments, inputs, outputs):
    """Outputs agree bit for bit and lie within the rounding of the exact mean."""
    assert all(torch.equal(outputs[0], out) for out in outputs[1:])
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    sizes = [s.size for s in segments]
    columns = zip(
        segments, exact.split(sizes), outputs[0].split(sizes), *(x.split(sizes) for x in inputs),
        strict=True,
    )  # fmt: skip
    for s, mean, out, *own in columns:
        if s.size:
            # a tensor's norm bounds its blocks' norms; the second side rounds a mean of roundings
            norm = 2 if "paper" in name else float("inf")
            largest = sum(float(torch.linalg.vector_norm(x, norm)) for x in own) / len(own)
            if s.raw and "bit" in name:
                step = 0.0
            elif "paper" in name:
                step = 1 / 256
            elif "bit" in name:
                step = 1 / (2 ** (int(name.split("bit")[0]) - 1) - 1)
            else:
                step = {"fp32": 0.0, "fp16": 2**-10, "bf16": 2**-7}[name]
            sides = 1 if "1side" in name else 2
            tolerance = largest * (step * (sides + step) + 1e-6)
            tolerance += 2**-23 if name == "fp16" else 0  # its smallest numbers
            assert (out - mean).abs().max() <= tolerance, (name, s)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_training_keeps_ranks_bit_equal_and_averages(ranks, name):
    runs = [r[name] for r in get(ranks, training)]
    for run in runs[1:]:
        assert torch.equal(runs[0]["params"], run["params"])
    assert not torch.equal(runs[0]["params"], params(make_model())), "nothing was trained"
    calls = [run["calls"] for run in runs]
    assert len({len(c) for c in calls}) == 1
    for step in (1, 2):  # DDP puts all of so small a model in one bucket at first
        assert sum(c["step"] == step for c in calls[0]) >= 10, "the model must have many buckets"
    assert {c["step"] for c in calls[0]} == {0, 1, 2}
    for same in zip(*calls, strict=True):
        assert all(c["segments"] == same[0]["segments"] for c in same)
        assert not torch.equal(same[0]["in"], same[1]["in"]), "workers saw the same data"
        check_mean(name, same[0]["segments"], [c["in"] for c in same], [c["out"] for c in same])


def test_every_parameter_is_sent_once_a_step_by_its_own_position(ranks):
    sizes = [p.numel() for p in make_model().parameters()]
    expected = {(sum(sizes[:i]), n) for i, n in enumerate(sizes)}
    calls = get(ranks, training)[0]["8bit-2side"]["calls"]
    layouts = []
    for step in range(3):
        sent = [s for c in calls if c["step"] == step for s in c["segments"]]
        assert len(sent) == len(expected)
        assert {(s.position, s.size) for s in sent} == expected
        layouts.append(sent)
    assert layouts[0] != layouts[1], "DDP did not rebuild its buckets: this run tests too little"


def test_bucket_views_and_delays_change_nothing(two):
    for run, again in zip(get(two, training), get(two, bucket_views), strict=True):
        assert torch.equal(run["8bit-2side"]["params"], again)


def test_fp32_all_reduce_is_ddp_itself(ranks):
    ours = [r["fp32"]["params"] for r in get(ranks, training)]
    plain = get(ranks, without_a_hook)
    for x, y in zip(ours, plain, strict=True):
        assert torch.equal(x, y)


def test_resumed_run_equals_an_uninterrupted_one(ranks):
    straight = get(ranks, training)[0]
    for name, result in get(ranks, resumed)[0].items():
        assert torch.equal(straight[name]["params"], result), name


def test_gradient_accumulation_sends_once(two):
    runs = get(two, accumulation)
    mean = torch.stack([r["alone"] for r in runs]).double().mean(0)
    for r in runs:
        assert r["steps"] == 1
        assert r["elements"] == r["size"]
        assert torch.equal(r["grads"], runs[0]["grads"])
        assert (r["grads"] - mean).abs().max() < 1e-3 * mean.abs().max()


def test_unused_parameters(two):
    a, b = get(two, unused_parameters)
    assert torch.equal(a["used"], b["used"])
    assert torch.equal(a["sometimes"], b["sometimes"])
    assert a["sometimes"].abs().sum() > 0
    assert a["never"] is None or not a["never"].any()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_rank_sees_an_overflow(two, name):
    for r in get(two, overflow):
        assert not any(r[name]), "some parameter's gradient hides the overflow"


def test_half_precision_overflow_reaches_every_rank(two):
    for mean in get(two, half_precision_overflow):
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


def test_meter_adds_up(ranks):
    for run in get(ranks, training):
        for name, r in run.items():
            assert r["bytes"] == sum(c["bytes"] for c in r["calls"]) > 0, name
            assert r["exposed"] > 0
            assert r["seconds"] > 0
            assert r["steps"] == 3
        assert run["2bit-2side"]["bytes"] < run["8bit-2side"]["bytes"] < run["fp32"]["bytes"]


def test_model_that_is_not_ddp_is_refused(two):
    for message in get(two, not_ddp):
        assert "DistributedDataParallel" in message
        assert "prepare" in message


def test_an_error_while_sending_surfaces_in_backward(two):
    for r in get(two, raising_everywhere):
        assert len(r["messages"]) >= 3, "training went on after a failure"
        assert all("cable unplugged" in m for m in r["messages"])
        assert r["calls"] == 3, "later buckets were still sent"


def test_an_error_on_one_rank_ends_the_others_too(two):
    healthy, failed = get(two, raising_on_one_rank)
    assert "cable unplugged" in failed
    assert "gradient communication failed" in healthy


# ------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("protocol", [None, AllReduce(), QSGD(bits=4)])
def test_one_process_sends_nothing_and_says_what_it_ignores(caplog, protocol):
    model = make_model()
    with caplog.at_level(logging.WARNING):
        comp = compress_gradients(model, protocol)
        train(model, range(2), 0)
    assert (comp.meter.bytes_sent, comp.meter.seconds, comp.meter.exposed_seconds) == (0, 0, 0)
    warned = [r for r in caplog.records if "ignored" in r.getMessage()]
    assert len(warned) == (1 if isinstance(protocol, QSGD) else 0)
    comp.load_state_dict(comp.state_dict())
    comp.close()


def test_settings_name_the_allowed_values():
    assert COLLECTIVES["qsgd"](bits=4, sides=1).bits == 4
    with pytest.raises(ValidationError, match="16, 8, 4 or 2"):
        QSGD(bits=7)
    with pytest.raises(ValidationError, match="fp32"):
        AllReduce(dtype="fp8")
    with pytest.raises(ValidationError, match="bit"):
        QSGD(bit=8)
    for bad in ({"block_size": 0}, {"sides": 3}, {"seed": -1}, {"norm": "l1"}):
        with pytest.raises(ValidationError):
            QSGD(**bad)
