"""PGD accuracy against eps and against the number of steps: Figure 3 of DAT."""

from collections.abc import Callable, Iterable

from robust_accel.attacks import PGD
from robust_accel.evaluation.accuracy import under_attack
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.ledger import Record
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.settings import EvaluateSettings, PGDSettings

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
    pgd = settings.pgd or PGDSettings()

    def curve(points: Iterable[float], attack_at: Callable[[float], PGD], key: str) -> Curve:
        left = clean
        found: Curve = []
        ordered = sorted(points)
        for point in ordered:
            attacker, unspent = (
                under_attack(attack_at(point), pgd.restarts),
                left.first(len(left.index)),
            )
            left = bench.attacked(attacker, unspent, title=f"{key} {point:.4g}")
            at = {"point": {"key": key, "value": point, "of": ordered}}
            found.append(bench.record("sweep", attacker.about, clean, left, **at))
        return found

    def with_eps(eps: float) -> PGD:
        return settings.make_pgd(pgd.num_steps, eps=eps)

    def with_steps(num_steps: float) -> PGD:
        return settings.make_pgd(int(num_steps), pgd.step_size)

    return {
        "eps": curve(settings.sweep.eps, with_eps, "eps"),
        "num_steps": curve(settings.sweep.num_steps, with_steps, "num_steps"),
    }
