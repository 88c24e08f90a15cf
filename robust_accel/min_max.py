"""Min-max problem (2) of DAT for whichever classifier is handed in: attack, then the outer loss."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_accel.attack_context import AttackMode, attack_context, is_whole
from robust_accel.attacks import Attack, MultiNorm, remembers
from robust_accel.attacks.base import gradients_seen
from robust_accel.attacks.norms import ORDERS, is_beyond, lengths
from robust_accel.objectives import AWP, Adversarial, Classifier, GradAlign, Objective, predicted
from robust_accel.settings import eps_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """What the first attacked batch of a process went through, measured.

    Attributes:
        images, moved: How many there were, and how many the attack has moved.
        norm, eps: The attack's ball, if it declares one; of several balls, ``multi-norm`` and 1.
        largest, median: Over the images, of their perturbation in that norm (L-inf if none); of
            several balls, as a share of the radius of the ball that it fills least.
        weights_moved: Tensors that weight perturbation has moved; None without it.
        non_finite: Images whose loss or gradient was NaN or infinite during the attack.
    """

    images: int
    moved: int
    norm: str
    eps: float | None
    largest: float
    median: float
    weights_moved: int | None = None
    non_finite: int = 0

    @classmethod
    def of(cls, attack: Any, x: Tensor, x_adv: Tensor) -> "Applied":
        """Measure a perturbation, x and x_adv: [B, C, H, W].

        Raises:
            RuntimeError: The attack should have moved the images and did not, or further than it
                promises (balls of other norms are not measured), or to where no number is.
        """
        if not x_adv.isfinite().all():
            raise RuntimeError(f"{attack!r} returned pixels that are NaN or infinite")
        norm, eps = str(getattr(attack, "norm", "linf")).lower(), getattr(attack, "eps", None)
        known = norm in ORDERS
        if isinstance(attack, MultiNorm):
            norm, eps, known = "multi-norm", 1.0, True
            shares = [lengths(x_adv - x, ball.norm) / ball.eps for ball in attack.balls]
            moves = torch.stack(shares).amin(dim=0)
        else:
            moves = lengths(x_adv - x, norm if known else "linf")
        largest, median = moves.max().item(), moves.median().item()
        moved = int((moves > 0).sum())
        found = cls(len(x), moved, norm if known else "linf", eps, largest, median)
        if eps is not None and not moved and not getattr(attack, "may_stay", False):
            raise RuntimeError(f"{attack!r} moved none of {len(x)} images")
        reach = getattr(attack, "reach", eps)
        if known and reach is not None and is_beyond(largest, reach):
            raise RuntimeError(
                f"{attack!r} moved an image by {largest:.4g} ({norm}), but promises {reach:.4g}"
            )
        return found

    def __str__(self) -> str:
        ball = "" if self.eps is None else f" of eps {self.eps:.4g}"
        text = (
            f"attacked {self.moved} of {self.images} images, {self.norm} perturbation{ball}: "
            f"median {self.median:.4g}, largest {self.largest:.4g}"
        )
        if self.weights_moved is not None:
            text += f"; {self.weights_moved} weight tensors perturbed"
        if self.non_finite:
            text += f"; {self.non_finite} images met gradients or losses that are not finite"
        return text


class MinMax:
    """The two levels of the problem; the classifier, pixels to logits, is each call's own.

    Args:
        attack: The inner maximisation (A1).
        objective: The outer loss; adversarial training (1) when not given.
        attack_mode: Mode of the classifier during the attack, see ``attack_context``.
        weight_perturbation: Take the outer loss at adversarial weights, too.

    Attributes:
        perturb_weights: Whether ``weight_perturbation`` is at work; a loop may start it later.
        calls: Batches attacked so far.
        applied: What happened to the first of them.
    """

    def __init__(
        self,
        attack: Attack,
        objective: Objective | None = None,
        *,
        attack_mode: AttackMode = "eval",
        weight_perturbation: AWP | None = None,
    ) -> None:
        if attack_mode not in ("eval", "train"):
            raise ValueError(f"attack_mode must be eval or train, got {attack_mode!r}")
        self.attack = attack
        self.objective: Objective = Adversarial() if objective is None else objective
        for part in (attack, self.objective):
            if kept := remembers(part):
                raise ValueError(
                    f"{part!r} keeps {kept} from step to step, which only robust-accel train can "
                    "tell it: train by a recipe, or choose another"
                )
        if (align := _alignment_of(self.objective)) is not None:
            align.within(attack)  # refused now, not at the first batch
        self.attack_mode: AttackMode = attack_mode
        self.weight_perturbation = weight_perturbation
        self.perturb_weights = weight_perturbation is not None
        self.calls = 0
        self.applied: Applied | None = None
        self._blind = False  # the gradient in the pixels was zero everywhere, so far
        self._non_finite = 0  # images of the batch that met such a gradient or loss
        for doubt in (getattr(attack, "fault", None), getattr(attack, "doubt", None)):
            if doubt is not None:
                logger.warning("%s: %s", type(attack).__name__, doubt)

    def loss(
        self,
        classifier: nn.Module,
        x: Tensor,
        labels: Tensor,
        *,
        num_labeled: float | None = None,
    ) -> dict[str, Tensor]:
        """Attack, then ``loss``, ``logits`` [B, K] at x_adv and the objective's named parts.

        Args:
            x: [B, C, H, W] in [0, 1].
            labels: [B] class indices, or [B, K] probabilities.
            num_labeled: Images with a label that a term over these is divided by, where the loss is
                averaged with others' (processes, micro-batches): their mean number. Those of
                ``labels`` when not given.
        """
        objective = self._of_batch(x)
        x_adv = self._first(classifier, objective, x, labels)
        options: dict[str, Any] = {}
        if num_labeled is not None and getattr(objective, "takes_unlabeled", False):
            options["num_labeled"] = num_labeled
        regularized = getattr(self.attack, "regularized", lambda _, out: out)

        def outer(model: nn.Module) -> dict[str, Tensor]:
            return regularized(model, objective.loss(model, x, x_adv, labels, **options))

        if getattr(objective, "grad_align", None) is not None:
            _refuse_shards(classifier, "GradAlign, which differentiates twice,")
        weights_moved, perturbed = None, classifier
        if self.weight_perturbation is not None and self.perturb_weights:
            _refuse_shards(classifier, "adversarial weight perturbation")
            _refuse_checkpoints(classifier)
            with attack_context(classifier, "train", freeze=False):
                perturbed = self.weight_perturbation(classifier, lambda: outer(classifier)["loss"])
            if self.applied is None:
                own = dict(classifier.named_parameters())
                weights_moved = sum(bool((w != own[n]).any()) for n, w in perturbed.moved.items())
        out = outer(perturbed)
        self._note(x, x_adv, weights_moved)
        return out

    def adversarial(self, classifier: nn.Module, x: Tensor, how: str) -> Tensor:
        """x_adv for a script that computes its loss itself: away from the own predictions.

        Raises:
            ValueError: The objective, or weight perturbation, is more than an attack; ``how`` tells
                how to pass labels.
        """
        asked = [] if self.objective == Adversarial() else [f"the objective {self.objective!r}"]
        asked += [] if self.weight_perturbation is None else [repr(self.weight_perturbation)]
        if asked:
            raise ValueError(
                f"{' and '.join(asked)} computes the loss, and needs labels: {how}; or keep the "
                "script's own loss with objective Adversarial() alone"
            )
        labels = self.predict(classifier, x).clamp(min=0)  # whatever NaN is taken for
        x_adv = self._first(classifier, self._of_batch(x), x, labels)
        self._note(x, x_adv, None)
        return x_adv

    def perturb(
        self,
        classifier: nn.Module,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Solve (A1): x [B, C, H, W] in [0, 1] -> x_adv of the same shape, detached."""
        return self._perturb(classifier, self._of_batch(x), x, labels, generator)

    @torch.no_grad()
    def predict(self, classifier: Classifier, x: Tensor) -> Tensor:
        """Predicted classes [B] of clean images, in the attack's mode; -1 where there is none."""
        assert isinstance(classifier, nn.Module)
        with attack_context(classifier, self.attack_mode):
            return predicted(classifier(x))

    def _perturb(
        self,
        classifier: nn.Module,
        objective: Objective,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with attack_context(classifier, self.attack_mode):
            loss_fn = objective.inner_loss(classifier, x, labels)
            return self.attack(loss_fn, x, generator=generator)

    def _first(
        self, classifier: nn.Module, objective: Objective, x: Tensor, labels: Tensor
    ) -> Tensor:
        """Attack; on the first batches see to it that there is a gradient to climb.

        Raises:
            RuntimeError: There was none on two batches (a zero-initialised head has none on one).
        """
        if self.applied is not None and not self._blind:
            return self._perturb(classifier, objective, x, labels)
        with gradients_seen() as seen:
            x_adv = self._perturb(classifier, objective, x, labels)
        self._non_finite = int(seen.non_finite(len(x)).sum())
        blind = seen.calls > 0 and not seen.any_nonzero
        if blind and self._blind:
            why = "zero everywhere; a model that rounds, detaches or saturates has none"
            if self._non_finite:
                why = f"zero or NaN everywhere (on {self._non_finite} images it is not finite)"
            raise RuntimeError(
                f"{self.attack!r} attacks nothing: the gradient of the loss in the pixels is {why}"
            )
        self._blind = blind
        return x_adv

    def _of_batch(self, x: Tensor) -> Objective:
        """The objective, with what it draws for this batch, in the ball of the attack as it is."""
        objective: Any = self.objective
        if (align := _alignment_of(objective)) is not None and align.eps is None:
            objective = objective.model_copy(update={"grad_align": align.within(self.attack)})
        for_batch = getattr(objective, "for_batch", None)
        return objective if for_batch is None else for_batch(x)

    def _note(self, x: Tensor, x_adv: Tensor, weights_moved: int | None) -> None:
        self.calls += 1
        if self.applied is None:
            if self._blind and torch.equal(x, x_adv):
                return  # the next batch tells
            found = Applied.of(self.attack, x, x_adv)
            self.applied = replace(found, weights_moved=weights_moved, non_finite=self._non_finite)
            logger.info("%s", self.applied)
            align = _alignment_of(self.objective)
            if align is not None and align.eps is not None and align.misfit(self.attack):
                logger.warning(
                    "GradAlign stays at eps %s while the attack's is another: grad_align.eps: null "
                    "(in a script None) is what the attack's is in each step",
                    eps_text(align.eps),
                )
            if self._non_finite:
                logger.warning(
                    "%d of %d images met gradients or losses in the first attack that are NaN or "
                    "infinite: pixels where they are NaN are not attacked; does the model divide, "
                    "or take a root or a logarithm, at black pixels?",
                    self._non_finite,
                    len(x),
                )


def _alignment_of(objective: Objective) -> GradAlign | None:
    return objective.grad_align if isinstance(objective, Adversarial) else None


def _refuse_shards(classifier: nn.Module, what: str) -> None:
    if not all(map(is_whole, classifier.parameters())):
        raise ValueError(
            f"{what} needs whole weights, got shards (FSDP or ZeRO 3): train by DDP or ZeRO 0 to "
            "2, or without it"
        )


def _refuse_checkpoints(classifier: nn.Module) -> None:
    """What is computed again in the backward pass would use the weights where they were."""
    flags = ("grad_checkpointing", "gradient_checkpointing")  # timm's, transformers'
    if any(getattr(m, flag, None) is True for m in classifier.modules() for flag in flags):
        raise ValueError(
            "adversarial weight perturbation does not go with gradient checkpointing, which runs "
            "blocks again when the weights are back: switch one of them off"
        )
