"""What every component's settings share: kinds of values, and faults in one form each."""

import inspect
import math
import re
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    ValidationError,
)

from robust_accel.files import check_path
from robust_accel.messages import close_to, cut, shown
from robust_accel.plain_yaml import MOST_FAULTS, number

Norm = Literal["linf", "l2", "l1"]


if TYPE_CHECKING:
    _Model = BaseModel
else:

    class _Telling(type(BaseModel)):
        def __call__(cls, *args: Any, **values: Any) -> Any:
            """Build one; what is wrong is said as of a recipe."""
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                faults = faults_of(error, cls)
            said = (f"{key}: {message}".removeprefix(": ") for key, message in faults)
            raise ValueError("; ".join(said))

    class _Model(BaseModel, metaclass=_Telling):
        pass


class Settings(_Model):
    """Base of every component that a recipe can name: its fields are the recipe's keys.

    Raises:
        ValueError: All faults, ``key: what was found, what is allowed`` each. (``model_validate``
            raises pydantic's error.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_number(value: object) -> float:
    """A number, or the number that a text is: ``"8/255"`` becomes ``8 / 255``.

    Raises:
        ValueError: It is none, or fp32 cannot hold it.
    """
    if isinstance(value, str):
        parts = [number(part.strip()) for part in value.split("/")]
        if None in parts or len(parts) > 2 or parts[1:] == [0]:
            raise ValueError(f"{_A_NUMBER} is wanted, or a fraction like 8/255")
        top, *bottom = (float(part) for part in parts if part is not None)
        value = top / bottom[0] if bottom else top
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{_A_NUMBER} is wanted, or a fraction like 8/255")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not (found == 0 or _FP32[0] <= abs(found) <= _FP32[1]):  # NaN is not, either
        raise ValueError(f"{_A_NUMBER} is wanted")
    return found


def parse_whole(value: object) -> int:
    """A whole number, ``1e3`` too.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    # a text is told from a number fast: there may be thousands of them
    if isinstance(value, bool | str) or not (isinstance(value, Real) and float(value).is_integer()):
        raise ValueError("a whole number is wanted")
    return int(float(value))


def parse_choice(value: object) -> object:
    """A whole number, where it is one of a few: pydantic takes True for 1.

    Raises:
        ValueError: It is a truth value or a fraction.
    """
    return parse_whole(value) if isinstance(value, bool | float) else value


def parse_flag(value: object) -> bool:
    """True or false, and the words that YAML 1.1 had for them.

    Raises:
        ValueError: It is neither.
    """
    known = _FLAGS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise ValueError("true or false is wanted")
    return known


_FP32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # what training and attacks compute in
_A_NUMBER = "a finite number that fp32 can hold"
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MOST = 2**31 - 1  # to seeds, numbers of processes and units are added yet

Number = Annotated[float, BeforeValidator(parse_number)]
Whole = Annotated[int, BeforeValidator(parse_whole), Le(MOST)]
Flag = Annotated[bool, BeforeValidator(parse_flag)]
if TYPE_CHECKING:
    # a type checker sees what may be given, and what is read: PGD(eps="8/255").eps is a float

    class Pixels:
        def __get__(self, owner: Any, cls: Any = None) -> float: ...
        def __set__(self, owner: Any, value: float | str) -> None: ...

    class OptionalPixels:
        def __get__(self, owner: Any, cls: Any = None) -> float | None: ...
        def __set__(self, owner: Any, value: float | str | None) -> None: ...
else:
    Pixels = Annotated[Number, Gt(0)]
    """A length in pixel units (a pixel is in [0, 1]): 0.03 or "8/255"."""
    OptionalPixels = Pixels | None


def default(value: Any) -> Any:
    """The default of a field of these two: to a type checker it is neither."""
    return value


PathText = Annotated[str, AfterValidator(check_path)]
"""Names a file or a folder, or what may be one."""


class _FirstFault(FailFast):  # that can be hashed, as a union wants of its members
    __hash__ = object.__hash__


RowNumbers = Annotated[tuple[Annotated[Whole, Ge(0)], ...], _FirstFault()]
"""There may be thousands: of those that are none the first is told."""


def not_finite(value: Any) -> bool:
    """Whether there is a NaN or an infinity among plain values."""
    if isinstance(value, dict):
        return any(map(not_finite, value.values()))
    if isinstance(value, list | tuple):
        return any(map(not_finite, value))
    return isinstance(value, float) and not math.isfinite(value)


