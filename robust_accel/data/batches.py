"""Who trains on which image when: the same deal, whoever computes it."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from robust_accel.data.augmentation import Mixing
from robust_accel.data.images import NO_LABEL, Batch, ImageSet, derived_seed, seeded_generator
from robust_accel.data.loading import Data
from robust_accel.data.orders import Order
from robust_accel.data.stored import StoredImages, labels_among


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
        parts = num_micro * world_size
        if over := batch_size % parts:
            less = f"{batch_size - over} or " if batch_size > parts else ""
            raise ValueError(
                f"batch_size: {batch_size} is not divisible by {world_size} processes x "
                f"{num_micro} micro-batches: choose {less}{batch_size - over + parts}"
            )
        if batch_size > num_images:
            raise ValueError(f"batch_size: {batch_size} exceeds the {num_images} training images")
        self.steps_per_epoch = num_images // batch_size
        self._micro_size = batch_size // (num_micro * world_size)
        self._num_images, self._num_micro = num_images, num_micro
        self._rank, self._world_size = rank, world_size
        self._seed, self._sharding = seed, sharding
        self._counts = (-1, torch.empty(0))  # labelled images by step, of the epoch at hand

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

    @property
    def own_images(self) -> Tensor:
        """All that this process may ever be dealt, [n] of indices."""
        if self._sharding == "global":
            return torch.arange(self._num_images)
        return self._shard(self._rank)

    def num_labeled(self, images: ImageSet, epoch: int, step: int) -> int:
        """How many of a step's images have a label, over all processes."""
        if self._counts[0] != epoch:
            flags = images.labels != NO_LABEL
            of_rank = [flags[self._own(epoch, rank)] for rank in range(self._world_size)]
            counts = [f.view(self.steps_per_epoch, -1).sum(dim=1) for f in of_rank]
            self._counts = (epoch, torch.stack(counts).sum(dim=0))
        return int(self._counts[1][step])

    def _shard(self, rank: int) -> Tensor:
        """A process's part in fixed shards."""
        dealt = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 2))
        return dealt[rank :: self._world_size]

    def _own(self, epoch: int, rank: int, *, shift: int = 0) -> Tensor:
        """A process's images in the epoch's order; or those so many places before in each step."""
        if self._sharding == "fixed":
            own = self._shard(rank)
            generator = seeded_generator(self._seed, 3, epoch, rank)
            order = torch.randperm(len(own), generator=generator)
            used = own[order[: self.steps_per_epoch * self._num_micro * self._micro_size]]
            return used.view(self.steps_per_epoch, -1).roll(shift, dims=1).flatten()
        order = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 4, epoch))
        used = order[: self.steps_per_epoch * self._micro_size * self._num_micro * self._world_size]
        # [steps, processes, images of a process]: a step's images do not depend on their number
        by_step = used.view(self.steps_per_epoch, -1).roll(shift, dims=1)
        return by_step.view(self.steps_per_epoch, self._world_size, -1)[:, rank].flatten()


class StoredSampler(Sampler):
    """A ``Sampler`` without lists of all images: it computes a micro-batch's when its turn comes.

    Its orders are others than a ``Sampler``'s, and have the same properties.
    """

    def epoch(
        self, epoch: int, first_step: int = 0, *, with_previous: bool = False
    ) -> Iterator[Tensor]:
        for step in range(first_step, self.steps_per_epoch):
            for micro in range(self._num_micro):
                own = self._dealt(epoch, self._rank, step, micro)
                if with_previous:
                    before = self._dealt(epoch, *self._before(step, micro))[-1:]
                    own = torch.cat([before, own])
                yield own

    def _before(self, step: int, micro: int) -> tuple[int, int, int]:
        """Process, step and micro-batch that end with the image before a micro-batch's first."""
        if micro > 0:
            return self._rank, step, micro - 1
        processes = 1 if self._sharding == "fixed" else self._world_size
        rank = self._rank if processes == 1 else (self._rank - 1) % processes
        return rank, step, self._num_micro - 1

    def num_labeled(self, images: ImageSet, epoch: int, step: int) -> int:
        assert isinstance(images, StoredImages)
        parts = itertools.product(range(self._world_size), range(self._num_micro))
        dealt = torch.cat([self._dealt(epoch, rank, step, micro) for rank, micro in parts])
        return int((images.labels_at(dealt) != NO_LABEL).sum())

    def _dealt(self, epoch: int, rank: int, step: int, micro: int) -> Tensor:
        """A process's images of one micro-batch."""
        size, of_process = self._micro_size, self._micro_size * self._num_micro
        if self._sharding == "fixed":
            number = len(range(rank, self._num_images, self._world_size))
            start = step * of_process + micro * size
            own = Order(number, self._seed, 3, epoch, rank)[torch.arange(start, start + size)]
            return Order(self._num_images, self._seed, 2)[rank + self._world_size * own]
        start = (step * self._world_size + rank) * of_process + micro * size
        order = Order(self._num_images, self._seed, 4, epoch)
        return order[torch.arange(start, start + size)]


