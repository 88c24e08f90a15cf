"""A classifier and images on which attacks are tried: units of work, verdicts, records.

Images are cut into units; each has its own seed and goes to one process, so that an outcome does
not depend on how many processes there are. What a ledger has of a unit is not done again.
"""

import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from robust_accel.attack_context import attack_context
from robust_accel.attacks.base import gradients_seen
from robust_accel.console import shows_bars
from robust_accel.data import ImageSet, derived_seed
from robust_accel.evaluation.identity import (
    answers,
    digest_of_function,
    digest_of_json,
    digests_of_images,
)
from robust_accel.evaluation.ledger import Ledger, Record, told_to_all
from robust_accel.evaluation.outcomes import (
    Collector,
    Outcomes,
    Verdict,
    by_class,
    counted,
    global_state_kept,
    joined,
    without_tf32,
)
from robust_accel.models import PixelClassifier
from robust_accel.objectives import NOT_A_NUMBER, predicted
from robust_accel.provenance import hardware, source_digest, versions
from robust_accel.statistics import wilson_interval

_SEED_STEP = 1000  # between units

Perturb = Callable[[PixelClassifier, Tensor, Tensor, int], Tensor]
"""classifier, x [B, C, H, W] in [0, 1], labels [B], seed of the unit -> images to classify."""


class Attacker(NamedTuple):
    """A way to perturb images, and all that decides what it does, as plain values."""

    about: dict[str, Any]
    perturb: Perturb


class Unit(NamedTuple):
    """Images that are worked on together."""

    number: int
    indices: Tensor  # [B], of the images


