"""Inner maximisation, equation (A1): one file a family of attacks, one line a name."""

from robust_accel.attacks.apgd import APGD
from robust_accel.attacks.base import Attack, JudgedLoss, LossFn, remembers
from robust_accel.attacks.ddn import DDN
from robust_accel.attacks.fgsm import FGSMRS, NFGSM
from robust_accel.attacks.multi_norm import MultiNorm, NormBall, NormBalls
from robust_accel.attacks.pgd import PGD, NoAttack
from robust_accel.attacks.pgi import FGSMPGI
from robust_accel.attacks.strength import EpsSchedule

ATTACKS = {
    "none": NoAttack,
    "pgd": PGD,
    "apgd": APGD,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "fgsm-pgi": FGSMPGI,
    "ddn": DDN,
    "multi-norm": MultiNorm,
}

__all__ = [
    "APGD",
    "ATTACKS",
    "DDN",
    "FGSMPGI",
    "FGSMRS",
    "NFGSM",
    "PGD",
    "Attack",
    "EpsSchedule",
    "JudgedLoss",
    "LossFn",
    "MultiNorm",
    "NoAttack",
    "NormBall",
    "NormBalls",
    "remembers",
]
