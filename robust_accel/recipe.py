"""Recipes: YAML files, inherited by ``base:``, overridden on the command line, checked whole."""

import copy
import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, BaseModel, ValidationError

from robust_accel.attacks import ATTACKS, Attack
from robust_accel.comm import COLLECTIVES
from robust_accel.data import DataSettings
from robust_accel.evaluation.settings import CertifySettings, EvaluateSettings
from robust_accel.models import ModelSettings
from robust_accel.objectives import AWP, OBJECTIVES, Objective
from robust_accel.optim import SCHEDULES, OptimizerSettings, check_optimizer
from robust_accel.robust_model import AttackMode
from robust_accel.settings import Number, Settings

Built = TypeVar("Built")

RECIPES = next(
    folder / "recipes"
    for folder in (Path(__file__).parent, Path(__file__).parent.parent)  # wheel, repository
    if (folder / "recipes").is_dir()
)


class RecipeError(ValueError):
    """A recipe that cannot run: one line a fault, with file, key, what was found and allowed."""


def _trackers_at_hand(names: tuple[str, ...]) -> tuple[str, ...]:
    at_hand = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in at_hand:
            known = _list(LOGGER_TYPE_TO_CLASS)
            raise ValueError(
                f"{name!r} is not installed or unknown; installed: {_list(at_hand) or 'none'}; "
                f"Accelerate knows {known}"
            )
    return names


class TrainSettings(Settings):
    """The recipe's ``train`` section.

    Args:
        epochs: Passes over the training images.
        batch_size: Images an optimizer step, over all processes and accumulated micro-batches.
        gradient_accumulation: Micro-batches that a process adds up before a step.
        max_steps: Stop after so many optimizer steps; the schedule still counts in epochs.
        seed: Of the weights, the order, the augmentation and the attacks.
        precision: ``auto`` is bf16 where the device computes in it, else fp32.
        attack_mode: Mode of the model during the attack, see ``RobustModel``.
        eps_warmup_epochs: The attack's eps and step size grow linearly, epoch by epoch, to what
            they are: in the k-th of these epochs they are k / eps_warmup_epochs of it.
        awp: Adversarial weight perturbation: ``{gamma: 0.005, warmup_epochs: 10}``, see ``AWP``.
        max_grad_norm: Clip the gradient's global L2 norm to this.
        ema_decay: Keep an exponential moving average of the weights, and evaluate that.
        select: Which weights the run leaves: ``best`` robust accuracy on the held-out split of
            train (``data.validation_size``), or ``last``.
        validate_every: Epochs between measurements on the held-out split.
        validation_steps: Steps of the PGD that measures robust accuracy there.
        early_stopping: Stop after so many measurements in a row without a better one.
        checkpoint_every: Optimizer steps between checkpoints; each epoch when not given.
        log_every: Optimizer steps between lines of ``metrics.jsonl``.
        log_with: Accelerate's trackers, for example ``[tensorboard]``.
        channels_last, compile: Memory format and ``torch.compile`` of the inner model.
    """

    epochs: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    gradient_accumulation: Annotated[int, Ge(1)] = 1
    max_steps: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    attack_mode: AttackMode = "eval"
    eps_warmup_epochs: Annotated[int, Ge(0)] = 0
    awp: AWP | None = None
    max_grad_norm: Annotated[Number, Gt(0)] | None = None
    ema_decay: Annotated[Number, Gt(0), Lt(1)] | None = None
    select: Literal["best", "last"] = "last"
    validate_every: Annotated[int, Ge(1)] = 1
    validation_steps: Annotated[int, Ge(1)] = 10
    early_stopping: Annotated[int, Ge(1)] | None = None
    checkpoint_every: Annotated[int, Ge(1)] | None = None
    log_every: Annotated[int, Ge(1)] = 50
    log_with: Annotated[tuple[str, ...], AfterValidator(_trackers_at_hand)] = ()
    channels_last: bool = False
    compile: bool = False