class TrainingBatches:
    """A process's batches: labelled images, and unlabelled ones where the data have them.

    An epoch is a pass over the labelled images. Unlabelled images of each source have an order and
    epochs of their own; what a step trains on follows from its number alone.

    Args:
        data: ``data.mixed_in`` is mixed in where it is there.
        fraction: Share of unlabelled images in each batch, of each source.
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
        fraction: float | Sequence[float] | None,
        batch_size: int,
        num_micro: int,
        rank: int,
        world_size: int,
        seed: int,
        sharding: Literal["global", "fixed"],
        mixing: Mixing | None = None,
    ) -> None:
        about: dict[str, Any] = {"num_micro": num_micro, "rank": rank, "world_size": world_size}
        about |= {"sharding": sharding}
        self._num_parts = num_micro * world_size
        fractions = fraction if isinstance(fraction, Sequence) else [fraction]
        numbers: list[int] = []
        others: list[tuple[ImageSet, Sampler]] = []
        for i, images in enumerate(data.mixed_in):
            share = fractions[i]
            assert share is not None
            key = "data.unlabeled.fraction" + f" (number {i})" * (len(data.mixed_in) > 1)
            numbers.append(self._number_of(share, key, batch_size, num_micro, world_size))
            own_seed = derived_seed(seed, 7, i)
            if numbers[-1] > len(images):
                raise ValueError(
                    f"batch_size: {batch_size} x {key} {share:g} makes {numbers[-1]} images a "
                    f"step, and there are {len(images)}"
                )
            kind = StoredSampler if isinstance(images, StoredImages) else Sampler
            others.append((images, kind(len(images), numbers[-1], seed=own_seed, **about)))
        if sum(numbers) >= batch_size:
            raise ValueError(
                f"batch_size: {batch_size} has no room for labelled images beside {numbers} others"
            )
        sampler = Sampler(len(data.train), batch_size - sum(numbers), seed=seed, **about)
        self.steps_per_epoch = sampler.steps_per_epoch
        self._sets = [(data.train, sampler), *others]
        self._vary = any(
            NO_LABEL in found and len(found) > 1
            for found in (labels_among(images) for images, _ in self._sets)
        )
        self._mixing, self._num_micro = mixing, num_micro
        if mixing is not None:
            fewest = min([batch_size - sum(numbers), *numbers])
            if sharding == "fixed":
                fewest //= world_size
            if fewest < 2:
                raise ValueError(
                    f"batch_size: {batch_size} makes a step of one image, which data.mix has "
                    "nothing to mix with"
                )

    def _number_of(
        self, fraction: float, key: str, batch_size: int, num_micro: int, world_size: int
    ) -> int:
        """Images a step that a share makes."""
        number = round(fraction * batch_size)
        if not 0 < number < batch_size or number % self._num_parts:
            near = round(number / self._num_parts) * self._num_parts / batch_size
            fits = f" (a share of {near:g} could)" if 0 < near < 1 else ""
            raise ValueError(
                f"batch_size: {batch_size} x {key} {fraction:g} makes "
                f"{number} unlabelled images a step, which must be more than 0, fewer "
                f"than all, and divisible by {world_size} processes x {num_micro} micro-batches"
                f"{fits}"
            )
        return number

    def epoch(self, epoch: int, first_step: int, device: torch.device) -> Iterator[Batch]:
        """The micro-batches of an epoch from a step on: labelled images first, then the others."""
        (labeled, sampler), *others = self._sets
        batches = self._from(labeled, sampler, 0, epoch, first_step, device)
        if not others:
            yield from batches
            return
        step = epoch * self.steps_per_epoch + first_step
        mixed_in = [self._without_end(*other, i, step, device) for i, other in enumerate(others, 1)]
        for parts in zip(batches, *mixed_in, strict=False):
            yield torch.cat([x for x, _ in parts]), torch.cat([labels for _, labels in parts])

    def indices(self, epoch: int, first_step: int) -> Iterator[Tensor]:
        """Which of the training images ``epoch`` yields, the first ones of each micro-batch."""
        return self._sets[0][1].epoch(epoch, first_step)

    @property
    def own_images(self) -> Tensor:
        """All indices that ``indices`` may ever yield, [n]."""
        return self._sets[0][1].own_images

    def num_labeled(self, step: int) -> float | None:
        """Labelled images in a step's micro-batches, the mean over all of all processes.

        None where each has as many as the others.
        """
        if not self._vary:
            return None
        total = 0
        for images, sampler in self._sets:
            total += sampler.num_labeled(images, *divmod(step, sampler.steps_per_epoch))
        return max(total, 1) / self._num_parts

    def _without_end(
        self, images: ImageSet, sampler: Sampler, number: int, step: int, device: torch.device
    ) -> Iterator[Batch]:
        """Epoch after epoch of a source of images, from a step of training on."""
        epoch, first_step = divmod(step, sampler.steps_per_epoch)
        while True:
            yield from self._from(images, sampler, number, epoch, first_step, device)
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
