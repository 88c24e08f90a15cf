"""LAMB traced, compiled and fused: the same steps as plain LAMB."""

import math
import os
import shutil

import pytest
import torch
from seeded_tensors import assert_equal, make_params, tensors
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from robust_accel.optim import LAMB, lamb_kernels

has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])),
    reason="torch.compile needs a C++ compiler on a CPU",
)


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
