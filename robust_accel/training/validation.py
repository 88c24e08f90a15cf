"""What a validation measures: the held-out split as it is, under attack, and after one step."""

from typing import NamedTuple

from accelerate import Accelerator

from robust_accel.attacks import PGD
from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import attacker_of, under_attack
from robust_accel.evaluation.bench import Attacker, Bench
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier
from robust_accel.recipe import Recipe
from robust_accel.training.accelerator import broadcast_all
from robust_accel.training.collapse import HELD_OUT, RAW
from robust_accel.training.shards import Shards

_RAW_IMAGES = 500  # by which a collapse is seen


class Measured(NamedTuple):
    """What became of the held-out images; of several balls, in all of them together."""

    clean: Outcomes
    robust: Outcomes
    one_step: Outcomes

    def line(self, prefix: str) -> dict[str, float]:
        """For ``metrics.jsonl``: ``PREFIX_robust_accuracy``, and so on."""
        return {f"{prefix}_{name}_accuracy": one.accuracy for name, one in self._asdict().items()}


class Validation:
    """Measures a run's weights on its held-out split.

    By ``evaluate``'s threat model and attack, of ``train.validation_steps`` steps and one start;
    and by one step from the image itself to the ball's edge (FGSM), at the price of two passes: by
    how much more that leaves, a collapse shows, see ``collapse.py``.

    Args:
        recipe: With ``train``.
        images: The held-out split.
        classifier: The network that is trained; under FSDP2 in pieces.
        averaged: With the averaged weights, if there are such.
        shards: By which both are cut, under FSDP2.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSet,
        accelerator: Accelerator,
        classifier: PixelClassifier,
        averaged: PixelClassifier | None,
        shards: Shards | None,
    ) -> None:
        assert recipe.train is not None
        self._settings, self._num_steps = recipe.evaluate, recipe.train.validation_steps
        self._images, self._accelerator = images, accelerator
        self._classifier, self._averaged, self._shards = classifier, averaged, shards

    def weights(self, *, raw: bool = False) -> PixelClassifier:
        """The averaged weights if there are any, with one process's BatchNorm statistics.

        Args:
            raw: Those that are trained in any case.
        """
        if self._shards is not None:
            classifier = self._shards.whole(raw=raw)
        else:
            classifier = self._classifier if raw or self._averaged is None else self._averaged
        # each process updates its own statistics; the first one's count, as in DDP's forward
        broadcast_all(list(classifier.buffers()))
        return classifier

    def measure(self) -> tuple[PixelClassifier, Outcomes, dict[str, float]]:
        """The weights to choose among, what they make of the images, and a line of metrics.

        Where these are averaged, the line has the raw ones' accuracies, too, on some of the images:
        they may collapse before the average does.
        """
        line: dict[str, float] = {}
        if self._averaged is not None:
            found = self._measured(self.weights(raw=True), _RAW_IMAGES)
            line = found.line(RAW) | {f"{RAW}_images": len(found.clean.index)}
        classifier = self.weights()
        found = self._measured(classifier)
        return classifier, found.clean, found.line(HELD_OUT) | line

    def _measured(self, classifier: PixelClassifier, num_images: int | None = None) -> Measured:
        settings = self._settings
        bench = Bench(
            classifier,
            self._images,
            self._accelerator,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        clean = robust = one_step = bench.clean(num_images)
        for one in settings.threat_models():
            attacker = attacker_of(one, num_steps=self._num_steps, eps=one.eps, restarts=1)
            robust = bench.attacked(attacker, robust)
            one_step = bench.attacked(_fgsm(one), one_step)
        return Measured(clean, robust, one_step)


def _fgsm(settings: EvaluateSettings) -> Attacker:
    norm, eps = settings.norm, settings.eps
    assert norm is not None and eps is not None
    return under_attack(PGD(norm=norm, eps=eps, step_size=eps, num_steps=1, random_start=False))
