"""The quantiser's messages: their sizes, what lies where, and bytes that come back exactly."""

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

from robust_accel.comm import layout
from robust_accel.comm.layout import Segment, segment, split
from robust_accel.comm.quantizer import Message, Quantizer


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


def model_of(shapes):
    segments, position = [], 0
    for shape in shapes:
        segments.append(segment(shape, position))
        position += segments[-1].size
    return segments, position


def served(quantizer, gradients, segments, *, in_full):
    """All workers and servers in this process: what each worker ends with."""
    num = len(gradients)
    messages = [
        quantizer.encode_parts(x, segments, key(rank=m), num) for m, x in enumerate(gradients)
    ]
    replies = []
    for rank in range(num):
        of_all = (
            torch.stack([plane[rank] for plane in planes]) for planes in zip(*messages, strict=True)
        )
        own = quantizer.mean_of_part(Message(*of_all), segments, gradients[0].clone())
        replies.append(
            quantizer.part_in_full(own)
            if in_full
            else quantizer.encode_part(own, segments, key(rank=-1), rank, num)
        )
    gathered = Message(*(torch.cat(planes) for planes in zip(*replies, strict=True)))
    take = quantizer.place_parts if in_full else quantizer.decode_parts
    return take(gathered, segments, torch.empty_like(gradients[0]))


SHAPES = [(300,), (40, 30), (7,), (1 << 18,), (9, 9), (5000,), (), (64, 64, 3, 3)]


@pytest.mark.parametrize("num", [1, 3, 7])
@pytest.mark.parametrize("block", [256, 100])
@pytest.mark.parametrize("bits", [8, pytest.param(2, marks=pytest.mark.long)])
def test_servers_give_the_mean_of_whole_messages(bits, block, num):
    segments, size = model_of(SHAPES)
    gradients = [sample("gauss", size) * (m + 1) for m in range(num)]
    q = Quantizer(bits, "max", block)
    messages = [q.encode(x, segments, key(rank=m)) for m, x in enumerate(gradients)]
    expected = q.mean(torch.stack(messages), segments)
    assert served(q, gradients, segments, in_full=True).equal(expected)
    # and rounding that mean once more is what the second side does
    again = q.decode(q.encode(expected, segments, key(rank=-1)), segments)
    assert served(q, gradients, segments, in_full=False).equal(again)


@pytest.mark.parametrize("num", [1, 2, 3, 7])
@pytest.mark.parametrize("norm", BOTH_NORMS)
def test_servers_of_whole_tensors_as_blocks_stay_within_their_steps(norm, num):
    segments, size = model_of(SHAPES)
    gradients = [sample("gauss", size) for _ in range(num)]
    out = served(Quantizer(8, norm, None), gradients, segments, in_full=False)
    sizes = [s.size for s in segments]
    mean = gradients[0].split(sizes)
    for s, x, y in zip(segments, mean, out.split(sizes), strict=True):
        if s.raw:
            torch.testing.assert_close(y, x)
        elif s.size:
            largest = x.norm(float("inf") if norm == "max" else 2)
            assert (y - x).abs().max() <= 2.1 * largest / levels(8, norm)


@pytest.mark.parametrize("shapes", [[(300,)], [(3, 3)], [(0,)], [(5,), (1000, 2)]])
def test_servers_of_small_gradients(shapes):
    segments, size = model_of(shapes)
    x = sample("gauss", size)
    for q in (Quantizer(8), Quantizer(8, "l2", None)):
        out = served(q, [x] * 5, segments, in_full=False)
        assert (out - x).abs().max() < 0.1 if size else out.equal(x)


def test_layouts_go_with_their_owner():
    q, other = Quantizer(), Quantizer()
    x = sample("gauss", 3000)
    for _ in range(3):
        roundtrip(q, x)
    assert len(q._layouts) == 1 and not other._layouts
    assert q == other


@pytest.mark.parametrize(("norm", "block"), [("max", 256), ("max", None), ("l2", None)])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_message_does_not_depend_on_what_is_copied_first(norm, block, parts, monkeypatch):
    """Long runs are read where they lie on a CPU, and copied on a GPU, where a copy is cheap."""
    sizes = [7, 200_000, 300, 140_032, 131_072, 8, 150_003]
    segments, position = [], 0
    for size in sizes:
        segments.append(Segment(size, position, raw=size < 10))
        position += size
    x, found = sample("gauss", position), []
    for long_run in (layout.LONG_RUN, layout.LONG_RUN_ON_GPU, 1):
        monkeypatch.setattr(layout, "LONG_RUN", long_run)
        quantizer, out = Quantizer(8, norm, block), torch.empty(position)
        message = quantizer.encode_parts(x, segments, key(), parts)
        groups = quantizer._layout(segments, parts, x.device).groups
        in_place = sum(piece.src is not None for group in groups for piece in group.pieces)
        found.append((in_place, *message, out))
        if parts == 1:
            quantizer.decode_parts(message, segments, out)
    assert len({number for number, *_ in found}) > 1
    for _, floats, words, out in found[1:]:
        assert torch.equal(floats, found[0][1]) and torch.equal(words, found[0][2])
        assert parts > 1 or torch.equal(out, found[0][3])
