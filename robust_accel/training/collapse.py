"""Robust accuracy that was there and is gone: a loss spike, or catastrophic overfitting."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from robust_accel.statistics import wilson_interval


class Fall(NamedTuple):
    epoch: float
    text: str


def falls(
    metrics: Iterable[dict[str, Any]], num_classes: int, *, held_out: int, after: float
) -> list[Fall]:
    """Where robust accuracy fell below half of its best so far, or to a guess's, beyond chance.

    On the held-out split, else on the training batches of a line: these show that training has
    broken down, but not that a weak attack is fooled (catastrophic overfitting).

    Args:
        metrics: Lines of ``metrics.jsonl``.
        held_out: Images of the split.
        after: The epoch up to which lines of training don't count: their attack was weaker.
    """
    key, where = "validation_robust_accuracy", "the held-out split"
    if not held_out:
        key, where = "robust_batch_accuracy", "training batches"
    found: list[Fall] = []
    best, best_epoch, best_n, gone = 0.0, 0.0, 1, False
    for line in metrics:
        accuracy, epoch = line.get(key), line["epoch"]
        if accuracy is None or (not held_out and epoch <= after):
            continue
        n = held_out or line.get("labeled_images", 1)  # older runs have not counted them
        was_gone, gone = gone, accuracy <= max(best / 2, 1 / num_classes)
        gone = gone and wilson_interval(accuracy, n)[1] < wilson_interval(best, best_n)[0]
        if gone and not was_gone:
            text = (
                f"robust accuracy on {where} is gone: {100 * accuracy:.2f}% at epoch {epoch:.4g}, "
                f"{100 * best:.2f}% at epoch {best_epoch:.4g}"
            )
            found.append(Fall(epoch, text))
        if accuracy > best:
            best, best_epoch, best_n = accuracy, epoch, n
    return found
