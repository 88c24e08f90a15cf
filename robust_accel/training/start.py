"""How a run begins: anew, or from which checkpoint, and whether it is still the same run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from robust_accel.data import DataIdentity, ImageSet, identity_of
from robust_accel.data.shards import changed
from robust_accel.evaluation.settings import PGDSettings
from robust_accel.plain_yaml import dump, parse, plain, read_plain
from robust_accel.provenance import versions
from robust_accel.recipe import Recipe
from robust_accel.run_folder import RunFolder, differences, with_new_defaults
from robust_accel.training.launcher import Sharding
from robust_accel.training.manifest import Manifest, read_whole, restore_replaced
from robust_accel.training.peers import check_same_images, images_in_words

# what a run may change on the way: where it lies, how its images are decoded, how it is measured,
# logged, kept and ended
_FREE = (
    "output", "evaluate", "certify", "data.num_workers", "train.keep", "train.checkpoint_every",
    "train.log_every", "train.log_with", "train.max_time", "train.timeout", "train.on_nonfinite",
    "train.max_skipped_in_a_row", "train.on_collapse", "train.max_rollbacks", "train.keep_gathered",
)  # fmt: skip
_ATTACKING = (
    "evaluate.norm", "evaluate.eps", "evaluate.balls", "evaluate.pgd.attack", "evaluate.pgd.loss",
)  # fmt: skip
CHOOSING = (*_ATTACKING, "evaluate.seed", "evaluate.batch_size")
"""Settings of the held-out accuracy, which chooses weights."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: Its name in ``checkpoints/``; None: anew.
        about: What that checkpoint's manifest says of the run.
        notes: What a user should know.
    """

    checkpoint: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def engine_of(accelerator: Accelerator, sharding: Sharding | None = None) -> dict[str, Any]:
    """What writes a checkpoint's files; ``sharding``: by FSDP2."""
    with_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    engine = "torch" if sharding is None else "FSDP2"  # alone or by DDP: the same files
    return {
        "engine": "DeepSpeed" if with_deepspeed else engine,
        "zero_stage": accelerator.deepspeed_plugin.zero_stage if with_deepspeed else None,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
    } | ({} if sharding is None else {"replicas": sharding.replicas})


def find_start(recipe: Recipe, folder: RunFolder, engine: dict[str, Any], *, resume: bool) -> Start:
    """Look at the folder that this process owns.

    Args:
        engine: From ``engine_of``.
        resume: Whether a run that is there may be continued.

    Raises:
        ValueError: ``output: ...``: it holds other files, or a run that is not to be continued, was
            started otherwise, or has no whole checkpoint.
    """
    if not folder.check(resume=resume):
        return Start()
    checkpoint, manifest, notes = _newest_whole(folder)
    about = manifest["about"] if manifest else {"settings": read_plain(folder.recipe)}
    now = plain(parse(dump(recipe.settings), "recipe"))  # as it was saved: a tuple became a list
    was = with_new_defaults(about["settings"], now, recipe.chosen)
    changed = differences(_with_attack(was), _with_attack(now))
    fixed_too = _fixed_of_evaluate(recipe)
    refused = [line for key, line in changed.items() if key in fixed_too or not within(key, _FREE)]
    if refused:
        raise ValueError(
            f"output: {folder.path} was started with other settings: {'; '.join(refused)}"
        )
    if checkpoint is None:
        return Start(notes=tuple(notes))
    ran = about["engine"]
    fixed = ["engine", "zero_stage"]
    if engine["zero_stage"]:  # each process has a shard
        fixed.append("num_processes")
    if any(ran[key] != engine[key] for key in fixed):
        raise ValueError(
            f"output: {folder.path} was trained by {_in_words(ran)}, and {_in_words(engine)} "
            "cannot read its checkpoints: launch it as before, or start another run"
        )
    if ran["num_processes"] != engine["num_processes"]:
        notes.append(
            f"the checkpoint is from {ran['num_processes']} processes, not "
            f"{engine['num_processes']}: the run goes on, but not bit for bit"
        )
    others = {
        "device": (ran["device"], engine["device"]),
        "replicas": (ran.get("replicas", 1), engine.get("replicas", 1)),
        **_both(about["versions"], versions()),
    }
    moved = [f"{name} {old}, now {new}" for name, (old, new) in others.items() if old != new]
    if moved:
        notes.append(f"the run goes on, perhaps not bit for bit: {'; '.join(moved)}")
    said = [line for key, line in changed.items() if key != "output"]
    if said:
        notes.append(f"changed since the checkpoint: {'; '.join(said)}")
    return Start(checkpoint, about, tuple(notes))


def check_same_data(
    start: Start, data: DataIdentity, test: ImageSet, accelerator: Accelerator
) -> None:
    """Refuse other data than the run's, or than another process's.

    Args:
        data: From ``Data.identity``, of this process.
        test: Its test images, which may change while a run goes on.

    Raises:
        ValueError: ``path: ...``: images are more, fewer or others, or have other labels.
    """
    check_same_images(lambda: data | identity_of(test=test), accelerator)
    known: DataIdentity = start.about.get("data", data)
    shards = changed(*(of.get("train", {}).get("shards", {}) for of in (known, data)))
    for name in sorted(known.keys() | data.keys()):
        was, found = (images_in_words(of.get(name)) for of in (known, data))
        if was != found:
            raise ValueError(
                f"path: {shards}the run has trained on {was} as {name}, and now there are {found}: "
                "it goes on only with the same data in the same order; restore them, or start "
                "another run"
            )


def _newest_whole(folder: RunFolder) -> tuple[str | None, Manifest | None, list[str]]:
    """The checkpoint to go on from; what is said of those that cannot be used."""
    restore_replaced(folder.checkpoints)
    faults: list[str] = []
    for path in reversed(folder.steps()):
        try:
            return path.name, read_whole(path), [f"{fault}: it is not used" for fault in faults]
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise ValueError(
            f"output: {folder.path} has no whole checkpoint to go on from: {'; '.join(faults)}; "
            "restore one from a copy, or start again in another folder by output=FOLDER"
        )
    if folder.model.exists():
        raise ValueError(
            f"output: {folder.path} has a trained model and no checkpoint to go on from: restore "
            "one from a copy, or start again in another folder by output=FOLDER"
        )
    return None, None, []


def _with_attack(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with what validations attack by where nothing is given: the attack's ball, PGD."""
    given = settings.get("evaluate") or {}
    attack = settings.get("attack") or {}
    filled = {key: given.get(key) or attack.get(key) for key in ("norm", "eps", "balls")}
    pgd = PGDSettings().model_dump(include={"attack", "loss"}) | (given.get("pgd") or {})
    return settings | {"evaluate": given | filled | {"pgd": pgd}}


def _fixed_of_evaluate(recipe: Recipe) -> tuple[str, ...]:
    """What a run measures its held-out images by: the accuracies are compared with each other."""
    train = recipe.train
    if train is not None and (train.select == "best" or train.early_stopping is not None):
        return CHOOSING
    return _ATTACKING if recipe.data.validation_size else ()  # a fall of them is a collapse


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a setting is one of these, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _both(old: dict[str, str], new: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    return {name: (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())}


def _in_words(engine: dict[str, Any]) -> str:
    stage = "" if engine["zero_stage"] is None else f", ZeRO stage {engine['zero_stage']},"
    return f"{engine['engine']}{stage} on {engine['num_processes']} processes"
