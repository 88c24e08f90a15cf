"""Recipes: each section built from plain values and checked, all faults said at once.

A recipe that is trained is code where it names a class of its own (``attack.name:
package.module:Class``): that is imported and called. From the recipe of a run folder, which may be
a stranger's, nothing is imported unless it is trusted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, ConfigDict

from robust_accel.attack_context import AttackMode
from robust_accel.attacks import ATTACKS, Attack, EpsSchedule, MultiNorm
from robust_accel.comm import COLLECTIVES
from robust_accel.comm.heartbeat import TIMEOUT
from robust_accel.data import DataSettings
from robust_accel.evaluation.certify_images import CertifySettings
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.files import write_text
from robust_accel.models import ModelSettings
from robust_accel.objectives import AWP, OBJECTIVES, Objective
from robust_accel.optim import SCHEDULES, OptimizerSettings, Schedule
from robust_accel.plain_yaml import RecipeError, dump
from robust_accel.recipe_builder import Builder, SectionSpec, chosen
from robust_accel.recipe_file import RecipeValues, find_recipe, name_of, origin_of
from robust_accel.settings import (
    Duration,
    Flag,
    Number,
    Settings,
    Whole,
    eps_text,
    listed,
)

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
        deterministic: Kernels that give the same bits in each run, where GPUs have faster ones;
            what torch has no such kernel for is refused. On CPUs nothing here needs it.
        attack_mode: Mode of the model during the attack, see ``RobustModel``.
        eps_warmup_epochs: The attack's eps and step size grow linearly, epoch by epoch, to what
            they are: in the k-th of these epochs they are k / eps_warmup_epochs of it.
        eps_schedule: The same step by step: ``{shape: sine, epochs: 10}``, see ``EpsSchedule``.
            ``metrics.jsonl`` has the eps of each line's last step as ``attack_eps``.
        awp: Adversarial weight perturbation: ``{gamma: 0.005, warmup_epochs: 10}``, see ``AWP``.
        max_grad_norm: Clip the gradient's global L2 norm to this.
        on_nonfinite: What to do where a loss or gradient is NaN or infinite on any process:
            ``stop`` ends the run at the next log line, validation or checkpoint, and keeps the last
            checkpoint, which is finite; ``skip`` leaves the step out on all processes, at the price
            of a small message a step, and counts it (``skipped_steps``).
        max_skipped_in_a_row: Of more steps than this the run ends; of a loss scaler's (fp16), too.
        on_collapse: What to do where robust accuracy on the held-out split falls to half of its
            best, or clearly falls while accuracy after one step does not, as in catastrophic
            overfitting: ``warn`` says it; ``stop`` ends the training, and the run
            leaves its best weights (with ``select: best``). ``rollback`` goes back to where the
            last validation had met no fall, whose checkpoint is kept, and on from there with half
            the rate and other draws of the attack.
        max_rollbacks: How often it does; where robust accuracy falls once more, training ends as by
            ``stop``. The report has ``rollbacks``, the reason of each.
        ema_decay: Keep an exponential moving average of the weights, and evaluate that: 0.995 to
            0.9999, the longer the training; at step t at most 1 - 1 / t, the mean of all so far.
            Not with ``swa_start``.
        swa_start: Keep the mean of the weights after each epoch from this one on, the first being
            1, and evaluate that: stochastic weight averaging. BatchNorm's running statistics are
            averaged as the weights are. Before it the weights are measured as they are.
        select: Which weights the run leaves: ``best`` robust accuracy on the held-out split of
            train (``data.validation_size``), or ``last``.
        validate_every: Epochs between measurements on the held-out split; the last one is at the
            end of the training in any case.
        validation_steps: Steps of the attack, ``evaluate.pgd``'s from one start, that measures
            robust accuracy there.
        early_stopping: Stop after so many measurements in a row without a better one.
        checkpoint_every: Optimizer steps between checkpoints; each epoch when not given.
        keep: How many checkpoints are kept, the newest ones; where one is damaged, a run goes on
            from the one before.
        max_time: Stop in time, with a checkpoint, before this process has lived so long: ``3h50m``,
            ``90m``, seconds. ``--resume`` goes on, with so much time again.
        timeout: How long one process may wait for another, ``10m`` unless given: then the one that
            does not answer is named and the run ends. Longer than the slowest step, checkpoint or
            reading of the data; evaluations have no limit while all processes answer.
        log_every: Optimizer steps between lines of ``metrics.jsonl``.
        log_with: Accelerate's trackers, for example ``[tensorboard]``.
        keep_gathered: Under FSDP2, gather the weights once a micro-batch and keep them for the
            whole attack and the outer loss, not in each forward and backward of it: 2 K + 2 times
            less traffic with an attack of K steps (K + 1 times where weights stay from forward to
            backward), and a whole copy of the weights in memory.
        channels_last, compile: Memory format and ``torch.compile`` of the inner model.
    """

    epochs: Annotated[Whole, Ge(1)]
    batch_size: Annotated[Whole, Ge(1)]
    gradient_accumulation: Annotated[Whole, Ge(1)] = 1
    max_steps: Annotated[Whole, Ge(1)] | None = None
    seed: Annotated[Whole, Ge(0)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    deterministic: Flag = False
    attack_mode: AttackMode = "eval"
    eps_warmup_epochs: Annotated[Whole, Ge(0)] = 0
    eps_schedule: EpsSchedule | None = None
    awp: AWP | None = None
    max_grad_norm: Annotated[Number, Gt(0)] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_in_a_row: Annotated[Whole, Ge(0)] = 20
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    max_rollbacks: Annotated[Whole, Ge(1)] = 3
    ema_decay: Annotated[Number, Gt(0), Lt(1)] | None = None
    swa_start: Annotated[Whole, Ge(1)] | None = None
    select: Literal["best", "last"] = "last"
    validate_every: Annotated[Whole, Ge(1)] = 1
    validation_steps: Annotated[Whole, Ge(1)] = 10
    early_stopping: Annotated[Whole, Ge(1)] | None = None
    checkpoint_every: Annotated[Whole, Ge(1)] | None = None
    keep: Annotated[Whole, Ge(2)] = 2
    max_time: Duration | None = None
    timeout: Annotated[Duration, Ge(5)] = TIMEOUT
    log_every: Annotated[Whole, Ge(1)] = 50
    log_with: Annotated[tuple[str, ...], AfterValidator(_trackers_at_hand)] = ()
    keep_gathered: Flag = False
    channels_last: Flag = False
    compile: Flag = False

    @property
    def grows_eps(self) -> float:
        """Epochs in which the attack is not whole yet."""
        schedule = self.eps_schedule
        return self.eps_warmup_epochs if schedule is None else schedule.epochs or self.epochs


# One line a section: its settings, or the family whose member its ``name`` chooses.
SECTIONS: dict[str, SectionSpec] = {
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


class MemoryFormat(Settings):
    """What of ``train`` a command needs that uses the model."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    channels_last: Flag = False


Section = Settings | Mapping[str, Any]


def as_section(section: str, given: Section) -> dict[str, Any]:
    """A recipe's section as plain values, of settings those that were given.

    Raises:
        ValueError: ``section: ...``: the settings are of no class that a recipe knows by name.
    """
    if not isinstance(given, Settings):
        return dict(given)
    values = given.model_dump(mode="json", exclude_unset=True)
    spec = SECTIONS[section]
    family: Mapping[str, type] = spec if isinstance(spec, Mapping) else {}
    names = [name for name, cls in family.items() if cls is type(given)]
    if not names and type(given) is not spec:
        known = [spec] if isinstance(spec, type) else family.values()
        wanted = listed(cls.__name__ for cls in known)
        raise ValueError(
            f"{section}: a {type(given).__name__} is not allowed; allowed: {wanted}, or a mapping"
            + (' with name="package.module:Class"' if family else "")
        )
    return {"name": names[0], **values} if names else values


# What commands that use a model build: of the run's own classes only what they need.
USED: dict[str, SectionSpec] = {
    key: SECTIONS[key] for key in ("model", "data", "attack", "objective", "evaluate", "certify")
} | {"train": MemoryFormat}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: each section built; those that a command does not need are None."""

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
    def chosen(self) -> dict[str, Any]:
        """Of the settings those that are not at their defaults."""
        return {
            section: chosen(getattr(self, section), values)
            for section, values in self.settings.items()
        }

    @property
    def doubts(self) -> list[str]:
        """Where what is measured is not what is trained, and what is set and does nothing."""
        idle: list[str] = []
        if self.train is not None and isinstance(self.schedule, Schedule):
            idle = self.schedule.doubts(self.train.epochs)
        trained, measured = _balls(self.attack), _balls(self.evaluate)
        if None in (*trained.values(), *measured.values()) or trained == measured:
            return idle
        own, other = (
            " and ".join(f"{norm}, eps {eps_text(eps or 0)}" for norm, eps in balls.items())
            for balls in (trained, measured)
        )
        keys = "evaluate.norm, evaluate.eps" if self.evaluate.balls is None else "evaluate.balls"
        return [f"trained against {own}; measured against {other} ({keys})", *idle]

    def save(self, path: Path) -> None:
        write_text(path, dump(self.settings))


def _balls(part: Any) -> dict[str, float | None]:
    """The radii of an attack, or of what is measured with, by their norms."""
    if isinstance(part, MultiNorm | EvaluateSettings) and part.balls is not None:
        return {ball.norm: ball.eps for ball in part.balls}
    return {getattr(part, "norm", "linf"): getattr(part, "eps", None)}


def load_recipe(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    layers: Iterable[Path | tuple[str, dict[str, Any]]] = (),
    required: Iterable[str] = FOR_TRAINING,
    trust: bool = True,
) -> Recipe:
    """Read a recipe and check it whole.

    Args:
        source: A path, or the name of a packaged recipe (``quickstart``, ``cifar10/dat_pgd``).
        overrides: ``key.subkey=value``; a value is as in a file, but that it is YAML only where it
            begins with ``[``, ``{`` or a quote, and else is taken as it stands.
        layers: What is laid over the recipe before the overrides, each over the ones before: files,
            or settings with the words for where they stand.
        required: Sections that must be there.
        trust: Import and call the classes that it names; else it can be looked at, not trained.

    Raises:
        RecipeError: All faults at once, a line each.
    """
    values, path = RecipeValues(DEFAULTS), find_recipe(source)
    values.read(path)
    for layer in layers:
        if isinstance(layer, Path):
            values.read(layer)
        else:
            values.merge(layer[1], layer[0])
    values.override(overrides)
    return _recipe(values, SECTIONS, f"runs/{name_of(path)}", required, trust=trust)


def recipe_of_use(
    settings: dict[str, Any],
    overrides: Sequence[str],
    source: str,
    *,
    required: Iterable[str],
    optional: Iterable[str] = (),
    trust: bool = False,
) -> Recipe:
    """What a command needs that uses a model: no other section is built.

    Args:
        settings: A run folder's recipe, or what is known of another model.
        overrides: ``key.subkey=value``, of sections that are built.
        source: Where the settings are from.
        required: Sections that are built and must be there.
        optional: Sections that are built as well.
        trust: Import and call the classes that the attack and the objective name; else their plain
            values are taken, as far as they go.

    Raises:
        RecipeError: All faults at once, a line each.
    """
    values, required = RecipeValues(DEFAULTS), tuple(required)
    values.merge(settings, source)
    values.override(overrides)
    needed = {*required, *optional, "train"}
    needed |= {"attack"} if "evaluate" in required else set()
    needed |= {"objective"} if "certify" in required else set()
    sections = {key: spec for key, spec in USED.items() if key in needed}
    return _recipe(values, sections, f"runs/{Path(source).name}", required, trust=trust)


def _recipe(
    values: RecipeValues,
    sections: Mapping[str, SectionSpec],
    output: str,
    required: Iterable[str],
    *,
    trust: bool,
) -> Recipe:
    builder = Builder(values, sections, SECTIONS, DEFAULTS, trust=trust)
    built, settings = builder.build(default_output=output, required=tuple(required))
    return Recipe(
        **built, output=Path(settings["output"]), settings=settings, origins=values.origins
    )
