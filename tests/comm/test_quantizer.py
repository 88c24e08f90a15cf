"""The quantiser's laws: unbiased, bounded, the paper's form, and no input that breaks them."""

import pytest
import torch
from roundtrips import (
    ALL_BITS,
    BOTH_NORMS,
    block_norms,
    key,
    levels,
    one_segment,
    roundtrip,
    sample,
)
from sklearn.datasets import load_digits

from robust_accel.comm import draws
from robust_accel.comm.layout import Segment, segment
from robust_accel.comm.quantizer import Quantizer
from robust_accel.comm.quantizer_reference import dequantize, quantize

# ------------------------------------------------------------------------------ randomness


def all_draws(rows=1024, width=256, bits=8, **kwargs):
    """All draws of consecutive blocks, in the order of the elements. [rows * width] float64."""
    seeds = draws.row_seeds(torch.arange(0, rows * width, width, dtype=torch.int32), key(**kwargs))
    size = width * bits // 32  # elements of a block that share the bits of a word
    parts = [u for i in range(0, 32 // bits, 2) for u in draws.uniform_pair(seeds, i * size, size)]
    return torch.stack(parts, dim=1).view(-1).double()


def test_draws_are_uniform_and_independent():
    u = all_draws()
    n = u.numel()
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5
    others = {
        **{f"lag {lag}": torch.roll(u, lag) for lag in (1, 2, 64, 128, 192, 255, 256, 257, 4096)},
        "step": all_draws(step=1),
        "rank": all_draws(rank=1),
        "server": all_draws(rank=-1),
        "seed": all_draws(seed=1),
        "swapped": all_draws(step=1, rank=0, seed=2),
    }
    for name, v in others.items():
        r = ((u - 0.5) * (v - 0.5)).mean() * 12
        assert abs(r) < 5 / n**0.5, name
        # beyond correlation: how often both are small
        both = ((u < 1 / 16) & (v < 1 / 16)).double().mean()
        assert abs(both * 256 - 1) < 5 * (255 / n) ** 0.5, name


def test_a_long_vectors_draws_are_fine_enough_for_its_small_entries():
    seeds = draws.row_seeds(torch.arange(0, 1 << 24, 1 << 12, dtype=torch.int32), key())
    u = draws.uniform(seeds, 1 << 12)
    assert u.min() > 0 and u.max() <= 1
    assert u.double().mean() == pytest.approx(0.5, abs=1e-3)
    for k in (17, 20):  # 128 and 16 are expected
        expected = 2 ** (24 - k)
        assert abs(int((u < 2.0**-k).sum()) - expected) < 6 * expected**0.5


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


@pytest.mark.parametrize("name", ["gauss", "heavy", "spikes"])
@pytest.mark.parametrize("norm", BOTH_NORMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_it_is_the_papers_quantiser_given_the_same_draws(bits, norm, name):
    block, num_blocks, s = 256, 8, levels(bits, norm)
    x = sample(name, block * num_blocks)
    y = roundtrip(Quantizer(bits, norm, block), x)
    own = all_draws(num_blocks, block, bits).view(num_blocks, block)
    if norm == "l2":
        seeds = draws.row_seeds(torch.arange(0, len(x), block, dtype=torch.int32), key())
        own = draws.uniform(seeds, block)
    norms = block_norms(x, norm, block).float()
    for i, (part, draw) in enumerate(zip(x.split(block), own, strict=True)):
        if norm == "max":
            # it takes the floor of a signed value, which rounds up where 1 - draw is small
            draw = torch.where(part >= 0, 1 - draw, draw)
        scale = norms[i * block]
        expected = dequantize(quantize(part, s, draw, scale), s)
        error = (y[i * block : (i + 1) * block] - expected).abs() / (scale / s)
        # draws of 16 bits against fp32's rounding: one element in thousands lands on another side
        assert error.max() <= 1 + 1e-3
        assert (error > 1e-2).float().mean() <= (0.1 if bits == 16 else 0.01)


def test_the_papers_quantiser_is_unbiased_and_keeps_its_levels():
    g, s, n = sample("gauss", 64), 4, 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = [quantize(g, s, torch.rand(64, generator=generator)) for _ in range(n)]
    assert all(q.level.min() >= 0 and q.level.max() <= s for q in drawn)
    mean = torch.stack([dequantize(q, s) for q in drawn]).double().mean(dim=0)
    step = g.norm() / s
    assert (mean - g).abs().max() < 5 * 0.5 * step / n**0.5  # at most half a step's deviation
    zero = quantize(torch.zeros(4), s, torch.zeros(4))
    assert dequantize(zero, s).equal(torch.zeros(4))


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


@pytest.mark.parametrize("norm", BOTH_NORMS)
def test_entries_far_below_a_step_are_not_lost(norm):
    x = torch.full((1 << 15,), 2.0**-18)
    x[0] = 1.0
    drawn = [roundtrip(Quantizer(2, norm, None), x, k=key(step=i)) for i in range(100)]
    mean = torch.stack(drawn)[:, 1:].double().mean()
    assert float(mean / 2**-18) == pytest.approx(1, abs=0.3)


def test_more_bits_and_smaller_blocks_mean_less_error():
    x = sample("gauss", 1 << 14)

    def error(*args):
        return float((roundtrip(Quantizer(*args), x) - x).square().sum() / x.square().sum())

    by_bits = [error(b, "max", 128) for b in (2, 4, 8, 16)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(8, "max", 256) < 1e-3 < error(8, "l2", None)


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