def parse_duration(value: object) -> object:
    """Turn ``3h50m``, ``90m`` or ``45s`` into seconds; numbers are seconds already.

    Raises:
        ValueError: It is nothing of these, or not above 0.
    """
    seconds = value
    if isinstance(value, str):
        # 3h50 is nothing: whoever writes it means minutes
        pattern = r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?|(\d+(?:\.\d+)?)"
        parts = re.fullmatch(pattern, value.strip(), re.ASCII)
        found = [float(part or 0) for part in parts.groups()] if parts else [0.0]
        seconds = sum(n * unit for n, unit in zip(found, (86400, 3600, 60, 1, 1), strict=False))
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 1e-3 <= seconds < 1e9
    ):
        raise ValueError("write 3h50m, 90m, 45s or a number of seconds, at least 0.001")
    return seconds


Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds, in recipes also as ``3h50m``."""


def faults_of(error: ValidationError, spec: Any) -> list[tuple[str, str]]:
    """pydantic's faults as (dotted key, what was found and what is allowed), one a key.

    Args:
        spec: The settings that were to be built.
    """
    by_key: dict[str, dict[str, None]] = {}  # a union's members each have their complaint
    for fault in error.errors(include_url=False)[:MOST_FAULTS]:
        if fault["type"] == "default_factory_not_called":  # of another key's fault
            continue
        keys, message = _explain(fault, spec)
        by_key.setdefault(".".join(keys), {})[message] = None
    # where a union's member complains of a key inside, the others complain of the whole
    whole = [key for key in by_key if any(other.startswith(f"{key}.") for other in by_key)]
    return [(key, "; or ".join(by_key[key])) for key in by_key if key not in whole]


def first_fault(error: ValidationError) -> str:
    """pydantic's first fault in a short line, whatever a stranger's file has held."""
    fault = error.errors(include_url=False)[0]
    key, found = ".".join(map(str, fault["loc"]))[:200], repr(fault["input"])[:80]
    if fault["type"] == "missing":
        return f"{key}: missing: this key is required"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {found} is not allowed: {message[:1].lower()}{message[1:200]}"


def _explain(fault: Any, spec: Any) -> tuple[list[str], str]:
    """One pydantic fault as its keys, and: what was found, what is allowed."""
    keys: list[str] = []
    is_name = False
    for part in fault["loc"]:
        if is_name or isinstance(part, int):  # of settings by name, or in a list
            keys.append(cut(str(part)))
            is_name = False
            continue
        fields = getattr(spec, "model_fields", {})  # of the settings that hold this key
        is_list = part not in fields and part.startswith("tuple[") and part != fault["loc"][-1]
        name = getattr(spec, "__name__", None)
        if is_list or part == name or re.fullmatch(rf"function-\w+\[.*, {name}\]", part):
            continue  # a union's member, maybe with what checks it as a whole
        if fault["type"] == "extra_forbidden" and part not in fields and spec is not None:
            message = f"unknown key{close_to(part, fields)}; allowed: {listed(fields)}"
            return [*keys, cut(str(part))], message
        if part in fields:  # else it tells a union's members apart
            keys.append(str(part))
        annotation = fields[part].annotation if part in fields else None
        kinds = [get_origin(kind) for kind in (annotation, *get_args(annotation))]
        spec, is_name = _nested(annotation), dict in kinds
    if fault["type"] == "missing":
        return keys, "missing: this key is required"
    message = fault["msg"].removeprefix("Value error, ")
    if not keys:  # a complaint about keys together names them itself
        return keys, message
    return keys, f"{shown(fault['input'])} is not allowed: {message[0].lower()}{message[1:]}"


def _nested(annotation: Any) -> Any:
    """The settings class in a field's annotation, if there is one."""
    for member in (annotation, *get_args(annotation)):
        if inspect.isclass(member) and issubclass(member, BaseModel):
            return member
    return None


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def eps_text(eps: float) -> str:
    """``8/255`` where eps is a multiple of 1/255, else four digits.

    Fifths (0.2 is 51/255) stay decimals, as everybody writes them.
    """
    steps = round(255 * eps)
    # as close as fp32 comes
    if steps > 0 and steps % 51 and math.isclose(steps / 255, eps, rel_tol=1e-6):
        return f"{steps}/255"
    return f"{eps:.4g}"
