"""The ``wrap`` command: run a training script as it is, with its model made robust."""

import argparse
import json
import logging
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from robust_accel.attacks import remembers
from robust_accel.comm import AllReduce, GradientCompression, compress_gradients
from robust_accel.files import write_json
from robust_accel.integrations.in_place import RobustTraining, make_robust, robust_training
from robust_accel.integrations.witness import NotAttacked, Witness
from robust_accel.messages import is_setting
from robust_accel.recipe import Recipe, RecipeError, load_recipe
from robust_accel.settings import listed
from robust_accel.studies.trial import flat

logger = logging.getLogger(__name__)

_USED = ("attack", "objective", "communication")
_APPLIED = (*_USED, "train.attack_mode", "train.awp")
_STATE_FILE = "gradient_compression.json"  # beside what Accelerate saves


class NotWrapped(ValueError):
    """The script has no model that could be wrapped, or more than one."""


def run(options: argparse.Namespace) -> int:
    words = options.script
    start = next((i for i, word in enumerate(words) if not is_setting(word)), len(words))
    if start == len(words):
        raise ValueError("wrap: no script given, only settings of the recipe")
    recipe = load_recipe(options.recipe, words[:start], required=["attack"])
    script, *arguments = words[start:]
    return wrap_script(script, arguments, recipe, mean=options.mean, std=options.std)


def wrap_script(
    script: str | Path,
    arguments: Sequence[str],
    recipe: Recipe,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> int:
    """Run an Accelerate script; the model that it trains attacks its images.

    ``make_robust`` is applied to what the script gives to ``Accelerator.prepare`` (transformers'
    ``Trainer`` does so, too), with the recipe's attack, objective and ``train.attack_mode`` and
    ``train.awp``, and its gradients are sent by the recipe's communication. Model, data, optimizer,
    schedule and loop are the script's.

    Args:
        script: A Python file, run as ``__main__`` in this process.
        arguments: The script's own.
        recipe: With an ``attack`` section.
        mean, std: By which the script normalises its images; left out: they are in [0, 1].

    Returns:
        0, or 1 when the script has failed, with its traceback on standard error.

    Raises:
        NotWrapped: The script trained no model, or gave several to ``prepare``.
        ValueError: There is no such script, or a setting that only our own loop can follow, or one
            of the command line that is not applied.
    """
    if not Path(script).is_file():
        raise ValueError(f"{script}: no such script")
    if (mean is None) != (std is None):
        raise ValueError(f"--mean and --std go together, got {mean} and {std}")
    train = recipe.train
    if train is not None and train.grows_eps:
        key = "eps_warmup_epochs" if train.eps_schedule is None else "eps_schedule"
        raise RecipeError(f"train.{key}: epochs are the script's: leave it out for wrap")
    if train is not None and train.awp is not None and train.awp.warmup_epochs:
        raise RecipeError("train.awp.warmup_epochs: epochs are the script's: wrap wants 0")
    for section in ("attack", "objective"):
        recipe.checked(section, partial(_check_forgets, recipe, section))
    by_hand = [key for key in _unused(recipe) if recipe.origins[key] == "command line"]
    if by_hand:
        said = f"wrap does not apply it, it is the script's: wrap applies {listed(_APPLIED)}"
        raise RecipeError(*(f"command line: {key}: {said}" for key in by_hand))
    wrapping = _Wrapping(recipe, Path(script).name, mean, std)
    code = _run(script, arguments, wrapping)
    return code or wrapping.conclude()


def _check_forgets(recipe: Recipe, section: str) -> None:
    """Refuse what keeps something from step to step: a script does not tell it of its images."""
    if kept := remembers(getattr(recipe, section)):
        name = recipe.settings[section]["name"]
        raise ValueError(
            f"name: {name} keeps {kept} from step to step, which only "
            "robust-accel train can tell it: choose another, or train by the recipe"
        )


def _run(script: str | Path, arguments: Sequence[str], wrapping: "_Wrapping") -> int:
    """As ``python script arguments`` would, with Accelerate's prepare replaced."""
    prepare, prepare_model = Accelerator.prepare, Accelerator.prepare_model
    before = sys.argv, sys.path[:], dict(sys.modules)
    patched: Any = Accelerator
    patched.prepare = wrapping.around(prepare)
    patched.prepare_model = wrapping.around(prepare_model)
    hook = register_optimizer_step_pre_hook(wrapping.before_step)
    folder = Path(script).resolve().parent
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(folder))
    try:
        _make_way(folder)
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    except NotWrapped:
        raise
    except NotAttacked as error:
        raise NotWrapped(f"{wrapping.script}: {error}") from error
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        hook.remove()
        patched.prepare, patched.prepare_model = prepare, prepare_model
        sys.argv, sys.path[:] = before[:2]
        sys.modules.update(before[2])
    return 0


