"""LAMB against Algorithm A2 by hand, against timm and torch, and the ways it is called."""

import copy
import functools
import io
import math
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from robust_accel.optim import LAMB, Piece, lamb_kernels

has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])),
    reason="torch.compile needs a C++ compiler on a CPU",
)

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), ()]


def tensors(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def run(optimizer: torch.optim.Optimizer, *, num_steps: int, first_seed: int = 100) -> None:
    """Steps with gradients that do not depend on the parameters, so that no rounding grows."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(num_steps):
        for param, grad in zip(params, tensors(seed=first_seed + step), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def make_params(**kwargs) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors(**kwargs)]


def assert_equal(actual, expected, **tolerance) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), torch.as_tensor(b).detach(), **tolerance)


def algorithm_a2(theta, grads, *, lr, beta1, beta2, zeta, decay, c_l, c_u):
    """Algorithm A2 on one layer in numpy, with You et al.'s decay; returns theta and every tau."""
    m, v, taus = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + zeta) + decay * theta
        taus.append(min(max(np.sqrt((theta**2).sum()), c_l), c_u))
        theta = theta - lr * taus[-1] / np.sqrt((u**2).sum()) * u
    return theta, taus


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_algorithm_a2_by_hand_with_the_clamp_active_at_both_ends(foreach, decay):
    generator = np.random.default_rng(0)
    scales = [0.01, 1.0, 100.0]  # norms far below c_l, between, far above c_u
    start = [scale * generator.standard_normal((4, 3)) for scale in scales]
    grads = generator.standard_normal((6, 3, 4, 3))
    rule = {"lr": 0.05, "zeta": 1e-3, "decay": decay, "c_l": 0.5, "c_u": 10.0}
    params = [nn.Parameter(torch.tensor(theta)) for theta in start]
    optimizer = LAMB(
        params,
        lr=0.05,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=decay,
        weight_norm_clamp=(0.5, 10.0),
        foreach=foreach,
    )
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = torch.tensor(grad)
        optimizer.step()

    by_hand = [
        algorithm_a2(theta, grads[:, i], beta1=0.8, beta2=0.95, **rule)
        for i, theta in enumerate(start)
    ]
    assert_equal(params, [theta for theta, _ in by_hand], rtol=1e-12, atol=1e-12)
    taus = [taus for _, taus in by_hand]
    assert taus[0][0] == 0.5
    assert all(0.5 < tau < 10 for tau in taus[1])
    assert set(taus[2]) == {10.0}


def test_each_step_is_lr_times_the_clamped_norm_long():
    params = make_params()
    optimizer = LAMB(params, lr=0.1, weight_norm_clamp=(0.0, 2.0), weight_decay=0.01)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        run(optimizer, num_steps=1, first_seed=step)
        for param, old in zip(params, before, strict=True):
            expected = 0.1 * min(old.norm().item(), 2.0)
            assert (param - old).norm().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_equals_timms_lamb_where_the_rules_agree(decay):
    # timm has no clamp on ||theta||; ours has no gradient clipping, and adapts without decay too
    ours, theirs = make_params(), make_params()
    ours[1].data.zero_()
    theirs[1].data.zero_()  # a zero tensor included: ratio 1 in both
    run(LAMB(ours, lr=0.1, weight_decay=decay, weight_norm_clamp=(0, math.inf)), num_steps=5)
    options = {"max_grad_norm": None, "always_adapt": True, "trust_clip": False}
    run(timm.optim.Lamb(theirs, lr=0.1, weight_decay=decay, eps=1e-6, **options), num_steps=5)
    assert_equal(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exclude_1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_equals_plain(exclude_1d, dtype):
    plain, foreach = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {"lr": 0.1, "weight_decay": 0.01, "exclude_1d": exclude_1d}
    run(LAMB(plain, foreach=False, **options), num_steps=4)
    run(LAMB(foreach, foreach=True, **options), num_steps=4)
    assert_equal(foreach, plain)


def test_exclude_1d_gives_vectors_a_step_of_adam_without_decay():
    adapted, excluded, adam = make_params(), make_params(), make_params()
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}
    run(LAMB(adapted, weight_decay=0.1, **options), num_steps=3)
    run(LAMB(excluded, weight_decay=0.1, exclude_1d=True, **options), num_steps=3)
    run(torch.optim.Adam(adam, **options), num_steps=3)
    for i, shape in enumerate(SHAPES):
        expected = adapted if len(shape) > 1 else adam
        torch.testing.assert_close(excluded[i], expected[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_zero_tensor_moves_and_a_zero_update_does_not_divide(foreach):
    zero, still = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = LAMB([zero, still], lr=0.1, foreach=foreach)
    zero.grad, still.grad = torch.ones(3, 2), torch.zeros(3, 2)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((3, 2), -0.1))  # Adam's first step
    torch.testing.assert_close(still.detach(), torch.ones(3, 2))


def test_a_zero_tensor_follows_the_rule_when_c_l_is_positive():
    zero = nn.Parameter(torch.zeros(2, 2))
    optimizer = LAMB([zero], lr=0.1, weight_norm_clamp=(0.5, 10))
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    assert zero.norm().item() == pytest.approx(0.1 * 0.5)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_is_not_hidden_and_stays_in_its_tensor(bad, foreach):
    params = make_params()
    optimizer = LAMB(params, lr=0.1, foreach=foreach)
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad[0, 0] = bad
    optimizer.step()
    assert params[0].isnan().all()
    assert all(param.isfinite().all() for param in params[1:])


def test_a_tensor_without_gradient_stays_and_counts_its_own_steps():
    params = make_params()
    start = params[0].detach().clone()
    optimizer = LAMB(params, lr=0.1)
    for step in range(2):
        for param, grad in zip(params[1:], tensors(seed=step)[1:], strict=True):
            param.grad = grad
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), start)
    assert params[0] not in optimizer.state

    run(optimizer, num_steps=1)
    late, alone = params[0], nn.Parameter(start.clone())
    alone.grad = late.grad.clone()
    LAMB([alone], lr=0.1).step()  # bias correction of a first step, not of a third
    torch.testing.assert_close(late, alone)


