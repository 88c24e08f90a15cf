"""Theorem 1 in numbers: the terms of equation (4), measured where its assumptions hold.

python examples/theorem1.py --quick         # seconds
python examples/theorem1.py --write docs/   # minutes: docs/theorem1.png and .svg, and its table

(4) bounds the mean of E||grad Psi(theta_t)||^2 over T steps of LAMB at rates ~ 1/sqrt(T) by
O(1/sqrt(T) + sigma/sqrt(MB) + min{d/4^b, sqrt(d)/2^b} + epsilon). Each term is measured alone: the
others are switched off (all data, no quantiser, a maximiser that is exact), or so small a step is
taken that they are smaller. A slope is that of a line through the logarithms. (4) is an upper one:
a slope that falls faster does not contradict it. docs/theorem1.md says what is seen, and where our
reading of the proof (A25) has another power than (4).
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from theorem1_problem import BETA2, CLAMP, DIMENSION, Compressor, Dat, Problem, train
from torch import Tensor

from robust_accel.comm.draws import random_key
from robust_accel.comm.layout import Segment
from robust_accel.comm.quantizer import Quantizer
from robust_accel.comm.quantizer_reference import dequantize, quantize
from robust_accel.statistics import Interval, t_interval

REGIME = float(np.log2(DIMENSION) / 2)  # bits at which 2^b = sqrt(d): the terms of the min cross


@dataclass(frozen=True)
class Curve:
    """A quantity against one cause; ``y`` has a row a replica."""

    panel: str  # T, MB, variance, bits or tolerance
    name: str
    x: list[float]
    y: Tensor  # [R, points]
    paper: float | None = None  # (4)'s slope
    proof: float | None = None  # (A25)'s
    between: tuple[float, float] = (0, np.inf)  # the x that are fitted

    def slope(self) -> Interval:
        """Of log y in log x (per bit: of log2 y in b), with its 95% interval over replicas."""
        x = np.array(self.x)
        kept = (x >= self.between[0]) & (x <= self.between[1])
        x = x[kept] if self.panel in ("variance", "bits") else np.log2(x[kept])
        return t_interval([float(np.polyfit(x, np.log2(y[kept]), 1)[0]) for y in self.y.numpy()])


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    replicas: int = 5
    rate: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    workers: tuple[int, ...] = (1, 2, 4, 8)
    sgd: tuple[int, ...] = (4, 16, 64)
    rates: tuple[float, ...] = (0.001, 0.002, 0.004)
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10)
    shipped: tuple[int, ...] = (2, 4, 8)
    tolerances: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003, 0.001)
    steps: int = 800


QUICK = Plan(2, (16, 64, 256), (4, 32), (1, 8), (4, 32), (0.001, 0.004), (2, 4, 6, 8), (2, 8),
             (0.1, 0.01), 48)  # fmt: skip


def whole(problem: Problem, bits: int) -> Compressor:
    """(A5) and (A6) at any number of bits: one L2 norm a vector, s = 2^b."""

    def compress(g: Tensor) -> Tensor:
        norm = g.norm(dim=-1, keepdim=True)
        return dequantize(quantize(g, 2**bits, problem.uniform(*g.shape), norm), 2**bits)

    return compress


def shipped(seed: int, quantizer: Quantizer) -> Compressor:
    """The package's quantiser, packed to bits and back; each vector is a segment."""
    step = 0

    def compress(g: Tensor) -> Tensor:
        nonlocal step
        step += 1
        d = g.shape[-1]
        segments = [Segment(d, i * d, raw=False) for i in range(g.numel() // d)]
        key = random_key(seed, 0, step, g.device)
        message = quantizer.encode(g.flatten().float(), segments, key)
        return quantizer.decode(message, segments).view(g.shape).to(g.dtype)

    return compress


def tail(problem: Problem, theta: Tensor, dat: Dat) -> Tensor:
    """Mean of ||grad Psi||^2 over the second half of a run from a stationary point: [R]."""
    found = train(problem, theta, dat, every=8)
    return found[:, found.shape[1] // 2 :].mean(dim=1)


def rate_curve(problem: Problem, start: Tensor, plan: Plan) -> Curve:
    """All data, no quantiser, an exact maximiser, from random weights."""
    runs = [train(problem, start, Dat(t, 0.3 / t**0.5), every=max(1, t // 128)) for t in plan.rate]
    y = torch.stack([run.mean(dim=1) for run in runs], dim=1)
    return Curve("T", "LAMB, eta = 0.3 / sqrt(T)", list(plan.rate), y, -0.5, -0.5)


def batch_curves(problem: Problem, at: Tensor, plan: Plan) -> list[Curve]:
    def floors(dats: list[Dat]) -> Tensor:
        return torch.stack([tail(problem, at, dat) for dat in dats], dim=1)

    n, lr, loose = plan.steps, 0.002, 1e-4
    in_b = floors([Dat(n, lr, 4, b, loose) for b in plan.batches])
    in_m = floors([Dat(n, lr, m, 16, loose) for m in plan.workers])
    sgd = floors([Dat(n, 0.05, 4, b, loose, optimizer="sgd") for b in plan.sgd])
    in_lr = floors([Dat(n, r, 4, 16, loose) for r in plan.rates])
    of_b, of_m, of_sgd = ([float(m * b) for b in bs] for m, bs in
                          ((4, plan.batches), (16, plan.workers), (4, plan.sgd)))  # fmt: skip
    return [
        Curve("MB", "LAMB, M = 4, B varies", of_b, in_b, -0.5, -0.5, (16, np.inf)),
        Curve("MB", "LAMB, B = 16, M varies", of_m, in_m, -0.5, -0.5),
        Curve("MB", "SGD, M = 4, B varies", of_sgd, sgd),
        Curve("eta", "LAMB, M = 4, B = 16, eta varies", list(plan.rates), in_lr, 0.0, 0.0),
    ]


def quantiser_curves(problem: Problem, at: Tensor, plan: Plan) -> list[Curve]:
    """All data in four workers, so that quantising is all the noise there is."""
    x, y = (t.unflatten(1, (4, -1)) for t in (problem.x, problem.y))
    local = at.unsqueeze(1).expand(-1, 4, -1)
    g = problem.gradient(local, x, y)
    s = list(map(float, plan.bits))
    coarse, fine = (0, REGIME), (REGIME, 8)

    def variance(compress: Compressor) -> Tensor:
        """E||Q(g) - g||^2 / ||g||^2: [R]."""
        draws = [(compress(g) - g).square().sum(dim=-1) for _ in range(16)]
        return (torch.stack(draws).mean(dim=0) / g.square().sum(dim=-1)).mean(dim=1)

    def floor(up: Compressor, down: Compressor | None = None) -> Tensor:
        return tail(problem, at, Dat(plan.steps, 5e-4, 4, up=up, down=down))

    def ours(bits: int, **form: object) -> Compressor:
        return shipped(problem.seed, Quantizer(bits, compile=False, **form))

    paper = [whole(problem, b) for b in plan.bits]
    whole_variance = torch.stack([variance(q) for q in paper], dim=1)
    whole_floor = torch.stack([floor(q) for q in paper], dim=1)
    both = torch.stack([floor(whole(problem, b), whole(problem, b)) for b in plan.shipped], dim=1)
    curves = [
        Curve("variance", f"whole vector, b < {REGIME:.1f}", s, whole_variance, -1, -1, coarse),
        Curve("variance", f"whole vector, b > {REGIME:.1f}", s, whole_variance, -2, -2, fine),
        Curve("bits", f"whole vector, b < {REGIME:.1f}", s, whole_floor, -1, -0.5, coarse),
        Curve("bits", f"whole vector, b > {REGIME:.1f}", s, whole_floor, -2, -1, fine),
        Curve("bits", "whole vector, step 10 too", list(map(float, plan.shipped)), both),
    ]
    for name, form in {
        "whole vector, as shipped": {"norm": "l2", "block_size": None},
        "blocks of 256, as shipped": {"norm": "max"},
    }.items():
        b = list(map(float, plan.shipped))
        v = torch.stack([variance(ours(n, **form)) for n in plan.shipped], dim=1)
        f = torch.stack([floor(ours(n, **form)) for n in plan.shipped], dim=1)
        curves += [Curve("variance", name, b, v), Curve("bits", name, b, f)]
    return curves


def tolerance_curves(problem: Problem, at: Tensor, plan: Plan) -> list[Curve]:
    """All data, no quantiser; the error itself (A22), and the floor to which it leads."""
    x, y, errors, floors = problem.x, problem.y, [], []
    exact, _ = problem.true_gradient(at)
    for tolerance in plan.tolerances:
        delta = problem.maximise(at, x, y, tolerance)
        error = problem.gradient(at, x + delta, y) - exact
        errors.append(error.square().sum(dim=-1))
        floors.append(tail(problem, at, Dat(plan.steps, 1e-5, tolerance=tolerance)))
    t = list(plan.tolerances)
    return [
        Curve("tolerance", "floor of ||grad Psi||^2", t, torch.stack(floors, dim=1), 1, 1),
        Curve("tolerance", "gradient's squared error", t, torch.stack(errors, dim=1), None, 1),
    ]


def bound_of_batch(problem: Problem, at: Tensor, batch: int) -> float:
    """(A25)'s kappa sqrt(3) / C ||chi||_1 at MB = batch, with G no larger than what is seen."""
    x = problem.x + problem.maximise(at, problem.x, problem.y, 1e-8)
    rows = at.unsqueeze(1).expand(-1, x.shape[1], -1)
    each = problem.gradient(rows, x.unsqueeze(2), problem.y.unsqueeze(2))  # [R, N, d]
    chi = (each.var(dim=1) / batch).sqrt().sum(dim=-1).mean()
    g = each.norm(dim=-1).max()
    c = 0.25 * (3 * (1 - BETA2) / (g**2 * DIMENSION)) ** 0.5
    return float(CLAMP[1] / CLAMP[0] * 3**0.5 / c * chi)


def measure(plan: Plan, seed: int = 0) -> tuple[list[Curve], dict[str, float]]:
    """Every curve, and what else the page quotes."""
    problem = Problem(plan.replicas, seed=seed)
    start = problem.start()
    at = problem.stationary(start)
    curves = [rate_curve(problem, start, plan), *batch_curves(problem, at, plan)]
    curves += quantiser_curves(problem, at, plan) + tolerance_curves(problem, at, plan)
    facts = {"mu": min(problem.strong_concavity(start), problem.strong_concavity(at)),
             "gradient_at_start": float(problem.true_gradient(start)[0].square().sum(-1).mean()),
             "bound_256": bound_of_batch(problem, at, 256)}  # fmt: skip
    return curves, facts


def main(arguments: list[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, too few for conclusions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, help="folder of theorem1.md; figure and table go there"
    )
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--write: --quick is too small to be written; leave one of them out")
    torch.set_num_threads(1)
    begun = time.process_time()
    curves, facts = measure(QUICK if options.quick else Plan(), options.seed)
    from theorem1_figure import table, write

    facts["cpu_seconds"] = time.process_time() - begun
    print(table(curves, facts))
    if options.write:
        write(curves, facts, options.write)
    return curves


if __name__ == "__main__":
    main()
