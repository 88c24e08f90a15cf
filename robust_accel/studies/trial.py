"""One training of a study: its place, its settings, and by what it is known."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_accel.attacks import NoAttack
from robust_accel.data import selection_of
from robust_accel.data.ids import IdsError
from robust_accel.evaluation.identity import digest_of_json
from robust_accel.files import as_json
from robust_accel.plain_yaml import RecipeError, read_plain
from robust_accel.recipe import Recipe
from robust_accel.run_folder import RunFolder, differences, with_new_defaults
from robust_accel.studies.study_file import Values
from robust_accel.training.start import CHOOSING, within

_MANY = 50_000  # images, where the recipe does not say
Command = tuple[str, ...]
"""A command of this package and its words, without the run's folder."""
_FREE = (
    "output", "certify", "evaluate", "data.num_workers", "train.checkpoint_every", "train.keep",
    "train.max_time", "train.timeout", "train.log_every", "train.log_with",
)  # fmt: skip
"""What the weights do not depend on, but for ``CHOOSING``."""


@dataclass(frozen=True)
class Cell:
    """A row of the table: a run, and a label of each axis that multiplies it."""

    run: str
    labels: tuple[tuple[str, str], ...] = ()  # axis -> label

    @property
    def name(self) -> str:
        return ", ".join([self.run, *(label for _, label in self.labels)])


@dataclass(frozen=True, eq=False)
class Trial:
    """One training, and what is measured of it.

    Args:
        tried: The tuned settings.
        recipe: All of its settings.
        digest: Of the settings that the weights depend on.
        folder: Of its run.
        then: Commands after it, as the study has them.
        needs: Folders of the trainings that it starts from.
    """

    cell: Cell
    tried: tuple[tuple[str, Any], ...]
    seed: int
    recipe: Recipe
    digest: str
    folder: Path
    processes: int
    then: tuple[Command, ...]
    needs: tuple[Path, ...]

    @property
    def commands(self) -> list[Command]:
        """What is to be done, in its order, each with all that its result depends on."""
        return [(*c, *self._list_of(c[0])) for c in self._commands(self.recipe.chosen)]

    def arguments(self, command: Command) -> Command:
        """What one of them is started with: defaults as well, for the run may have had others."""
        return self._commands(self.recipe.settings)[self.commands.index(command)]

    def _commands(self, settings: Values) -> list[Command]:
        certify = tuple(_words("certify", settings["certify"]))
        evaluate = {
            key: value
            for key, value in settings["evaluate"].items()
            if f"evaluate.{key}" not in CHOOSING
        }
        then = [(c[0], *certify, *c[1:]) if c[0] == "certify" else c for c in self.then]
        return [("train",), ("evaluate", *_words("evaluate", evaluate)), *then]

    def check_lists(self) -> None:
        """That files which list images can be read.

        Raises:
            RecipeError: One cannot.
        """
        for command in self._commands(self.recipe.chosen):
            self._list_of(command[0])

    def _list_of(self, name: str) -> Command:
        """What a file of images lists now that a command measures, by its digest."""
        ids = getattr(self.recipe, name).ids if name in ("evaluate", "certify") else None
        if not isinstance(ids, str):
            return ()

        def listed() -> str:
            try:
                return selection_of(self.recipe.data, ids)
            except IdsError as error:
                error.section = name
                raise

        return (self.recipe.checked(name, listed),)

    def check(self) -> None:
        """That what lies in its folder was trained so.

        Raises:
            RecipeError: By a version with another default.
        """
        stored, now = RunFolder(self.folder).recipe, as_json(self.recipe.settings)
        if not stored.exists():
            return
        was = with_new_defaults(read_plain(stored), now, self.recipe.chosen)
        given = {*flat(self.recipe.chosen)}
        for key, line in differences(was, now).items():
            if _counts(key) and key not in given:
                raise RecipeError(f"{stored}: {line}, by default: move the folder away")

    @property
    def passes(self) -> float:
        """Images through the network and back, by the settings: what a training costs, roughly."""
        recipe, train = self.recipe, self.recipe.train
        assert train is not None
        of_attack = getattr(
            recipe.attack, "num_steps", 0 if isinstance(recipe.attack, NoAttack) else 1
        )
        each = (1 + of_attack) * getattr(recipe.objective, "num_noise", 1)
        return train.epochs * (recipe.data.train_size or _MANY) * each

    @property
    def name(self) -> str:
        tried = [f"{key.split('.')[-1]}={value}" for key, value in self.tried]
        return ", ".join([self.cell.name, *tried, f"seed {self.seed}"])


def slug(recipe: Recipe) -> str:
    """What a folder's name tells of a training; the same for the same training."""
    settings, train = recipe.settings, recipe.train
    assert train is not None
    names = [settings[key]["name"] for key in ("model", "attack", "optimizer")]
    words = [*names, f"lr{settings['optimizer']['lr']:g}", f"batch{train.batch_size}"]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "", "-".join([*words, f"seed{train.seed}"]))[:150]


def digest_of(
    settings: Values, processes: int, launcher: str | None, needed: Mapping[str, Trial]
) -> str:
    """Of what the weights depend on; what a training starts from counts by its own digest.

    Args:
        settings: Without those at their defaults: a later version's new ones change nothing.
    """
    kept = {
        key: _counting(value, key) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in ("output", "certify")
    }
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    for trial in needed.values():
        text = text.replace(str(trial.folder), f"{trial.digest} {trial.then}")
    return digest_of_json([text, processes, launcher])[:12]


def _counts(key: str) -> bool:
    return key in CHOOSING or not within(key, _FREE)


def _counting(tree: Values, above: str) -> Values:
    """Of a section what the weights depend on; nothing of it where that is nothing."""
    kept: Values = {}
    for key, value in tree.items():
        name = f"{above}.{key}"
        if isinstance(value, dict) and value:
            kept |= {key: inner} if (inner := _counting(value, name)) else {}
        elif _counts(name):
            kept[key] = value
    return kept


def flat(tree: Values, above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _words(section: str, settings: Values) -> Iterator[str]:
    """Settings as the command line has them."""
    for key, value in settings.items():
        yield f"{section}.{key}={'null' if value is None else json.dumps(value)}"
