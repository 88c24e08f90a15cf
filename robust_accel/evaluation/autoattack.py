"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) by ``pyautoattack``, over many processes.

Its attacks run one after another, each on the images that have survived. Before each, survivors
are cut into units of about one size, a unit has its own seed, and units are dealt to the processes:
an image's fate does not depend on how many processes there are. Every unit's outcome is written
down when it is known, so that a killed evaluation goes on where it was.
"""

import hashlib
import json
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from pyautoattack import AutoAttack, checks
from torch import Tensor
from tqdm.auto import tqdm

from robust_accel.attack_context import attack_context
from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import Perturb
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier
from robust_accel.provenance import digest_of
from robust_accel.run_folder import append_line, read_lines

ATTACKS_OF = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "quick": ("apgd-ce", "apgd-t"),
    "rand": ("apgd-ce", "apgd-dlr"),  # for randomised models, gradients averaged over 20 draws
}
_MIN_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}  # the DLR losses rank so many logits
_MAX_TARGETS = 9
_SEED_STEP = 1000  # between units


class Stage(NamedTuple):
    """One attack of the sequence."""

    attack: str
    bf16: bool  # searched in bf16; what counts is found in fp32 again


def stages_of(settings: EvaluateSettings) -> list[Stage]:
    """The sequence: the version's own in fp32, after a search in bf16 if that is asked for.

    A success of the search counts only where it holds in fp32, and whatever survives it is attacked
    by the whole sequence, so the verdict is one of fp32.
    """
    assert settings.autoattack is not None
    attacks = ATTACKS_OF[settings.autoattack]
    search = [a for a in attacks if a.startswith("apgd")] if settings.search == "bf16" else []
    return [Stage(a, bf16=True) for a in search] + [Stage(a, bf16=False) for a in attacks]


class AutoAttackEvaluation:
    """AutoAttack on the images that a classifier gets right.

    Args:
        settings: With ``autoattack``, the norm and eps.
        num_classes: Of the data.

    Raises:
        ValueError: The data have fewer classes than the attacks need.
    """

    def __init__(self, settings: EvaluateSettings, num_classes: int) -> None:
        self.settings, self.stages = settings, stages_of(settings)
        needed = max(_MIN_CLASSES.get(stage.attack, 2) for stage in self.stages)
        if num_classes < needed:
            raise ValueError(
                f"evaluate.autoattack: {settings.autoattack} needs at least {needed} classes (its "
                f"loss ranks them), the data have {num_classes}; set it to null"
            )
        self._num_targets = min(_MAX_TARGETS, num_classes - 1)

    def flags(
        self,
        classifier: PixelClassifier,
        images: ImageSet,
        right: Tensor,
        accelerator: Accelerator,
        folder: Path | None = None,
    ) -> Tensor:
        """Which of the first N images survive: [N], the same on all processes.

        Args:
            classifier: The same weights and buffers on all processes.
            images: At least N.
            right: [N], bool, on the CPU: those that the classifier gets right unattacked.
            folder: Where each process writes, and all read, the outcome of each unit.
        """
        log = _Log(folder, self._identity(classifier, images, right), accelerator)
        flags = right.clone()
        with attack_context(classifier, "eval"):
            for number, stage in enumerate(self.stages):
                survivors = flags.nonzero().flatten()
                # of one size, so that no process waits for a larger unit of another
                units = survivors.tensor_split(-(-len(survivors) // self.settings.batch_size) or 1)
                if number == 0 and units:
                    self._check(classifier, images, units[0], accelerator)
                broken = torch.zeros_like(flags)
                mine = []
                for index, indices in enumerate(units):
                    known = log.outcome(number, index, indices)
                    if known is not None:
                        broken[known] = accelerator.is_main_process
                    else:
                        mine.append((index, indices))
                mine = mine[accelerator.process_index :: accelerator.num_processes]
                batches = images.batches([indices for _, indices in mine], accelerator.device)
                bar = tqdm(
                    zip(mine, batches, strict=True),
                    total=len(mine),
                    desc=stage.attack + (" (bf16)" if stage.bf16 else ""),
                    leave=False,
                    disable=not accelerator.is_local_main_process,
                )
                for (index, indices), (x, labels) in bar:
                    seed = self.settings.seed + _SEED_STEP * index
                    lost = indices[self._broken(classifier, x, labels, stage, seed)]
                    broken[lost] = True
                    log.write(number, stage.attack, index, indices, lost)
                    # of this process's own images alone: others can only lower it
                    bound = (flags & ~broken).sum().item() / len(flags)
                    bar.set_postfix(robust=f"<={100 * bound:.2f}%")
                total = reduce(broken.int().to(accelerator.device), "sum").bool().cpu()
                flags &= ~total
        return flags

    def _broken(
        self, classifier: PixelClassifier, x: Tensor, labels: Tensor, stage: Stage, seed: int
    ) -> Tensor:
        """Which of a unit's images one attack breaks, judged in fp32: [B], on the CPU."""
        attack = self._attack(classifier, stage.attack, seed, x.device)
        in_bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=stage.bf16)
        with _global_state_kept(), in_bf16:
            x_adv = attack.perturb(x, labels)
        with torch.no_grad():
            return (classifier(x_adv).argmax(dim=1) != labels).cpu()

    def _attack(
        self, classifier: PixelClassifier, name: str, seed: int, device: torch.device
    ) -> Any:
        """One of the reference's attacks with the parameters of its versions."""
        settings, suite = self.settings, _suite(classifier, self.settings, seed, device)
        # what version="standard" sets, for any number of classes
        suite.apgd.n_restarts = suite.fab.n_restarts = 1
        suite.fab.targeted = True
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = self._num_targets
        suite.apgd.loss = name.removeprefix("apgd-")
        if settings.autoattack == "rand":
            suite.apgd.eot_iter = 20
        return {"apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square}.get(
            name, suite.apgd
        )

    def _check(
        self, classifier: PixelClassifier, images: ImageSet, unit: Tensor, accelerator: Accelerator
    ) -> None:
        """The reference's warnings: randomised, probabilities for logits, gradients in forward."""
        if not accelerator.is_main_process:
            return
        logger = logging.getLogger("auto-attack")
        ((x, labels),) = images.batches([unit], accelerator.device)
        with _global_state_kept():
            if self.settings.autoattack != "rand":
                checks.check_randomized(classifier, x, labels, bs=len(x), logger=logger)
            checks.check_range_output(classifier, x, logger=logger)
            checks.check_dynamic(classifier, x, False, logger=logger)

    def _identity(self, classifier: PixelClassifier, images: ImageSet, right: Tensor) -> str:
        """What makes an outcome this evaluation's own: weights, images and settings."""
        about = self.settings.model_dump(
            include={"norm", "eps", "autoattack", "search", "batch_size", "seed"}
        )
        others = [classifier.mean, classifier.std, images.labels[: len(right)], right]
        digest = digest_of([*classifier.state_dict().values(), *others])
        text = json.dumps([about, images.shape, digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _suite(
    classifier: PixelClassifier, settings: EvaluateSettings, seed: int, device: torch.device
) -> AutoAttack:
    return AutoAttack(
        classifier,
        norm={"linf": "Linf", "l2": "L2"}[settings.norm or ""],
        eps=settings.eps,
        version="custom",
        seed=seed,
        device=device,
    )


def square_perturb(settings: EvaluateSettings, num_queries: int) -> Perturb:
    """The reference's Square alone: it needs no gradient."""

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        with _global_state_kept():
            square = _suite(classifier, settings, seed, x.device).square
            square.n_queries = num_queries
            return square.perturb(x, labels)

    return perturb


class _Log:
    """Outcomes of units, a file a process; lines of other evaluations are left alone."""

    def __init__(self, folder: Path | None, identity: str, accelerator: Accelerator) -> None:
        self._identity = identity
        self._file: Path | None = None
        self._known: dict[tuple[int, int], dict[str, Any]] = {}
        if folder is None:
            return
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, Any]] = []
        if accelerator.is_main_process:  # one reads: all must go on from the same
            for path in sorted(folder.glob("process-*.jsonl")):
                lines += read_lines(path)
        for line in gather_object(lines):
            if line["evaluation"] == identity:
                self._known[line["stage"], line["unit"]] = line
        self._file = folder / f"process-{accelerator.process_index}.jsonl"

    def outcome(self, stage: int, unit: int, indices: Tensor) -> Tensor | None:
        """Images of a unit that were broken, if that is known."""
        line = self._known.get((stage, unit))
        if line is None or line["images"] != indices.tolist():
            return None
        return torch.tensor(line["broken"], dtype=torch.int64)

    def write(self, stage: int, attack: str, unit: int, indices: Tensor, broken: Tensor) -> None:
        if self._file is not None:
            line = {"evaluation": self._identity, "stage": stage, "attack": attack, "unit": unit}
            append_line(self._file, line | {"images": indices.tolist(), "broken": broken.tolist()})


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """AutoAttack reseeds the global generators and ends all tracing: put them back."""
    trace = sys.gettrace()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            sys.settrace(trace)
