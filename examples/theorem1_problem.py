"""A min-max problem on which Theorem 1's assumptions hold, and Algorithm A1 on it; see theorem1.py.

Two layers of tanh, the logistic loss, a ridge, and a quadratic price on the perturbation::

    phi(theta, delta; x, y) = log(1 + exp(-y f(x + delta))) + ridge/2 ||theta||^2
                              - gamma/2 ||delta||^2,      f(x) = a . tanh(W x + b)

It is smooth in theta (A1, A2), and mu-strongly concave in delta where gamma is larger than the
loss's curvature in x (Sinha et al. 2018, arXiv 1710.10571), which ``strong_concavity`` measures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robust_accel import LAMB

INPUTS, HIDDEN = 16, 32
SIZES = {"W": HIDDEN * INPUTS, "b": HIDDEN, "a": HIDDEN}  # h = 3 layers
DIMENSION = sum(SIZES.values())  # d
CLAMP = (0.1, 10.0)  # c_l, c_u: the paper's experiments have c_l = 0, for which kappa is infinite
BETA2 = 0.99  # beta1 = 0, as the proof has it
EXACT = 1e-10  # the tolerance by which grad Psi is measured

Compressor = Callable[[Tensor], Tensor]
"""[..., d] -> [..., d], each vector's unbiased estimate."""


@dataclass
class Problem:
    """So many independent problems side by side, each with its own data, all in float64.

    Args:
        replicas: R, how many; a mean over them has an interval.
        images: N of each.
        seed: Of the data and of all that is drawn later.
    """

    replicas: int
    images: int = 64
    seed: int = 0
    gamma: float = 8.0
    radius: float = 0.05  # the paper's epsilon of ||delta||_inf
    ridge: float = 0.02
    flipped: float = 0.2  # of the labels: gradients keep a variance where their mean is zero
    x: Tensor = field(init=False)  # [R, N, n]
    y: Tensor = field(init=False)  # [R, N], -1 or 1

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.x = self.normal(self.replicas, self.images, INPUTS)
        teacher = self.normal(self.replicas, INPUTS, 1)
        clean = (self.x @ teacher).squeeze(-1).sign()
        self.y = torch.where(self.uniform(*clean.shape) < self.flipped, -clean, clean)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def start(self) -> Tensor:
        """Random weights [R, d]."""
        w = self.normal(self.replicas, SIZES["W"]) / INPUTS**0.5
        a = self.normal(self.replicas, SIZES["a"]) / HIDDEN**0.5
        return torch.cat([w, torch.zeros_like(a), a], dim=-1)

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """theta: [..., d], x: [..., B, n], y: [..., B] -> [..., B]."""
        w, b, a = layers(theta)
        hidden = torch.tanh(x @ w.mT + b.unsqueeze(-2))
        f = (hidden @ a.unsqueeze(-1)).squeeze(-1)
        return softplus(-y * f) + self.ridge / 2 * theta.square().sum(dim=-1, keepdim=True)

    def input_gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The loss's in x, [..., B, n], by hand: autograd takes thrice as long."""
        w, b, a = layers(theta)
        hidden = torch.tanh(x @ w.mT + b.unsqueeze(-2))  # [..., B, H]
        f = (hidden @ a.unsqueeze(-1)).squeeze(-1)
        slope = -y * torch.sigmoid(-y * f)
        return slope.unsqueeze(-1) * (((1 - hidden.square()) * a.unsqueeze(-2)) @ w)

    def maximise(
        self, theta: Tensor, x: Tensor, y: Tensor, tolerance: float, delta: Tensor | None = None
    ) -> Tensor:
        """(A1) by projected gradient ascent, delta [..., B, n].

        Each sample ends where its gradient's norm (in the box's corners, that of the projected
        step) is at most the tolerance: the "epsilon-approximate solution" of Theorem 1.
        """
        delta = torch.zeros_like(x) if delta is None else delta
        while True:
            step = self.input_gradient(theta, x + delta, y) / self.gamma - delta
            moved = (delta + step).clamp(-self.radius, self.radius)
            residual = self.gamma * (moved - delta).norm(dim=-1, keepdim=True)
            going = residual > tolerance
            if not going.any():
                return delta
            delta = torch.where(going, moved, delta)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Mean gradient in theta [..., d] at perturbed x [..., B, n]: (A2) with lambda = 0."""
        theta = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(theta, x, y).mean(dim=-1).sum(), theta)
        return grad

    def true_gradient(self, theta: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """grad Psi [R, d], by all data and the exact maximiser, and the latter [R, N, n]."""
        delta = self.maximise(theta, self.x, self.y, EXACT, delta)
        return self.gradient(theta, self.x + delta, self.y), delta

    def strong_concavity(self, theta: Tensor) -> float:
        """mu at the maximisers: gamma less the loss's largest curvature in x + delta."""
        x = self.x + self.maximise(theta, self.x, self.y, EXACT)
        curvature = torch.func.hessian(lambda x, y, row: self.loss(row, x[None], y[None])[0])
        hessians = [
            torch.func.vmap(curvature, in_dims=(0, 0, None))(x[r], self.y[r], theta[r])
            for r in range(self.replicas)
        ]
        return self.gamma - float(torch.linalg.eigvalsh(torch.stack(hessians)).max())

    def stationary(self, theta: Tensor) -> Tensor:
        """A stationary point of Psi near theta, by L-BFGS."""
        theta, delta = theta.clone(), None

        def psi() -> Tensor:
            nonlocal delta
            theta.grad, delta = self.true_gradient(theta, delta)
            price = self.gamma / 2 * delta.square().sum(dim=-1)
            return (self.loss(theta, self.x + delta, self.y) - price).mean(dim=-1).sum()

        torch.optim.LBFGS(
            [theta],
            max_iter=600,
            history_size=50,
            tolerance_grad=1e-7,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        ).step(psi)
        return theta


