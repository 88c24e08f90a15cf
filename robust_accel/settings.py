"""What every component's settings share: unknown keys are refused, and fractions are numbers."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

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
