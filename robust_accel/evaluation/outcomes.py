"""What became of images: verdicts, outcomes, and the accuracies of all and of each class."""

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Verdict(NamedTuple):
    """How a classifier answers: over its draws, if it is randomised."""

    prediction: Tensor  # [B]: the class, of most draws; NOT_A_NUMBER without finite logits
    share: Tensor  # [B], of the draws that are right: 0 or 1 for a classifier that always agrees


@dataclass(frozen=True)
class Outcomes:
    """What became of each of N images.

    Attributes:
        index, label: [N], of the images.
        prediction, share: [N], see ``Verdict``, after the attack that did most.
        chosen: [N]: the share by which that attack was chosen, of other draws than ``share``: the
            least of several shares of the same draws would be too small.
        seconds, forward_passes: Spent on it, by all processes; images through the classifier.
        non_finite: Images that met NaN or Inf, by where.
    """

    index: Tensor
    label: Tensor
    prediction: Tensor
    share: Tensor
    chosen: Tensor
    seconds: float = 0.0
    forward_passes: int = 0
    non_finite: dict[str, list[int]] = field(default_factory=dict)

    @property
    def right(self) -> Tensor:
        return self.prediction == self.label

    @property
    def verdicts(self) -> Verdict:
        return Verdict(self.prediction, self.share)

    @property
    def accuracy(self) -> float:
        return self.share.double().mean().item()

    @property
    def digest(self) -> str:
        """Of the images' indices and what became of them."""
        columns = (self.index, self.prediction, self.share)
        text = json.dumps([column.tolist() for column in columns])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first(self, number: int) -> "Outcomes":
        """Of the first images, as if nothing had been spent."""
        names = ("index", "label", "prediction", "share", "chosen")
        found = {name: getattr(self, name)[:number] for name in names}
        kept = set(found["index"].tolist())
        non_finite = {k: [i for i in v if i in kept] for k, v in self.non_finite.items()}
        found["non_finite"] = {where: met for where, met in non_finite.items() if met}
        return replace(self, **found, seconds=0.0, forward_passes=0)

    def after(self, indices: Tensor, verdict: Verdict, chosen: Tensor) -> "Outcomes":
        """With the images that an attack has brought further down; indices: positions in N."""
        worse = chosen < self.chosen[indices]
        found = {}
        new = {"prediction": verdict.prediction, "share": verdict.share, "chosen": chosen}
        for name, value in new.items():
            found[name] = getattr(self, name).clone()
            found[name][indices[worse]] = value[worse].to(found[name].dtype)
        return replace(self, **found)

    def spent(self, units: Iterable[dict[str, Any]]) -> "Outcomes":
        """With the cost and the accidents of some units."""
        units = list(units)
        non_finite = {where: set(found) for where, found in self.non_finite.items()}
        for unit in units:
            for where, found in unit.get("non_finite", {}).items():
                non_finite.setdefault(where, set()).update(found)
        return replace(
            self,
            seconds=self.seconds + sum(unit["seconds"] for unit in units),
            forward_passes=self.forward_passes + sum(unit["forward_passes"] for unit in units),
            non_finite={where: sorted(found) for where, found in non_finite.items() if found},
        )


def joined(found: Sequence[dict[str, Any]]) -> tuple[Verdict, Tensor]:
    """Verdicts of units one after another, and the shares by which they are chosen: [N]."""
    prediction, share, chosen = (
        torch.tensor([value for one in found for value in one[name]])
        for name in ("prediction", "share", "chosen")
    )
    return Verdict(prediction, share.double()), chosen.double()


_CONFUSION = 200  # classes: the matrix of more is longer than what it tells


def by_class(outcomes: Outcomes, names: Sequence[str] | None) -> dict[str, Any]:
    """Accuracy of each class, and the confusion, where there are not too many classes.

    ``confusion[label][prediction]`` counts images; those without finite logits are in none.
    """
    per_class = []
    for label in outcomes.label.unique().tolist():
        of_class = outcomes.label == label
        name = names[label] if names is not None and label < len(names) else None
        share = outcomes.share[of_class].mean().item()
        row = {"class": label, "name": name, "n": int(of_class.sum()), "accuracy": share}
        per_class.append(row)
    found: dict[str, Any] = {"per_class": per_class}
    number = int(max(outcomes.label.max(), outcomes.prediction.max())) + 1
    number = max(number, len(names or ()))
    if number <= _CONFUSION:
        known = outcomes.prediction >= 0
        pairs = outcomes.label[known] * number + outcomes.prediction[known]
        counts = torch.bincount(pairs, minlength=number**2)
        found["confusion"] = counts.reshape(number, number).tolist()
    return found


class Collector:
    """A logger that keeps what the reference's checks warn of."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def warning(self, text: str) -> None:
        self.said.append(str(text).split(" See flags_doc")[0])


@contextmanager
def counted(classifier: nn.Module) -> Iterator[list[int]]:
    """Counts the images that go through a classifier."""
    count = [0]

    def note(_: Any, arguments: tuple[Tensor, ...]) -> None:
        count[0] += len(arguments[0])

    handle = classifier.register_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of fp32 are in fp32: cuDNN rounds to TF32, if nothing is said.

    Attacks may go by that, which is several times as fast: what counts is judged without.
    """
    allowed = False
    with suppress(RuntimeError):  # of torch, where ``fp32_precision`` was set: that stays
        allowed = torch.backends.cudnn.allow_tf32
    try:
        if allowed:
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        if allowed:
            torch.backends.cudnn.allow_tf32 = True


@contextmanager
def global_state_kept(seed: int | None = None) -> Iterator[None]:
    """The global generators, seeded if so, and tracing: put back after attacks that change them."""
    trace = sys.gettrace()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # torch warns of several CUDA devices that nobody has named
    with torch.random.fork_rng(range(torch.cuda.device_count()) or None):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            sys.settrace(trace)
