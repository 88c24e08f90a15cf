"""The quantiser's laws: unbiased, bounded, the paper's form, and bytes that come back exactly."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sklearn.datasets import load_digits

from robust_accel.comm import kernels
from robust_accel.comm import quantizer as q
from robust_accel.comm.kernels import random_key
from robust_accel.comm.quantizer import Quantizer, Segment, segment, split

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


def draws(rows=1024, width=256, **kwargs):
    """All draws of consecutive blocks, in the order of the elements. [rows * width] float64."""
    seeds = kernels.row_seeds(
        torch.arange(0, rows * width, width, dtype=torch.int32), key(**kwargs)
    )
    parts = [u for i in (0, 2) for u in kernels.uniform_pair(seeds, i * width // 4, width // 4)]
    return torch.stack(parts, dim=1).view(-1).double()


def test_draws_are_uniform_and_independent():
    u = draws()
    n = u.numel()
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5
    others = {
        **{f"lag {lag}": torch.roll(u, lag) for lag in (1, 2, 64, 128, 192, 255, 256, 257, 4096)},
        "step": draws(step=1),
        "rank": draws(rank=1),
        "server": draws(rank=-1),
        "seed": draws(seed=1),
        "swapped": draws(step=1, rank=0, seed=2),
    }
    for name, v in others.items():
        r = ((u - 0.5) * (v - 0.5)).mean() * 12
        assert abs(r) < 5 / n**0.5, name
        # beyond correlation: how often both are small
        both = ((u < 1 / 16) & (v < 1 / 16)).double().mean()
        assert abs(both * 256 - 1) < 5 * (255 / n) ** 0.5, name


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
    d, draws, block = 1024, 120, 128
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
    # the variance of a squared error: a few blocks carry most of a heavy-tailed one
    spread = (f * (1 - f) * (1 - 2 * f) ** 2 * step**4).sum() * draws
    assert abs(measured - expected) < 5 * spread.sqrt() + 0.02 * expected
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
    # its only entry is at the top level, which b bits and a sign alone cannot hold under (A6); at
    # 2 to 16 bits it comes back to fp32's precision, whatever the draw
    x = torch.zeros(1000)
    x[417] = sign * 0.37
    for block in (None, 128):
        for step in range(5):
            y = roundtrip(Quantizer(bits, norm, block), x, k=key(step=step))
            torch.testing.assert_close(y, x, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("norm", BOTH_NORMS)
def test_real_gradient_is_unbiased_and_meets_the_bound(norm, bits):
    digits = load_digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
    images = torch.tensor(digits.data[:256], dtype=torch.float32) / 16
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor(digits.target[:256]))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    segments, position = [], 0
    for g in gradients:
        segments.append(segment(g.shape, position))
        position += g.numel()
    x = torch.cat([g.flatten() for g in gradients])
    quantizer, num_draws = Quantizer(bits, norm, 128), 100
    y = torch.stack([roundtrip(quantizer, x, segments, key(step=i)) for i in range(num_draws)])
    error = y.double() - x
    sizes = [s.size for s in segments]
    step = torch.cat([block_norms(p, norm, 128) / levels(bits, norm) for p in x.split(sizes)])
    raw = torch.cat([torch.full((s.size,), s.raw) for s in segments])
    assert not error[:, raw].any()
    f = (x.double() / step) % 1
    variance = (f * (1 - f) * step.square())[~raw].sum()
    # a fixed direction sees the bias, if there is one
    for direction in (x.double(), torch.ones(len(x), dtype=torch.float64), x.sign().double()):
        scale = ((f * (1 - f) * step.square() * direction.square())[~raw].sum() / num_draws).sqrt()
        assert abs((error.mean(0) * direction)[~raw].sum()) < 5 * scale
    assert float(error.square().sum() / num_draws / variance) == pytest.approx(1, abs=0.05)


def test_more_bits_and_smaller_blocks_mean_less_error():
    x = sample("gauss", 1 << 14)

    def error(*args):
        return float((roundtrip(Quantizer(*args), x) - x).square().sum() / x.square().sum())

    by_bits = [error(b, "max", 128) for b in (2, 4, 8, 16)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(8, "max", 256) < 1e-3 < error(8, "l2", None)


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_comes_back_at_every_size(bits, norm):
    # values that lie on a level are sent exactly; max norm: every block must hold the largest
    s = levels(bits, norm)
    g = torch.Generator().manual_seed(0)
    for n in [*range(1, 70), 300]:
        if norm == "max":
            x = torch.randint(-s, s + 1, (n,), generator=g).float()
            x[::32] = s
            y = roundtrip(Quantizer(bits, norm, 32), x)
        else:  # few entries: their norm is a whole number
            x = torch.zeros(n)
            x[torch.randperm(n, generator=g)[:1]] = s * (-1.0) ** n
            y = roundtrip(Quantizer(bits, norm, None), x)
        # the encoder's hair (2^-22) may lift an entry of 16 bits by one level
        assert ((y - x).abs() <= (1 if bits == 16 else 1e-4 * s)).all()
        if bits < 16:
            assert torch.equal(y.round(), x)


def test_message_sizes():
    # (A5)-(A6): 32 + d + bd bits; max norm: 32 a block, and b an element of whole blocks
    assert Quantizer(8, "l2", None).num_bytes(one_segment(4096)) * 8 == 32 + 4096 + 8 * 4096
    assert Quantizer(8).num_bytes(one_segment(1000)) == 4 * 4 + 1024
    for bits in ALL_BITS:
        for norm in BOTH_NORMS:
            for block in (None, 1, 7, 128):
                assert Quantizer(bits, norm, block).num_bytes(one_segment(777)) % 4 == 0


def test_encode_and_decode_fill_what_they_are_given():
    x, segments = sample("gauss", 1000), [Segment(900, 0, False), Segment(100, 900, True)]
    quantizer = Quantizer(4, block_size=128)
    n = quantizer.num_bytes(segments)
    buffer = torch.zeros(n + 8, dtype=torch.uint8)
    message = quantizer.encode(x, segments, key(), out=buffer[4:-4])
    assert message.data_ptr() == buffer[4:].data_ptr()
    assert torch.equal(message, quantizer.encode(x, segments, key()))
    assert not buffer[:4].any() and not buffer[-4:].any()
    flat = torch.zeros(1002)
    quantizer.decode(message, segments, out=flat[1:-1])
    assert torch.equal(flat[1:-1], quantizer.decode(message, segments))
    assert flat[0] == 0 and flat[-1] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 11])
@pytest.mark.parametrize("norm", BOTH_NORMS)
def test_mean_is_the_sum_in_order_times_one_over_their_number(norm, count):
    segments = [Segment(900, 0, False), Segment(100, 900, True), Segment(300, 1000, False)]
    quantizer = Quantizer(4, norm, 128)
    messages = torch.stack(
        [quantizer.encode(sample("gauss", 1300) * i, segments, key(rank=i)) for i in range(count)]
    )
    total = quantizer.decode(messages[0], segments)
    for message in messages[1:]:
        total += quantizer.decode(message, segments)
    assert torch.equal(quantizer.mean(messages, segments), total * (1 / count))


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
        # steps below fp32's normal range are rounded up to its end
        assert ((y.double() - x).abs() <= (step * 1.001).clamp(min=2.0**-126)).all()


def test_empty_gradient():
    for bits in ALL_BITS:
        for norm in BOTH_NORMS:
            quantizer = Quantizer(bits, norm)
            assert quantizer.encode(torch.empty(0), [], key()).numel() == 0
            assert roundtrip(quantizer, torch.empty(0), one_segment(0)).numel() == 0


# ------------------------------------------------------------------------------ compiled


def same_bits(a, b):
    """As integers: NaN differs from itself."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("bits", ALL_BITS)
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
    x = sample("gauss", 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = roundtrip(Quantizer(8, compile=True), x)
    kernels.fused.cache_clear()
    assert torch.equal(y, roundtrip(Quantizer(8, compile=False), x))
    assert sum("eager" in r.getMessage() for r in caplog.records) == 1
