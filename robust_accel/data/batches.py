"""Who trains on which image when: the same deal, whoever computes it."""

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from robust_accel.data.augmentation import Mixing
from robust_accel.data.images import NO_LABEL, Batch, ImageSet, seeded_generator
from robust_accel.data.loading import Data


class Sampler:
    """Deals the training images to processes: the same deal, whoever computes it.

    Each epoch is cut into steps of ``batch_size`` images, each step into a part a process and
    micro-batch. Images that do not fill the last step wait for another epoch's order, so no image
    is weighted twice.

    Args:
        num_images: N.
        batch_size: Images a step over all processes.
        num_micro: Micro-batches a step and process.
        rank, world_size: Of this process.
        seed: Of the order.
        sharding: See ``DataSettings``.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        num_micro: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        sharding: Literal["global", "fixed"] = "global",
    ) -> None:
        if batch_size % (num_micro * world_size):
            raise ValueError(
                f"batch_size: {batch_size} is not divisible by {world_size} processes x "
                f"{num_micro} micro-batches"
            )
        if batch_size > num_images:
            raise ValueError(f"batch_size: {batch_size} exceeds the {num_images} training images")
        self.steps_per_epoch = num_images // batch_size
        self._micro_size = batch_size // (num_micro * world_size)
        self._num_images, self._num_micro = num_images, num_micro
        self._rank, self._world_size = rank, world_size
        self._seed, self._sharding = seed, sharding

    def epoch(
        self, epoch: int, first_step: int = 0, *, with_previous: bool = False
    ) -> Iterator[Tensor]:
        """This process's micro-batches of indices, from a step on.

        Args:
            with_previous: Begin each with the image that comes before it in the step's order, over
                all processes (in fixed shards, the process's own); before the first is the last.
        """
        micro_batches = self._own(epoch, self._rank).split(self._micro_size)
        if with_previous:
            previous = self._own(epoch, self._rank, shift=1).split(self._micro_size)
            pairs = zip(previous, micro_batches, strict=True)
            micro_batches = tuple(torch.cat([before[:1], own]) for before, own in pairs)
        return itertools.islice(iter(micro_batches), first_step * self._num_micro, None)

    def count(self, flags: Tensor, epoch: int) -> Tensor:
        """How many images with a flag each step of the epoch has, over all processes: [steps].

        flags: [N], bool.
        """
        of_rank = [flags[self._own(epoch, rank)] for rank in range(self._world_size)]
        return torch.stack([f.view(self.steps_per_epoch, -1).sum(dim=1) for f in of_rank]).sum(
            dim=0
        )

    def _own(self, epoch: int, rank: int, *, shift: int = 0) -> Tensor:
        """A process's images in the epoch's order; or those so many places before in each step."""
        if self._sharding == "fixed":
            dealt = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 2))
            own = dealt[rank :: self._world_size]
            generator = seeded_generator(self._seed, 3, epoch, rank)
            order = torch.randperm(len(own), generator=generator)
            used = own[order[: self.steps_per_epoch * self._num_micro * self._micro_size]]
            return used.view(self.steps_per_epoch, -1).roll(shift, dims=1).flatten()
        order = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 4, epoch))
        used = order[: self.steps_per_epoch * self._micro_size * self._num_micro * self._world_size]
        # [steps, processes, images of a process]: a step's images do not depend on their number
        by_step = used.view(self.steps_per_epoch, -1).roll(shift, dims=1)
        return by_step.view(self.steps_per_epoch, self._world_size, -1)[:, rank].flatten()


class TrainingBatches:
    """A process's batches: labelled images, and unlabelled ones where the data have them.

    An epoch is a pass over the labelled images. Unlabelled images have an order and epochs of
    their own; what a step trains on follows from its number alone.

    Args:
        data: ``data.unlabeled`` is mixed in where it is there.
        fraction: Share of unlabelled images in each batch.
        batch_size, num_micro, rank, world_size, seed, sharding: See ``Sampler``; the batch size
            counts both.
        mixing: Of images with others of their set, which then all have a label.

    Raises:
        ValueError: ``batch_size: ...`` where a share cannot be dealt to the processes, or is one
            image that there is nothing to mix with.
    """

    def __init__(
        self,
        data: Data,
        *,
        fraction: float | None,
        batch_size: int,
        num_micro: int,
        rank: int,
        world_size: int,
        seed: int,
        sharding: Literal["global", "fixed"],
        mixing: Mixing | None = None,
    ) -> None:
        about = {"num_micro": num_micro, "rank": rank, "world_size": world_size}
        self._num_parts = num_micro * world_size
        self._counts: dict[int, tuple[int, Tensor]] = {}  # of the epoch at hand, by set
        num_unlabeled = 0
        self._unlabeled: tuple[ImageSet, Sampler] | None = None
        if data.unlabeled is not None:
            assert fraction is not None
            num_unlabeled = round(fraction * batch_size)
            if not 0 < num_unlabeled < batch_size or num_unlabeled % self._num_parts:
                raise ValueError(
                    f"batch_size: {batch_size} x data.unlabeled.fraction {fraction:g} makes "
                    f"{num_unlabeled} unlabelled images a step, which must be more than 0, fewer "
                    f"than all, and divisible by {world_size} processes x {num_micro} micro-batches"
                )
            own_seed = seeded_generator(seed, 7).initial_seed()
            sampler = Sampler(
                len(data.unlabeled), num_unlabeled, seed=own_seed, sharding=sharding, **about
            )
            self._unlabeled = (data.unlabeled, sampler)
        self._labeled = data.train
        self._sampler = Sampler(
            len(data.train), batch_size - num_unlabeled, seed=seed, sharding=sharding, **about
        )
        self.steps_per_epoch = self._sampler.steps_per_epoch
        sets = [(self._labeled, self._sampler)]
        sets += [] if self._unlabeled is None else [self._unlabeled]
        self._mixing, self._num_micro = mixing, num_micro
        if mixing is not None:
            fewest = min(batch_size - num_unlabeled, num_unlabeled or batch_size)
            if sharding == "fixed":
                fewest //= world_size
            if fewest < 2:
                raise ValueError(
                    f"batch_size: {batch_size} makes a step of one image, which data.mix has "
                    "nothing to mix with"
                )
        self._labeled_flags = [(images.labels != NO_LABEL, sampler) for images, sampler in sets]
        self._vary = any(bool(f.any()) and not bool(f.all()) for f, _ in self._labeled_flags)

    def epoch(self, epoch: int, first_step: int, device: torch.device) -> Iterator[Batch]:
        """The micro-batches of an epoch from a step on: labelled images first, then the others."""
        batches = self._from(self._labeled, self._sampler, 0, epoch, first_step, device)
        if self._unlabeled is None:
            yield from batches
            return
        others = self._unlabeled_from(epoch * self.steps_per_epoch + first_step, device)
        for (x, labels), (other_x, other_labels) in zip(batches, others, strict=False):
            yield torch.cat([x, other_x]), torch.cat([labels, other_labels])

    def num_labeled(self, step: int) -> float | None:
        """Labelled images in a step's micro-batches, the mean over all of all processes.

        None where each has as many as the others.
        """
        if not self._vary:
            return None
        total = 0
        for i, (flags, sampler) in enumerate(self._labeled_flags):
            epoch, own_step = divmod(step, sampler.steps_per_epoch)
            if self._counts.get(i, (-1,))[0] != epoch:
                self._counts[i] = (epoch, sampler.count(flags, epoch))
            total += int(self._counts[i][1][own_step])
        return max(total, 1) / self._num_parts

    def _unlabeled_from(self, step: int, device: torch.device) -> Iterator[Batch]:
        """Without end: epoch after epoch of the unlabelled images, from a step of training on."""
        assert self._unlabeled is not None
        images, sampler = self._unlabeled
        epoch, first_step = divmod(step, sampler.steps_per_epoch)
        while True:
            yield from self._from(images, sampler, 1, epoch, first_step, device)
            epoch, first_step = epoch + 1, 0

    def _from(
        self,
        images: ImageSet,
        sampler: Sampler,
        number: int,
        epoch: int,
        first_step: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        """A set's micro-batches in its own epoch, mixed by a draw for each of its steps."""
        mixing = self._mixing
        if mixing is None:
            yield from images.batches(sampler.epoch(epoch, first_step), device, epoch)
            return
        indices = sampler.epoch(epoch, first_step, with_previous=True)
        for i, (x, labels) in enumerate(images.batches(indices, device, epoch)):
            yield mixing(x, labels, number, epoch, first_step + i // self._num_micro)
