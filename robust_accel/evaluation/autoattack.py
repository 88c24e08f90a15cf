"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) by ``pyautoattack``, over many processes.

Its attacks run one after another, each on the images that have survived. Before each, survivors
are cut into units of about one size, a unit has its own seed, and units are dealt to the processes:
an image's fate does not depend on how many processes there are. Every unit's outcome is written
down when it is known, so that a killed evaluation goes on where it was.
"""

import logging
import time
from typing import Any, NamedTuple

import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor

from robust_accel.evaluation.bench import Attacker, Bench, Unit
from robust_accel.evaluation.outcomes import Collector, Outcomes, global_state_kept
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier

logger = logging.getLogger(__name__)

ATTACKS_OF = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "quick": ("apgd-ce", "apgd-t"),
    "rand": ("apgd-ce", "apgd-dlr"),  # for randomised models, gradients averaged over 20 draws
}
_MIN_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}  # the DLR losses rank so many logits
_MAX_TARGETS = 9
_L1 = {"restarts": 5, "targets": 5}  # of APGD-CE and of APGD-T: what upstream does in L1 alone
_SQUARE_GAIN = 0.002  # of accuracy: more of Square after the others is warned of, as upstream does


class Stage(NamedTuple):
    """One attack of the sequence."""

    attack: str
    bf16: bool  # searched in bf16; what counts is found in fp32 again


def stages_of(settings: EvaluateSettings) -> list[Stage]:
    """The sequence: the version's own in fp32, after a search in bf16 if that is asked for.

    A success of the search counts only where it holds in fp32, and whatever survives it is attacked
    by the whole sequence, so the verdict is one of fp32.
    """
    assert settings.autoattack is not None
    attacks = ATTACKS_OF[settings.autoattack]
    search = [a for a in attacks if a.startswith("apgd")] if settings.search == "bf16" else []
    return [Stage(a, bf16=True) for a in search] + [Stage(a, bf16=False) for a in attacks]


def check_classes(version: str | None, num_classes: int) -> None:
    """Refuse a version whose losses rank more classes than there are.

    Args:
        version: ``evaluate.autoattack``; None asks for nothing.
        num_classes: The classifier's logits.

    Raises:
        ValueError: ``evaluate.autoattack: ...``.
    """
    if version is None:
        return
    needed = max(_MIN_CLASSES.get(attack, 2) for attack in ATTACKS_OF[version])
    if num_classes < needed:
        raise ValueError(
            f"evaluate.autoattack: {version} needs at least {needed} classes (its loss ranks "
            f"them), the model has {num_classes}; set it to null"
        )


class AutoAttackEvaluation:
    """AutoAttack on the images that a classifier gets right.

    Args:
        settings: With ``autoattack``, the norm and eps.
        num_classes: The classifier's logits, among which targets are chosen, as upstream does.
    """

    def __init__(self, settings: EvaluateSettings, num_classes: int) -> None:
        self.settings, self.stages = settings, stages_of(settings)
        self._num_classes = num_classes
        assert settings.autoattack is not None
        self.about: dict[str, Any] = {
            "name": "autoattack",
            "version": settings.autoattack,
            "attacks": list(ATTACKS_OF[settings.autoattack]),
            "search": settings.search,
            "num_targets": self._num_targets("apgd-t"),
            "norm": settings.norm,
            "eps": settings.eps,
        }
        if self._is_thorough:
            self.about["apgd_restarts"] = _L1["restarts"]

    def run(self, bench: Bench, before: Outcomes) -> tuple[Outcomes, dict[str, Any]]:
        """Attack what is right.

        Returns:
            The outcomes, and about them: ``after``: the accuracy after each attack, and how many
            images it broke; ``warnings``: what the reference's checks say, which is logged, too;
            ``wall_seconds``: of this call, and of the units that a ledger knew, as if dealt to
            these processes.
        """
        outcomes, after, start = before, [], time.perf_counter()
        known = bench.seconds_known
        warnings: list[str] = []

        def warn(text: str) -> None:
            warnings.append(text)
            if bench.accelerator.is_main_process:
                logger.warning("autoattack: %s", text)

        for text in self._said(bench, before):
            warn(text)
        for stage in self.stages:
            name = stage.attack + (" (bf16)" if stage.bf16 else "")
            found = bench.attacked(self._attacker(stage), outcomes, even=True, title=name)
            broken = int((outcomes.right & ~found.right).sum())
            if stage.attack == "square" and outcomes.accuracy - found.accuracy > _SQUARE_GAIN:
                warn(
                    f"Square broke {broken} images that the gradient attacks had not: gradients "
                    "may be masked, and more queries or another attack may break more"
                )
            outcomes = found
            after.append({"attack": name, "accuracy": found.accuracy, "broken": broken})
            logger.info(
                "after %s: %.2f%% of %d images", name, 100 * found.accuracy, len(before.index)
            )
        known = bench.seconds_known - known
        seconds = time.perf_counter() - start + known / bench.accelerator.num_processes
        return outcomes, {"after": after, "warnings": warnings, "wall_seconds": seconds}

    def _attacker(self, stage: Stage) -> Attacker:
        settings = self.settings
        targets = self._num_targets(stage.attack)
        about = {**stage._asdict(), "name": stage.attack, "num_targets": targets}
        about |= {"norm": settings.norm, "eps": settings.eps, "eot": settings.autoattack == "rand"}

        def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
            attack = self._attack(classifier, stage.attack, seed, x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=stage.bf16):
                return attack.perturb(x.contiguous(), labels)

        return Attacker(about, perturb)

    def _attack(
        self, classifier: PixelClassifier, name: str, seed: int, device: torch.device
    ) -> Any:
        """One of the reference's attacks with the parameters of its versions."""
        settings, suite = self.settings, _suite(classifier, self.settings, seed, device)
        # what version="standard" sets, for any number of classes
        suite.apgd.n_restarts = suite.fab.n_restarts = 1
        suite.fab.targeted = True
        for own, attack in (("apgd-t", suite.apgd_targeted), ("fab-t", suite.fab)):
            attack.n_target_classes = self._num_targets(own)
        if self._is_thorough:
            suite.apgd.n_restarts = _L1["restarts"]
            suite.apgd.use_largereps = suite.apgd_targeted.use_largereps = True
        suite.apgd.loss = name.removeprefix("apgd-")
        if settings.autoattack == "rand":
            suite.apgd.eot_iter = 20
        return {"apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}.get(
            name, suite.apgd
        )

    @property
    def _is_thorough(self) -> bool:
        """Whether it is the version of L1, which begins with larger balls."""
        return self.settings.norm == "l1" and self.settings.autoattack != "rand"

    def _num_targets(self, attack: str) -> int:
        """Of the classes, how many a targeted attack tries."""
        is_less = self._is_thorough and attack == "apgd-t"
        return min(_L1["targets"] if is_less else _MAX_TARGETS, self._num_classes - 1)

    def _said(self, bench: Bench, before: Outcomes) -> list[str]:
        """The reference's checks: randomised, probabilities for logits, gradients in forward."""

        def compute(unit: Unit, x: Tensor, labels: Tensor) -> dict[str, Any]:
            said: list[str] = []
            logger, classifier = Collector(said), bench.classifier
            with global_state_kept():
                if self.settings.autoattack != "rand":
                    checks.check_randomized(classifier, x, labels, bs=len(x), logger=logger)
                checks.check_range_output(classifier, x, logger=logger)
                checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it counts for ever
                checks.check_dynamic(classifier, x, False, logger=logger)
            return {"said": said}

        unit = Unit(0, before.index[: bench.batch_size])
        about = {"name": "checks", "rand": self.settings.autoattack == "rand"}
        return bench.share(about, [unit], compute, "checks")[0]["said"]


def _suite(
    classifier: PixelClassifier, settings: EvaluateSettings, seed: int, device: torch.device
) -> AutoAttack:
    return AutoAttack(
        classifier,
        norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[settings.norm or ""],
        eps=settings.eps,
        version="custom",
        seed=seed,
        device=device,
    )


def square_attack(settings: EvaluateSettings, num_queries: int) -> Attacker:
    """The reference's Square alone: it needs no gradient."""

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        square = _suite(classifier, settings, seed, x.device).square
        square.n_queries = num_queries
        return square.perturb(x.contiguous(), labels)

    about = {"name": "square", "n_queries": num_queries}
    return Attacker(about | {"norm": settings.norm, "eps": settings.eps}, perturb)