# One line a section: its settings, or the family whose member its ``name`` chooses.
SECTIONS: dict[str, type[Settings] | Mapping[str, type]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "attack": ATTACKS,
    "objective": OBJECTIVES,
    "optimizer": OptimizerSettings,
    "schedule": SCHEDULES,
    "communication": COLLECTIVES,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "certify": CertifySettings,
}
DEFAULTS: dict[str, Any] = {
    "objective": {"name": "adversarial"},
    "schedule": {"name": "constant"},
    "communication": {"name": "allreduce"},
    "evaluate": {},
    "certify": {},
}
FOR_TRAINING = ("model", "data", "attack", "optimizer", "train", "evaluate")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: each section built, sections that the command does not need are None."""

    model: ModelSettings
    data: DataSettings
    evaluate: EvaluateSettings
    certify: CertifySettings
    objective: Objective
    schedule: Any
    communication: Any
    output: Path
    settings: dict[str, Any]
    """The resolved settings as plain values: what ``recipe.yaml`` of the run folder holds."""
    origins: dict[str, str]
    """Where each dotted key was set: a file, or the command line."""
    attack: Attack | None = None
    optimizer: OptimizerSettings | None = None
    train: TrainSettings | None = None

    def checked(self, section: str, build: Callable[[], Built]) -> Built:
        """Build from a section; a component's ``key: message`` gets the file and the section.

        Raises:
            RecipeError: ``file: section.key: what was found, what is allowed``.
        """
        try:
            return build()
        except ValueError as error:
            key, _, _ = str(error).partition(":")
            origin = _origin(self.origins, f"{section}.{key}")
            raise RecipeError(f"{origin}: {section}.{error}") from error

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.settings, sort_keys=False))


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), *, required: Iterable[str] = FOR_TRAINING
) -> Recipe:
    """Read a recipe and check it whole.

    Args:
        source: A path, or the name of a packaged recipe (``quickstart``, ``cifar10/dat_pgd``).
        overrides: ``key.subkey=value``, values in YAML.
        required: Sections that must be there.

    Raises:
        RecipeError: All faults at once, a line each.
    """
    draft = _Draft()
    path = find_recipe(source)
    draft.read(path)
    draft.override(overrides)
    return draft.build(default_output=f"runs/{path.stem}", required=tuple(required))


def recipe_from_settings(
    settings: dict[str, Any], overrides: Sequence[str], source: str, *, required: Iterable[str]
) -> Recipe:
    """Build a recipe from settings that no file holds."""
    draft = _Draft()
    draft.merge(settings, source)
    draft.override(overrides)
    return draft.build(default_output=f"runs/{Path(source).name}", required=tuple(required))


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given as a path or as the name of a packaged one."""
    for candidate in (Path(source), RECIPES / source, RECIPES / f"{source}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
    names = [n for n in names if "/_" not in f"/{n}" and not n.startswith("accelerate/")]
    raise RecipeError(f"{source}: no such file, nor a packaged recipe ({', '.join(names)})")


def _origin(origins: dict[str, str], dotted: str) -> str:
    """Where a key, or the nearest section above it, was set."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((origins[p] for p in prefixes if p in origins), "recipe")


class _Draft:
    """A recipe while it is put together: plain values, and where each came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = copy.deepcopy(DEFAULTS)
        self.origins: dict[str, str] = {}  # dotted key -> file, or "command line"
        self.faults: list[str] = []

    def read(self, path: Path, seen: tuple[Path, ...] = ()) -> None:
        """Merge a file over its bases."""
        if path.resolve() in seen:
            raise RecipeError(f"{path}: base: the recipe inherits from itself")
        try:
            values = yaml.load(path.read_text(), _Loader)
        except (FileNotFoundError, IsADirectoryError):
            raise RecipeError(f"{seen[-1]}: base: no such file: {path}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not YAML: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, got {values!r}")
        base = values.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise RecipeError(f"{path}: base: must be one file, got {base!r}")
            self.read(path.parent / base, (*seen, path.resolve()))
        self.merge(values, str(path))

    def override(self, overrides: Sequence[str]) -> None:
        """Merge ``key.subkey=value`` settings of the command line."""
        tree: dict[str, Any] = {}
        for text in overrides:
            dotted, equals, value = text.partition("=")
            keys = dotted.split(".")
            if not equals or not all(keys):
                raise RecipeError(f"command line: {text!r} is not of the form key.subkey=value")
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise RecipeError(f"command line: {text!r}: {key} is set to {node!r} there too")
            try:
                node[keys[-1]] = yaml.load(value, _Loader)
            except yaml.YAMLError as error:
                raise RecipeError(f"command line: {text!r} is not YAML: {error}") from None
        self.merge(tree, "command line")

    def merge(self, values: dict[str, Any], origin: str) -> None:
        self.values = self._merged(self.values, values, origin, "")

    def _merged(self, old: Any, new: dict[str, Any], origin: str, prefix: str) -> dict[str, Any]:
        # another component by name starts its section afresh: its settings are its own
        old = old if isinstance(old, dict) else {}
        renamed = prefix and new.get("name", old.get("name")) != old.get("name")
        if renamed:
            stale = [key for key in self.origins if key.startswith(prefix)]
            for key in stale:  # or a key missing now would be blamed on the file that had it
                del self.origins[key]
        merged = {} if renamed else dict(old)
        for key, value in new.items():
            dotted = f"{prefix}{key}"
            self.origins[dotted] = origin
            nested = isinstance(value, dict)
            merged[key] = (
                self._merged(merged.get(key), value, origin, f"{dotted}.") if nested else value
            )
        return merged

    def build(self, *, default_output: str, required: tuple[str, ...]) -> Recipe:
        """Check every section, and raise all faults at once."""
        output = self.values.pop("output", None) or default_output
        # a section that is there but empty (null) is as good as left out
        given = copy.deepcopy(DEFAULTS) | {k: v for k, v in self.values.items() if v is not None}
        for key in map(str, self.values):
            if key in SECTIONS:
                continue
            self.fault(key, f"unknown section{_close(key, SECTIONS)}; allowed: {_list(SECTIONS)}")
        for key in required:
            if key not in given:
                self.fault(key, "missing: this section is required")
        built: dict[str, Any] = {}
        resolved: dict[str, Any] = {}
        for key, spec in SECTIONS.items():
            values = given.get(key)
            if values is None:
                continue
            if not isinstance(values, dict):
                self.fault(key, f"must be a mapping of settings, got {values!r}")
                continue
            built[key], resolved[key] = self._section(key, spec, dict(values))
        if not self.faults:
            self._check_together(built, required)
        if self.faults:
            raise RecipeError("\n".join(self.faults))
        return Recipe(
            **built,
            output=Path(str(output)),
            settings=resolved | {"output": str(output)},
            origins=self.origins,
        )

    def _section(self, key: str, spec: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Build one section: (its component, its settings with every default)."""
        name = None
        if isinstance(spec, Mapping):
            name = values.pop("name", None)
            spec = self._component(key, spec, name)
            if spec is None:
                return None, {}
        try:
            component = spec(**values)
            if isinstance(component, OptimizerSettings):
                check_optimizer(component)
        except ValidationError as error:
            by_key: dict[str, dict[str, None]] = {}  # a union's members each have their complaint
            for fault in error.errors():
                dotted, message = _explain(fault, spec)
                by_key.setdefault(".".join((key, *dotted)), {})[message] = None
            for dotted_key, messages in by_key.items():
                self.fault(dotted_key, "; or ".join(messages))
            return None, {}
        except (TypeError, ValueError) as error:  # an optimizer, or a user's own class
            self.fault_of(key, error)
            return None, {}
        if isinstance(component, BaseModel):
            values = component.model_dump(mode="json")
        elif dataclasses.is_dataclass(component) and not isinstance(component, type):
            values = dataclasses.asdict(component)
        return component, ({} if name is None else {"name": name}) | values

    def _component(self, key: str, family: Mapping[str, type], name: object) -> type | None:
        """The class that a name stands for: the family's own, or a user's package.module:Class."""
        if isinstance(name, str) and name in family:
            return family[name]
        if isinstance(name, str) and ":" in name:
            module, _, attribute = name.partition(":")
            try:
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                self.fault(f"{key}.name", f"{name!r} cannot be imported: {error}")
                return None
        found = "missing" if name is None else f"{name!r} is unknown{_close(name, family)}"
        self.fault(f"{key}.name", f"{found}; allowed: {_list(family)}, or package.module:Class")
        return None

    def _check_together(self, built: dict[str, Any], required: tuple[str, ...]) -> None:
        """Faults that no section can see alone."""
        train: TrainSettings | None = built.get("train")
        data: DataSettings = built["data"]
        attack = built.get("attack")
        evaluate: EvaluateSettings = built["evaluate"]
        if train is not None:
            selects = train.select == "best" or train.early_stopping is not None
            if selects and data.validation_size == 0:
                self.fault(
                    "data.validation_size",
                    "0, but train.select: best and train.early_stopping choose on a held-out "
                    "split of train: hold out some images",
                )
            if train.batch_size % train.gradient_accumulation:
                self.fault(
                    "train.gradient_accumulation",
                    f"{train.gradient_accumulation} does not divide train.batch_size "
                    f"{train.batch_size}",
                )
            try:
                built["schedule"].check(train.epochs)
            except ValueError as error:
                self.fault_of("schedule", error)
        evaluate = built["evaluate"] = evaluate.with_threat_model_of(attack)
        if built["certify"].sigma is None:
            sigma = getattr(built["objective"], "sigma", None)
            built["certify"] = built["certify"].model_copy(update={"sigma": sigma})
            if sigma is None and "certify" in required:
                self.fault("certify.sigma", "missing: the objective has no sigma to certify with")
        if "evaluate" not in required:
            return
        if evaluate.eps is None:
            self.fault("evaluate.eps", "missing: the attack has no eps to evaluate with")
        elif evaluate.norm == "linf" and evaluate.eps > 1:
            self.fault(
                "evaluate.eps",
                f"{evaluate.eps} is not allowed: in pixel units an L-inf eps is at most 1, "
                "like 8/255",
            )

    def fault(self, dotted: str, message: str) -> None:
        self.faults.append(f"{_origin(self.origins, dotted)}: {dotted}: {message}")

    def fault_of(self, section: str, error: Exception) -> None:
        """A component's own complaint, which may begin with ``section.key``."""
        named_key = re.match(rf"{section}\.([\w.]+):? (.*)", str(error), re.DOTALL)
        dotted, message = named_key.groups() if named_key else ("", str(error))
        self.fault(f"{section}.{dotted}".rstrip("."), message)


def _explain(fault: Any, spec: Any) -> tuple[list[str], str]:
    """One pydantic fault as its keys, and: what was found, what is allowed."""
    keys: list[str] = []
    for part in fault["loc"]:
        fields = getattr(spec, "model_fields", {})  # of the settings that hold this key
        if fault["type"] == "extra_forbidden" and part not in fields and spec is not None:
            message = f"unknown key{_close(part, fields)}; allowed: {_list(fields)}"
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


def _close(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number: YAML 1.1 asks for a dot, people don't."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