def layers(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views W [..., H, n], b [..., H] and a [..., H] of theta [..., d]."""
    w, b, a = theta.split(list(SIZES.values()), dim=-1)
    return w.unflatten(-1, (HIDDEN, INPUTS)), b, a


def leaves(theta: Tensor) -> list[Tensor]:
    """The layers of all replicas, each a tensor of its own for an optimizer: views."""
    return [layer for row in theta.unbind() for layer in layers(row)]


@dataclass(frozen=True)
class Dat:
    """Algorithm A1's settings."""

    steps: int  # T
    lr: float  # eta
    workers: int = 1  # M, each with N / M of the data
    batch: int | None = None  # B of each worker, drawn with replacement; None: all that it has
    tolerance: float = 1e-6  # of the inner maximiser
    up: Compressor | None = None  # step 7, of what workers send
    down: Compressor | None = None  # step 10, of the mean
    optimizer: Literal["lamb", "sgd"] = "lamb"


def train(problem: Problem, theta: Tensor, dat: Dat, every: int = 1) -> Tensor:
    """Run Algorithm A1 on each replica, its workers one after another.

    Returns:
        ||grad Psi(theta_t)||^2 [R, measured], at t = 0, every, 2 every, ... < T.
    """
    m = dat.workers
    x_all = problem.x.unflatten(1, (m, -1))  # [R, M, N / M, n]
    y_all = problem.y.unflatten(1, (m, -1))
    x, y, delta, exact = x_all, y_all, None, None
    theta, grad, found = theta.clone(), torch.zeros_like(theta), []
    optimizer = _optimizer(theta, grad, dat)
    for t in range(dat.steps):
        if t % every == 0:
            true, exact = problem.true_gradient(theta, exact)
            found.append(true.square().sum(dim=-1))
        if dat.batch is not None:
            size = (*y_all.shape[:2], dat.batch)
            index = torch.randint(y_all.shape[2], size, generator=problem.generator)
            x = x_all.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, INPUTS))
            y, delta = y_all.gather(2, index), None
        local = theta.unsqueeze(1).expand(-1, m, -1)  # [R, M, d]
        delta = problem.maximise(local, x, y, dat.tolerance, delta)
        sent = problem.gradient(local, x + delta, y)
        if dat.up is not None:
            sent = dat.up(sent)  # step 7
        mean = sent.mean(dim=1)  # (A3)
        grad.copy_(mean if dat.down is None else dat.down(mean))  # step 10
        optimizer.step()  # (A4)
    return torch.stack(found, dim=1)


def _optimizer(theta: Tensor, grad: Tensor, dat: Dat) -> torch.optim.Optimizer:
    params = leaves(theta)
    for param, g in zip(params, leaves(grad), strict=True):
        param.grad = g
    if dat.optimizer == "sgd":
        return torch.optim.SGD(params, lr=dat.lr)
    return LAMB(params, lr=dat.lr, betas=(0.0, BETA2), weight_norm_clamp=CLAMP, foreach=True)
