"""The recipe's ``evaluate`` section."""

from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Len
from pydantic import ValidationInfo, field_validator, model_validator

from robust_accel.attacks import PGD, MultiNorm, NormBall, NormBalls
from robust_accel.attacks.steps import default_step, unfit_step
from robust_accel.objectives import AttackLoss
from robust_accel.settings import (
    Flag,
    Norm,
    Number,
    OptionalPixels,
    PathText,
    RowNumbers,
    Settings,
    Whole,
    default,
)


class PGDSettings(Settings):
    """PGD of the evaluation.

    Args:
        attack: ``pgd``, or ``apgd``, which chooses its own step lengths, see ``APGD``.
        loss: What it climbs: ``cross_entropy``, ``cw`` (PGD on this is what papers call CW-20) or
            ``dlr``, see ``climbed``.
        num_steps: Steps of a restart.
        step_size: In pixel units; when not given eps / 4, and 2.5 eps / num_steps, at most eps,
            below ten steps. Steps that cannot reach the ball's edge are refused, and such that leap
            over it (longer than 2 eps).
        restarts: Random starts; an image counts as robust if it survives all.
    """

    attack: Literal["pgd", "apgd"] = "pgd"
    loss: AttackLoss = "cross_entropy"
    num_steps: Annotated[Whole, Ge(1)] = 20
    step_size: OptionalPixels = default(None)
    restarts: Annotated[Whole, Ge(1)] = 1

    @field_validator("step_size")
    @classmethod
    def _of_a_step(cls, step_size: float | None, info: ValidationInfo) -> float | None:
        if step_size is not None and info.data.get("attack") == "apgd":
            raise ValueError("apgd chooses the lengths of its steps: leave it out")
        return step_size


class SweepSettings(Settings):
    """PGD at several radii and numbers of steps, in one pass each (Figure 3 of DAT).

    An image that is broken at one point counts as broken at all larger ones, and is not attacked
    there again: both curves can only fall.

    Args:
        eps: Radii in pixel units, with ``evaluate.pgd``'s number of steps; their length is that of
            the rule there.
        num_steps: Numbers of steps at the threat model's eps, of ``evaluate.pgd``'s step size.
    """

    eps: tuple[Annotated[Number, Gt(0)], ...] = ()
    num_steps: tuple[Annotated[Whole, Ge(1)], ...] = ()


class SanitySettings(Settings):
    """Checks for numbers that are too good, see ``evaluation/sanity.py``.

    Args:
        images: The first so many test images.
        transfer_from: A run or timm model whose adversarial images are tried on this one; of
            ``robust-accel evaluate``, not of a training.
    """

    images: Annotated[Whole, Ge(1)] = 200
    transfer_from: PathText | None = None


Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate",
]  # fmt: skip
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)[:15]
"""The benchmark's; the others are meant for validation."""
SEVERITIES = (1, 2, 3, 4, 5)


class CorruptionSettings(Settings):
    """Error on images that noise, blur, weather and compression have corrupted.

    Args:
        path: Published images: a folder with ``NAME.npy`` of each corruption (its severities one
            after another) and ``labels.npy``, as CIFAR-10-C; or with ``NAME/SEVERITY/CLASS/IMAGE``,
            as ImageNet-C. Not given: the test images are corrupted here, by the package
            ``imagecorruptions-imaug`` (``pip install -e ".[corruptions]"``), whose images are not
            the published ones.
        names: Of the corruptions; the fifteen of the benchmark unless given.
        severities: From 1 to 5.
        images: The first so many images of each severity; ``evaluate.images`` when not given.
        reference: The error of another model for each corruption, a share, mean over the five
            severities: then the mean corruption error relative to that model (mCE) is told, too.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261.
    """

    path: PathText | None = None
    names: Annotated[tuple[Corruption, ...], Len(1)] = CORRUPTIONS
    severities: Annotated[tuple[Annotated[Whole, Ge(1), Le(5)], ...], Len(1)] = SEVERITIES
    images: Annotated[Whole, Ge(1)] | None = None
    reference: dict[str, Annotated[Number, Gt(0), Le(1)]] | None = None

    @field_validator("names", "severities")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{twice[0]} is named twice")
        return values

    @model_validator(mode="after")
    def _comparable(self) -> "CorruptionSettings":
        if self.reference is None:
            return self
        if lacking := [name for name in self.names if name not in self.reference]:
            raise ValueError(f"reference: there is no error of {lacking[0]}, which is measured")
        if sorted(self.severities) != list(SEVERITIES):
            raise ValueError(
                f"reference: mCE is over the severities 1 to 5, not {list(self.severities)}"
            )
        return self


