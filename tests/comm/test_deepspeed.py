"""Protocols and LAMB in the real DeepSpeed engine, in real processes."""

import os
import tempfile
from itertools import product

import processes
import pytest
import torch
from ddp_training import PROTOCOLS, Recorder, batch, check_mean, get, make_model, params, wrap

from robust_accel import LAMB
from robust_accel.comm import QSGD, compress_gradients
from robust_accel.training.accelerator import deepspeed_without_gpu

STEPS = 4
LAMBS = {
    "plain": {"lr": 0.02, "weight_decay": 1e-2},
    "clamped, 1d apart": {"lr": 0.02, "weight_norm_clamp": (0.5, 2.0), "exclude_1d": True},
}


def make_engine(rank, world_size, stage, optimizer=None, accumulation=1, config=None, **zero):
    import deepspeed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    deepspeed_without_gpu()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = make_model()
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    elif isinstance(optimizer, dict):
        optimizer = LAMB(model.parameters(), **optimizer)
    config = (config or {}) | {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000} | zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train_engine(engine, rank, steps=range(STEPS)):
    for step in steps:
        engine.backward(engine(batch(rank, step)).square().mean())
        engine.step()


# ------------------------------------------------------------------------------ scenarios


def trajectories(rank, world_size):
    results = {}
    for name, options in LAMBS.items():
        model = wrap(make_model())
        compression = compress_gradients(model)
        optimizer = LAMB(model.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
        compression.close()
        results[name, "ddp"] = params(model)
        for stage in (0, 1, 2):
            engine = make_engine(rank, world_size, stage, options)
            compress_gradients(engine)
            train_engine(engine, rank)
            results[name, stage] = params(engine.module)
    return results


def exchanges(rank, world_size):
    variants = {
        "0": {"stage": 0},
        "1": {"stage": 1},
        "2": {"stage": 2},
        "2, in full": {"stage": 2, "reduce_scatter": False},
        "1, gradients apart": {"stage": 1, "contiguous_gradients": False},
        "2, rank by rank": {"stage": 2, "use_multi_rank_bucket_allreduce": False},
    }
    results = {}
    for variant, options in variants.items():
        others = ("8bit-1side", "4bit-2side") if variant in ("0", "1", "2") else ()
        for name in ("fp32", "8bit-2side", *others):
            recorder = Recorder(PROTOCOLS[name])
            engine = make_engine(rank, world_size, **options)
            compression = compress_gradients(engine, recorder)
            train_engine(engine, rank)
            results[variant, name] = {
                "params": params(engine.module),
                "calls": recorder.calls,
                "bytes": compression.meter.bytes_sent,
                "seconds": compression.meter.seconds,
                "steps": compression.steps,
            }
    return results


def uncompressed(rank, world_size):
    results = {}
    for stage in (0, 1, 2):
        engine = make_engine(rank, world_size, stage)
        train_engine(engine, rank)
        results[stage] = params(engine.module)
    return results


def resumed(rank, world_size):
    """Two engines with 4 bits: one runs through, one is saved after two steps and loaded anew."""
    results = []
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)
        for steps, saved in ((range(4), None), (range(2), "save"), (range(2, 4), "load")):
            engine = make_engine(rank, world_size, 2)
            compression = compress_gradients(engine, QSGD(bits=4))
            if saved == "load":
                engine.load_checkpoint(folder[0])
            train_engine(engine, rank, steps)
            if saved == "save":
                engine.save_checkpoint(folder[0])
            results.append(params(engine.module))
            compression.close()
        torch.distributed.barrier()
    return results


def accumulated(rank, world_size):
    results = {}
    for stage in (0, 1, 2):
        engine = make_engine(rank, world_size, stage, accumulation=2)
        compress_gradients(engine, PROTOCOLS["8bit-2side"])
        train_engine(engine, rank, range(4))
        exact = make_engine(rank, world_size, stage, accumulation=2)
        train_engine(exact, rank, range(4))
        results[stage] = (params(engine.module), params(exact.module))
    return results


def overflow(rank, world_size):
    """Rank 1 alone meets an infinite loss."""
    results = {}
    for stage, name in product((0, 1, 2), ("fp32", "8bit-2side", "2bit-1side")):
        recorder = Recorder(PROTOCOLS[name])
        engine = make_engine(rank, world_size, stage)
        compress_gradients(engine, recorder)
        scale = float("inf") if rank == 1 else 1.0
        engine.backward(engine(batch(rank, 0)).square().mean() * scale)
        results[stage, name] = [bool(call["out"].isfinite().any()) for call in recorder.calls]
    return results


