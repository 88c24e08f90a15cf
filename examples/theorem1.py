"""Theorem 1 in numbers: the four terms of equation (4), measured where its assumptions hold.

python examples/theorem1.py --quick         # seconds
python examples/theorem1.py --write docs/   # minutes: docs/theorem1.png and .svg, and its table

With LAMB at rates ~ 1/sqrt(T), M workers with batches of B and b bits, (4) bounds the mean of
E||grad Psi(theta_t)||^2 over T steps by
O(1/sqrt(T) + sigma/sqrt(MB) + min{d/4^b, sqrt(d)/2^b} + epsilon). Here the problem is::

    phi(theta, delta; x, y) = log(1 + exp(-y theta.(x + delta))) - gamma/2 ||delta||^2
                              + ridge sum_j theta_j^2 / (1 + theta_j^2)
    Psi(theta)              = mean over (x, y) of max over delta of phi

It is smooth and not convex in theta (assumption A1), and strongly concave in delta (assumption A2)
where gamma is larger than ||theta||^2 / 4, which is checked. Each term is measured alone, the
others switched off: all data instead of batches, no quantiser, a maximiser that is all but exact.
What is seen: docs/theorem1.md.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from theorem1_figure import table, write
from torch import Tensor
from torch.nn.functional import softplus

from robust_accel import LAMB
from robust_accel.comm.quantizer_reference import dequantize, quantize
from robust_accel.statistics import Interval, t_interval

D, LAYERS = 64, 4  # d, and h layers of d / h each
N, FLIPPED = 256, 0.2  # samples; labels that are wrong, so that no theta fits them all
GAMMA, RIDGE = 4.0, 0.02
CLAMP = (0.1, 10.0)  # c_l, c_u: the paper's experiments have c_l = 0, where (A25) is infinite
EXACT = 1e-8  # the tolerance by which grad Psi is measured


@dataclass(frozen=True)
class Run:
    """Algorithm A1's settings."""

    steps: int  # T
    lr: float  # eta
    workers: int = 1  # M, each with N / M of the data
    batch: int | None = None  # B of each worker, drawn with replacement; None: all that it has
    bits: int | None = None  # b of step 7, of what workers send; None: not quantised
    tolerance: float = 1e-6  # epsilon, of the inner gradient's norm
    ascent: float = 1.0  # the inner maximiser's step size, in 1 / gamma