def test_groups_have_their_own_options():
    params = make_params()
    groups = [
        {"params": params[:2], "lr": 0.0},
        {"params": params[2:], "weight_norm_clamp": (0.0, 0.5), "betas": [0.5, 0.9]},
    ]
    run(LAMB(groups, lr=0.1), num_steps=2)
    expected = make_params()
    assert_equal(params[:2], expected[:2])
    only = LAMB(expected[2:], lr=0.1, weight_norm_clamp=(0.0, 0.5), betas=(0.5, 0.9))
    for step in range(2):
        for param, grad in zip(expected[2:], tensors(seed=100 + step)[2:], strict=True):
            param.grad = grad
        only.step()
    assert_equal(params[2:], expected[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_do_not_overflow(dtype):
    param = nn.Parameter(torch.ones(600, 600, dtype=dtype))  # sum of squares 360,000 > 65,504
    optimizer = LAMB([param], lr=0.25, weight_norm_clamp=(0, math.inf))
    param.grad = torch.ones_like(param)
    optimizer.step()  # norms are equal: a step of 0.25 everywhere
    torch.testing.assert_close(
        param.detach().float(), torch.full((600, 600), 0.75), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("betas", [(0.9, 0.99), [0.9, 0.99]])
def test_a_restored_optimizer_continues_the_same_trajectory(betas):
    straight, resumed = make_params(), make_params()
    options = {"lr": 0.1, "weight_decay": 0.01, "betas": betas, "exclude_1d": True}
    run(LAMB(straight, **options), num_steps=6)

    first = LAMB(resumed, **options)
    run(first, num_steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LAMB(resumed, lr=0.7)  # every option comes back from the checkpoint
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, num_steps=3, first_seed=103)
    assert_equal(resumed, straight, rtol=0, atol=0)
    assert all(state["step"].device.type == "cpu" for state in second.state.values())


def test_lr_as_a_tensor_and_a_scheduler():
    number, tensor = make_params(), make_params()
    for params, lr in ((number, 0.1), (tensor, torch.tensor(0.1, dtype=torch.float64))):
        optimizer = LAMB(params, lr=lr, exclude_1d=True)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            run(optimizer, num_steps=1, first_seed=step)
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 4)
    assert_equal(tensor, number, rtol=1e-9, atol=1e-9)


def test_closure_runs_with_gradients_and_its_loss_returns():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = LAMB([param], lr=0.1)

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert param.detach().max() < 1


def compiled_equals_eager(backend: str, *, foreach: bool) -> None:
    # two tensors, one adapted and one excluded: compiling more takes longer and shows no more
    eager, compiled = (make_params(dtype=torch.float32)[:2] for _ in range(2))
    for params in (eager, compiled):
        torch.compiler.reset()
        optimizer = LAMB(
            params, lr=torch.tensor(0.1), weight_decay=0.01, exclude_1d=True, foreach=foreach
        )
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        step = optimizer.step
        if params is compiled:
            step = torch.compile(optimizer.step, backend=backend)
        for t in range(4):
            for param, grad in zip(params, tensors(seed=t, dtype=torch.float32)[:2], strict=True):
                param.grad = grad
            # one graph serves every step and every learning rate
            with torch.compiler.set_stance("fail_on_recompile" if t > 0 else "default"):
                step()
            scheduler.step()
    assert_equal(compiled, eager, rtol=1e-5, atol=1e-6)


# the scheduler counts calls of optimizer.step itself, and does not see the compiled one
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("foreach", [False, True])
def test_traced_step_equals_eager(foreach):
    compiled_equals_eager("aot_eager", foreach=foreach)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@has_compiler
def test_compiled_step_equals_eager():
    compiled_equals_eager("inductor", foreach=True)


LARGE = [(64, 512), (300, 301), (64, 32, 3, 3), (20_001,), (5, 4), (3,)]


def large_params(*, channels_last: bool = False) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for shape in LARGE]
    params[1].data.zero_()
    if channels_last:
        params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
    return params


@pytest.mark.parametrize("exclude_1d", [False, True])
def test_fused_equals_plain(monkeypatch, exclude_1d):
    monkeypatch.setattr(lamb_kernels, "FUSED_BATCH", 40_000)  # of several tensors, and of one
    torch.manual_seed(0)
    plain = large_params()
    torch.manual_seed(0)
    fused = large_params(channels_last=True)  # with gradients alike, and one unlike
    options = {"lr": 0.1, "weight_decay": 0.01, "exclude_1d": exclude_1d}
    optimizers = [LAMB(plain, fused=False, **options), LAMB(fused, **options)]
    for t in range(4):
        for i, (a, b) in enumerate(zip(plain, fused, strict=True)):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone() if t == 2 or i == 4 else torch.empty_like(b).copy_(a.grad)
        version = fused[0]._version
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
            with torch.device("meta"):  # a default device is not the parameters'
                optimizer.step()
        assert fused[0]._version > version  # autograd sees that the parameter has changed
    assert_equal(fused, plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain, fused, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            expected = optimizers[0].state[a][key]
            torch.testing.assert_close(optimizers[1].state[b][key], expected)
        assert b.stride() == optimizers[1].state[b]["exp_avg"].stride()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fused_does_not_hide_a_bad_gradient(bad):
    params = large_params()
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad[0, 0] = bad
    LAMB(params, lr=0.1, fused=True).step()
    assert params[0].isnan().all()
    assert all(param.isfinite().all() for param in params[1:])


def test_fused_where_not_told_otherwise_and_where_the_kernel_can(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise AssertionError("fused")

    monkeypatch.setattr(torch, "_fused_adam_", no_kernel)
    one = nn.Parameter(torch.ones(4, 3))
    for params, options in [
        ([one], {"foreach": False}),
        ([one], {"foreach": True}),
        ([one], {"fused": False}),
        ([nn.Parameter(one.detach().double())], {}),
        ([nn.Parameter(one.detach().bfloat16())], {"fused": True}),
        ([nn.Parameter(torch.ones(4, 6)[:, ::2])], {"fused": True}),
    ]:
        for param in params:
            param.grad = torch.ones_like(param)
        LAMB(params, **options).step()
    for options in ({}, {"fused": True, "foreach": True}):
        with pytest.raises(AssertionError, match="fused"):
            LAMB([one], **options).step()


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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -0.1}, r"lr must be >= 0 and finite, got -0.1"),
        ({"lr": math.nan}, "lr must be >= 0"),
        ({"lr": torch.ones(2)}, "lr must be a number or a one-element tensor"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be > 0 and finite, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0 and finite, got -1.0"),
        ({"weight_norm_clamp": (2.0, 1.0)}, "weight_norm_clamp must be .* got"),
        ({"weight_norm_clamp": (0.0, 0.0)}, "c_u > 0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        LAMB([param], **option)
    with pytest.raises(ValueError, match=message):
        LAMB([{"params": [param], **option}])


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match="params must be real"):
        LAMB([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        LAMB(embedding.parameters()).step()
