"""What records, units of work and reports must have before they are shown or gone on from; and
what an attack in them is called.

A run folder may be a stranger's. Whatever else stands in a line is left as it is.
"""

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from robust_accel.settings import first_fault

Share = Annotated[float, Ge(0), Le(1)]
_AnyPart = TypeVar("_AnyPart", bound="_Part")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Attack(_Part):
    name: str


class _ThreatModel(_Part):
    norm: str
    eps: float


class _Union(_Part):
    union: list[_ThreatModel]


class _Images(_Part):
    n: int
    selection: str | None = None
    source: dict[str, Any] = {}


class ReportRow(_Part):
    """A measurement as reports show it."""

    purpose: str
    attack: _Attack
    images: _Images
    threat_model: _ThreatModel | _Union | None = None
    accuracy: Share | None = None
    interval: list[float] | None = None


class _ImagesOfRecord(_Part):
    image: list[str]


class RecordLine(ReportRow):
    """A measurement as the ledger keeps it."""

    key: str
    function: str
    versions: dict[str, Any]
    outcomes: _ImagesOfRecord


class UnitLine(_Part):
    """The outcome of a unit of images: of an attack, of a certificate, or of checks."""

    key: str
    seconds: Annotated[float, Ge(0)]
    forward_passes: Annotated[int, Ge(0)]
    prediction: list[Annotated[int, Ge(-1), Le(2**31)]] = []
    share: list[Share] = []
    chosen: list[Share] = []
    non_finite: dict[str, list[int]] = {}
    predict: int = 0
    radius: float = 0
    samples: int = 0
    said: list[str] = []

    @model_validator(mode="after")
    def _of_the_same_images(self) -> "UnitLine":
        if len({len(column) for column in (self.prediction, self.share, self.chosen)}) > 1:
            raise ValueError("prediction, share and chosen are not of one number of images")
        return self


class FunctionLine(_Part):
    """What a function of some digest answered."""

    model_config = ConfigDict(allow_inf_nan=True)

    digest: str
    function: str
    answers: list[list[float]]


class _Model(_Part):
    function: str
    class_names: list[str] | None = None


class Report(_Part):
    """``report.json``."""

    model: _Model | None = None
    measurements: list[ReportRow] = []
    recipe: dict[str, Any] = {}
    doubts: list[str] = []


def check(cls: type[_AnyPart], found: Iterable[dict[str, Any]], where: str) -> None:
    """Raise ValueError, with what is wrong in which of them, unless all are of a kind."""
    for number, one in enumerate(found, 1):
        try:
            cls.model_validate(one)
        except ValidationError as error:
            raise ValueError(f"{where}, {number}: {first_fault(error)}") from None


def attack_text(attack: dict[str, Any]) -> str:
    """An attack in short: ``PGD-20 x5``, ``AutoAttack standard``; ``PGD`` of no number of steps."""
    name = attack["name"]
    if name in ("pgd", "apgd"):
        restarts, loss = attack.get("restarts", 1), attack.get("loss", "cross_entropy")
        times = f" x{restarts}" if restarts > 1 else ""
        of = "" if loss == "cross_entropy" else f" {loss.upper()}"
        steps = f"-{attack['num_steps']}" if "num_steps" in attack else ""
        return f"{name.upper()}{steps}{of}{times}"
    if name == "autoattack":
        search = attack.get("search", "fp32")
        about = f", {search} search" if search != "fp32" else ""
        return f"AutoAttack {attack['version']}{about}"
    if name == "certify":
        return f"certificate, {attack['method']}, sigma {attack['sigma']:.4g}"
    if name == "corruption":
        return str(attack["corruption"])
    if name == "corruptions":
        return f"mean of {len(attack['corruptions'])} corruptions"
    return {"none": "none", "sanity": "sanity checks"}.get(name, name)
