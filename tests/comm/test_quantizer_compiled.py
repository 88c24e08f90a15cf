"""The quantiser compiled: the same bytes, when it compiles, and what happens without a compiler."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from roundtrips import ALL_BITS, BOTH_NORMS, CPU, key, one_segment, roundtrip, sample

from robust_accel.comm import compiled
from robust_accel.comm.kernels import MAX_UNROLL, WIDE
from robust_accel.comm.layout import Segment
from robust_accel.comm.quantizer import FUSE_LIMIT, Quantizer


def same_bits(a, b):
    """As integers: NaN differs from itself."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("block", [12, 64, 96, 100, 200, 256])
def test_whatever_the_compiler_makes_of_a_block_size_the_values_are_right(block):
    # those that fill no vectors torch 2.14 miscompiles, and aborts now and then: they stay eager
    x = sample("gauss", 5000)
    quantizer = Quantizer(8, block_size=block, compile=True)
    assert roundtrip(quantizer, x).equal(roundtrip(Quantizer(8, block_size=block), x))


@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_on_cpus_only_what_fills_vectors_is_compiled(monkeypatch, bits, norm):
    made = []
    monkeypatch.setattr(compiled, "Fused", lambda bits, norm, width, *_: made.append(width))
    monkeypatch.setattr(compiled, "_check", lambda *_: None)
    monkeypatch.setattr(compiled, "_RIGHT_CODE", (2, 0))  # whatever version is here
    compiled.fused.cache_clear()
    packed = 1 if norm == "l2" else bits  # signs, or codes
    widths = range(32 // packed, 2049, 32 // packed)
    for width in widths:
        compiled.fused(bits, norm, width, False, CPU, 1)
    compiled.fused.cache_clear()
    assert made == [width for width in widths if (width * packed // 32) % 16 == 0]
    assert {512, 2048} <= {*made}


@pytest.mark.parametrize(
    "bits", [b if b == 8 else pytest.param(b, marks=pytest.mark.long) for b in ALL_BITS]
)
def test_compiled_bytes_equal_eager_bytes_without_recompiling(bits):
    eager, fused = Quantizer(bits, compile=False), Quantizer(bits, compile=True)
    if compiled.fused(bits, "max", 256, False, CPU, torch.get_num_threads()) is None:
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
    ranks = range(MAX_UNROLL + 1)
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


@pytest.mark.parametrize(
    ("bits", "norm", "block"),
    [
        (8, "l2", None),
        (8, "l2", 512),
        *(
            pytest.param(bits, norm, block, marks=pytest.mark.long)
            for bits in ALL_BITS
            for norm in BOTH_NORMS
            for block in (None, 2 * WIDE + 64)
        ),
    ],
)
def test_long_blocks_and_the_l2_norm_come_to_the_same_bytes(bits, norm, block):
    segments = [Segment(3 * WIDE + 37, 0, False), Segment(5 * WIDE, 3 * WIDE + 37, False)]
    x = sample("heavy", 8 * WIDE + 37)
    eager, fused = (Quantizer(bits, norm, block, compile) for compile in (False, True))
    messages = [quantizer.encode(x, segments, key()) for quantizer in (eager, fused)]
    assert messages[0].equal(messages[1])
    both = torch.stack([messages[0], eager.encode(-x, segments, key(rank=1))])
    assert same_bits(eager.mean(both, segments), fused.mean(both, segments))


def test_auto_fuses_large_gradients_only(monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "fused", lambda *args: asked.append(args))
    for size, count in ((FUSE_LIMIT - 1, 0), (FUSE_LIMIT, 1)):
        Quantizer(8).encode(torch.zeros(size), one_segment(size), key())
        assert len(asked) == count


def test_no_compiler_falls_back_and_says_so_once(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    compiled.fused.cache_clear()
    compiled._say_eager.cache_clear()
    x = sample("gauss", 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = roundtrip(Quantizer(8, compile=True), x)
    compiled.fused.cache_clear()
    assert torch.equal(y, roundtrip(Quantizer(8, compile=False), x))
    assert sum("eager" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(("block", "width"), [(None, WIDE), (1 << 16, WIDE), (256, 256)])
def test_what_is_compiled_are_rows_of_few_widths(monkeypatch, block, width):
    """One is made with a thousand rows: of whole tensors, each for itself, it would not end."""
    asked = []
    monkeypatch.setattr(compiled, "fused", lambda *format: asked.append(format))
    sizes = [1 << 17, 3000, 70_000]
    segments = [Segment(n, i, False) for i, n in enumerate(sizes)]
    roundtrip(Quantizer(block_size=block, compile=True), torch.randn(sum(sizes)), segments)
    assert {format[2] for format in asked} == {width}
