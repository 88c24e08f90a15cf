"""Classes are told apart by name where they have names, by number where not."""

import copy
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_accel.data.images import NO_LABEL, ImageSet

logger = logging.getLogger(__name__)

ClassNames = Sequence[str] | None
"""Names by number; None where classes have only numbers."""

_SHOWN = 10


@dataclass(frozen=True)
class Classes:
    """The classes of a split: how many, their names if they have some, and whose they are."""

    number: int
    names: tuple[str, ...] | None
    where: str

    def chosen(self, classes: Sequence[int] | None) -> "Classes":
        """Only some of them, numbered anew.

        Raises:
            ValueError: ``classes: ...``: there are no such classes.
        """
        if classes is None:
            return self
        if max(classes) >= self.number:
            raise ValueError(
                f"classes: {list(classes)} is not allowed: {self.where} has the classes 0 to "
                f"{self.number - 1}"
            )
        names = self.names and tuple(self.names[i] for i in classes)
        return Classes(len(classes), names, self.where)

    @property
    def named(self) -> bool:
        """Whether there are names that say more than the numbers."""
        return self.names is not None and not _are_numbers(self.names)

    def positions_in(self, train: "Classes") -> tuple[tuple[int, ...] | None, str | None]:
        """``match_classes``, and ``compared_by_number``, with those of a training split."""
        about: Any = {"num_data": self.number, "num_model": train.number}
        about |= {"data": self.where, "model": train.where}
        positions = match_classes(self.names, train.names, **about)
        return positions, compared_by_number(self.names, train.names, **about)


def match_classes(
    data_names: ClassNames,
    model_names: ClassNames,
    *,
    num_data: int | None = None,
    num_model: int | None = None,
    data: str = "the data",
    model: str = "the model",
) -> tuple[int, ...] | None:
    """Where a data set's classes are among a model's, by name.

    Numbers are compared where a side has no names, or only those that ``datasets`` gives classes
    without names (``0``, ``1``, ...): see ``compared_by_number``.

    Args:
        data_names, model_names: By class number.
        num_data, num_model: Classes, where there are no names.
        data, model: What they are called in errors.

    Returns:
        The model's number of each class of the data; None where these are the data's own.

    Raises:
        ValueError: The data have a class that the model has not.
    """
    own, known = _names(data_names, num_data), _names(model_names, num_model)
    if own is None or known is None:
        return None
    unknown = [name for name in own if name not in known]
    if not unknown:
        positions = tuple(known.index(name) for name in own)
        return None if positions == tuple(range(len(own))) else positions
    if not (_are_numbers(own) or _are_numbers(known)):
        raise ValueError(
            f"{data} has the classes {shown(unknown)}, which {model} has not: allowed are "
            f"{shown(known)}"
        )
    if len(own) > len(known):
        raise ValueError(f"{data} has {len(own)} classes, {model} {len(known)}")
    return None


def compared_by_number(
    data_names: ClassNames,
    model_names: ClassNames,
    *,
    num_data: int,
    num_model: int,
    data: str = "the data",
    model: str = "the model",
) -> str | None:
    """A sentence where ``match_classes`` had no names to go by, else None."""
    own, known = _names(data_names, num_data), _names(model_names, num_model)
    assert own is not None and known is not None
    without = [who for who, names in ((data, own), (model, known)) if _are_numbers(names)]
    by_name = all(name in known for name in own) and len(without) < 2
    if not without or by_name:
        return None
    return (
        f"{model} has {num_model} classes, {data} {num_data}: compared by number, for "
        f"{' and '.join(without)} {'have' if len(without) > 1 else 'has'} no class names"
    )


def renumbered(images: ImageSet, positions: Sequence[int] | None) -> ImageSet:
    """The same images, their labels as ``match_classes`` says; no label stays none."""
    if positions is None:
        return images
    images = copy.copy(images)
    images.labels = renumbered_labels(images.labels, positions)
    return images


def renumbered_labels(labels: Tensor, positions: Sequence[int] | None) -> Tensor:
    """Labels [N] by the new number of each class."""
    if positions is None:
        return labels
    numbers = torch.tensor([*positions, NO_LABEL])  # NO_LABEL is -1: the last
    return numbers[labels]


def check_classes(labels: Tensor, classes: Classes, *, also: Tensor | None = None) -> None:
    """Look at the labels that a model is to be trained on.

    Args:
        labels: [N].
        also: More labels that are trained on.

    Raises:
        ValueError: ``label_column: ...``: they are all of one class, so nothing can be learned.
    """
    names, where = classes.names, classes.where
    present = set(labels.unique().tolist()) - {NO_LABEL}
    if len(present) == 1:
        (only,) = present
        raise ValueError(
            f"label_column: all {len(labels)} training images of {where} are of one class, "
            f"{names[only] if names else only}: at least two are needed"
        )
    times = Counter(name.lower() for name in names or ())
    if alike := [name for name in names or () if times[name.lower()] > 1]:
        tell(f"classes of {where} differ only by capitals: {shown(alike)}: each is its own class")
    present |= set() if also is None else set(also.unique().tolist()) - {NO_LABEL}
    missing = [i for i in range(classes.number) if i not in present]
    if missing:
        named = [names[i] for i in missing] if names else missing
        late = len(missing) == min(present)  # labels that start above 0
        tell(
            f"{len(missing)} of {classes.number} classes have no training image in {where}: "
            f"{shown(named)}: the model gets outputs that nothing trains"
            + f" (labels start at {min(present)}; data.classes numbers them anew)"
            * late
        )


def shown(values: Sequence[object]) -> str:
    """The first few of a list."""
    more = f", ... ({len(values)})" if len(values) > _SHOWN else ""
    return f"[{', '.join(map(str, values[:_SHOWN]))}{more}]"


def tell(text: str) -> None:
    """Warn, from one of the launcher's processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", text)


def _names(names: ClassNames, number: int | None) -> list[str] | None:
    if names is not None:
        return list(names)
    return None if number is None else [str(i) for i in range(number)]


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(i) for i in range(len(names))]