def _make_way(folder: Path) -> None:
    """Forget imported modules whose names the script's folder has, as its own ``datasets.py``.

    ``python script`` finds the folder's first, but for what Python itself has loaded by then.
    """
    own = {p.stem for p in folder.glob("*.py")}
    own |= {p.parent.name for p in folder.glob("*/__init__.py")}
    loaded = {name.partition(".")[0] for name in sys.modules}
    taken = (own & loaded) - {"__main__", "robust_accel"}
    if not taken:
        return
    listing = "import sys; print(*sys.modules)"
    bare = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True)
    taken -= set(bare.stdout.split())
    for name in [n for n in sys.modules if n.partition(".")[0] in taken]:
        del sys.modules[name]


class _Wrapping:
    """What is wrapped so far: one model."""

    def __init__(
        self,
        recipe: Recipe,
        script: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.recipe, self.script, self.mean, self.std = recipe, script, mean, std
        self.model: nn.Module | None = None
        self._busy = self._stepped = False
        self._prepared: list[Optimizer] = []  # of the script's one model: others are refused

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Accelerate's ``prepare`` or ``prepare_model``, which calls the other within."""

        def prepare(accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
            if self._busy or kwargs.get("evaluation_mode"):
                return original(accelerator, *args, **kwargs)
            given = args or tuple(kwargs.values())
            self._prepared += [item for item in given if isinstance(item, Optimizer)]
            self._busy = True
            try:
                found = self.wrap(accelerator, given)
                prepared = original(accelerator, *args, **kwargs)
            finally:
                self._busy = False
            if found:
                each = prepared if isinstance(prepared, tuple | list) else (prepared,)
                mine = next(each[i] for i, a in enumerate(given) if a is self.model)
                own = getattr(mine, "basic_optimizer", None)  # DeepSpeed's, by its configuration
                self._prepared += [own] if isinstance(own, Optimizer) else []
                self.send(accelerator, mine)
            return prepared

        return prepare

    def wrap(self, accelerator: Accelerator, given: Sequence[Any]) -> bool:
        """Make the one trainable module among these robust; whether there was one."""
        candidates = [
            item
            for item in given
            if isinstance(item, nn.Module)
            and any(p.requires_grad for p in item.parameters())
            and (self.model is None or accelerator.unwrap_model(item) is not self.model)
        ]
        if len(candidates) + (self.model is not None) > 1:
            first = [] if self.model is None else [self.model]
            names = " and ".join(type(m).__name__ for m in [*first, *candidates])
            raise NotWrapped(
                f"{self.script} prepares several models to train, {names}: call make_robust on "
                "the classifier in the script instead"
            )
        if not candidates:
            return False
        (self.model,) = candidates
        train = self.recipe.train
        assert self.recipe.attack is not None
        make_robust(
            self.model,
            self.recipe.attack,
            self.recipe.objective,
            mean=self.mean,
            std=self.std,
            attack_mode="eval" if train is None else train.attack_mode,
            weight_perturbation=None if train is None else train.awp,
        )
        logger.info("robust-accel: %s", self.summary())
        return True

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Of every optimizer of the model: what it steps on must come from attacked images.

        Raises:
            NotWrapped: They were not, or there is no model of the script yet.
        """
        if self.model is None:
            self.check()
        if optimizer not in self._prepared:  # whose parameters ZeRO replaces by others
            own = {id(p) for p in self.trained.parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                return  # of something else
        for witness in Witness.of(self.trained):
            if witness.accusation is not None:
                raise NotWrapped(f"{self.script}: {witness.accusation}")
        if not self._stepped:
            self.check()
            applied = self.training.min_max.applied
            self._stepped = applied is not None
            if self._stepped:
                logger.info("robust-accel: %s", applied)

    def send(self, accelerator: Accelerator, prepared: nn.Module) -> None:
        """Gradients by the recipe's communication."""
        if self.recipe.communication != AllReduce():
            compression = compress_gradients(prepared, self.recipe.communication)
            keep_with_checkpoints(accelerator, compression)

    def summary(self) -> str:
        """What was wrapped, by what, and what the recipe says in vain."""
        assert self.model is not None
        name = type(self.model).__name__
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        lines = [f"wrapped {name} ({sum(sizes):,} parameters to train) of {self.script}"]
        lines += [f"  {section}: {getattr(self.recipe, section)!r}" for section in _USED]
        if self.recipe.train is not None and self.recipe.train.awp is not None:
            lines.append(f"  awp: {self.recipe.train.awp!r}")
        if self.mean is None:
            lines.append("  images: in [0, 1]" + _hint(self.model))
        else:
            lines.append(f"  images: normalised by mean {self.mean} and std {self.std}")
        if self.recipe.train is not None:
            lines.append(f"  attack_mode: {self.recipe.train.attack_mode}")
        parts = (key.split(".") for key in _unused(self.recipe))  # of train, which is split, keys
        unused = (".".join(part[:2]) if part[0] == "train" else part[0] for part in parts)
        said = listed(dict.fromkeys(unused)) or "all else"
        lines.append(f"  the script's own, not the recipe's: {said}")
        return "\n".join(lines)

    def check(self) -> None:
        """Raise NotWrapped where there is no model, or where it was not attacked."""
        if self.model is None:
            raise NotWrapped(
                f"{self.script} gave no module with parameters to train to Accelerator.prepare: "
                "nothing was wrapped; call make_robust on the model in the script instead"
            )
        if self.training.min_max.calls == 0:
            raise NotWrapped(
                f"{type(self.model).__name__} of {self.script} was never called in training mode: "
                "nothing was attacked"
            )

    def conclude(self) -> int:
        """Say how often the model was attacked.

        Raises:
            NotWrapped: See ``check``.
        """
        self.check()
        calls = self.training.min_max.calls
        logger.info("robust-accel: attacked %d batches a process", calls)
        return 0

    @property
    def trained(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def training(self) -> RobustTraining:
        training = robust_training(self.trained)
        assert training is not None
        return training


def keep_with_checkpoints(accelerator: Accelerator, compression: GradientCompression) -> None:
    """Save and load the rounding's state with ``accelerator.save_state``, in a file of its own.

    A checkpoint without it (of a run without compression) is loaded as it is.
    """

    def save(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            write_json(Path(folder, _STATE_FILE), compression.state_dict())

    def load(models: Any, folder: str) -> None:
        if Path(folder, _STATE_FILE).exists():
            compression.load_state_dict(json.loads(Path(folder, _STATE_FILE).read_text()))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _unused(recipe: Recipe) -> list[str]:
    """Keys that somebody has set, other than to their defaults, and that are not applied."""
    applied = tuple(f"{key}." for key in _APPLIED)
    keys = (key for key in flat(recipe.chosen) if not f"{key}.".startswith(applied))
    return [key for key in keys if key in recipe.origins]


def _hint(model: nn.Module) -> str:
    """A timm model's own statistics, which most scripts normalise by."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if "mean" not in cfg:
        return "; if the script normalises them: --mean and --std"
    mean, std = (",".join(map(str, cfg[key])) for key in ("mean", "std"))
    return f"; if the script normalises them as timm does: --mean {mean} --std {std}"
