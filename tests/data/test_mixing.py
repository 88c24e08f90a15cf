"""mixup and CutMix: who is mixed with whom, how much, and that processes make no difference."""

from typing import Any

import pytest
import torch
from numbered_images import CPU
from torch import Tensor
from torchvision.transforms import v2

from robust_accel.data import Data, MemoryImages, Mixing, MixSettings, TrainingBatches
from robust_accel.data.augmentation import seeded
from robust_accel.data.batch_augmentation import BatchAugmentation

CUTMIX, MIXUP = MixSettings(cutmix=1.0), MixSettings(mixup=1.0)
BOTH = MixSettings(mixup=0.2, cutmix=1.0, prob=0.7)


def images(number: int = 53, num_classes: int = 4, seed: int = 0) -> MemoryImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (number, 3, 8, 6), dtype=torch.uint8, generator=generator)
    augmentation = BatchAugmentation("crop_flip", seed)
    return MemoryImages(pixels, torch.arange(number) % num_classes, augmentation)


def batches(
    settings: MixSettings | None, *, world_size: int = 1, rank: int = 0, **options: Any
) -> TrainingBatches:
    """Steps of 8 of 53 images, half of them unlabelled ones where ``other`` is given."""
    data = Data(options.pop("train", images()), images(), images(), 4, options.pop("other", None))
    about: dict[str, Any] = {"num_micro": 1, "batch_size": 8, "sharding": "global"}
    return TrainingBatches(
        data, fraction=0.5, seed=3, rank=rank, world_size=world_size,
        mixing=None if settings is None else Mixing(settings, 4, 3), **about | options,
    )  # fmt: skip


def steps(settings: MixSettings | None, epoch: int = 1, **options: Any) -> list[tuple]:
    """Of each step its images and labels, over all processes and micro-batches, in order."""
    world_size, num_micro = options.get("world_size", 1), options.get("num_micro", 1)
    ranks = [
        list(batches(settings, rank=rank, **options).epoch(epoch, 0, CPU))
        for rank in range(world_size)
    ]
    number = len(ranks[0]) // num_micro
    parts = [
        [part for rank in ranks for part in rank[s * num_micro : (s + 1) * num_micro]]
        for s in range(number)
    ]
    return [tuple(map(torch.cat, zip(*step, strict=True))) for step in parts]