class Bench:
    """Measures one classifier on one set of images.

    Args:
        classifier: On [0, 1] pixels, the same on all processes; measured in eval mode and fp32.
        images: The first of them are measured, or those that a call names.
        accelerator: Of the processes that share the work.
        batch_size: Images a unit.
        seed: Of the attacks, and of a randomised classifier's draws.
        draws: Forward passes a verdict; None for a classifier that always answers the same.
        ledger: Where outcomes are kept; nowhere when not given.
        source: Where the images are from, plain values: said in records, no part of identities.
        kind: Which of that source's images they are: ``all``, ``ids of NAME (DIGEST)``.

    Attributes:
        seconds_known: That the units took which were found done.
    """

    def __init__(
        self,
        classifier: PixelClassifier,
        images: ImageSet,
        accelerator: Accelerator,
        *,
        batch_size: int,
        seed: int = 0,
        draws: int | None = None,
        ledger: Ledger | None = None,
        source: dict[str, Any] | None = None,
        kind: str = "all",
    ) -> None:
        self.classifier, self.images, self.accelerator = classifier, images, accelerator
        self.batch_size, self.seed, self.draws = batch_size, seed, draws
        self.ledger = Ledger(None, accelerator) if ledger is None else ledger
        self.source, self.kind = source or {}, kind
        self._digests: dict[int, str] = {}
        self.seconds_known = 0.0

    def on(self, images: ImageSet, source: dict[str, Any] | None, kind: str = "all") -> "Bench":
        """The same classifier, digested once, on other images of this shape."""
        assert images.shape == self.images.shape
        bench = copy(self)
        bench.function, bench.images = self.function, images
        bench.source, bench.kind = source or {}, kind
        bench._digests, bench.seconds_known = {}, 0.0
        return bench

    # ---- verdicts ------------------------------------------------------------------------------

    def clean(self, num_images: int | None = None) -> Outcomes:
        """The first N images as they are; all when not given."""
        number = min(num_images or len(self.images), len(self.images))
        index = torch.arange(number)
        units = [Unit(u, part) for u, part in enumerate(index.split(self.batch_size))]

        def compute(unit: Unit, x: Tensor, labels: Tensor) -> dict[str, Any]:
            return self._judged(x, labels, unit, {})

        found = self.share({"name": "none"}, units, compute, "clean")
        verdict, chosen = joined(found)
        return Outcomes(index, self.images.labels[index], *verdict, chosen).spent(found)

    def attacked(
        self, attacker: Attacker, before: Outcomes, *, even: bool = False, title: str = ""
    ) -> Outcomes:
        """Attack the images that are not lost yet: those that are can only stay so.

        Args:
            even: Units of one size, so that no process waits for a larger one of another; else
                each unit is of the same ``batch_size`` images, less those that are lost.
        """
        alive = before.chosen > 0
        if even:
            left = alive.nonzero().flatten()
            parts = left.tensor_split(-(-len(left) // self.batch_size) or 1)
        else:
            parts = torch.arange(len(alive)).split(self.batch_size)
            parts = tuple(part[alive[part]] for part in parts)
        held = [(number, part) for number, part in enumerate(parts) if len(part)]
        units = [Unit(number, before.index[part]) for number, part in held]

        def compute(unit: Unit, x: Tensor, labels: Tensor) -> dict[str, Any]:
            seed = self.seed + _SEED_STEP * unit.number
            with global_state_kept(seed), gradients_seen() as seen:
                x_adv = attacker.perturb(self.classifier, x, labels, seed)
            # what is no image has broken none
            finite = x_adv.isfinite().flatten(1).all(dim=1)
            x_adv = torch.where(finite.view(-1, 1, 1, 1), x_adv, x)
            met = {"gradients": seen.non_finite(len(x)), "perturbations": ~finite.cpu()}
            return self._judged(x_adv, labels, unit, met)

        found = self.share(attacker.about, units, compute, title or attacker.about["name"])
        return before.after(torch.cat(parts), *joined(found)).spent(found)

    def _judged(
        self, x: Tensor, labels: Tensor, unit: Unit, non_finite: dict[str, Tensor]
    ) -> dict[str, Any]:
        """A unit's verdicts, and which of its images met what is not finite, by where."""
        key = (self.seed, unit.number, 11)
        verdict = self.verdict(x, labels, key)
        chosen = verdict.share if self.draws is None else self.verdict(x, labels, (*key, 1)).share
        non_finite["logits"] = verdict.prediction.cpu() == NOT_A_NUMBER
        return {
            "prediction": verdict.prediction.tolist(),
            "share": verdict.share.tolist(),
            "chosen": chosen.tolist(),
            "non_finite": {
                where: unit.indices[met].tolist() for where, met in non_finite.items() if met.any()
            },
        }

    @torch.no_grad()
    @without_tf32()
    def verdict(self, x: Tensor, labels: Tensor, key: tuple[int, ...]) -> Verdict:
        """How the classifier answers in fp32: once, or by seeded draws."""
        if self.draws is None:
            prediction = predicted(self.classifier(x))
            return Verdict(prediction, (prediction == labels).double())
        answers = []
        for draw in range(self.draws):
            with global_state_kept(derived_seed(*key, draw)):
                answers.append(predicted(self.classifier(x)))
        return Verdict(
            torch.stack(answers).mode(dim=0).values,
            torch.stack([answer == labels for answer in answers]).double().mean(dim=0),
        )

    def is_randomised(self, num_images: int) -> bool:
        """Whether the classifier answers one image differently, as the reference looks for it."""
        from pyautoattack.checks import check_randomized

        unit = torch.arange(min(num_images, len(self.images), self.batch_size))
        said: list[str] = []
        if self.accelerator.is_main_process:
            ((x, labels),) = self.images.batches([unit], self.accelerator.device)
            with attack_context(self.classifier, "eval"), global_state_kept():
                check_randomized(self.classifier, x, labels, logger=Collector(said))
        return bool(told_to_all(said, self.accelerator))

    def is_repeatable(self, num_images: int) -> bool:
        """Whether a randomised classifier answers alike where the generators are seeded alike."""
        unit = torch.arange(min(num_images, len(self.images), self.batch_size))
        ((x, labels),) = self.images.batches([unit], self.accelerator.device)
        with attack_context(self.classifier, "eval"):
            one, other = (self.verdict(x, labels, (self.seed, 12)).share for _ in range(2))
        return all(told_to_all([bool(one.equal(other))], self.accelerator))

    # ---- units ---------------------------------------------------------------------------------

    def share(
        self,
        about: dict[str, Any],
        units: Sequence[Unit],
        compute: Callable[[Unit, Tensor, Tensor], dict[str, Any]],
        title: str,
    ) -> list[dict[str, Any]]:
        """The outcome of each unit, the same on all processes.

        Units whose outcome the ledger has are not done again; the others are dealt to the
        processes, and each outcome is kept when it is known.

        Args:
            about: All that decides outcomes, apart from the classifier and the images.
            compute: unit, x, labels -> plain values; gets ``seconds`` and ``forward_passes``.
        """
        keys = self._keys(about, units)
        known = self.ledger.units() if keys else {}
        for key, unit in zip(keys, units, strict=bool(keys)):
            if len(known.get(key, {}).get("prediction") or unit.indices) != len(unit.indices):
                raise ValueError(f"measurements: the outcome {key} is of another number of images")
        left = [i for i in range(len(units)) if not keys or keys[i] not in known]
        self.seconds_known += sum(known[key]["seconds"] for key in keys if key in known)
        mine = left[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = self.images.batches([units[i].indices for i in mine], self.accelerator.device)
        bar = tqdm(
            zip(mine, batches, strict=True),
            total=len(mine),
            desc=title,
            leave=False,
            disable=not shows_bars() or len(mine) < 2,
        )
        own: dict[int, dict[str, Any]] = {}
        with attack_context(self.classifier, "eval"):
            for i, (x, labels) in bar:
                start = time.perf_counter()
                with counted(self.classifier) as count:
                    outcome = compute(units[i], x, labels)
                outcome |= {"seconds": time.perf_counter() - start, "forward_passes": count[0]}
                if keys:
                    self.ledger.keep(keys[i], outcome)
                own[i] = outcome
        found = dict(told_to_all(list(own.items()), self.accelerator))
        if keys:
            turns = {i: turn % self.accelerator.num_processes for turn, i in enumerate(left)}
            self.ledger.keep_of_absent({keys[i]: (turns[i], found[i]) for i in left})
            known |= {keys[i]: outcome for i, outcome in found.items()}
            return [known[key] for key in keys]
        return [found[i] for i in range(len(units))]

    def _keys(self, about: dict[str, Any], units: Sequence[Unit]) -> list[str]:
        """The identity of each unit; none where no ledger keeps them."""
        if not self.ledger.is_kept or not units:
            return []
        digests = self._digests_of(torch.cat([unit.indices for unit in units]).tolist())
        common = [self.function, self.identity_versions, about, self.seed, self.draws or 1]
        return [
            digest_of_json([common, unit.number, [digests[i] for i in unit.indices.tolist()]])
            for unit in units
        ]

    def _digests_of(self, indices: Sequence[int]) -> dict[int, str]:
        """Digests of images, each made by one process and told to all."""
        new = torch.tensor([i for i in indices if i not in self._digests], dtype=torch.int64)
        if len(new):
            chunks = new.split(self.batch_size)
            mine = chunks[self.accelerator.process_index :: self.accelerator.num_processes]
            made = digests_of_images(self.images, list(mine))
            pairs = zip((i for chunk in mine for i in chunk.tolist()), made, strict=True)
            found = told_to_all([(i, d.hex()) for i, d in pairs], self.accelerator)
            self._digests |= dict(found)
        return self._digests

    # ---- records -------------------------------------------------------------------------------

    @cached_property
    def function(self) -> str:
        """Digest of the classifier.

        Raises:
            ValueError: Processes hold different ones.
        """
        own = digest_of_function(self.classifier, self.images.shape)
        if len(set(told_to_all([own], self.accelerator))) > 1:
            raise ValueError("the processes hold different models: what is measured is unclear")
        if not self.ledger.is_kept or self.draws is not None:
            return own
        return self.ledger.function(own, answers(self.classifier, self.images.shape))

    @cached_property
    def identity_versions(self) -> dict[str, str]:
        names = ("robust-accel", "torch", "torchvision", "timm", "transformers", "pyautoattack")
        found = {name: version for name, version in versions().items() if name in names}
        return found | {"source": source_digest()[:16]}

    def record(
        self,
        purpose: str,
        attack: dict[str, Any],
        before: Outcomes,
        outcomes: Outcomes,
        **more: Any,
    ) -> Record:
        """Keep a finished measurement.

        Args:
            attack: Its description, with ``norm`` and ``eps`` where it has a ball, or ``union``.
            before: The same images unattacked.
            more: Further results.
        """
        number = len(outcomes.index)
        result: dict[str, Any] = {
            "accuracy": outcomes.accuracy,
            "interval": list(wilson_interval(outcomes.accuracy, number)),
            "clean_accuracy": before.accuracy,
        }
        per_image = {name: getattr(outcomes, name).tolist() for name in ("label", "prediction")}
        if self.draws is not None:
            result["majority_accuracy"] = outcomes.right.double().mean().item()
            per_image["share"] = outcomes.share.tolist()
        result |= by_class(outcomes, self.classifier.class_names)
        if outcomes.non_finite:
            result["non_finite"] = outcomes.non_finite
        spent = {"seconds": outcomes.seconds, "forward_passes": outcomes.forward_passes}
        return self.keep(purpose, attack, outcomes.index, result | more, per_image, spent)

    def keep(
        self,
        purpose: str,
        attack: dict[str, Any],
        index: Tensor,
        result: dict[str, Any],
        per_image: dict[str, list[Any]],
        spent: dict[str, Any],
        selection: str | None = None,
    ) -> Record:
        """A record of any kind of result, its identity made from what was measured."""
        digests = self._digests_of(index.tolist())
        attack = dict(attack)
        norm, eps, union = (attack.pop(key, None) for key in ("norm", "eps", "union"))
        ball = None if eps is None else {"norm": norm, "eps": eps}
        whole = len(index) == len(self.images)
        part = selection or (self.kind if whole else f"first {len(index)}")
        identity = {
            "function": self.function,
            "purpose": purpose,
            "attack": attack,
            "threat_model": ball if union is None else {"union": union},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "draws": self.draws or 1,
            "class_names": self.classifier.class_names,
        }
        identity |= {"point": result["point"]} if "point" in result else {}
        digest = digest_of_json([digests[i] for i in index.tolist()])
        key = digest_of_json([identity, digest, self.identity_versions])[:16]
        del identity["class_names"]
        if self.draws is None:
            del identity["draws"]
        about: dict[str, Any] = {
            **identity,
            "images": {
                "n": len(index),
                "selection": part if whole or self.kind == "all" else f"{part} of {self.kind}",
                "kind": self.kind,
                "source": self.source,
                "digest": digest,
                "first": digests[int(index[0])][:12],  # sets that begin alike are of one list
            },
            **result,
            **spent,
            "device": str(self.accelerator.device),
            "hardware": hardware(self.accelerator.device),
            "num_processes": self.accelerator.num_processes,
            "versions": versions() | {"robust-accel-source": self.identity_versions["source"]},
            "outcomes": {
                "index": index.tolist(),
                "image": [digests[i][:12] for i in index.tolist()],
                **per_image,
            },
        }
        return self.ledger.record(key, about)
