"""Who gets which image follows from seed and epoch alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from robust_accel.data import NO_LABEL, Data, Sampler, TrainingBatches
from robust_accel.evaluation.any_module import TensorImages


def deal(
    epoch: int, world_size: int = 1, first_step: int = 0, **options: Any
) -> list[list[Tensor]]:
    """[rank][micro-batch] of 103 images in steps of 8."""
    return [
        list(Sampler(103, 8, rank=rank, world_size=world_size, **options).epoch(epoch, first_step))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_gives_every_image_to_at_most_one_process_once(
    world_size: int, num_micro: int, sharding: str
) -> None:
    dealt = deal(5, world_size, num_micro=num_micro, sharding=sharding)
    for micro_batches in dealt:
        assert len(micro_batches) == 12 * num_micro  # 103 images make 12 steps of 8
        assert {len(batch) for batch in micro_batches} == {8 // num_micro // world_size}
    used = torch.cat([batch for micro_batches in dealt for batch in micro_batches])
    assert len(used.unique()) == len(used) == 96
    assert {*used.tolist()} <= {*range(103)}


def test_a_steps_images_do_not_depend_on_the_number_of_processes_or_micro_batches() -> None:
    def steps(world_size: int, num_micro: int) -> list[list[int]]:
        dealt = deal(1, world_size, num_micro=num_micro)
        return [
            sorted(
                torch.cat(
                    [b for r in dealt for b in r[s * num_micro : (s + 1) * num_micro]]
                ).tolist()
            )
            for s in range(12)
        ]

    assert steps(1, 1) == steps(2, 1) == steps(4, 1) == steps(2, 2) == steps(1, 4)


@pytest.mark.parametrize("sharding", ["global", "fixed"])
def test_epochs_and_seeds_differ_and_repeat(sharding: str) -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        return torch.cat(deal(epoch, 2, seed=seed, sharding=sharding)[1]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, seed=1)


def test_fixed_shards_stay_with_their_process() -> None:
    def shards(sharding: str, rank: int) -> set[int]:
        """What a rank sees in 12 epochs: each leaves out other images of its shard."""
        batches = [b for epoch in range(12) for b in deal(epoch, 2, sharding=sharding)[rank]]
        return {*torch.cat(batches).tolist()}

    fixed = [shards("fixed", rank) for rank in (0, 1)]
    assert fixed[0].isdisjoint(fixed[1])
    assert fixed[0] | fixed[1] == {*range(103)}
    assert shards("global", 0) == {*range(103)}


@pytest.mark.parametrize("sharding", ["global", "fixed"])
def test_resuming_gives_the_tail(sharding: str) -> None:
    options: dict[str, Any] = {"num_micro": 2, "sharding": sharding}
    whole, tail = deal(3, 2, **options), deal(3, 2, first_step=5, **options)
    for rank in (0, 1):
        assert [b.tolist() for b in tail[rank]] == [b.tolist() for b in whole[rank][10:]]
    assert not any(deal(3, 2, first_step=12, **options))


def test_batch_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: 8 .* 3 processes x 1 micro-batches"):
        Sampler(103, 8, world_size=3)
    with pytest.raises(ValueError, match=r"^batch_size: 8 .* 4 processes x 4 micro-batches"):
        Sampler(103, 8, world_size=4, num_micro=4)
    with pytest.raises(ValueError, match=r"^batch_size: 104 exceeds the 103"):
        Sampler(103, 104)
    assert Sampler(103, 103).steps_per_epoch == 1


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize(("world_size", "num_micro"), [(1, 1), (2, 1), (2, 3), (4, 1)])
def test_every_process_knows_how_many_labels_a_step_has(sharding, world_size, num_micro):
    labels = torch.arange(60) % 4
    labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]] = NO_LABEL
    images = TensorImages(torch.rand(60, 1, 2, 2), labels)
    data = Data(images, images, images, 4)
    ranks = [
        TrainingBatches(
            data, fraction=None, batch_size=12, num_micro=num_micro, rank=rank,
            world_size=world_size, seed=1, sharding=sharding,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for epoch in range(2):
        steps = [list(r.epoch(epoch, 0, torch.device("cpu"))) for r in ranks]
        for step in range(5):
            mine = slice(step * num_micro, (step + 1) * num_micro)
            counted = sum(int((y != NO_LABEL).sum()) for own in steps for _, y in own[mine])
            for r in ranks:
                found = r.num_labeled(5 * epoch + step)
                assert found == pytest.approx(max(counted, 1) / (world_size * num_micro))


def test_where_each_part_has_as_many_labels_nothing_need_be_counted():
    images = TensorImages(torch.rand(20, 1, 2, 2), torch.arange(20) % 4)
    unlabeled = TensorImages(torch.rand(20, 1, 2, 2), torch.full((20,), NO_LABEL))
    for other in (None, images, unlabeled):
        batches = TrainingBatches(
            Data(images, images, images, 4, other), fraction=0.5, batch_size=4, num_micro=1,
            rank=0, world_size=2, seed=0, sharding="global",
        )  # fmt: skip
        assert batches.num_labeled(3) is None
