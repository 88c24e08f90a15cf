"""Measure a classifier: clean, PGD and AutoAttack accuracy, exact on any number of processes."""

import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from accelerate import Accelerator

from robust_accel.attacks import Attack
from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import (
    attacker_of,
    check_loss,
    predictions,
    under_attack,
)
from robust_accel.evaluation.autoattack import AutoAttackEvaluation, check_classes
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.corruptions import CorruptionEvaluation
from robust_accel.evaluation.examples import keep_examples
from robust_accel.evaluation.ledger import Ledger, Record
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.own_attacks import own_attacker
from robust_accel.evaluation.sanity import sanity
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.evaluation.sweep import sweep
from robust_accel.evaluation.unions import attack_of_union, union_of
from robust_accel.models import PixelClassifier
from robust_accel.run_folder import RunFolder
from robust_accel.settings import eps_text

__all__ = [
    "EvaluateSettings",
    "evaluate",
    "predictions",
    "under_attack",
]

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """An attack within one ball, what it has left, and what else there is to say."""

    about: dict[str, Any]
    outcomes: Outcomes
    more: dict[str, Any]


DRAWS = 21  # of a randomised model, if no number is asked for; odd, so that two classes cannot tie


def evaluate(
    classifier: PixelClassifier,
    images: ImageSet,
    settings: EvaluateSettings,
    accelerator: Accelerator,
    *,
    num_classes: int,
    num_data_classes: int | None = None,
    folder: RunFolder | None = None,
    other: PixelClassifier | None = None,
    train: ImageSet | None = None,
    source: dict[str, Any] | None = None,
    train_source: dict[str, Any] | None = None,
    kind: str = "all",
    positions: Sequence[int] | None = None,
    attacks: Sequence[Attack] = (),
) -> dict[str, Any]:
    """Run every measurement that the settings name.

    Args:
        classifier: On [0, 1] pixels, the same weights and buffers on all processes; measured in
            eval mode and fp32.
        images: The test images.
        num_classes: The classifier's logits, among which AutoAttack has its targets.
        num_data_classes: Of the data, where these are fewer.
        folder: Where records and the work under way are kept (what is there is not done again),
            and some adversarial images to look at.
        other: Of ``settings.sanity``: a model whose adversarial images are tried on this one.
        train: Of ``settings.train_images``.
        source, kind: Where the images are from, and which of them they are, see ``Bench``.
        train_source: The same of ``train``.
        positions: The classifier's number of each class of the data, see ``match_classes``.
        attacks: Beside those of the settings, each in its own ball, see ``own_attacker``.

    Returns:
        The records of this evaluation: ``clean_accuracy``, ``pgd_accuracy`` and
        ``autoattack_accuracy``, ``train_clean_accuracy`` and ``train_pgd_accuracy``, ``sweep``,
        ``sanity``; ``corruptions``, and by name ``corruption``; and ``function``, the digest of
        what was measured. Of several balls these accuracies are those of the union, ``sanity`` is a
        list, and ``pgd_accuracy_by_ball`` and so on are lists of records, too. ``attacks``, in
        their order, where there are some.
    """

    def told(name: str, record: Record) -> Record:
        low, high = (100 * bound for bound in record["interval"])
        share, number = 100 * record["accuracy"], record["images"]["n"]
        known = f", measured before, {record['time']}" if record["time"] < began else ""
        logger.info(
            f"{name}: {share:.2f}% of {number} images (95%: {low:.1f} to {high:.1f}){known}"
        )
        for where, found in record.get("non_finite", {}).items():
            logger.warning(f"{name}: {len(found)} images met NaN or Inf in {where}: {found[:10]}")
        return record

    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    models = settings.threat_models()
    # first: what they refuse, they refuse before anything is spent
    given = [own_attacker(attack) for attack in attacks]
    check_classes(settings.autoattack, num_classes)
    check_loss("evaluate.pgd.loss", settings.pgd, num_classes)
    corruptions = None
    if settings.corruptions:
        corruptions = CorruptionEvaluation(
            settings,
            images,
            num_classes=num_classes if num_data_classes is None else num_data_classes,
            class_names=classifier.class_names,
            positions=positions,
            source=source,
            kind=kind,
        )
    absent = () if folder is None else folder.absent
    ledger = Ledger(None if folder is None else folder.path, accelerator, absent)
    bench = Bench(
        classifier,
        images,
        accelerator,
        batch_size=settings.batch_size,
        seed=settings.seed,
        ledger=ledger,
        source=source,
        kind=kind,
    )
    if bench.is_randomised(settings.batch_size):
        bench.draws = settings.draws or DRAWS
        logger.info(f"the model is randomised: each verdict is of {bench.draws} draws")
        if not bench.is_repeatable(settings.batch_size):
            logger.warning(
                "its draws follow none of torch's, NumPy's and Python's generators: numbers vary"
            )
    elif (settings.draws or 1) > 1:
        logger.warning(
            f"evaluate.draws: {settings.draws}, but the model always answers the same: one is taken"
        )
    if settings.autoattack is None and settings.search != "fp32":
        logger.warning(
            f"evaluate.search: {settings.search}, but evaluate.autoattack is null: it changes "
            "nothing"
        )
    result: dict[str, Any] = {"function": bench.function}
    pgds = [] if settings.pgd is None else [attacker_of(one) for one in models]

    def keep(
        bench: Bench, purpose: str, name: str, before: Outcomes, parts: list[Part], key: str
    ) -> None:
        """The accuracy in each ball and, of several, that of their union."""
        records = []
        for about, outcomes, more in parts:
            where = f" ({about['norm']}, eps {eps_text(about['eps'])})" if len(parts) > 1 else ""
            record = bench.record(purpose, about, before, outcomes, **more)
            records.append(told(name + where, record))
        if len(parts) > 1:
            result[f"{key}_by_ball"] = list(records)
            about = attack_of_union([part.about for part in parts])
            left = union_of([part.outcomes for part in parts])
            record = bench.record(purpose, about, before, left)
            records.append(told(f"{name} (in all of these balls)", record))
        result[key] = records[-1]

    def clean_and_pgd(
        bench: Bench, limit: int | None, prefix: str, purpose: str
    ) -> tuple[Outcomes, list[Outcomes]]:
        right = bench.clean(limit)
        name = f"{prefix}clean_accuracy"
        result[name] = told(name, bench.record(purpose, {"name": "none"}, right, right))
        found = []
        for pgd in pgds:
            left = bench.attacked(pgd, right.first(len(right.index)))
            found.append(Part(pgd.about, left, {}))
        if found:
            name = "_".join(pgds[0].about[k] for k in ("name", "loss") if k in pgds[0].about)
            key = f"{prefix}pgd_accuracy"
            keep(bench, purpose, f"{prefix}{name}_accuracy", right, found, key)
        return right, [part.outcomes for part in found]

    right, by_pgd = clean_and_pgd(bench, settings.images, "", "accuracy")
    if train is not None and settings.train_images is not None:
        if bool((train.labels < 0).any()):  # pooled with images without labels
            train = train.subset((train.labels >= 0).nonzero().flatten())
        of_train = bench.on(train, train_source)
        clean_and_pgd(of_train, settings.train_images, "train_", "train")
    if settings.sweep is not None:
        result["sweep"] = sweep(bench, right, settings)
    for attacker in given:
        left = bench.attacked(attacker, right.first(len(right.index)))
        record = bench.record("accuracy", attacker.about, right, left)
        result.setdefault("attacks", []).append(told(f"{attacker.about['name']} accuracy", record))
    by_autoattack: list[Part] = []
    if settings.autoattack is not None:
        limit = min(settings.autoattack_images or len(right.index), len(images))
        before = (right if limit <= len(right.index) else bench.clean(limit)).first(limit)
        for autoattack in (AutoAttackEvaluation(one, num_classes) for one in models):
            left, more = autoattack.run(bench, before)
            by_autoattack.append(Part(autoattack.about, left, more))
        name = "autoattack_accuracy"
        keep(bench, "accuracy", name, before, by_autoattack, name)
    if settings.sanity:
        both = zip(by_pgd, (part.outcomes for part in by_autoattack), strict=False)
        compared: list[Any] = list(both) or [None] * len(models)
        checked = [
            sanity(bench, one, autoattack=pair, other=other)
            for one, pair in zip(models, compared, strict=True)
        ]
        result["sanity"] = checked[0] if len(checked) == 1 else checked
    if corruptions is not None:
        result |= corruptions.run(bench)
    if folder is not None:
        keep_examples(bench, models[0], folder.examples)
    return result
