"""Builds a recipe's sections from values, and collects every fault."""

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from robust_accel.components import NotImported, find_component, is_custom
from robust_accel.exit_codes import Stopped
from robust_accel.files import as_json, check_path
from robust_accel.messages import close_to, cut, shown, told
from robust_accel.optim import OptimizerSettings, with_defaults
from robust_accel.plain_yaml import RecipeError, Written, plain, refuse_other, with_texts
from robust_accel.recipe_checks import clashes
from robust_accel.recipe_file import RecipeValues, origin_of
from robust_accel.settings import Settings, faults_of, listed

SectionSpec: TypeAlias = type[Settings] | Mapping[str, type]
"""A section's settings, or the family whose member its ``name`` chooses."""


class Builder:
    """Builds sections one by one.

    Args:
        recipe: The values.
        sections: Those that are built; others are left as plain values.
        every: All that a recipe may have.
        defaults: Of those that may be left out.
        trust: Import and call the classes that sections name, see ``components.py``.
    """

    def __init__(
        self,
        recipe: RecipeValues,
        sections: Mapping[str, SectionSpec],
        every: Mapping[str, SectionSpec],
        defaults: Mapping[str, Any],
        *,
        trust: bool,
    ) -> None:
        self.values, self.origins = recipe.values, recipe.origins
        self.sections, self.every, self.defaults = sections, every, defaults
        self.trust = trust
        self.faults: list[str] = []

    def build(
        self, *, default_output: str, required: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Check every section.

        Returns:
            The components, None for those that are not built, and all settings as plain values,
            with every default.

        Raises:
            RecipeError: All faults at once.
        """
        output = self.values.pop("output", None)
        output = default_output if output is None else output
        output = output.text if isinstance(output, Written) else output
        if not isinstance(output, str):
            self.fault("output", f"must be a folder, got {shown(plain(output))}")
        else:
            try:
                output = check_path(output)
            except ValueError as error:
                self.fault("output", f"{shown(output)} is not allowed: {error}")
        self._refuse_unread()
        # a section that is there but empty (null) is as good as left out
        given = copy.deepcopy(dict(self.defaults))
        given |= {key: values for key, values in self.values.items() if values is not None}
        built: dict[str, Any] = dict.fromkeys(self.every)
        resolved: dict[str, Any] = {}
        for key in self.every:
            values = given.get(key)
            if values is None:
                if key in required:
                    self.fault(key, "missing: this section is required")
            elif not isinstance(values, dict):
                self.fault(key, f"must be a mapping of settings, got {shown(plain(values))}")
            elif key in self.sections:
                built[key], resolved[key] = self._section(key, self.sections[key], values)
            else:
                resolved[key] = plain(values)
        if not self.faults:
            self._check_training(built, required)
            self._fill_sigma(built, required)
            self._fill_threat_model(built, resolved, required)
        if self.faults:
            raise RecipeError(*self.faults)
        return built, resolved | {"output": output}

    def _refuse_unread(self) -> None:
        """Sections that do not exist, and settings of the command line that nothing would read."""
        for key in self.values:
            if key not in self.every:
                inside = [name for name in self.every if key in _keys_of(self.every[name])]
                meant = f" (did you mean {' or '.join(f'{name}.{key}' for name in inside)}?)"
                close = meant if inside else close_to(key, self.every)
                self.fault(key, f"unknown section{close}; allowed: {listed(self.every)}")
        unread = [
            dotted
            for dotted, origin in self.origins.items()
            if origin == "command line" and not self._is_read(*dotted.split(".")[:2])
        ]
        for dotted in unread:
            if not any(other.startswith(f"{dotted}.") for other in unread):
                read = [name for key in self.every for name in self._read_of(key)]
                self.fault(dotted, f"this command does not read it; it reads {listed(read)}")

    def _is_read(self, section: str, key: str | None = None) -> bool:
        if section not in self.every:  # a fault of its own
            return True
        read = self._read_of(section)
        return section in read or (bool(read) if key is None else f"{section}.{key}" in read)

    def _read_of(self, section: str) -> list[str]:
        """A section that is built, or the few keys of one that are read."""
        spec = self.sections.get(section)
        if spec is None:
            return []
        if isinstance(spec, Mapping) or spec.model_config.get("extra") != "ignore":
            return [section]
        return [f"{section}.{key}" for key in spec.model_fields]

    def _section(self, key: str, spec: Any, tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Build one section: (its component, its settings with every default)."""
        named: dict[str, Any] = {}
        if isinstance(spec, Mapping):
            named = {"name": plain(tree.get("name"))}
            tree = {k: value for k, value in tree.items() if k != "name"}
            if is_custom(named["name"], spec) and not self.trust:
                return NotImported.of(named["name"], plain(tree)), named | plain(tree)
            try:
                spec = find_component(key, spec, named["name"])
            except ValueError as error:
                self.fault(f"{key}.name", str(error))
                return None, {}
        try:
            component = built(spec, tree)
            values = _settings_of(component, plain(tree))
        except ValidationError as error:
            found = faults_of(error, spec)
            # what hangs on a name that is wrong, is not known
            for dotted, message in [f for f in found if f[0] == "name"] or found:
                self.fault(f"{key}.{dotted}".rstrip("."), message)
        except (TypeError, ValueError) as error:  # an optimizer, or a user's own class
            self.fault_of(key, error)
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # a user's own
            self.fault(key, told(error))
        else:
            return component, named | values
        return None, {}

    def _check_training(self, built: dict[str, Any], required: tuple[str, ...]) -> None:
        """Faults of the training that no section can see alone."""
        if "schedule" not in self.sections:
            return
        for dotted, message in clashes(built):
            self.fault(dotted, message)
        if built["train"] is not None and not isinstance(built["schedule"], NotImported):
            try:
                built["schedule"].check(built["train"].epochs)
            except ValueError as error:
                self.fault_of("schedule", error)
        fault = getattr(built["attack"], "fault", None)
        if isinstance(fault, str) and "attack" in required:
            self.fault_of("attack", ValueError(f"attack.{fault}"))

    def _fill_sigma(self, built: dict[str, Any], required: tuple[str, ...]) -> None:
        """The noise to certify with is the objective's, where it is not given."""
        certify, objective = built["certify"], built["objective"]
        if certify is None or certify.sigma is not None:
            return
        sigma = getattr(objective, "sigma", None)
        built["certify"] = certify.model_copy(update={"sigma": sigma})
        if sigma is None and "certify" in required:
            why = "the objective has no sigma to certify with"
            if isinstance(objective, NotImported):
                why = objective.why("objective")
            self.fault("certify.sigma", f"missing: {why}: give it, as certify.sigma=0.25")

    def _fill_threat_model(
        self, built: dict[str, Any], resolved: dict[str, Any], required: tuple[str, ...]
    ) -> None:
        """The norm and eps, or balls, to evaluate with are the attack's, where none are given."""
        evaluate, attack = built["evaluate"], built["attack"]
        if evaluate is None:
            return
        unknown = [key for key in ("norm", "eps") if getattr(evaluate, key) is None]
        unknown = [] if evaluate.balls is not None else unknown
        if isinstance(attack, NotImported) and attack.norm is None:
            if unknown and "evaluate" in required:
                names = " and ".join(f"evaluate.{key}" for key in unknown)
                why = attack.why("attack")
                self.fault(f"evaluate.{unknown[0]}", f"missing: {why}: give {names}")
                return
            attack = None
        try:
            built["evaluate"] = filled = evaluate.with_threat_model_of(attack)
        except ValueError as error:
            if "evaluate" in required:
                self.fault_of("evaluate", ValueError(f"evaluate.{error}"))
            return
        if filled.eps is None and filled.balls is None and "evaluate" in required:
            self.fault("evaluate.eps", "missing: the attack has no eps to evaluate with")
        name = resolved.get("attack", {}).get("name")
        if is_custom(name, {}):  # so that the run can be measured without its code
            resolved["evaluate"] |= {"norm": filled.norm, "eps": filled.eps}

    def fault(self, dotted: str, message: str) -> None:
        self.faults.append(f"{origin_of(self.origins, dotted)}: {cut(dotted)}: {message}")

    def fault_of(self, section: str, error: Exception) -> None:
        """A component's own complaint, which may begin with ``section.key``."""
        named_key = re.match(rf"{section}\.([\w.]+):? (.*)", str(error), re.DOTALL)
        dotted, message = named_key.groups() if named_key else ("", str(error))
        self.fault(f"{section}.{dotted}".rstrip("."), message)


def _keys_of(spec: SectionSpec) -> set[str]:
    """All keys that a section may have."""
    members = spec.values() if isinstance(spec, Mapping) else [spec]
    return {key for member in members for key in getattr(member, "model_fields", ())}


def built(spec: Any, tree: dict[str, Any]) -> Any:
    """The component; what is no text is taken as it was written where a text is wanted."""
    values = plain(tree)
    build = spec.model_validate if issubclass(spec, Settings) else lambda found: spec(**found)
    try:
        component = build(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        places = [fault["loc"] for fault in found if fault["type"] == "string_type"]
        written = with_texts(tree, places) if places else values
        if written == values:  # there may be thousands of faults: once is enough
            raise
        component = build(written)
    if not isinstance(component, spec):  # a user's own ``__new__``
        raise ValueError(f"calling {shown(spec)} gives {shown(component)}, no instance of it")
    return with_defaults(component) if isinstance(component, OptimizerSettings) else component


def chosen(component: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Of a component's settings those that are not at their defaults.

    A later version, with settings that this one does not know, finds the same for the same recipe.

    Args:
        values: All settings as plain values; a user's own class has no defaults that are known.
    """
    if isinstance(component, BaseModel):
        defaults = {
            key: field.get_default(call_default_factory=True, validated_data={})
            for key, field in type(component).model_fields.items()
            if not field.is_required()
        }
    elif dataclasses.is_dataclass(component):
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(component)
            if field.default is not dataclasses.MISSING
        }
    else:
        return values
    kept: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key, dataclasses.MISSING)
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        if default is dataclasses.MISSING or as_json(default) != as_json(value):
            own = getattr(component, key, None)
            if isinstance(value, dict) and own is not None:
                kept[key] = chosen(own, value)
            elif isinstance(own, tuple) and all(isinstance(part, BaseModel) for part in own):
                kept[key] = [chosen(*pair) for pair in zip(own, value, strict=True)]
            else:
                kept[key] = value
    return kept


def _settings_of(component: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Plain values that build the same component.

    Raises:
        ValueError: One of them cannot stand in a recipe.
    """
    if isinstance(component, BaseModel):
        values = component.model_dump(mode="json")
    elif dataclasses.is_dataclass(component) and not isinstance(component, type):
        values = dataclasses.asdict(component)
    refuse_other(values)
    return values
