"""Attacks of a user's own, adaptive ones say: measured like any other, and held to their ball."""

from typing import get_args

from torch import Tensor

from robust_accel.attacks import ATTACKS, Attack
from robust_accel.attacks.norms import is_beyond, lengths
from robust_accel.evaluation.accuracy import under_attack
from robust_accel.evaluation.bench import Attacker
from robust_accel.evaluation.identity import digest_of_object
from robust_accel.models import PixelClassifier
from robust_accel.settings import Norm


def own_attacker(attack: Attack) -> Attacker:
    """Perturb by an attack that is given as an object; it climbs the logits' cross-entropy.

    What is known of it is its class, as ``module:Class``, its settings, and a digest of both with
    the class's source: another version of it is another attack.

    Raises:
        ValueError: ``attacks: ...``: nothing says in which ball it looks.
    """
    kind = type(attack)
    norm, eps = str(getattr(attack, "norm", "linf")).lower(), getattr(attack, "eps", None)
    if eps is None or norm not in get_args(Norm):
        norms = ", ".join(get_args(Norm))
        raise ValueError(
            f"attacks: {kind.__qualname__} must have an eps and a norm of {norms} (linf if none), "
            f"got eps {eps}, norm {norm!r}: accuracy is told in a ball"
        )
    attacker = under_attack(attack)

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        x_adv = attacker.perturb(classifier, x, labels, seed)
        if x_adv.shape != x.shape:
            raise ValueError(f"{attack!r} returned {list(x_adv.shape)} for {list(x.shape)}")
        seen = x_adv.where(x_adv.isfinite(), x)  # what is no image is counted, and breaks none
        far, (low, high) = lengths(seen - x, norm).amax().item(), seen.aminmax()
        if is_beyond(far, eps):
            raise ValueError(
                f"{attack!r} moved an image by {far:.4g} ({norm}), its eps is {eps:.4g}"
            )
        if low < -1e-6 or high > 1 + 1e-6:
            raise ValueError(
                f"{attack!r} returned pixels in [{low:.4g}, {high:.4g}], not in [0, 1]"
            )
        return x_adv

    about = attacker.about | {"norm": norm, "eps": float(eps)}
    if kind not in ATTACKS.values():
        about["name"] = f"{kind.__module__}:{kind.__qualname__}"
        about["settings"] = digest_of_object((kind, attack))
    return Attacker(about, perturb)
