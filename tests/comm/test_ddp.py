"""Protocols in DDP, in real processes: what training with them must never change."""

import contextlib
import logging
import math

import pytest
import torch
from ddp_training import (
    PROTOCOLS,
    WIDTH,
    Recorder,
    batch,
    check_mean,
    get,
    make_model,
    params,
    train,
    wrap,
)
from torch import nn

from robust_accel.comm import QSGD, AllReduce, compress_gradients


def grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


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


def one_element(rank, world_size):
    """Of one parameter's gradient, on rank 1 alone."""
    results = {}
    for name, protocol in PROTOCOLS.items():
        for number in ("nan", "inf", "-inf"):
            model = wrap(make_model())
            comp = compress_gradients(model, protocol)
            weight = next(p for p in model.parameters() if p.numel() == WIDTH**2)
            spoilt = torch.zeros_like(weight)
            spoilt[5, 7] = float(number) if rank == 1 else 0.0
            weight.register_hook(lambda gradient, spoilt=spoilt: gradient + spoilt)
            model(batch(rank, 0)).square().mean().backward()
            results[name, number] = weight.grad[5, 7].item()
            comp.close()
    return results


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
    one_element,
    raising_everywhere,
    raising_on_one_rank,
]
THREE = [training, without_a_hook, resumed]


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


def test_every_rank_sees_one_number_that_is_none(two):
    for r in get(two, one_element):
        assert len(r) == 3 * len(PROTOCOLS)
        assert not [key for key, number in r.items() if math.isfinite(number)]


def test_meter_adds_up(ranks):
    for run in get(ranks, training):
        for name, r in run.items():
            assert r["bytes"] == sum(c["bytes"] for c in r["calls"]) > 0, name
            assert r["exposed"] > 0
            assert r["seconds"] > 0
            assert r["steps"] == 3
        assert run["2bit-2side"]["bytes"] < run["8bit-2side"]["bytes"] < run["fp32"]["bytes"]


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
