"""LAMB against Algorithm A2 by hand, against timm and torch, and the ways it is called."""

import io
import math

import pytest
import timm.optim
import torch
from seeded_tensors import SHAPES, assert_equal, make_params, run, tensors
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from robust_accel.optim import LAMB
from robust_accel.optim.lamb_reference import Moments, lamb_step


@pytest.mark.parametrize("form", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_papers_algorithm_with_the_clamp_active_at_both_ends(form, decay):
    dtype = torch.float32 if form == "fused" else torch.float64  # the kernel takes no other
    generator = torch.Generator().manual_seed(0)
    scales = [0.01, 1.0, 100.0]  # norms far below c_l, between, far above c_u
    start = [scale * torch.randn(4, 3, generator=generator, dtype=dtype) for scale in scales]
    grads = torch.randn(6, 3, 4, 3, generator=generator, dtype=dtype)
    params = [nn.Parameter(theta.clone()) for theta in start]
    optimizer = LAMB(
        params,
        lr=0.05,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=decay,
        weight_norm_clamp=(0.5, 10.0),
        foreach={"plain": False, "foreach": True, "fused": None}[form],
    )
    reference, taus = list(start), [[], [], []]
    moments = [Moments.zeros_like(theta) for theta in start]
    rule = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "zeta": 1e-3, "c_l": 0.5, "c_u": 10.0}
    for step_grads in grads:
        for i, (param, grad) in enumerate(zip(params, step_grads, strict=True)):
            param.grad = grad
            taus[i].append(reference[i].norm().clamp(0.5, 10.0).item())
            reference[i], moments[i] = lamb_step(
                reference[i], grad, moments[i], weight_decay=decay, **rule
            )
        optimizer.step()
    tolerance = 1e-5 if form == "fused" else 1e-12
    assert_equal(params, reference, rtol=tolerance, atol=tolerance)
    assert taus[0][0] == 0.5
    assert all(0.5 < tau < 10 for tau in taus[1])
    assert set(taus[2]) == {10.0}


def test_the_reference_moves_a_zero_tensor_and_divides_by_no_zero():
    zero, grad = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    moved, moments = lamb_step(zero, grad, Moments.zeros_like(zero), lr=0.1)
    torch.testing.assert_close(moved, torch.tensor([-0.1, 0.1, 0.0]))  # Adam's first step
    assert moments.t == 1
    stays, _ = lamb_step(grad, zero, Moments.zeros_like(zero), lr=0.1)
    assert stays.equal(grad)


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


@pytest.mark.parametrize("exclude_1d", [False, True])
@pytest.mark.parametrize("foreach", [False, True, None])
def test_a_rate_of_one_element_moves_parameters_without_dimensions(foreach, exclude_1d):
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        params = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3, 2))]
        for p in params:
            p.grad = torch.ones_like(p)
        LAMB(params, lr=lr, exclude_1d=exclude_1d, foreach=foreach).step()
        results.append(params)
    for other in results[1:]:
        assert_equal(other, results[0])
    assert results[0][0].shape == ()


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_parameters_of_fsdp1_are_refused_by_name(mark):
    parameter = nn.Parameter(torch.ones(7))
    setattr(parameter, mark, True)
    with pytest.raises(ValueError, match=r"does not support FSDP1.*fsdp_version: 2"):
        LAMB([parameter])
