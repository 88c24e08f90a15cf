"""The quantiser's laws: unbiased, bounded, the paper's form, and bytes that come back exactly."""

import logging

import pytest
import torch

from robust_accel.comm import quantizer as q
from robust_accel.comm.quantizer import Quantizer, Segment, random_key, segment, split

CPU = torch.device("cpu")
ALL_BITS = [16, 8, 4, 2]
BOTH_NORMS = ["max", "l2"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def key(step=0, rank=0, seed=0):
    return random_key(seed, rank, step, CPU)


def one_segment(size):
    return [Segment(size, 0, False)]


def roundtrip(quantizer, x, segments=None, k=None):
    segments = segments or one_segment(x.numel())
    message = quantizer.encode(x, segments, key() if k is None else k)
    assert message.dtype == torch.uint8
    assert message.numel() == quantizer.num_bytes(segments)
    return quantizer.decode(message, segments)


def levels(bits, norm):
    return 2**bits if norm == "l2" else 2 ** (bits - 1) - 1


def block_norms(x, norm, block):
    """[d] float64: the norm of each element's block, computed apart from the package."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.numel(), block):
        b = x[i : i + block].double()
        out[i : i + block] = b.abs().max() if norm == "max" else b.square().sum().sqrt()
    return out


def sample(name, d):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(d, generator=g)
    if name == "heavy":
        x = x / torch.randn(d, generator=g)  # Cauchy
    elif name == "spikes":  # one entry takes nearly all of its block's norm, either sign
        x *= 0.02
        x[5::128] = 1.0
        x[5::256] = -1.0
    return x


# ------------------------------------------------------------------------------ randomness


def test_uniform_is_uniform_and_independent():
    n = 1 << 18
    position = torch.arange(n, dtype=torch.int32)
    u = q.uniform(position, key()).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5
    others = {
        "next": torch.roll(u, 1),
        "block": torch.roll(u, 256),
        "step": q.uniform(position, key(step=1)).double(),
        "rank": q.uniform(position, key(rank=1)).double(),
        "server": q.uniform(position, key(rank=-1)).double(),
        "seed": q.uniform(position, key(seed=1)).double(),
        "swapped": q.uniform(position, key(step=1, rank=0, seed=2)).double(),
    }
    for name, v in others.items():
        r = ((u - 0.5) * (v - 0.5)).mean() * 12
        assert abs(r) < 5 / n**0.5, name


def test_same_key_same_bytes_and_each_part_of_the_key_matters():
    x = sample("gauss", 3000)
    quantizer = Quantizer(4, block_size=128)
    before = torch.get_rng_state()

    def encode(**kwargs):
        return quantizer.encode(x, one_segment(3000), key(**kwargs))

    assert torch.equal(encode(step=3, rank=1, seed=2), encode(step=3, rank=1, seed=2))
    variants = [encode(step=s, rank=r, seed=d) for s in (0, 1) for r in (-1, 0, 1) for d in (0, 1)]
    for i, a in enumerate(variants):
        assert all(not torch.equal(a, b) for b in variants[:i])
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not move"


def test_positions_beyond_int32_still_round_at_random():
    x = torch.full((512,), 0.5)
    x[::128] = 1.0
    s = [Segment(512, (1 << 33) + 7, False)]
    decoded = roundtrip(Quantizer(2, block_size=128), x, s)
    half = decoded[x == 0.5]
    assert 0.35 < half.mean() < 0.65
    assert set(half.tolist()) == {0.0, 1.0}


# ------------------------------------------------------------------------------ the law


@pytest.mark.parametrize("name", ["gauss", "heavy", "spikes"])
@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_unbiased_with_the_variance_of_stochastic_rounding(bits, norm, name):
    # Every draw of an element is one of two neighbouring levels, the upper with probability f: so
    # its variance is known, and the mean's error over it is a standard normal.
    d, draws, block = 1024, 150, 128
    x, s = sample(name, d), levels(bits, norm)
    quantizer = Quantizer(bits, norm, block)
    decoded = torch.stack([roundtrip(quantizer, x, k=key(step=i)) for i in range(draws)]).double()
    step = block_norms(x, norm, block) / s
    f = (x.double() / step) % 1
    variance = f * (1 - f) * step**2
    assert ((decoded - x).abs() <= step * 1.01).all()
    sure = f * (1 - f) > 0.02  # elsewhere a few draws are far from normal
    z = ((decoded.mean(0) - x) / (variance / draws).sqrt())[sure]
    n = int(sure.sum())
    if n < 50:  # heavy tails at 2 bits: nearly everything is close to level 0
        z = (decoded - x).sum() / (variance.sum() * draws).sqrt()
        assert abs(z) < 5
        return
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5 + 0.02
    measured, expected = (decoded - x).square().sum(), variance.sum() * draws
    assert 0.9 < measured / expected < 1.1
    assert expected <= step.square().sum() / 4 * draws


@pytest.mark.parametrize("bits", ALL_BITS)
def test_paper_form_meets_its_variance_bound_and_its_bit_count(bits):
    # (A5)-(A6): one L2 norm for the whole vector, s = 2^b; 32 + d + bd bits
    d, s = 4096, 2**bits
    quantizer = Quantizer(bits, "l2", None)
    assert quantizer.num_bytes(one_segment(d)) * 8 == 32 + d + bits * d
    x = sample("gauss", d)
    errors = [(roundtrip(quantizer, x, k=key(step=i)) - x).square().sum() for i in range(20)]
    relative = torch.stack(errors).mean() / x.square().sum()
    assert relative <= min(d / s**2, d**0.5 / s)
    f = (x.double() / x.double().norm() * s) % 1
    assert relative == pytest.approx(float((f * (1 - f)).sum() / s**2), rel=0.1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_one_hot_is_exact(bits, norm, sign):
    # its only entry is at the top level, which b bits and a sign alone cannot hold under (A6)
    x = torch.zeros(1000)
    x[417] = sign * 0.37
    for block in (None, 128):
        assert torch.equal(roundtrip(Quantizer(bits, norm, block), x), x)


def test_more_bits_and_smaller_blocks_mean_less_error():
    x = sample("gauss", 1 << 14)

    def error(*args):
        return float((roundtrip(Quantizer(*args), x) - x).square().sum() / x.square().sum())

    by_bits = [error(b, "max", 128) for b in (2, 4, 8, 16)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(8, "max", 256) < 1e-3 < error(8, "l2", None)


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("bits", [1, *ALL_BITS])
def test_pack_unpack_exact(bits):
    g = torch.Generator().manual_seed(0)
    for n in range(41):
        low, high = (-(2**15), 2**15) if bits == 16 else (0, 2**bits)
        codes = torch.randint(low, high, (n,), generator=g).to(q.code_dtype(bits))
        packed = q.pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.numel() == (n * bits + 7) // 8
        assert torch.equal(q.unpack(packed, n, bits).long(), codes.long())


@pytest.mark.parametrize("block", [None, 1, 7, 128, 256])
@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_blocks_never_straddle_tensors(bits, norm, block):
    # each tensor has its own magnitude: an error above its own step would betray a shared norm
    shapes = [(300, 2), (5,), (0, 3), (1, 1), (256, 1), (33, 31), (7,), (5000,), (16, 16)]
    segments, values, position = [], [], 0
    for i, shape in enumerate(shapes):
        segments.append(segment(shape, position))
        values.append(torch.randn(segments[-1].size, generator=torch.Generator().manual_seed(i)))
        values[-1] *= 10.0 ** (3 * (i % 4) - 6)
        position += segments[-1].size
    decoded = roundtrip(Quantizer(bits, norm, block), torch.cat(values), segments)
    for s, x, y in zip(segments, values, decoded.split([s.size for s in segments]), strict=True):
        if s.raw:
            assert torch.equal(x, y)
        elif s.size:
            step = block_norms(x, norm, block or s.size) / levels(bits, norm)
            assert ((y.double() - x).abs() <= step * 1.001).all()


def test_only_small_one_dimensional_tensors_stay_uncompressed():
    assert segment((64,), 0).raw
    assert segment((), 0).raw
    assert not segment((1 << 20,), 0).raw
    assert not segment((8, 8), 0).raw
    bias = [segment((64,), 0)]
    assert Quantizer(2).num_bytes(bias) == 4 * 64


@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_values_do_not_depend_on_how_tensors_are_bucketed(bits, norm):
    # DDP rebuilds its buckets: a resumed run must still round as the uninterrupted one did
    shapes = [(40, 30), (64,), (17, 9), (128, 4)]
    segments, position = [], 0
    for shape in shapes:
        segments.append(segment(shape, position))
        position += segments[-1].size
    x = sample("gauss", position)
    quantizer = Quantizer(bits, norm, 128)
    together = roundtrip(quantizer, x, segments)
    pieces = x.split([s.size for s in segments])
    apart = [roundtrip(quantizer, p, [s]) for p, s in zip(pieces, segments, strict=True)]
    assert torch.equal(together, torch.cat(apart))
    for parts in (2, 3, 7):
        chunks = split(segments, parts, 128)
        cuts = x.split([sum(s.size for s in c) for c in chunks])
        apart = [roundtrip(quantizer, p, c) if c else p for p, c in zip(cuts, chunks, strict=True)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_split_covers_everything_in_balance(parts, block):
    for sizes in ([], [0], [1], [2, 1], [1000], [128] * 9, [5000, 3, 0, 777]):
        segments, position = [], 11
        for i, size in enumerate(sizes):
            segments.append(Segment(size, position, raw=i % 4 == 1))
            position += size
        chunks = split(segments, parts, block)
        assert len(chunks) == parts
        covered = [p for c in chunks for s in c for p in range(s.position, s.position + s.size)]
        assert covered == list(range(11, position))
        unit = block or max(-(-max(sizes, default=0) // parts), 1)
        for c in chunks:
            assert sum(s.size for s in c) <= sum(sizes) / parts + unit
        for c in chunks:
            for s in c:
                owner = next(o for o in segments if o.position <= s.position < o.position + o.size)
                assert s.raw == owner.raw
                if block and not s.raw:
                    assert (s.position - owner.position) % block == 0


# ------------------------------------------------------------------------------ hard inputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_overflow_poisons_its_block_and_no_other(bits, norm, bad):
    x = sample("gauss", 5 * 128 + 3)
    x[130] = bad
    y = roundtrip(Quantizer(bits, norm, 128), x)
    assert not y[128:256].isfinite().any()
    assert y[:128].isfinite().all()
    assert y[256:].isfinite().all()


def test_overflow_in_an_uncompressed_tensor_arrives():
    x = torch.tensor([1.0, float("inf"), float("nan")])
    y = roundtrip(Quantizer(4), x, [segment((3,), 0)])
    assert y[0] == 1
    assert y[1] == float("inf")
    assert y[2].isnan()


@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_extreme_magnitudes(bits, norm):
    zero = torch.zeros(700)
    zero[100:300] = -0.0
    assert torch.equal(roundtrip(Quantizer(bits, norm, 128), zero), zero)
    for magnitude in (1e-44, 1e-40, 1e-30, 1e30, 1e37):
        x = sample("gauss", 1024).clamp(-3, 3) * magnitude
        y = roundtrip(Quantizer(bits, norm, 128), x)
        assert y.isfinite().all()
        step = block_norms(x, norm, 128) / levels(bits, norm)
        assert ((y.double() - x).abs() <= step * 1.001 + 3e-45).all()


def test_empty_gradient():
    for bits in ALL_BITS:
        for norm in BOTH_NORMS:
            quantizer = Quantizer(bits, norm)
            assert quantizer.encode(torch.empty(0), [], key()).numel() == 0
            assert roundtrip(quantizer, torch.empty(0), one_segment(0)).numel() == 0


# ------------------------------------------------------------------------------ compiled


def test_compiled_bytes_equal_eager_bytes_without_recompiling():
    q._compiled_kernels.cache_clear()
    eager, fused = Quantizer(8), Quantizer(8, compile=True)
    if q._kernels(True, CPU)[0] is q._slab_encode:
        pytest.skip("no compiler here")
    for step, d in enumerate([3000, 70_000, 5121]):
        # not monkeypatch: it would take the option away from the tests that follow
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            x = sample("gauss", d)
            x[700] = float("inf")
            a, b = (z.encode(x, one_segment(d), key(step=step)) for z in (eager, fused))
            assert torch.equal(a, b)
            # as integers, since ranks must agree bit for bit and NaN differs from itself
            x, y = (z.decode(a, one_segment(d)) for z in (eager, fused))
            assert torch.equal(x.isfinite(), y.isfinite())
            assert torch.equal(x.nan_to_num().view(torch.int32), y.nan_to_num().view(torch.int32))
            assert int(y.isfinite().sum()) == d - 256
            x[40] = float("nan")
            assert not roundtrip(fused, x, one_segment(d))[:256].isfinite().any()


def test_no_compiler_falls_back_and_says_so_once(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    q._compiled_kernels.cache_clear()
    x = sample("gauss", 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = roundtrip(Quantizer(8, compile=True), x)
    q._compiled_kernels.cache_clear()
    assert torch.equal(y, roundtrip(Quantizer(8), x))
    assert sum("eager" in r.getMessage() for r in caplog.records) == 1
