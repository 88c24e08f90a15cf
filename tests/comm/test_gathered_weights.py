"""FSDP2's weights, gathered quantised: in real processes."""

import pytest
import torch
from fsdp2_training import backward, get, in_parts, params, sharded, vit
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm import QSGD, compress_gradients
from robust_accel.comm.fsdp2 import has_hooks

pytestmark = pytest.mark.skipif(not has_hooks(), reason="this torch's FSDP2 takes no all-gather")
BITS = [16, 8]
DRAWS = 20


def seen(model, rank, step, passes, whole=None):
    """The weights of each of so many forward passes before one backward."""
    found = []
    hooks = [
        module.register_forward_pre_hook(
            lambda m, _: found.append(
                torch.cat([p.detach().flatten() for p in m.parameters(False)])
            )
        )
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.LayerNorm)
    ]
    with torch.no_grad():
        for _ in range(passes - 1):
            model(torch.rand(2, 3, 8, 8))
    backward(whole or model, rank, step)
    for hook in hooks:
        hook.remove()
    return torch.cat(found).view(passes, -1)


def of_two_forwards(model):
    """A layer's weights in all passes of two micro-batches whose loss has two forwards."""
    found, layer = [], model.blocks[0].mlp.fc1

    def note(*_):
        found.append(layer.weight.detach().clone())

    hooks = [layer.register_forward_pre_hook(note), layer.register_full_backward_pre_hook(note)]
    for number in range(2):
        model.set_requires_gradient_sync(number == 1)
        x = torch.rand(2, 3, 8, 8)
        (model(x) - model(x / 2)).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return found


def gathered(rank, world_size):
    model = vit()
    shapes = [tuple(p.shape) for p in model.parameters()]
    results = {"exact": seen(model, rank, 0, 1), "shapes": shapes}
    for bits in BITS:
        model = sharded(vit(), reshard_after_forward=True)
        compression = compress_gradients(model, QSGD(bits=8, weight_bits=bits))
        before, optimizer = params(model), torch.optim.SGD(model.parameters(), lr=0.0)
        rounds = []
        for step in range(DRAWS):
            rounds.append(seen(model, rank, step, 1 if step else 3))
            optimizer.step()
        results[bits] = {
            "in one step": rounds[0],
            "step by step": torch.stack([one[0] for one in rounds]),
            "bytes": compression.gathered.bytes_sent,
            "kept": bool(before.equal(params(model))),
            "of two forwards": of_two_forwards(model),
        }
    model = sharded(vit())
    compression = compress_gradients(model)
    results["plain"] = seen(model, rank, 0, 1), compression.gathered.bytes_sent
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(vit(), mp_policy=half)
    compress_gradients(model, QSGD(weight_bits=8))
    results["bf16"] = seen(model, rank, 0, 1)
    return results


def resumed(rank, world_size):
    """Two steps; and one, and another in what goes on from there."""
    eight = QSGD(weight_bits=8)
    ways = [range(2)], [range(1), range(1, 2)]
    return [in_parts(rank, eight, *parts)[0] for parts in ways]


def frozen(rank, world_size):
    """What a frozen part is rounded to in two steps; and in the second of them, gone on from."""
    found, state = [], {"steps": 0}
    for resumes in (False, True):
        model = vit()
        for parameter in model.blocks.parameters():
            parameter.requires_grad_(False)
        model = sharded(model, reshard_after_forward=True)
        compression = compress_gradients(model, QSGD(weight_bits=8))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        compression.load_state_dict(state)
        for step in range(resumes, 2):
            found.append(seen(model.blocks, rank, step, 1, whole=model))
            optimizer.step()
            if not step:
                state = compression.state_dict()
    return found


def refused(rank, world_size):
    with pytest.raises(ValueError, match="weight_bits: weights are gathered under FSDP2 alone"):
        compress_gradients(DistributedDataParallel(vit()), QSGD(weight_bits=8))
    return True


TWO = [gathered, resumed, frozen, refused]


@pytest.mark.parametrize("bits", BITS)
def test_all_passes_of_a_step_are_by_the_same_weights_on_all_ranks(two, bits):
    first, *others = (result[bits] for result in get(two, gathered))
    for other in others:
        assert first["step by step"].equal(other["step by step"])
    same = first["in one step"]
    assert same[0].equal(same[1])
    assert same[0].equal(same[2])
    assert not first["step by step"][0].equal(first["step by step"][1])
    assert first["kept"]
    one, *rest = first["of two forwards"]
    assert len(rest) == 7
    assert all(one.equal(other) for other in rest)


@pytest.mark.parametrize("bits", BITS)
def test_they_lie_around_the_weights_themselves(two, bits):
    result = get(two, gathered)[0]
    exact, draws = result["exact"][0].double(), result[bits]["step by step"].double()
    error = draws - exact
    assert error.abs().max() <= exact.abs().max() / (2 ** (bits - 1) - 1) + 1e-6
    is_rounded = draws.std(0) > 0
    assert is_rounded.sum() > 10_000
    one_dimensional = exact == 1  # LayerNorm's
    assert one_dimensional.any()
    assert not (is_rounded & one_dimensional).any()
    signs = torch.randint(2, (60, len(exact)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    along = error @ signs.double().T
    z = along.mean(0) / along.std(0) * len(draws) ** 0.5
    assert z.abs().max() < 4.5
    assert 0.4 < float(z.square().mean()) < 1.9


def test_bytes_follow_the_formula(two):
    result = get(two, gathered)[0]
    pieces = [(s, -(-s[0] // 2) * torch.Size(s[1:]).numel()) for s in result["shapes"]]
    weights, sent = result["plain"]
    assert weights.equal(result["exact"])
    gathers = sent / (4 * sum(n for _, n in pieces))
    assert 1 <= gathers <= 2  # there, and back where blocks were cut again
    for bits in BITS:
        once = sum(
            4 * n if len(s) == 1 else -(-n // 256) * (4 + 256 * bits // 8) for s, n in pieces
        )
        passes = DRAWS + 2  # forwards; each but two of them with its backward
        assert passes * once <= result[bits]["bytes"] <= (passes + DRAWS) * once


def test_weights_of_another_type_are_gathered_in_it(two):
    result = get(two, gathered)[0]
    assert result["bf16"].dtype == torch.bfloat16
    assert not result["bf16"].float().equal(result["exact"].bfloat16().float())
    near = (result["bf16"].float() - result["exact"]).abs() <= result["exact"].abs().max() / 60
    assert near.all()


def test_what_goes_on_is_the_same(two):
    for straight, again in get(two, resumed):
        assert straight.equal(again)


def test_a_frozen_part_is_rounded_anew_in_each_step_and_goes_on_alike(two):
    for first, second, again in get(two, frozen):
        assert not first.equal(second)
        assert second.equal(again)


def test_where_weights_are_not_gathered_it_is_refused(two):
    assert all(get(two, refused))
    with pytest.raises(ValueError, match="weight_bits: weights are gathered under FSDP2 alone"):
        compress_gradients(vit(), QSGD(weight_bits=8))


@pytest.mark.parametrize("bits", [4, 2, 3, 32, "no"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="weight_bits"):
        QSGD(weight_bits=bits)