def equal(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        a.equal(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("settings", [CUTMIX, MIXUP, BOTH], ids=["cutmix", "mixup", "both"])
def test_processes_and_micro_batches_make_no_difference(settings: MixSettings) -> None:
    whole = steps(settings)
    assert not equal(whole, steps(None))
    for world_size, num_micro in ((2, 1), (4, 1), (1, 4), (2, 2), (8, 1)):
        assert equal(steps(settings, world_size=world_size, num_micro=num_micro), whole)
    assert not equal(steps(settings, epoch=2), whole)


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_a_step_is_what_torchvision_makes_of_the_whole_of_it(name: str) -> None:
    mixed = steps(MixSettings(**{name: 0.8}), num_micro=2)
    transform = (v2.CutMix if name == "cutmix" else v2.MixUp)(alpha=0.8, num_classes=4)
    for step, ((x, labels), found) in enumerate(zip(steps(None), mixed, strict=True)):
        with seeded(3, 0, 1, step):
            torch.rand(2)  # whether, and which
            expected = transform(x, labels)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [CUTMIX, MIXUP, BOTH], ids=["cutmix", "mixup", "both"])
def test_a_labels_share_is_the_share_of_its_pixels(settings: MixSettings) -> None:
    """White images are of class 1, black ones of class 0: an image's mean is its label."""
    labels = torch.arange(53) % 2
    white = (255 * labels)[:, None, None, None].expand(53, 3, 8, 6).to(torch.uint8)
    shares = []
    for x, soft in steps(settings, train=MemoryImages(white, labels)):
        torch.testing.assert_close(x.mean(dim=(1, 2, 3)), soft[:, 1])
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
        assert soft.shape == (8, 4)
        assert 0 <= x.min() <= x.max() <= 1
        shares.append(soft[:, 1])
    assert any(bool(((s > 0) & (s < 1)).any()) for s in shares)


def test_resuming_gives_the_tail_with_micro_batches() -> None:
    of = batches(BOTH, num_micro=2, other=images(20, seed=1))
    whole, tail = list(of.epoch(2, 0, CPU)), list(of.epoch(2, 3, CPU))
    assert len(whole) == 2 * 13
    assert equal(tail, whole[6:])


def test_each_set_is_mixed_with_its_own() -> None:
    """The given images are black, the others white: neither turns grey."""
    black = MemoryImages(torch.zeros(53, 3, 8, 6, dtype=torch.uint8), torch.zeros(53).long())
    white = MemoryImages(torch.full((40, 3, 8, 6), 255, dtype=torch.uint8), torch.ones(40).long())
    for world_size in (1, 2):
        for rank in range(world_size):
            part = batches(MIXUP, train=black, other=white, world_size=world_size, rank=rank).epoch(
                0, 0, CPU
            )
            for x, labels in part:
                half = len(x) // 2
                assert x[:half].eq(0).all() and x[half:].ge(1 - 1e-6).all()
                assert labels[:half, 0].allclose(torch.ones(half))
                assert labels[half:, 1].allclose(torch.ones(half))


def test_a_process_of_a_fixed_shard_mixes_with_its_own_images_alone() -> None:
    seen: list[Tensor] = []
    for rank in range(2):
        own = batches(None, world_size=2, rank=rank, sharding="fixed")
        labelled = torch.arange(53)
        train = MemoryImages(images().images, labelled)
        mixing = Mixing(MIXUP, 53, 0)
        mixed = TrainingBatches(
            Data(train, train, train, 53), fraction=None, batch_size=8, num_micro=2, rank=rank,
            world_size=2, seed=3, sharding="fixed", mixing=mixing,
        )  # fmt: skip
        met = [labels for epoch in range(8) for _, labels in mixed.epoch(epoch, 0, CPU)]
        seen.append(torch.cat(met).sum(dim=0) > 0)
        assert own.steps_per_epoch == 6
    assert not bool((seen[0] & seen[1]).any())


def test_how_often_and_how_much_follow_the_settings() -> None:
    def shares(settings: MixSettings, number: int = 2000) -> Tensor:
        mixing = Mixing(settings, 2, 0)
        x, labels = torch.zeros(2, 1, 64, 64), torch.tensor([0, 1])
        return torch.stack([mixing(x, labels, step)[1][0, 1] for step in range(number)])

    half = shares(MixSettings(mixup=1.0, prob=0.5))
    assert 0.45 < half.eq(1).float().mean() < 0.55
    mixed = half[half < 1]  # of Beta(1, 1), the uniform law
    assert abs(mixed.mean() - 0.5) < 0.04 and abs(mixed.std() - 12**-0.5) < 0.02
    weak = shares(MixSettings(mixup=0.1))
    assert torch.minimum(weak, 1 - weak).mean() < 0.1
    # a share of pixels is a multiple of 1/64^2, one of the Beta law hardly ever
    both = shares(MixSettings(mixup=1.0, cutmix=1.0, switch_prob=0.2))
    cut = (both * 64**2).frac().eq(0).float().mean()
    assert 0.17 < cut < 0.23


def test_mixing_leaves_other_streams_alone() -> None:
    before = torch.get_rng_state()
    list(batches(BOTH).epoch(0, 0, CPU))
    assert torch.get_rng_state().equal(before)


def test_a_step_of_one_image_is_refused() -> None:
    for options in ({"batch_size": 1}, {"batch_size": 2, "other": images()}):
        with pytest.raises(ValueError, match=r"^batch_size: . makes a step of one image.*data.mix"):
            batches(CUTMIX, **options)
    with pytest.raises(ValueError, match=r"^batch_size: 2 makes a step of one image"):
        batches(CUTMIX, batch_size=2, world_size=2, sharding="fixed")
    assert len(list(batches(CUTMIX, batch_size=2, world_size=2).epoch(0, 0, CPU))) == 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither mixup nor cutmix is above 0"),
        ({"mixup": 0, "cutmix": 0}, "neither mixup nor cutmix is above 0"),
        ({"mixup": -1}, "greater than or equal to 0"),
        ({"cutmix": 1, "prob": 0}, "greater than 0"),
        ({"cutmix": 1, "prob": 1.5}, "less than or equal to 1"),
        ({"cutmix": 1, "switch_prob": 0.5}, "switch_prob: 0.5 chooses between"),
        ({"cutmix": 1, "mode": "elem"}, "mode: unknown key; allowed: mixup"),
    ],
)
def test_settings_that_would_not_mix_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixSettings(**options)