def refusals(rank, world_size):
    messages = {}
    for name, engine in (
        ("stage 3", make_engine(rank, world_size, 3)),
        ("ZeRO++", make_engine(rank, world_size, 2, zero_quantized_gradients=True)),
        ("version", make_engine(rank, world_size, 2)),
    ):
        if name == "version":
            engine.optimizer.allreduce_bucket = lambda bucket, dtype: None
        try:
            compress_gradients(engine, PROTOCOLS["8bit-2side"])
        except ValueError as error:
            messages[name] = str(error)
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    try:
        compress_gradients(make_engine(rank, world_size, 1, LAMBS["plain"], config=bf16))
    except ValueError as error:
        messages["bf16"] = str(error)
    engine = make_engine(rank, world_size, 1, LAMBS["plain"])  # and nobody tells LAMB
    try:
        train_engine(engine, rank)
    except RuntimeError as error:
        messages["untold"] = str(error)
    return messages


# ------------------------------------------------------------------------------ tests


TWO = [trajectories, exchanges, uncompressed, resumed, accumulated, overflow, refusals]
THREE = [trajectories, exchanges]


@pytest.mark.parametrize("name", LAMBS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lamb_follows_one_trajectory(ranks, name, stage):
    start = params(make_model())
    for r in get(ranks, trajectories):
        expected = r[name, "ddp"]
        moved = (expected - start).abs().max()
        assert (r[name, stage] - expected).abs().max() < 1e-4 * moved
        assert torch.equal(r[name, stage], get(ranks, trajectories)[0][name, stage])


def test_every_mean_is_right_and_the_same_on_every_rank(ranks):
    size = params(make_model()).numel()
    for variant, name in get(ranks, exchanges)[0]:
        runs = [r[variant, name] for r in get(ranks, exchanges)]
        assert all(torch.equal(runs[0]["params"], run["params"]) for run in runs)
        for same in zip(*(run["calls"] for run in runs), strict=True):
            assert all(c["segments"] == same[0]["segments"] for c in same)
            check_mean(name, same[0]["segments"], [c["in"] for c in same], [c["out"] for c in same])
        for run in runs:
            assert sum(c["in"].numel() for c in run["calls"]) == STEPS * size, variant
            assert run["bytes"] == sum(c["bytes"] for c in run["calls"]) > 0
            assert run["seconds"] > 0
            # each exchange has a number of its own, which follows from the engine's step
            steps = [divmod(c["step"], 1 << 20) for c in run["calls"]]
            in_one = len(steps) // STEPS
            assert steps == [(step, k) for step in range(STEPS) for k in range(in_one)]


def test_a_resumed_engine_rounds_as_one_that_was_never_stopped(two):
    for through, _, again in get(two, resumed):
        assert again.equal(through)


def test_small_tensors_stay_uncompressed(two):
    biases = sum(p.numel() for p in make_model().parameters() if p.ndim <= 1)
    for (variant, _), run in get(two, exchanges)[0].items():
        sent = [s for c in run["calls"] for s in c["segments"] if s.raw]
        assert sum(s.size for s in sent) == STEPS * biases, variant


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_uncompressed_exchange_is_deepspeed_itself(two, stage):
    ours = [r[str(stage), "fp32"]["params"] for r in get(two, exchanges)]
    for x, y in zip(ours, get(two, uncompressed), strict=True):
        assert (x - y[stage]).abs().max() < 1e-6 * (y[stage] - params(make_model())).abs().max()


def test_accumulated_gradients_are_averaged(two):
    start = params(make_model())
    for r in get(two, accumulated):
        for stage, (ours, exact) in r.items():
            assert (ours - exact).abs().max() < 0.02 * (exact - start).abs().max(), stage


def test_every_rank_sees_an_overflow(two):
    for r in get(two, overflow):
        assert not any(any(finite) for finite in r.values())


def test_what_cannot_work_is_refused(two):
    for messages in get(two, refusals):
        assert "the shards of DeepSpeed's BF16_Optimizer" in messages["bf16"]
        assert "ZeRO++" in messages["stage 3"] and "FSDP2" in messages["stage 3"]
        assert "passes over zero_quantized_gradients: True at ZeRO 2" in messages["ZeRO++"]
        assert "0.19.8" in messages["version"]
        assert "allreduce_bucket" in messages["version"]
        assert "compress_gradients" in messages["untold"]


def test_lamb_learns_its_layers_on_one_process_too(tmp_path):
    (alone,) = processes.run([trajectories_of_one], 1, tmp_path)
    results = get([alone], trajectories_of_one)[0]
    for name in LAMBS:
        assert (results[name, 2] - results[name, "plain"]).abs().max() < 1e-5


def trajectories_of_one(rank, world_size):
    results = {}
    for name, options in LAMBS.items():
        model = make_model()
        optimizer = LAMB(model.parameters(), **options)
        engine = make_engine(rank, world_size, 2, options)
        compress_gradients(engine)
        train_engine(engine, rank)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
        results[name, "plain"], results[name, 2] = params(model), params(engine.module)
    return results
