"""What a stranger's config.json may say of a model: numbers and names, and where nothing lies."""

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Len
from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, ValidationError

from robust_accel.settings import first_fault

# Entries of timm's pretrained_cfg that say where weights lie or how they are read.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
# Arguments of timm that are none of a network's.
_LOADING = {"checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "no_jit"}
_LONGEST = 1000  # characters of a text
_MOST = 2**16  # of a network's sizes
_MOST_CLASSES = 2**24

Length = Annotated[int, Ge(1), Le(_MOST)]
_Name = Annotated[str, Len(0, _LONGEST)]
_Index = Annotated[str, Len(1, 8)]


def _network(arguments: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
    for key, value in (arguments or {}).items():
        if key in _LOADING or key.startswith("pretrained"):
            raise ValueError(f"{key} is no argument of a network")
        if len(repr(value)) > _LONGEST:
            raise ValueError(f"{key} is longer than {_LONGEST} characters")
        most = _MOST_CLASSES if key == "num_classes" else _MOST
        if not all(abs(number) <= most for number in _numbers(value)):
            raise ValueError(f"{key} has a number beyond {most}")
    return arguments


def _numbers(value: JsonValue) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Description(_Part):
    """timm's ``pretrained_cfg``, as far as it is used here."""

    mean: Annotated[list[float], Len(1, 16)] | float | None = None
    std: Annotated[list[Annotated[float, Gt(0)]], Len(1, 16)] | float | None = None
    input_size: Annotated[list[Length], Len(3, 3)] | None = None
    num_classes: Annotated[int, Ge(0), Le(_MOST_CLASSES)] | None = None
    label_names: list[_Name] | dict[_Index, _Name] | None = None
    labels: list[_Name] | dict[_Index, _Name] | None = None
    classifier: _Name | list[_Name] | None = None
    first_conv: _Name | list[_Name] | None = None


class _Own(_Part):
    size: Annotated[list[Length], Len(2, 2)] | None = None
    resize: _Name = ""


class _Config(_Description):
    architecture: Annotated[str, Len(1, 200)]
    pretrained_cfg: _Description | None = None
    model_args: Annotated[dict[str, JsonValue] | None, AfterValidator(_network)] = None
    robust_accel: _Own | None = None


def described(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json without the entries that would make timm look for weights elsewhere.

    Raises:
        ValueError: It is not as timm or this package writes it.
    """
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        if "architecture" not in config:
            raise ValueError(f"{where} names no architecture of timm: no timm folder") from None
        raise ValueError(f"{where}: {first_fault(error)}") from None
    kept = {key: value for key, value in config.items() if key not in _SOURCES}
    if kept.get("pretrained_cfg") is not None:
        cfg = kept["pretrained_cfg"]
        kept["pretrained_cfg"] = {k: v for k, v in cfg.items() if k not in _SOURCES}
    return kept
