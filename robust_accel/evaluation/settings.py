"""The recipe's ``evaluate`` section."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from robust_accel.attacks import PGD
from robust_accel.settings import Norm, Number, Settings


class PGDSettings(Settings):
    """PGD of the evaluation.

    Args:
        num_steps: Steps of a restart.
        step_size: In pixel units; eps / 4 when not given.
        restarts: Random starts; an image counts as robust if it survives all.
    """

    num_steps: Annotated[int, Ge(1)] = 20
    step_size: Annotated[Number, Gt(0)] | None = None
    restarts: Annotated[int, Ge(1)] = 1


class SweepSettings(Settings):
    """PGD at several radii and numbers of steps, in one pass each (Figure 3 of DAT).

    An image that is broken at one point counts as broken at all larger ones, and is not attacked
    there again: both curves can only fall.

    Args:
        eps: Radii in pixel units, with ``evaluate.pgd``'s steps of eps / 4.
        num_steps: Numbers of steps at the threat model's eps, with its step size.
    """

    eps: tuple[Annotated[Number, Gt(0)], ...] = ()
    num_steps: tuple[Annotated[int, Ge(1)], ...] = ()


class SanitySettings(Settings):
    """Checks for numbers that are too good, see ``evaluation/sanity.py``.

    Args:
        images: The first so many test images.
        transfer_from: A run or timm model whose adversarial images are tried on this one.
    """

    images: Annotated[int, Ge(1)] = 200
    transfer_from: str | None = None


class EvaluateSettings(Settings):
    """How a model is measured.

    Args:
        norm, eps: The threat model; the training attack's when not given.
        pgd: Null leaves PGD out.
        sweep: PGD accuracy against eps and against the number of steps, see ``SweepSettings``.
        autoattack: ``standard`` (APGD-CE, APGD-T, FAB-T, Square), ``quick`` (APGD-CE, APGD-T),
            ``rand`` (APGD-CE and APGD-DLR averaged over 20 draws, for randomised models), or null
            to leave it out.
        search: ``bf16`` lets AutoAttack's gradient attacks search in bf16 first. Successes count
            where they hold in fp32, and survivors are attacked in fp32 by the whole sequence.
        sanity: True, or ``SanitySettings``: checks for numbers that are too good.
        images: Measure clean and PGD accuracy on the first so many test images, all when null.
        autoattack_images: The same for AutoAttack; ``images`` when null.
        train_images: Measure clean and PGD accuracy on so many training images, too: the gap.
        ids: The test images that are measured, instead of all: their row numbers, a file with one a
            line (or names of image files), or ``robustbench/imagenet5000``.
        draws: Forward passes by which a randomised model is judged; found to be one, it has 20.
        batch_size: Images a unit of work; each unit has its own seed, so that results do not
            depend on the number of processes.
        seed: Of the attacks.
    """

    norm: Norm | None = None
    eps: Annotated[Number, Gt(0)] | None = None
    pgd: PGDSettings | None = PGDSettings()
    sweep: SweepSettings | None = None
    autoattack: Literal["standard", "quick", "rand"] | None = None
    search: Literal["fp32", "bf16"] = "fp32"
    sanity: bool | SanitySettings = False
    images: Annotated[int, Ge(1)] | None = None
    autoattack_images: Annotated[int, Ge(1)] | None = None
    train_images: Annotated[int, Ge(1)] | None = None
    ids: str | tuple[Annotated[int, Ge(0)], ...] | None = None
    draws: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 250
    seed: Annotated[int, Ge(0)] = 0

    def with_threat_model_of(self, attack: Any) -> "EvaluateSettings":
        """Fill norm and eps from the training attack where they were left out."""
        norm = self.norm or getattr(attack, "norm", "linf")
        eps = self.eps or getattr(attack, "eps", None)
        return self.model_copy(update={"norm": norm, "eps": eps})

    @property
    def sanity_settings(self) -> SanitySettings:
        return SanitySettings() if isinstance(self.sanity, bool) else self.sanity

    def make_pgd(
        self, num_steps: int, step_size: float | None = None, eps: float | None = None
    ) -> PGD:
        """PGD with this threat model, or another radius; steps of a quarter of it if not given."""
        eps = self.eps if eps is None else eps
        assert self.norm is not None and eps is not None
        step_size = eps / 4 if step_size is None else step_size
        return PGD(norm=self.norm, eps=eps, step_size=step_size, num_steps=num_steps)
