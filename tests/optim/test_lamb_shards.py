"""LAMB on the flat shards of DeepSpeed's ZeRO: the same steps as on whole tensors."""

import copy
import functools
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from seeded_tensors import make_params, run, tensors
from torch import Tensor, nn

from robust_accel.optim import LAMB, Piece


class Ranks:
    """Threads that play ranks: ``sum`` returns on each the sum of what all have passed."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=30)
        self.values: list[Tensor] = [torch.empty(0)] * num_ranks
        self.shapes: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]

    def sum(self, rank: int, value: Tensor) -> Tensor:
        assert value.dtype == torch.float32
        self.shapes[rank].append(tuple(value.shape))
        self.values[rank] = value.clone()
        self.barrier.wait()
        total = torch.stack(self.values).sum(0)
        self.barrier.wait()
        return total

    def run(self, work) -> None:
        with ThreadPoolExecutor(len(self.values)) as pool:
            list(pool.map(work, range(len(self.values))))


def cut(tensors: list[Tensor], num_ranks: int, padding: int) -> tuple[list[Tensor], list[list]]:
    """Lay tensors end to end with zeros behind, and cut in equal parts: flats, pieces by rank."""
    sizes = [tensor.numel() for tensor in tensors]
    total = sum(sizes) + padding
    total += -total % num_ranks
    whole = torch.cat([tensor.detach().flatten() for tensor in tensors])
    whole = torch.cat([whole, whole.new_zeros(total - whole.numel())])
    length = total // num_ranks
    pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        begin, offset = rank * length, 0
        for layer, tensor in enumerate(tensors):
            low, high = max(offset, begin), min(offset + sizes[layer], begin + length)
            if low < high:
                pieces[rank].append(Piece(layer, low - begin, high - low, tensor.ndim))
            offset += sizes[layer]
    return list(whole.split(length)), pieces


ZERO_GROUPS = [[(4, 3), (5,), (2, 3, 2, 2), ()], [(7, 5), (11,), (3,)]]


def replaced_by_shards(groups, options, ranks, rank, padding, dtype) -> LAMB:
    """A rank's optimizer as DeepSpeed leaves it: each group's params are one flat tensor."""
    optimizer = LAMB([{"params": [p.clone() for p in group]} for group in groups], **options)
    for index, group in enumerate(groups):
        flats, pieces = cut(group, len(ranks.values), padding)
        flat = flats[rank].clone().to(dtype).requires_grad_()
        optimizer.param_groups[index]["params"] = [flat]
        optimizer.shard(flat, pieces[rank], len(group), functools.partial(ranks.sum, rank))
    return optimizer


def zero_step(optimizer: LAMB) -> None:
    """As DeepSpeed steps: group by group."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def check_sharded(num_ranks, *, padding=3, num_steps=4, shapes=ZERO_GROUPS, **options) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = [[torch.randn(shape, generator=generator) for shape in group] for group in shapes]
    groups[0][0].zero_()
    plain = LAMB(
        [{"params": [nn.Parameter(p.clone()) for p in g]} for g in groups],
        **{**options, "fused": False},
    )
    grads = [
        [[torch.randn(shape, generator=generator) for shape in group] for group in shapes]
        for _ in range(num_steps)
    ]
    rates = [0.1, 0.1, 0.02, 0.3]
    for step_grads, lr in zip(grads, rates, strict=False):
        for group, group_grads in zip(plain.param_groups, step_grads, strict=True):
            group["lr"] = lr
            for param, grad in zip(group["params"], group_grads, strict=True):
                param.grad = grad
        plain.step()

    ranks = Ranks(num_ranks)
    optimizers: list[LAMB] = [None] * num_ranks  # type: ignore[list-item]

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        optimizer = replaced_by_shards(groups, options, ranks, rank, padding, torch.float32)
        optimizers[rank] = optimizer
        for step_grads, lr in zip(grads, rates, strict=False):
            for group, group_grads in zip(optimizer.param_groups, step_grads, strict=True):
                group["lr"] = lr
                group["params"][0].grad = cut(group_grads, num_ranks, padding)[0][rank].clone()
            zero_step(optimizer)

    ranks.run(work)
    for i, group in enumerate(plain.param_groups):
        parts = [optimizer.param_groups[i]["params"][0].detach() for optimizer in optimizers]
        joined, expected = torch.cat(parts), torch.cat(cut(group["params"], num_ranks, padding)[0])
        torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-6)
        num_elements = sum(param.numel() for param in group["params"])
        assert (joined[num_elements:] == 0).all()
    # one small sum a group and step, on every rank alike
    expected_shapes = [(2, len(group)) for group in shapes] * num_steps
    assert ranks.shapes == [expected_shapes] * num_ranks


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("exclude_1d", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_shards_equal_whole_tensors(num_ranks, exclude_1d, foreach):
    options = {"weight_decay": 0.02, "exclude_1d": exclude_1d, "foreach": foreach}
    check_sharded(num_ranks, weight_norm_clamp=(0.0, 2.0), **options)


@pytest.mark.parametrize("exclude_1d", [False, True])
def test_fused_shards_equal_whole_tensors(exclude_1d):
    # pieces at odd offsets
    check_sharded(
        2,
        shapes=[[(7,), (301, 200), (50_001,), (9, 9)]],
        weight_decay=0.02,
        exclude_1d=exclude_1d,
    )


def test_a_rank_with_nothing_but_padding_takes_part():
    check_sharded(3, padding=60, shapes=[[(2, 3), (4,)]], weight_norm_clamp=(0.5, 10.0))


def test_random_shapes_and_cuts():
    generator = np.random.default_rng(0)
    for num_ranks in (2, 3):
        dims = generator.integers(1, 9, size=(6, 3))
        shapes = [[tuple(map(int, d[: 1 + i % 3])) for i, d in enumerate(dims)]]
        padding = int(generator.integers(0, 20))
        check_sharded(num_ranks, padding=padding, shapes=shapes, exclude_1d=True, num_steps=2)


def test_a_shards_state_is_flat_and_restores_the_trajectory():
    def make() -> LAMB:
        group = tensors(dtype=torch.float32)
        return replaced_by_shards([group], {"lr": 0.1}, Ranks(1), 0, 2, torch.float32)

    def train(optimizer: LAMB, seed: int) -> None:
        flat = optimizer.param_groups[0]["params"][0]
        for step in range(2):
            flat.grad = cut(tensors(seed=seed + step, dtype=torch.float32), 1, 2)[0][0]
            zero_step(optimizer)

    straight, first, second = make(), make(), make()
    for seed in (0, 10):
        train(straight, seed)
    train(first, 0)
    flat = second.param_groups[0]["params"][0]
    flat.data.copy_(first.param_groups[0]["params"][0].data)
    second.load_state_dict(first.state_dict())
    assert set(second.state) == {flat}
    assert second.state[flat]["exp_avg"].shape == second.state[flat]["exp_avg_sq"].shape
    assert second.state[flat]["exp_avg"].shape == flat.shape
    assert second.state[flat]["step"] == 2
    train(second, 10)
    expected = straight.param_groups[0]["params"][0]
    torch.testing.assert_close(flat, expected, rtol=0, atol=0)


def test_a_bad_gradient_reaches_the_layers_pieces_on_every_rank():
    group = [torch.ones(4, 3), torch.ones(2, 2)]
    ranks, flats = Ranks(2), [torch.empty(0)] * 2

    def work(rank: int) -> None:
        optimizer = replaced_by_shards([group], {}, ranks, rank, 0, torch.float32)
        flats[rank] = flat = optimizer.param_groups[0]["params"][0]
        flat.grad = torch.ones(8)
        flat.grad[0] = math.nan if rank == 0 else 1.0
        zero_step(optimizer)

    ranks.run(work)
    whole = torch.cat(flats)
    assert whole[:12].isnan().all() and whole[12:].isfinite().all()


def test_an_unknown_flat_shard_is_refused():
    def replaced(params) -> tuple[LAMB, Tensor]:
        optimizer = LAMB(params, lr=0.1)
        flat = nn.Parameter(torch.ones(20))
        flat.grad = torch.ones(20)
        optimizer.param_groups[0]["params"] = [flat]
        return optimizer, flat

    optimizer, flat = replaced(make_params())
    with pytest.raises(RuntimeError, match=r"flat shard \(DeepSpeed ZeRO\).*compress_gradients"):
        optimizer.step()
    torch.testing.assert_close(flat.detach(), torch.ones(20))
    optimizer.shard(flat, [Piece(0, 0, 12, 2)], 1, lambda squares: squares)
    optimizer.step()
    assert flat.detach()[:12].max() < 1 and (flat.detach()[12:] == 1).all()
    lone = copy.deepcopy(optimizer)  # has no way to sum over ranks
    lone.param_groups[0]["params"][0].grad = torch.ones(20)
    with pytest.raises(RuntimeError, match="flat shard"):
        lone.step()


def test_what_is_no_shard_is_not_refused():
    params = make_params()  # with a vector
    optimizer = LAMB(params, lr=0.1)
    run(optimizer, num_steps=1)
    fresh = LAMB(make_params(), lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    pickled = pickle.loads(pickle.dumps(optimizer))
    replaced = LAMB(make_params(), lr=0.1)  # as FSDP2 replaces them: shape by shape
    replaced.param_groups[0]["params"] = make_params()
    for other in (fresh, copy.deepcopy(optimizer), pickled, replaced):
        run(other, num_steps=1)
    vector = nn.Parameter(torch.ones(9))
    optimizer.add_param_group({"params": [vector]})
    for param in [*params, vector]:
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece(0, 0, 6, 2), Piece(1, 5, 2, 1)], "overlaps another"),
        ([Piece(2, 0, 6, 2)], "no layer of 2"),
        ([Piece(0, 4, 6, 2)], "end at element 10 of a shard of 8"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces, message):
    flat = nn.Parameter(torch.ones(8))
    optimizer = LAMB([flat])
    with pytest.raises(ValueError, match=message):
        optimizer.shard(flat, pieces, 2, lambda squares: squares)
    with pytest.raises(ValueError, match="only parameter of one of"):
        optimizer.shard(torch.ones(8), [], 2, lambda squares: squares)
