"""What every component's settings share: faults in one form each, and fractions are numbers."""

import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

AnySettings = TypeVar("AnySettings", bound="Settings")
Norm = Literal["linf", "l2"]


class Settings(BaseModel):
    """Base of every component that a recipe can name: its fields are the recipe's keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_fraction(value: object) -> object:
    """Turn ``"8/255"`` into ``8 / 255``; anything else is left for pydantic to judge."""
    if isinstance(value, str) and value.count("/") == 1:
        numerator, denominator = value.split("/")
        try:
            return float(numerator) / float(denominator)
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(parse_fraction)]


def checked(cls: type[AnySettings], values: dict[str, Any]) -> AnySettings:
    """The settings of these values.

    Raises:
        ValueError: All faults, ``key: what was found, what is allowed`` each.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        faults = faults_of(error, cls)
    raise ValueError("; ".join(f"{key}: {message}".removeprefix(": ") for key, message in faults))


def faults_of(error: ValidationError, spec: Any) -> list[tuple[str, str]]:
    """pydantic's faults as (dotted key, what was found and what is allowed), one a key.

    Args:
        spec: The settings that were to be built.
    """
    by_key: dict[str, dict[str, None]] = {}  # a union's members each have their complaint
    for fault in error.errors():
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
    for part in fault["loc"]:
        fields = getattr(spec, "model_fields", {})  # of the settings that hold this key
        if spec is not None and getattr(spec, "__name__", None) == part:
            continue  # a union's member
        if fault["type"] == "extra_forbidden" and part not in fields and spec is not None:
            message = f"unknown key{close_to(part, fields)}; allowed: {listed(fields)}"
            return [*keys, str(part)], message
        if part in fields or isinstance(part, int):  # else it tells a union's members apart
            keys.append(str(part))
        spec = _nested(fields[part].annotation) if part in fields else None
    if fault["type"] == "missing":
        return keys, "missing: this key is required"
    message = fault["msg"].removeprefix("Value error, ")
    if not keys:  # a complaint about keys together names them itself
        return keys, message
    return keys, f"{fault['input']!r} is not allowed: {message[0].lower()}{message[1:]}"


def _nested(annotation: Any) -> Any:
    """The settings class in a field's annotation, if there is one."""
    for member in (annotation, *get_args(annotation)):
        if inspect.isclass(member) and issubclass(member, BaseModel):
            return member
    return None


def close_to(name: object, known: Iterable[str], number: int = 1) -> str:
    """`` (did you mean ...?)`` with the names that are close, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=number)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


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
