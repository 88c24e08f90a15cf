"""The recipe's ``evaluate`` section."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from robust_accel.attacks import PGD
from robust_accel.settings import Norm, Number, Settings


class PGDSettings(Settings):
    """PGD of the evaluation: ``num_steps`` steps of ``step_size`` (eps / 4 when not given)."""

    num_steps: Annotated[int, Ge(1)] = 20
    step_size: Annotated[Number, Gt(0)] | None = None


class EvaluateSettings(Settings):
    """How a model is measured.

    Args:
        norm, eps: The threat model; the training attack's when not given.
        pgd: Null leaves PGD out.
        autoattack: ``standard`` (APGD-CE, APGD-T, FAB-T, Square), ``quick`` (APGD-CE, APGD-T),
            ``rand`` (APGD-CE and APGD-DLR averaged over 20 draws, for randomised models), or null
            to leave it out.
        search: ``bf16`` lets AutoAttack's gradient attacks search in bf16 first. Successes count
            where they hold in fp32, and survivors are attacked in fp32 by the whole sequence.
        images: Measure clean and PGD accuracy on the first so many test images, all when null.
        autoattack_images: The same for AutoAttack; ``images`` when null.
        batch_size: Images a unit of work; each unit has its own seed, so that results do not
            depend on the number of processes.
        seed: Of the attacks.
    """

    norm: Norm | None = None
    eps: Annotated[Number, Gt(0)] | None = None
    pgd: PGDSettings | None = PGDSettings()
    autoattack: Literal["standard", "quick", "rand"] | None = None
    search: Literal["fp32", "bf16"] = "fp32"
    images: Annotated[int, Ge(1)] | None = None
    autoattack_images: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 250
    seed: Annotated[int, Ge(0)] = 0

    def with_threat_model_of(self, attack: Any) -> "EvaluateSettings":
        """Fill norm and eps from the training attack where they were left out."""
        norm = self.norm or getattr(attack, "norm", "linf")
        eps = self.eps or getattr(attack, "eps", None)
        return self.model_copy(update={"norm": norm, "eps": eps})

    def make_pgd(self, num_steps: int, step_size: float | None = None) -> PGD:
        """PGD with this threat model."""
        assert self.norm is not None and self.eps is not None
        step_size = self.eps / 4 if step_size is None else step_size
        return PGD(norm=self.norm, eps=self.eps, step_size=step_size, num_steps=num_steps)
