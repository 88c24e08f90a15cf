"""What attack and objective keep between steps: of each image, of each class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor

from robust_accel.attacks import Attack, remembers
from robust_accel.data import Data, TrainingBatches
from robust_accel.data.images import seeded_generator
from robust_accel.objectives import Objective
from robust_accel.recipe import Recipe
from robust_accel.training.parts import number_of_logits

_CORNERS = 9  # among the keys of seeded draws


class Memory:
    """A process's own; the others have theirs. Without anything to keep, it does nothing.

    Attributes:
        objective: The recipe's, with what it keeps.
    """

    def __init__(
        self, recipe: Recipe, data: Data, batches: TrainingBatches, accelerator: Accelerator
    ) -> None:
        assert recipe.train is not None
        self._seed, self._rank = recipe.train.seed, accelerator.process_index
        self._num_processes = accelerator.num_processes
        attack: Any = recipe.attack
        objective: Any = recipe.objective
        self._attack = self._kept_objective = None
        if remembers(attack):
            images = batches.own_images
            self._attack = attack.remembering(images, data.shape, accelerator.device)
        if remembers(objective):
            number = number_of_logits(recipe, data)
            self._kept_objective = objective.remembering(number, accelerator.device)
        self.objective: Objective = self._kept_objective or objective

    def begin(self, epoch: int) -> None:
        """An epoch begins, on all processes."""
        if self._attack is not None:
            self._attack.begin(
                epoch, lambda n: seeded_generator(self._seed, _CORNERS, n, self._rank)
            )
        if self._kept_objective is not None:
            self._kept_objective.begin(epoch, lambda tensor: reduce(tensor, "sum"))

    def attack_on(self, attack: Attack, images: Tensor | None = None) -> Attack:
        """An attack that knows which images it gets: [B] of indices, none when not given."""
        images = torch.empty(0, dtype=torch.int64) if images is None else images
        return attack if self._attack is None else self._attack.visit(attack, images)

    @property
    def num_bytes(self) -> int:
        """Of all processes, in a checkpoint."""
        tensors = [tensor for _, kept in self._kept() for tensor in kept.state().values()]
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own * self._num_processes

    def save(self, folder: Path) -> None:
        """Write this process's files into a checkpoint."""
        for name, kept in self._kept():
            state = {key: tensor.cpu().contiguous() for key, tensor in kept.state().items()}
            save_file(state, folder / f"{name}-{self._rank}.safetensors")

    def load(self, folder: Path) -> None:
        """Take its own from the files of all, however many processes have written."""
        for name, kept in self._kept():
            paths = sorted(folder.glob(f"{name}-*.safetensors"))
            number = self._num_processes
            if len(paths) == number:
                paths, number = [folder / f"{name}-{self._rank}.safetensors"], 1
            kept.load([load_file(path) for path in paths], number)

    def _kept(self) -> Iterator[tuple[str, Any]]:
        parts = {"attack": self._attack, "objective": self._kept_objective}
        return ((name, part) for name, part in parts.items() if part is not None)
