"""PGD accuracy against eps and against the number of steps: Figure 3 of DAT."""

from collections.abc import Callable, Iterable

from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.bench import Attacker, Bench
from robust_accel.evaluation.ledger import Record
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.settings import EvaluateSettings

Curve = list[Record]


def sweep(bench: Bench, clean: Outcomes, settings: EvaluateSettings) -> dict[str, Curve]:
    """Accuracy at each point of ``settings.sweep``.

    An image that is broken at a point is broken at all later ones.

    Args:
        clean: The images unattacked; those that are wrong are not attacked.

    Returns:
        ``eps`` and ``num_steps``: records in rising order, each with its ``point``.
    """
    assert settings.sweep is not None

    def curve(points: Iterable[float], attack_at: Callable[[float], Attacker], key: str) -> Curve:
        left = clean
        found: Curve = []
        ordered = sorted(points)
        for point in ordered:
            attacker, unspent = attack_at(point), left.first(len(left.index))
            left = bench.attacked(attacker, unspent, title=f"{key} {point:.4g}")
            at = {"point": {"key": key, "value": point, "of": ordered}}
            found.append(bench.record("sweep", attacker.about, clean, left, **at))
        return found

    def with_eps(eps: float) -> Attacker:
        return attacker_of(settings, eps=eps)

    def with_steps(num_steps: float) -> Attacker:
        return attacker_of(settings, num_steps=int(num_steps))

    return {
        "eps": curve(settings.sweep.eps, with_eps, "eps"),
        "num_steps": curve(settings.sweep.num_steps, with_steps, "num_steps"),
    }
