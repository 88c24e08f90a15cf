"""What a recipe's keys mean, read off the classes that a recipe is built from."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from robust_accel.optim import LAMB
from robust_accel.recipe import SECTIONS
from robust_accel.settings import MOST, Settings, eps_text, listed

_NUMBER = r"^[-+]?[\d.]+([eE][-+]?\d+)?( ?/ ?[\d.]+)?$"  # a fraction, too: 8/255


@dataclass(frozen=True)
class Key:
    """One setting.

    Args:
        dotted: As the command line has it.
        component: The member of a family that has it (``pgd``); empty where all have it.
        text: What it does.
        allowed, default: In words; an empty default is a setting that must be there.
    """

    dotted: str
    component: str
    text: str
    allowed: str
    default: str


def all_keys() -> list[Key]:
    """Every setting of every section, in the recipe's order."""
    found = [key for section in SECTIONS for key in _of_section(section)]
    return [*found, Key("output", "", "The run folder.", "text", "runs/ and the recipe's name")]


def about(section: str, component: str = "") -> str:
    """What a section, or a member of its family, is: its docstring without the settings."""
    return _without_settings(members(section)[component])


def members(section: str) -> Mapping[str, type[Settings]]:
    """Name -> class of a section's family; under the empty name, where there is but one."""
    spec = SECTIONS[section]
    return spec if isinstance(spec, Mapping) else {"": spec}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, by which an editor completes and marks what is wrong.

    A section may have the keys of all members of its family, for another file may say which is
    meant; what goes together is checked by the package alone.
    """
    definitions: dict[str, Any] = {}
    sections = {section: _schema_of(section, definitions) for section in SECTIONS}
    text = {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of robust-accel",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "base": text | {"description": "A recipe beside this one, or a packaged one's name."},
            **sections,
            "output": text | {"description": "The run folder."},
        },
        "$defs": definitions,
    }


def texts_of(cls: type) -> dict[str, str]:
    """Setting -> what the class's docstring says of it, or that of a class above it."""
    found: dict[str, str] = {}
    for above in reversed(cls.__mro__):
        found |= _texts_in(above.__doc__ or "")
    return found


def _texts_in(docstring: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    in_settings = False
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.startswith(" ") and line:
            in_settings = line == "Args:"
        elif in_settings and (entry := re.match(r"    (\w[\w, ]*): (.*)", line)):
            names = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(names, entry[2])
        elif in_settings and line:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _without_settings(cls: type) -> str:
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    return "\n\n".join(text for text in paragraphs if not text.startswith("Args:"))


def _of_section(section: str) -> Iterator[Key]:
    spec = SECTIONS[section]
    if isinstance(spec, Mapping):
        allowed = f"{listed(spec)}, or package.module:Class"
        yield Key(f"{section}.name", "", "Which one.", allowed, "")
    for name, cls in members(section).items():
        yield from _of_class(cls, section, name)
    if section == "optimizer":
        yield from _of_lamb()


def _of_class(cls: type[BaseModel], above: str, component: str) -> Iterator[Key]:
    texts, properties = texts_of(cls), cls.model_json_schema()["properties"]
    for name, field in cls.model_fields.items():
        inner = _inner(field)
        allowed = _allowed(properties[name])
        default = "" if field.is_required() else _written(field)
        yield Key(f"{above}.{name}", component, texts.get(name, ""), allowed, default)
        if inner is not None:
            yield from _of_class(inner, f"{above}.{name}", component)


def _of_lamb() -> Iterator[Key]:
    """The options of this package's optimizer; timm's others are in timm's documentation."""
    texts = texts_of(LAMB)
    for name, parameter in inspect.signature(LAMB).parameters.items():
        if name not in ("params", "lr", "weight_decay", "foreach", "fused"):  # not a recipe's
            default = _plain(parameter.default)
            yield Key(f"optimizer.{name}", "lamb", texts.get(name, ""), "", default)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """The settings inside of a setting."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(
        (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None
    )


def _written(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json", exclude_defaults=True)
    return _plain(default)


def _plain(value: Any) -> str:
    if isinstance(value, float) and "/" in eps_text(value):
        return eps_text(value)
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema says, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_allowed(kind) for kind in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return listed([str(value) for value in schema.get("enum", [schema.get("const")])])
    kind = schema.get("type")
    if kind == "array":
        inner: dict[str, Any] = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        return f"list of: {_allowed(inner)}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    signs |= {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # of what is parsed before
    bounds = [
        f"{sign} {schema[key]:g}" for key, sign in signs.items() if schema.get(key, MOST) != MOST
    ]
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
    }
    return " ".join([words.get(str(kind), "settings of its own"), ", ".join(bounds)]).strip()


def _schema_of(section: str, definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    spec = SECTIONS[section]
    if isinstance(spec, Mapping):
        custom = {"type": "string", "pattern": ":"}
        properties["name"] = {"anyOf": [{"enum": sorted(spec)}, custom]}
    for component, cls in members(section).items():
        own = cls.model_json_schema()
        for inner, found in own.pop("$defs", {}).items():
            lenient = {key: _lenient(value) for key, value in found["properties"].items()}
            definitions[inner] = found | {"properties": lenient}
        texts = texts_of(cls)
        for name, found in own["properties"].items():
            described = _lenient(found) | {"description": texts.get(name, "")}
            if component:
                described["description"] = f"{component}: {described['description']}"
            if name in properties and "anyOf" in properties[name]:
                properties[name]["anyOf"].append(described)
            elif name in properties:
                properties[name] = {"anyOf": [properties[name], described]}
            else:
                properties[name] = described
    is_open = isinstance(spec, Mapping) or spec.model_config.get("extra") == "allow"
    return {
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": is_open,
    }


def _lenient(schema: dict[str, Any]) -> dict[str, Any]:
    """Numbers may be written as fractions, or as 3h50m; bounds are the package's to check."""
    if schema.get("additionalProperties") is True:  # as without it; not every pydantic says so
        schema = {key: value for key, value in schema.items() if key != "additionalProperties"}
    if "anyOf" in schema:
        return schema | {"anyOf": [_lenient(kind) for kind in schema["anyOf"]]}
    if schema.get("type") not in ("number", "integer"):
        return schema
    plain = {key: value for key, value in schema.items() if key in ("title", "default")}
    texts = [
        {"type": "string", "pattern": _NUMBER},
        {"type": "string", "pattern": r"^(\d+[dhms])+$"},
    ]
    return plain | {"anyOf": [{"type": "number"}, *texts]}
