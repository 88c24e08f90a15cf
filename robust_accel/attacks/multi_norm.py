"""The balls of several norms at once: the worst of them for each image, or one a step."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Len
from pydantic import AfterValidator
from torch import Tensor

from robust_accel.attacks.apgd import APGD
from robust_accel.attacks.base import Attack, LossFn
from robust_accel.attacks.pgd import PGD, Ball
from robust_accel.settings import Norm, Pixels, Settings, Whole


class NormBall(Ball):
    """A norm and its radius.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: In pixel units, > 0; L-inf: at most 1.
    """

    norm: Norm
    eps: Pixels


def _of_different_norms(balls: tuple[NormBall, ...]) -> tuple[NormBall, ...]:
    norms = [ball.norm for ball in balls]
    if twice := [norm for norm in norms if norms.count(norm) > 1]:
        raise ValueError(f"{twice[0]} is named twice, and one of its balls lies in the other")
    return balls


NormBalls = Annotated[tuple[NormBall, ...], Len(2), AfterValidator(_of_different_norms)]
"""Two at least, each of another norm."""


class MultiNorm(Settings):
    """Attacks within the balls of several norms.

    By ``max`` each image is attacked in every ball, and stays where its loss is largest: of three
    balls three attacks a step, and three forward passes. By ``random`` all images of a step are
    attacked in one ball, on all processes the same, which seed and step draw: the price of one
    attack. (In a loop of your own each call draws, by torch's generator.)

    Without an eps of its own it cannot grow by ``train.eps_schedule``.

    Args:
        balls: Norm and radius of each: ``[{norm: linf, eps: 8/255}, {norm: l1, eps: 12}]``.
        strategy: ``max`` or ``random``.
        by: The attack in each ball: ``apgd``, or ``pgd`` from a random start with steps by its
            rule, which is weak in L1.
        num_steps: Of each attack, >= 1.

    Source: ``max`` Tramer and Boneh 2019 (arXiv 1904.13000); ``random`` as "SAT" of Madaan et al.
    2021 (arXiv 2006.12135). E-AT of Croce and Hein 2022 (arXiv 2105.12508) is ``random`` of L-inf
    and L1, but that each is drawn as often as it breaks images.
    """

    balls: NormBalls
    strategy: Literal["max", "random"] = "random"
    by: Literal["apgd", "pgd"] = "apgd"
    num_steps: Annotated[Whole, Ge(1)] = 10

    @property
    def attacks(self) -> tuple[APGD | PGD, ...]:
        """One a ball."""
        kind = APGD if self.by == "apgd" else PGD
        return tuple(
            kind(norm=ball.norm, eps=ball.eps, num_steps=self.num_steps) for ball in self.balls
        )

    def of_step(self, generator: torch.Generator | None = None) -> Attack:
        """The attack of all images of a step: one that ``generator``, else torch's own, draws."""
        if self.strategy == "max":
            return self
        device = "cpu" if generator is None else generator.device
        number = torch.randint(len(self.balls), (), generator=generator, device=device)
        return self.attacks[int(number)]

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.strategy == "random":
            return self.of_step(generator)(loss_fn, x, generator=generator)
        found = [attack(loss_fn, x, generator=generator) for attack in self.attacks]
        with torch.no_grad():  # of equals, or where there is none, the first
            losses = torch.stack([loss_fn(x_adv).float() for x_adv in found])
        highest = losses.nan_to_num(nan=-torch.inf).argmax(dim=0)  # [B]
        return torch.stack(found)[highest, torch.arange(len(x), device=x.device)]


def of_step(attack: Attack, generator: torch.Generator) -> Attack:
    """What a step attacks with, on all processes alike: ``MultiNorm`` draws it, all others stay."""
    draw: Callable[[torch.Generator], Attack] | None = getattr(attack, "of_step", None)
    return attack if draw is None else draw(generator)