class Problem:
    """Several problems side by side, each with data of its own, so that a mean has an interval.

    x: [R, N, d], y: [R, N] in {-1, 1}; all in float64.
    """

    def __init__(self, replicas: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.normal(replicas, N, D)
        clean = (self.x @ self.normal(replicas, D, 1)).squeeze(-1).sign()
        self.y = torch.where(self.uniform(replicas, N) < FLIPPED, -clean, clean)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def true_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """grad Psi at theta [R, d], and the maximiser [R, N, d]."""
        delta = maximise(theta, self.x, self.y, EXACT)
        return gradient(theta, self.x + delta, self.y), delta

    def stationary(self, theta: Tensor) -> Tensor:
        """A stationary point of Psi near theta, by L-BFGS."""
        theta = theta.clone()

        def psi() -> Tensor:
            theta.grad, delta = self.true_gradient(theta)
            loss = softplus(-self.y * forward(theta, self.x + delta))
            price = GAMMA / 2 * delta.square().sum(dim=-1)
            ridge = RIDGE * theta.square() / (1 + theta.square())
            return (loss - price).mean(dim=-1).sum() + ridge.sum()

        options = {"max_iter": 300, "tolerance_grad": 1e-7, "tolerance_change": 0.0}
        torch.optim.LBFGS([theta], line_search_fn="strong_wolfe", **options).step(psi)
        return theta


def forward(theta: Tensor, x: Tensor) -> Tensor:
    """[..., d], [..., B, d] -> [..., B]."""
    return (x @ theta.unsqueeze(-1)).squeeze(-1)


def slope(f: Tensor, y: Tensor) -> Tensor:
    """The logistic loss's derivative in f."""
    return -y * torch.sigmoid(-y * f)


def maximise(theta: Tensor, x: Tensor, y: Tensor, tolerance: float, ascent: float = 1.0) -> Tensor:
    """(A1): each sample's gradient ascent from 0, until ||grad_delta phi|| <= tolerance.

    That gradient, slope theta - gamma delta, never leaves theta's line: delta = c theta.
    """
    f, squared = forward(theta, x), theta.square().sum(dim=-1, keepdim=True)
    c = torch.zeros_like(f)
    while True:
        inner = slope(f + c * squared, y) - GAMMA * c  # times theta: grad_delta phi
        going = inner.abs() * squared.sqrt() > tolerance
        if not going.any():
            return c.unsqueeze(-1) * theta.unsqueeze(-2)
        c = torch.where(going, c + ascent / GAMMA * inner, c)


def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(A2) with lambda = 0: the mean gradient in theta [..., d] at perturbed x [..., B, d]."""
    loss = (slope(forward(theta, x), y).unsqueeze(-2) @ x).squeeze(-2) / x.shape[-2]
    return loss + 2 * RIDGE * theta / (1 + theta.square()).square()


def train(problem: Problem, theta: Tensor, run: Run, every: int) -> Tensor:
    """Algorithm A1 on each replica.

    Returns:
        ||grad Psi(theta_t)||^2 [R, measured], at t = 0, every, 2 every, ... < T.
    """
    m, found = run.workers, []
    x_all, y_all = problem.x.unflatten(1, (m, -1)), problem.y.unflatten(1, (m, -1))
    x, y = x_all, y_all  # [R, M, B, d], [R, M, B]
    theta, grad = theta.clone(), torch.zeros_like(theta)
    layers = [layer for row in theta for layer in row.chunk(LAYERS)]  # views
    for layer, g in zip(layers, (g for row in grad for g in row.chunk(LAYERS)), strict=True):
        layer.grad = g
    optimizer = LAMB(layers, run.lr, (0.0, 0.99), weight_norm_clamp=CLAMP, foreach=True)  # (A4)
    for t in range(run.steps):
        if t % every == 0:
            assert theta.square().sum(dim=-1).max() < 4 * GAMMA  # assumption A2
            found.append(problem.true_gradient(theta)[0].square().sum(dim=-1))
        if run.batch is not None:
            chosen = (problem.uniform(*y_all.shape[:2], run.batch) * y_all.shape[2]).long()
            x = x_all.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, D))
            y = y_all.gather(2, chosen)
        local = theta.unsqueeze(1).expand(-1, m, -1)  # [R, M, d]
        delta = maximise(local, x, y, run.tolerance, run.ascent)
        sent = gradient(local, x + delta, y)
        if run.bits is not None:  # (A5) and (A6): one L2 norm a worker, s = 2^b
            s, norm = 2**run.bits, sent.norm(dim=-1, keepdim=True)
            sent = dequantize(quantize(sent, s, problem.uniform(*sent.shape), norm), s)
        grad.copy_(sent.mean(dim=1))  # (A3)
        optimizer.step()
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Curve:
    """||grad Psi||^2 against one cause, and the slopes that are predicted; y: [R, points]."""

    term: str  # T, MB, b or epsilon
    name: str
    x: Sequence[float]
    y: Tensor
    paper: float  # (4)'s slope
    proof: float  # (A25)'s

    def slope(self) -> Interval:
        """Of log2 y in log2 x (or in b), by least squares over all points; 95% over replicas."""
        x = torch.tensor(self.x, dtype=torch.float64)
        x = x if self.term == "b" else x.log2()
        x = x - x.mean()
        return t_interval((self.y.log2() @ x / x.square().sum()).tolist())


@dataclass(frozen=True)
class Plan:
    """What is run."""

    replicas: int = 5
    rate: Sequence[int] = (64, 128, 256, 512, 1024, 2048)
    batches: Sequence[int] = (2, 4, 8, 16, 32, 64)
    workers: Sequence[int] = (1, 2, 4, 8, 16)
    coarse: Sequence[int] = (1, 2, 3)  # b where 2^b <= sqrt(d), and sqrt(d) / 2^b is the smaller
    fine: Sequence[int] = (3, 4, 5, 6, 7, 8)
    tolerances: Sequence[float] = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1)
    steps: int = 1000  # from a stationary point; the second half is measured


QUICK = Plan(2, (64, 256), (2, 64), (1, 16), (1, 3), (3, 5), (0.01, 0.1), steps=200)


def measure(plan: Plan, seed: int) -> list[Curve]:
    """Every curve: the first from random weights, the others about a stationary point."""
    problem = Problem(plan.replicas, seed)
    start = problem.normal(plan.replicas, D) / D**0.5
    at = problem.stationary(start)

    def rate(steps: int) -> Tensor:
        run = Run(steps, 0.3 / steps**0.5)
        return train(problem, start, run, every=max(1, steps // 1024)).mean(dim=1)

    def floor(travel: float, **settings: Any) -> Tensor:
        """At eta = travel / steps: the number of steps does not say how far a run gets."""
        run = Run(plan.steps, travel / plan.steps, **settings)
        found = train(problem, at, run, every=8)
        return found[:, found.shape[1] // 2 :].mean(dim=1)

    def curve(term: str, name: str, x: Sequence[float], y: list[Tensor], *slopes: float) -> Curve:
        return Curve(term, name, x, torch.stack(y, dim=1), *slopes)

    curves = [
        curve("T", "eta = 0.3 / sqrt(T)", plan.rate, [rate(t) for t in plan.rate], -0.5, -0.5)
    ]
    for travel in (8, 4):
        y = [floor(travel, workers=4, batch=b, tolerance=1e-4) for b in plan.batches]
        x = [4 * b for b in plan.batches]
        curves.append(
            curve("MB", f"M = 4, B varies, eta = {travel / plan.steps:g}", x, y, -0.5, -0.5)
        )
    y = [floor(4, workers=m, batch=16, tolerance=1e-4) for m in plan.workers]
    x = [16 * m for m in plan.workers]
    curves.append(curve("MB", f"B = 16, M varies, eta = {4 / plan.steps:g}", x, y, -0.5, -0.5))
    floors = {b: floor(0.5, workers=4, bits=b) for b in {*plan.coarse, *plan.fine}}
    for name, bits, paper in (("<=", plan.coarse, -1.0), (">=", plan.fine, -2.0)):
        name = f"2^b {name} sqrt(d)"
        curves.append(curve("b", name, bits, [floors[b] for b in bits], paper, paper / 2))
    y = [floor(0.2, tolerance=e, ascent=0.25) for e in plan.tolerances]
    return [*curves, curve("epsilon", "all data", plan.tolerances, y, 1.0, 1.0)]


def main(arguments: Sequence[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, too few for conclusions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="that holds theorem1.md")
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--write: --quick is too small to be written; leave one of them out")
    torch.set_num_threads(1)
    begun = time.process_time()
    curves = measure(QUICK if options.quick else Plan(), options.seed)
    print(table(curves), f"\n{time.process_time() - begun:.0f} s of one core")
    if options.write:
        write(curves, options.write)
    return curves


if __name__ == "__main__":
    main()
