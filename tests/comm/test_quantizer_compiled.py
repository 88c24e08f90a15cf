"""The quantiser compiled: the same bytes, when it compiles, and what happens without a compiler."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from roundtrips import ALL_BITS, CPU, key, one_segment, roundtrip, sample

from robust_accel.comm import kernels
from robust_accel.comm import quantizer as q
from robust_accel.comm.layout import Segment
from robust_accel.comm.quantizer import Quantizer


def same_bits(a, b):
    """As integers: NaN differs from itself."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("block", [12, 64, 96, 100, 200, 256])
def test_whatever_the_compiler_makes_of_a_block_size_the_values_are_right(block):
    # those that fill no vectors torch 2.14 miscompiles, and aborts now and then: they stay eager
    x = sample("gauss", 5000)
    quantizer = Quantizer(8, block_size=block, compile=True)
    assert roundtrip(quantizer, x).equal(roundtrip(Quantizer(8, block_size=block), x))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_on_cpus_only_what_fills_vectors_is_compiled(monkeypatch, bits):
    compiled = []
    monkeypatch.setattr(kernels, "Fused", lambda bits, width, device: compiled.append(width))
    monkeypatch.setattr(kernels, "_check", lambda *_: None)
    monkeypatch.setattr(kernels, "_RIGHT_CODE", (2, 0))  # whatever version is here
    kernels.fused.cache_clear()
    widths = range(32 // bits, 2049, 32 // bits)
    for width in widths:
        kernels.fused(bits, width, CPU, 1)
    kernels.fused.cache_clear()
    assert compiled == [width for width in widths if (width * bits // 32) % 16 == 0]
    assert {256, 512, 2048} <= {*compiled}


@pytest.mark.parametrize(
    "bits", [b if b == 8 else pytest.param(b, marks=pytest.mark.long) for b in ALL_BITS]
)
def test_compiled_bytes_equal_eager_bytes_without_recompiling(bits):
    eager, fused = Quantizer(bits, compile=False), Quantizer(bits, compile=True)
    if kernels.fused(bits, 256, CPU, torch.get_num_threads()) is None:
        pytest.skip("no compiler here")
    cases = [[3000], [70_000, 5121], [1], [150_001, 512, 200_000]]
    for step, sizes in enumerate(cases):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        segments = [Segment(n, i, raw=n == 512) for n, i in zip(sizes, starts, strict=True)]
        x = sample("gauss", sum(sizes))
        if len(x) > 1:
            x[700], x[1500] = float("inf"), float("nan")
        # not monkeypatch: it would take the option away from the tests that follow
        with torch._dynamo.config.patch(error_on_recompile=True):
            a, b = (z.encode(x, segments, key(step=step)) for z in (eager, fused))
            assert torch.equal(a, b)
            x, y = (z.decode(a, segments) for z in (eager, fused))
        assert same_bits(x, y)
        assert int(y.isnan().sum()) == (512 if len(x) > 1 else 0)


def test_compiled_mean_on_another_thread_equals_eager():
    segments = one_segment(140_000)
    eager, fused = Quantizer(8, compile=False), Quantizer(8, compile=True)
    # more than one kernel adds up
    ranks = range(kernels.MAX_UNROLL + 1)
    messages = [eager.encode(sample("gauss", 140_000), segments, key(rank=r)) for r in ranks]
    stacked = torch.stack(messages)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(
            pool.submit(fused.encode, sample("gauss", 140_000), segments, key()).result(),
            messages[0],
        )
        assert same_bits(
            pool.submit(fused.mean, stacked, segments).result(), eager.mean(stacked, segments)
        )


@pytest.mark.parametrize("bits", ALL_BITS)
def test_l2_ignores_compile(bits):
    x = sample("gauss", 5000)
    a, b = (
        Quantizer(bits, "l2", 128, c).encode(x, one_segment(5000), key()) for c in (True, False)
    )
    assert torch.equal(a, b)


def test_auto_fuses_large_gradients_only(monkeypatch):
    asked = []
    monkeypatch.setattr(q, "fused", lambda *args: asked.append(args))
    for size, count in ((q.FUSE_LIMIT - 1, 0), (q.FUSE_LIMIT, 1)):
        Quantizer(8).encode(torch.zeros(size), one_segment(size), key())
        assert len(asked) == count


def test_no_compiler_falls_back_and_says_so_once(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    kernels.fused.cache_clear()
    kernels._say_eager.cache_clear()
    x = sample("gauss", 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = roundtrip(Quantizer(8, compile=True), x)
    kernels.fused.cache_clear()
    assert torch.equal(y, roundtrip(Quantizer(8, compile=False), x))
    assert sum("eager" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("block", [None, 1 << 16, 256])
def test_whole_tensors_as_blocks_stay_eager(monkeypatch, block):
    """Fused, each would be a kernel of its own, compiled on a thousand copies of the tensor."""
    asked = []
    monkeypatch.setattr(q, "fused", lambda *format: asked.append(format))
    roundtrip(Quantizer(block_size=block, compile=True), torch.randn(1 << 17))
    assert bool(asked) == (block == 256)
