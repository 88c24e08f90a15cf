"""Robust accuracy that was there and is gone: a loss spike, or catastrophic overfitting."""

from collections.abc import Iterable, Iterator
from math import hypot, sqrt
from typing import Any, NamedTuple

from robust_accel.statistics import wilson_interval

HELD_OUT = "validation"
"""What metrics of the held-out split begin with: ``validation_robust_accuracy``."""
RAW = "validation_raw"
"""The same of the weights that are trained, in a run that measures and leaves averaged ones."""
_CLEARLY_LESS = 0.7  # of the best; robust overfitting leaves 0.8 of it
_STANDARD_ERRORS = 6  # of a difference; the best is the highest of many, so partly luck


class Fall(NamedTuple):
    """A place where robust accuracy was lost.

    Attributes:
        lasts: Whether it had not come back by the last line.
    """

    epoch: float
    text: str
    lasts: bool


class _Seen(NamedTuple):
    """One measurement, on n images."""

    epoch: float
    robust: float
    one_step: float | None
    n: int

    @property
    def kept(self) -> float:
        """The share that is robust of what one step leaves."""
        return min(1.0, self.robust * self.n / self._left)

    @property
    def error_of_kept(self) -> float:
        """Its standard error."""
        return sqrt(self.kept * (1 - self.kept) / self._left)

    @property
    def _left(self) -> float:
        """Images, by one step."""
        assert self.one_step is not None
        return max(1.0, self.one_step * self.n)

    def __str__(self) -> str:
        beside = "" if self.one_step is None else f" (after one step {100 * self.one_step:.2f}%)"
        return f"{100 * self.robust:.2f}%{beside} at epoch {self.epoch:.4g}"


def falls(
    metrics: Iterable[dict[str, Any]], num_classes: int, *, held_out: int, after: float
) -> list[Fall]:
    """Where robust accuracy fell so far below its best that it is lost, beyond chance.

    Beyond chance: its 95% interval (Wilson's, by the number of images) and that of the best so far
    do not meet. Lost is what has come to half of the best, or to a guess's. On the held-out split
    it shows sooner that a weak attack is fooled (catastrophic overfitting), by the accuracy after
    one step: lost is also what has come to 7/10 of the best while that is no lower than there, and
    what has fallen to less than half of that; either where of the images that one step leaves at
    most 7/10 of the share at the best are robust, beyond chance. For where the threat is hard, a
    sound training has less than half from its beginning. In it both fall together, and robust
    overfitting takes a fifth over many epochs.

    On the held-out split the weights that are trained count, not their average, which may hide a
    collapse for epochs. Without such a split the training batches of a line do: these show that
    training has broken down, but not that a weak attack is fooled.

    Args:
        metrics: Lines of ``metrics.jsonl``.
        held_out: Images of the split.
        after: The epoch up to which lines of training don't count: their attack was weaker.
    """
    where = "the held-out split" if held_out else "training batches"
    lines = list(metrics)
    seen = _validations(lines, held_out) if held_out else _batches(lines, after)
    found: list[Fall] = []
    best, gone = _Seen(0.0, 0.0, None, 1), False
    for now in seen:
        lost = _lost(now, best, num_classes)
        if lost and not gone:
            found.append(Fall(now.epoch, f"robust accuracy on {where} {lost}: {now}, {best}", True))
        elif gone and not lost:
            found[-1] = found[-1]._replace(lasts=False)
        gone = bool(lost)
        if now.robust > best.robust:
            best = now
    return found


def _validations(lines: list[dict[str, Any]], held_out: int) -> Iterator[_Seen]:
    prefix = RAW if any(f"{RAW}_robust_accuracy" in line for line in lines) else HELD_OUT
    for line in lines:
        robust = line.get(f"{prefix}_robust_accuracy")
        if robust is not None:
            one_step = line.get(f"{prefix}_one_step_accuracy")
            yield _Seen(line["epoch"], robust, one_step, line.get(f"{prefix}_images", held_out))


def _batches(lines: list[dict[str, Any]], after: float) -> Iterator[_Seen]:
    for line in lines:
        robust = line.get("robust_batch_accuracy")
        if robust is not None and line["epoch"] > after:
            # older runs have not counted them
            yield _Seen(line["epoch"], robust, None, line.get("labeled_images", 1))


def _lost(now: _Seen, best: _Seen, num_classes: int) -> str:
    """What has become of robust accuracy since its best, see ``falls``; empty if it is there."""
    is_gone = now.robust <= max(best.robust / 2, 1 / num_classes)
    # intervals take milliseconds, which add up over the lines
    if not (is_gone or _falls_away(now, best)) or not _is_below(now, best):
        return ""
    if is_gone:
        return "is gone"
    return "falls away from that after one step (catastrophic overfitting)"


def _falls_away(now: _Seen, best: _Seen) -> bool:
    """Whether the attack's loss of images has grown beside that of one step, beyond chance."""
    if now.one_step is None or best.one_step is None:
        return False
    stays = now.robust <= _CLEARLY_LESS * best.robust and now.one_step >= best.one_step
    if not (stays or now.kept < 1 / 2) or now.kept > _CLEARLY_LESS * best.kept:
        return False
    error = hypot(now.error_of_kept, best.error_of_kept)
    return best.kept - now.kept > _STANDARD_ERRORS * error


def _is_below(now: _Seen, best: _Seen) -> bool:
    """Whether robust accuracy is lower, beyond chance."""
    if now.robust >= best.robust:
        return False
    return wilson_interval(now.robust, now.n)[1] < wilson_interval(best.robust, best.n)[0]
