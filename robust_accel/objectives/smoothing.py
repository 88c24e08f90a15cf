"""Training for randomised smoothing: on noisy copies of the images, attacked or not."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from robust_accel.objectives.base import Classifier, cross_entropy_of
from robust_accel.settings import Number, Pixels, Settings, Whole


class Smoothing(Settings):
    """The mean loss over N noisy copies of each image, the same noise for attack and update.

    With ``attack.name: none`` it is Gaussian augmentation (Cohen et al. 2019), with an L2 attack
    SmoothAdv (Salman et al. 2019), and with ``consistency`` > 0 consistency regularisation (Jeong
    and Shin 2020). The attack climbs -log of the probability that the copies have on average.

    Args:
        sigma: Standard deviation of the noise in pixel units, > 0. Noisy pixels are not clamped,
            neither here nor in certification.
        num_noise: N, copies of an image; two at least where ``consistency`` compares them.
        consistency: lambda of Jeong and Shin, >= 0: adds lambda * KL(mean prediction || prediction)
            of each copy, and ``entropy`` times the entropy of the mean prediction.
        entropy: eta of Jeong and Shin, >= 0; without effect at ``consistency: 0``.
        label_smoothing: in [0, 1); of the outer loss only.
        copies_at_a_time: Send only so many copies through the model at once, forward and
            backward: the same gradient from less memory and one more forward. (BatchNorm in train
            mode then normalises over these copies alone.)

    Source: arXiv 1902.02918; arXiv 1906.04584, section 2.2; arXiv 2006.04062, equation (5). It is
    Smooth-AT of Table 2 in DAT.
    """

    takes_soft_labels: ClassVar[bool] = True

    sigma: Pixels
    num_noise: Annotated[Whole, Ge(1)] = 1
    consistency: Annotated[Number, Ge(0)] = 0.0
    entropy: Annotated[Number, Ge(0)] = 0.5
    label_smoothing: Annotated[Number, Ge(0), Lt(1)] = 0.0
    copies_at_a_time: Annotated[Whole, Ge(1)] | None = None

    @model_validator(mode="after")
    def _copies_to_compare(self) -> "Smoothing":
        if self.consistency > 0 and self.num_noise < 2:
            raise ValueError(
                f"consistency: {self.consistency:g} compares copies of an image with each other: "
                f"num_noise must be at least 2, not {self.num_noise}"
            )
        return self

    def for_batch(self, x: Tensor) -> "NoisyBatch":
        """The objective of one batch: its noise is drawn here, once."""
        noise = self.sigma * torch.randn(self.num_noise, *x.shape, device=x.device, dtype=x.dtype)
        return NoisyBatch(self, noise)

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """With noise of its own: a loop that wants the same for both calls ``for_batch``."""
        return self.for_batch(x).inner_loss(classifier, x, labels)

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """With noise of its own, see ``inner_loss``."""
        return self.for_batch(x).loss(classifier, x, x_adv, labels)


class NoisyBatch:
    """``Smoothing`` with its noise [N, B, C, H, W] fixed."""

    def __init__(self, settings: Smoothing, noise: Tensor) -> None:
        self.settings, self.noise = settings, noise

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        # the class that is judged is that of the copies' mean probability
        return cross_entropy_of(
            lambda x_adv: _mean_log_probability(self._logits(classifier, x_adv)), labels
        )

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        logits = self._logits(classifier, x_adv)  # [N, B, K]
        settings, copies = self.settings, len(logits)
        repeated = labels.repeat(copies, *[1] * (labels.ndim - 1))
        adv_loss = cross_entropy(
            logits.flatten(0, 1), repeated, label_smoothing=settings.label_smoothing
        )
        mean = _mean_log_probability(logits)
        result = {"loss": adv_loss, "logits": mean, "adv_loss": adv_loss.detach()}
        if settings.consistency > 0:
            log_p = log_softmax(logits, dim=2)
            divergence = (mean.exp() * (mean - log_p)).sum(dim=2).mean()
            entropy = -(mean.exp() * mean).sum(dim=1).mean()
            extra = settings.consistency * divergence + settings.entropy * entropy
            result |= {"loss": adv_loss + extra, "consistency_loss": extra.detach()}
        return result

    def _logits(self, classifier: Classifier, x: Tensor) -> Tensor:
        """Logits of all copies: [N, B, K]."""
        size = self.settings.copies_at_a_time or len(self.noise)
        if size >= len(self.noise):
            return _of_copies(classifier, x, self.noise)
        return torch.cat(
            [
                checkpoint(
                    _of_copies,
                    classifier,
                    x,
                    noise,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), _untracked(classifier)),
                )
                for noise in self.noise.split(size)
            ]
        )


def _of_copies(classifier: Classifier, x: Tensor, noise: Tensor) -> Tensor:
    copies = len(noise)
    return classifier((x + noise).flatten(0, 1)).unflatten(0, (copies, len(x)))


def _mean_log_probability(logits: Tensor) -> Tensor:
    """log of the softmax averaged over copies: [N, B, K] -> [B, K]."""
    return torch.logsumexp(log_softmax(logits, dim=2), dim=0) - torch.tensor(len(logits)).log()


def _untracked(classifier: Classifier) -> AbstractContextManager[None]:
    """What is computed again for the backward must not move BatchNorm's statistics again."""
    return _statistics_kept(classifier) if isinstance(classifier, nn.Module) else nullcontext()


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
