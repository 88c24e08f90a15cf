"""Random resized crops and cutout of whole batches: against torchvision, and drawn evenly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_images import pair, pixels
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from robust_accel.data import DataSettings, FileImages, MemoryImages, load_data
from robust_accel.data.batch_augmentation import BatchAugmentation, crop_boxes, cut_out, resized
from robust_accel.data.orders import uniforms

SIZES = st.integers(1, 40)


def drawn(number: int, seed: int = 0) -> Tensor:
    return uniforms(torch.arange(number), 5, seed)


def test_draws_are_even_and_each_has_its_own() -> None:
    found = uniforms(torch.arange(20_000), 5, 3)
    assert found.shape == (20_000, 5)
    assert found.min() >= 0 and found.max() < 1
    tenths = (10 * found).long()
    for column in tenths.unbind(dim=1):
        assert (column.bincount(minlength=10) - 2000).abs().max() < 5 * 2000**0.5
    assert (torch.corrcoef(found.T) - torch.eye(5)).abs().max() < 0.05
    assert uniforms(torch.tensor([7, 3]), 5, 3).equal(found[[7, 3]])
    assert not uniforms(torch.arange(20), 5, 4).equal(found[:20])


@settings(max_examples=100, deadline=None)
@given(height=SIZES, width=SIZES, scale=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_crop_lies_in_the_image_and_has_its_share(
    height: int, width: int, scale: float, seed: int
) -> None:
    extremes = torch.cartesian_prod(*[torch.tensor([0, 1 - 2**-32], dtype=torch.float64)] * 5)
    top, left, tall, wide, flip = crop_boxes(
        torch.cat([extremes, drawn(50, seed)]), height, width, scale
    ).unbind(dim=1)
    assert top.min() >= 0 and left.min() >= 0 and tall.min() >= 1 and wide.min() >= 1
    assert (top + tall).max() <= height and (left + wide).max() <= width
    rounding = (tall + wide + 1) / 2  # half a pixel a side
    assert (tall * wide >= scale * height * width - rounding - 1e-6).all()
    assert {*flip.tolist()} == {0, 1}
    if height == width:
        slack = 1 / tall + 1 / wide
        assert ((wide / tall).log().abs() < 0.288 + slack).all()


def test_crops_are_drawn_evenly() -> None:
    top, left, tall, wide, flip = crop_boxes(drawn(20_000), 64, 64, 0.25).double().unbind(dim=1)
    shares = (tall * wide / 64**2 - 0.25) / 0.75
    assert ((10 * shares).long().clamp(0, 9).bincount() / 2000 - 1).abs().max() < 0.15
    for start, length in ((top, tall), (left, wide)):
        place = (start + torch.rand(20_000)) / (64 - length + 1)  # even from 0 to 1
        assert ((10 * place).long().bincount(minlength=10) / 2000 - 1).abs().max() < 0.15
    assert abs(flip.mean() - 0.5) < 0.02
    assert abs((wide / tall).log().mean()) < 0.01


def test_a_resized_crop_is_torchvisions() -> None:
    x = torch.randint(0, 256, (300, 3, 9, 7), dtype=torch.uint8)
    boxes = crop_boxes(drawn(300), 9, 7, 0.05)
    assert len(boxes[:, 2:4].unique(dim=0)) > 15
    for image, box, found in zip(x, boxes.tolist(), resized(x, boxes), strict=True):
        *place, flip = box
        expected = resized_crop(image.float(), *place, [9, 7], antialias=False)
        expected = expected.flip(2) if flip else expected
        assert (found - expected).abs().max() < 0.51  # it is rounded to whole numbers


def test_the_whole_image_stays_as_it_is() -> None:
    x = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 33, 47, 0], [0, 0, 33, 47, 1]])
    assert resized(x, boxes).equal(torch.stack([x[0], x[1].flip(2)]))


def in_memory(seed: int = 3, **options: Any) -> MemoryImages:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return MemoryImages.of(x, torch.arange(40) % 3, DataSettings(path="x", **options), seed)


def test_resized_crops_follow_from_seed_epoch_and_image_alone() -> None:
    everyone = [[*range(40)]]
    options: dict[str, Any] = {"augment": "resized_crop_flip"}
    whole = pixels(in_memory(**options), everyone, epoch=2)
    order = [part.tolist() for part in torch.randperm(40).split(7)]
    assert pixels(in_memory(**options), order, epoch=2).equal(whole)
    assert pixels(in_memory(**options).subset(torch.arange(9)), [[3]], epoch=2).equal(whole[[3]])
    for other in (
        pixels(in_memory(**options), everyone, epoch=3),
        pixels(in_memory(4, **options), everyone, epoch=2),
        pixels(in_memory(crop_scale=0.9, **options), everyone, epoch=2),
        pixels(in_memory(), everyone, epoch=2),
    ):
        assert not other.equal(whole)
    assert pixels(in_memory(**options), everyone, epoch=None).equal(
        pixels(in_memory(), everyone, epoch=None)
    )


def test_the_default_share_is_torchvisions() -> None:
    options: dict[str, Any] = {"augment": "resized_crop_flip"}
    default, given_ = (
        pixels(in_memory(**options, **more), [[*range(40)]], 1)
        for more in ({}, {"crop_scale": 0.08})
    )
    assert given_.equal(default)


def test_cutout_is_of_what_comes_before_it() -> None:
    """Nothing but the square is other than without it."""
    for augment in ("none", "flip", "crop_flip", "resized_crop_flip"):
        with_, without = (
            pixels(in_memory(augment=augment, policy="rand", **more), [[*range(40)]], 1)
            for more in ({"cutout": 3}, {})
        )
        kept = with_ == without
        assert (~kept).any(dim=1).sum(dim=(1, 2)).le(9).all()
        assert with_[~kept].eq(0).all()


def test_a_square_is_cut_out_at_its_corner() -> None:
    x = torch.full((2, 1, 3, 4), 9)
    found = cut_out(x, torch.tensor([[0, 1], [1, 2]]), 2)
    assert found[0, 0].tolist() == [[9, 0, 0, 9], [9, 0, 0, 9], [9, 9, 9, 9]]
    assert found[1, 0].tolist() == [[9, 9, 9, 9], [9, 9, 0, 0], [9, 9, 0, 0]]


def test_crops_of_images_from_files_keep_the_share(tmp_path: Path) -> None:
    folder = pair(tmp_path)

    def train(**more: Any) -> FileImages:
        options: dict[str, Any] = {"in_memory": False, "image_size": 16, "num_workers": 0}
        found = load_data(DataSettings(path=str(folder), augment="timm", **options, **more)).train
        assert isinstance(found, FileImages)
        return found

    everyone = [[*range(12)]]
    default, same, large = (
        pixels(train(**more), everyone, 1) for more in ({}, {"crop_scale": 0.08}, {"crop_scale": 1})
    )
    assert same.equal(default)
    assert not large.equal(default)


@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_all_that_is_drawn_is_drawn_from_the_seed(augment: Any) -> None:
    """Two sets of one seed get the same, whatever their pixels are."""
    black = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    augmentation = BatchAugmentation(augment, 5, cutout=3)
    white = MemoryImages(black + 255, torch.zeros(30).long(), augmentation)
    grey = MemoryImages(black + 51, torch.zeros(30).long(), augmentation)
    holes = [pixels(images, [[*range(30)]], 1) == 0 for images in (white, grey)]
    assert holes[0].equal(holes[1])
    assert holes[0].any()