class EvaluateSettings(Settings):
    """How a model is measured.

    Args:
        norm, eps: The threat model; the training attack's when not given.
        balls: Several threat models in the place of these, as of the attack ``multi-norm``, whose
            they are when nothing is given: ``[{norm: linf, eps: 8/255}, {norm: l1, eps: 12}]``.
            Each attack is done in each, and beside its accuracies stands that of their union: an
            image counts if it withstands all.
        pgd: Null leaves PGD out.
        sweep: PGD accuracy against eps and against the number of steps, see ``SweepSettings``.
        autoattack: ``standard`` (APGD-CE, APGD-T, FAB-T, Square), ``quick`` (APGD-CE, APGD-T),
            ``rand`` (APGD-CE and APGD-DLR averaged over 20 draws, for randomised models), or null
            to leave it out. Its losses rank classes: at least four are needed (``rand``: three).
        search: ``bf16`` lets AutoAttack's gradient attacks search in bf16 first, which is faster on
            devices that compute in it. Successes count where they hold in fp32, and survivors are
            attacked in fp32 by the whole sequence.
        sanity: True, or ``SanitySettings``: checks for numbers that are too good.
        corruptions: True, or ``CorruptionSettings``: error on corrupted images.
        images: Measure clean and PGD accuracy on the first so many test images, all when null.
        autoattack_images: The same for AutoAttack; ``images`` when null.
        train_images: Measure clean and PGD accuracy on so many training images, too: the gap.
        ids: The test images that are measured, instead of all: their row numbers, a file with one a
            line (or names of image files), or ``robustbench/imagenet5000``.
        draws: Forward passes by which a randomised model is judged; found to be one, it has 21.
        batch_size: Images a unit of work; each unit has its own seed, so that results do not
            depend on the number of processes.
        seed: Of the attacks.
    """

    norm: Norm | None = None
    eps: OptionalPixels = default(None)
    balls: NormBalls | None = None
    pgd: PGDSettings | None = PGDSettings()
    sweep: SweepSettings | None = None
    autoattack: Literal["standard", "quick", "rand"] | None = None
    search: Literal["fp32", "bf16"] = "fp32"
    sanity: Flag | SanitySettings = False
    corruptions: Flag | CorruptionSettings = False
    images: Annotated[Whole, Ge(1)] | None = None
    autoattack_images: Annotated[Whole, Ge(1)] | None = None
    train_images: Annotated[Whole, Ge(1)] | None = None
    ids: PathText | RowNumbers | None = None
    draws: Annotated[Whole, Ge(1)] | None = None
    batch_size: Annotated[Whole, Ge(1)] = 250
    seed: Annotated[Whole, Ge(0)] = 0

    def with_threat_model_of(self, attack: Any) -> "EvaluateSettings":
        """Fill norm and eps, or balls, from the training attack where they were left out.

        Eps stays None where neither says it.

        Raises:
            ValueError: ``key: ...``: there is no such ball, or PGD's steps are none of this one.
        """
        balls = self.balls
        if self.norm is None and self.eps is None:
            balls = balls or (attack.balls if isinstance(attack, MultiNorm) else None)
        elif balls is not None:
            raise ValueError(
                "balls: norms and radii stand there: leave out (null) norm and eps, or balls"
            )
        if balls is not None:
            return self._with_balls(balls)
        own = str(getattr(attack, "norm", "linf")).lower()
        norm = self.norm or own
        if norm not in get_args(Norm):
            allowed = " or ".join(get_args(Norm))
            raise ValueError(f"norm: the attack's, {own!r}, cannot be measured: give {allowed}")
        eps = self.eps or getattr(attack, "eps", None)
        if eps is not None and self.eps is None and norm != own:
            raise ValueError(f"eps: missing: the attack's {eps:.4g} is one of {own}, not of {norm}")
        filled = self.model_copy(update={"norm": norm, "eps": eps})
        if eps is not None:
            filled._check_pgd()
        return filled

    def _with_balls(self, balls: tuple[NormBall, ...]) -> "EvaluateSettings":
        """Of several threat models; what is of one alone is refused."""
        if self.sweep is not None:
            raise ValueError("sweep: its radii are of one norm: give norm and eps, not balls")
        if self.pgd is not None and self.pgd.step_size is not None:
            raise ValueError(
                f"pgd.step_size: {self.pgd.step_size:.4g} is a length in one norm: leave it out "
                "for several balls"
            )
        filled = self.model_copy(update={"balls": balls})
        for one in filled.threat_models():
            one._check_pgd()
        return filled

    def threat_models(self) -> list["EvaluateSettings"]:
        """These settings for each threat model by itself: with a norm and an eps."""
        if self.balls is None:
            return [self]
        return [
            self.model_copy(update={"balls": None, "norm": ball.norm, "eps": ball.eps})
            for ball in self.balls
        ]

    def _check_pgd(self) -> None:
        """All that ``make_pgd`` will be asked for, before anything is spent."""
        sweep = self.sweep or SweepSettings()
        radii = [("eps", self.eps or 0), *(("sweep.eps", eps) for eps in sweep.eps)]
        for key, eps in radii:
            if self.norm == "linf" and eps > 1:
                raise ValueError(
                    f"{key}: {eps} is not allowed: in pixel units an L-inf eps is at most 1, "
                    "like 8/255"
                )
        if self.pgd is None:
            return
        self.make_pgd(self.pgd.num_steps, self.pgd.step_size)
        for num_steps in sweep.num_steps:
            try:
                self.make_pgd(num_steps, self.pgd.step_size)
            except ValueError as error:
                raise ValueError(f"sweep.num_steps: {num_steps} is not allowed: {error}") from None

    @property
    def sanity_settings(self) -> SanitySettings:
        return SanitySettings() if isinstance(self.sanity, bool) else self.sanity

    @property
    def corruption_settings(self) -> CorruptionSettings:
        return CorruptionSettings() if isinstance(self.corruptions, bool) else self.corruptions

    @model_validator(mode="after")
    def _published_are_whole(self) -> "EvaluateSettings":
        if self.ids is not None and self.corruption_settings.path is not None:
            raise ValueError(
                "corruptions.path: evaluate.ids lists test images, not those that are published "
                "corrupted: leave one out (corruptions.images takes the first so many)"
            )
        return self

    def make_pgd(
        self, num_steps: int, step_size: float | None = None, eps: float | None = None
    ) -> PGD:
        """PGD with this threat model, or another radius.

        Args:
            step_size: In pixel units; by the rule of ``PGDSettings`` when not given.

        Raises:
            ValueError: ``pgd.step_size: ...``: it is none for this ball.
        """
        eps = self.eps if eps is None else eps
        assert self.norm is not None and eps is not None
        rule = max(eps / 4, default_step(num_steps, eps))
        given = rule if step_size is None else step_size
        fault = unfit_step(num_steps, given, eps, rule)
        if fault is not None:
            raise ValueError(f"pgd.step_size: {fault}")
        return PGD(norm=self.norm, eps=eps, step_size=given, num_steps=num_steps)
