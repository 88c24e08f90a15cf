"""Recipes: each section built from plain values and checked, all faults said at once."""

import copy
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, BaseModel, ValidationError

from robust_accel.attack_context import AttackMode
from robust_accel.attacks import ATTACKS, Attack
from robust_accel.comm import COLLECTIVES
from robust_accel.data import DataSettings
from robust_accel.evaluation.certify_images import CertifySettings
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.files import write_text
from robust_accel.models import ModelSettings
from robust_accel.objectives import AWP, OBJECTIVES, Objective
from robust_accel.optim import SCHEDULES, OptimizerSettings, with_defaults
from robust_accel.recipe_file import RecipeError, RecipeValues, find_recipe, origin_of
from robust_accel.settings import Duration, Number, Settings, close_to, eps_text, faults_of, listed

Built = TypeVar("Built")


def _trackers_at_hand(names: tuple[str, ...]) -> tuple[str, ...]:
    at_hand = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in at_hand:
            known = listed(LOGGER_TYPE_TO_CLASS)
            raise ValueError(
                f"{name!r} is not installed or unknown; installed: {listed(at_hand) or 'none'}; "
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
        max_time: Stop in time, with a checkpoint, before this process has lived so long: ``3h50m``,
            ``90m``, seconds. ``--resume`` goes on, with so much time again.
        timeout: How long one process may wait for another, ``10m`` unless given: then the one that
            does not answer is named and the run ends. Longer than the slowest step, checkpoint or
            reading of the data; evaluations have no limit while all processes answer.
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
    max_time: Duration | None = None
    timeout: Annotated[Duration, Ge(5)] = 600.0
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
            section = getattr(error, "section", section)  # of a key that another section holds
            key, _, _ = str(error).partition(":")
            origin = origin_of(self.origins, f"{section}.{key}")
            raise RecipeError(f"{origin}: {section}.{error}") from error

    @property
    def doubts(self) -> list[str]:
        """Where what is measured is not what is trained."""
        trained = getattr(self.attack, "norm", "linf"), getattr(self.attack, "eps", None)
        measured = self.evaluate.norm, self.evaluate.eps
        if trained[1] is None or measured[1] is None or trained == measured:
            return []
        own, other = (f"{norm}, eps {eps_text(eps or 0)}" for norm, eps in (trained, measured))
        return [f"trained against {own}; measured against {other} (evaluate.norm, evaluate.eps)"]

    def save(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(self.settings, sort_keys=False))


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
    values, path = RecipeValues(DEFAULTS), find_recipe(source)
    values.read(path)
    values.override(overrides)
    return _Builder(values).build(default_output=f"runs/{path.stem}", required=tuple(required))


def recipe_from_settings(
    settings: dict[str, Any], overrides: Sequence[str], source: str, *, required: Iterable[str]
) -> Recipe:
    """Build a recipe from settings that no file holds."""
    values = RecipeValues(DEFAULTS)
    values.merge(settings, source)
    values.override(overrides)
    return _Builder(values).build(
        default_output=f"runs/{Path(source).name}", required=tuple(required)
    )


class _Builder:
    """Builds a recipe's sections one by one, and collects all faults."""

    def __init__(self, recipe: RecipeValues) -> None:
        self.values, self.origins = recipe.values, recipe.origins
        self.faults: list[str] = []

    def build(self, *, default_output: str, required: tuple[str, ...]) -> Recipe:
        """Check every section, and raise all faults at once."""
        output = self.values.pop("output", None) or default_output
        # a section that is there but empty (null) is as good as left out
        given = copy.deepcopy(DEFAULTS) | {k: v for k, v in self.values.items() if v is not None}
        for key in map(str, self.values):
            if key in SECTIONS:
                continue
            self.fault(
                key, f"unknown section{close_to(key, SECTIONS)}; allowed: {listed(SECTIONS)}"
            )
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
                component = with_defaults(component)
        except ValidationError as error:
            for dotted, message in faults_of(error, spec):
                self.fault(f"{key}.{dotted}".rstrip("."), message)
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
        found = "missing" if name is None else f"{name!r} is unknown{close_to(name, family)}"
        self.fault(f"{key}.name", f"{found}; allowed: {listed(family)}, or package.module:Class")
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
        if built["certify"].sigma is None:
            sigma = getattr(built["objective"], "sigma", None)
            built["certify"] = built["certify"].model_copy(update={"sigma": sigma})
            if sigma is None and "certify" in required:
                self.fault("certify.sigma", "missing: the objective has no sigma to certify with")
        fault = getattr(attack, "fault", None)
        if fault is not None and "attack" in required:
            self.fault_of("attack", ValueError(f"attack.{fault}"))
        try:
            evaluate = built["evaluate"] = evaluate.with_threat_model_of(attack)
        except ValueError as error:
            if "evaluate" in required:
                self.fault_of("evaluate", ValueError(f"evaluate.{error}"))
            return
        if evaluate.eps is None and "evaluate" in required:
            self.fault("evaluate.eps", "missing: the attack has no eps to evaluate with")

    def fault(self, dotted: str, message: str) -> None:
        self.faults.append(f"{origin_of(self.origins, dotted)}: {dotted}: {message}")

    def fault_of(self, section: str, error: Exception) -> None:
        """A component's own complaint, which may begin with ``section.key``."""
        named_key = re.match(rf"{section}\.([\w.]+):? (.*)", str(error), re.DOTALL)
        dotted, message = named_key.groups() if named_key else ("", str(error))
        self.fault(f"{section}.{dotted}".rstrip("."), message)
