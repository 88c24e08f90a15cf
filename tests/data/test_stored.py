"""Images that stay in their file: batches, augmentation, orders, shares, and their digest."""

import re
from pathlib import Path
from typing import Any

import numbered_images
import numpy as np
import pytest
import torch
from published_arrays import arrays, pixels, write, write_folder

from robust_accel.data import (
    NO_LABEL,
    Data,
    DataSettings,
    MemoryImages,
    TrainingBatches,
    load_data,
)
from robust_accel.data import stored as stored_module
from robust_accel.data.batch_augmentation import augmented
from robust_accel.data.batches import StoredSampler

CPU = torch.device("cpu")


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """Images of 3x5x6 of 3 classes, the numbers 0 to 11."""
    return numbered_images.pair(tmp_path / "labeled")


def load(labeled: Path, unlabeled: Any, **options: Any) -> Data:
    return load_data(DataSettings(path=str(labeled), unlabeled=unlabeled, **options))


def batches(data: Data, batch_size: int, rank: int = 0, world: int = 1, **options: Any) -> Any:
    about = {"fraction": 0.5, "num_micro": 1, "seed": 0, "sharding": "global"} | options
    return TrainingBatches(data, batch_size=batch_size, rank=rank, world_size=world, **about)


def numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


# ---- batches -----------------------------------------------------------------------------------


def test_crops_are_those_of_images_in_memory_and_follow_from_seed_epoch_and_index(
    labeled: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, **arrays(40))
    images: Any = load(labeled, {"path": str(path)}, augment="crop_flip").unlabeled
    indices = torch.arange(40)

    def batch(epoch: int | None, order: torch.Tensor = indices, size: int = 40) -> torch.Tensor:
        found = torch.cat([x for x, _ in images.batches(order.split(size), CPU, epoch)])
        return (found[order.argsort()] * 255).round().byte()

    plain = torch.from_numpy(pixels(40)).permute(0, 3, 1, 2)
    assert torch.equal(batch(None), plain)
    assert torch.equal(batch(3, indices.flip(0), size=7), batch(3))
    assert not torch.equal(batch(3), batch(4))
    crops = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    all_crops = [augmented(plain, crop.expand(40, 3), "crop_flip") for crop in crops]
    found = {
        (i, c)
        for i in range(40)
        for c, possible in enumerate(all_crops)
        if torch.equal(possible[i], batch(3)[i])
    }
    assert {i for i, _ in found} == {*range(40)}
    assert len({c for _, c in found}) > 20
    other = load_data(
        DataSettings(path=str(labeled), unlabeled={"path": str(path)}, augment="crop_flip"), seed=1
    ).unlabeled
    ((x, _),) = other.batches([indices], CPU, 3)
    assert not torch.equal((x * 255).round().byte(), batch(3))


def deal(epoch: int, world: int = 1, first_step: int = 0, **options: Any) -> list[Any]:
    """[rank][micro-batch] of 103 images in steps of 8."""
    samplers = [StoredSampler(103, 8, rank=r, world_size=world, **options) for r in range(world)]
    return [[*sampler.epoch(epoch, first_step)] for sampler in samplers]


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_gives_every_image_to_at_most_one_process_once(
    world: int, num_micro: int, sharding: str
) -> None:
    options = {"num_micro": num_micro, "sharding": sharding}
    dealt = deal(5, world, **options)
    assert {len(b) for micro_batches in dealt for b in micro_batches} == {8 // num_micro // world}
    used = torch.cat([batch for micro_batches in dealt for batch in micro_batches])
    assert len(used.unique()) == len(used) == 96
    assert {*used.tolist()} <= {*range(103)}
    late = deal(5, world, first_step=5, **options)
    for whole, tail in zip(dealt, late, strict=True):
        assert torch.equal(torch.cat(whole[5 * num_micro :]), torch.cat(tail))
    assert not torch.equal(used, torch.cat([b for own in deal(6, world, **options) for b in own]))
    assert not torch.equal(
        used, torch.cat([b for own in deal(5, world, seed=1, **options) for b in own])
    )


def test_a_steps_images_do_not_depend_on_processes_and_fixed_shards_stay() -> None:
    def steps(world: int, num_micro: int) -> list[list[int]]:
        dealt = deal(1, world, num_micro=num_micro)
        own = [torch.stack(micro_batches).view(12, -1) for micro_batches in dealt]
        return [sorted(step) for step in torch.cat(own, dim=1).tolist()]

    assert steps(1, 1) == steps(2, 1) == steps(4, 1) == steps(2, 2) == steps(1, 4)
    shards = [
        {*torch.cat([b for e in range(12) for b in deal(e, 2, sharding="fixed")[rank]]).tolist()}
        for rank in (0, 1)
    ]
    assert shards[0].isdisjoint(shards[1])
    assert shards[0] | shards[1] == {*range(103)}


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize(("world", "num_micro"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_the_image_before_a_micro_batch_is_that_of_the_steps_order(
    world: int, num_micro: int, sharding: Any
) -> None:
    about: Any = {"num_micro": num_micro, "world_size": world, "seed": 0, "sharding": sharding}
    samplers = [StoredSampler(50, 12, rank=rank, **about) for rank in range(world)]
    for step in range(4):
        parts = []
        for sampler in samplers:
            found = list(sampler.epoch(1, with_previous=True))[step * num_micro :][:num_micro]
            plain = list(sampler.epoch(1))[step * num_micro :][:num_micro]
            assert all(torch.equal(a[1:], b) for a, b in zip(found, plain, strict=True))
            parts.append((torch.cat([a[:1] for a in found]), torch.cat(plain)))
        orders = [own for _, own in parts]
        orders = orders if sharding == "fixed" else [torch.cat(orders)] * world
        size = 12 // world // num_micro
        for rank, (before, _) in enumerate(parts):
            start = 0 if sharding == "fixed" else rank * num_micro * size
            places = start + size * torch.arange(num_micro) - 1
            assert torch.equal(before, orders[rank][places])


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "rand", "cutout": 2},
        {"augment": "resized_crop_flip", "crop_scale": 0.3, "cutout": 2},
        {"augment": "resized_crop_flip", "policy": "trivial"},
    ],
    ids=str,
)
def test_each_image_is_transformed_by_its_own_draw_as_in_memory(
    labeled: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(tmp_path, **arrays(20))
    images: Any = load(labeled, {"path": str(path)}, **options).unlabeled
    indices = torch.arange(20)

    def batch(order: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([x for x, _ in images.batches(order.split(size), CPU, 3)])[order.argsort()]

    in_memory = torch.from_numpy(pixels(20)).permute(0, 3, 1, 2).contiguous()
    expected = MemoryImages(in_memory, indices, images.augmentation)
    (whole,) = expected.batches([indices], CPU, 3)
    assert torch.equal(batch(indices, 20), whole[0])
    assert torch.equal(batch(indices.flip(0), 7), whole[0])
    plain = torch.cat([x for x, _ in images.batches([indices], CPU)])
    assert not torch.equal(plain, whole[0])


@pytest.mark.parametrize("sharding", ["global", "fixed"])
def test_each_batch_holds_the_share_and_each_set_its_own_epochs(
    labeled: Path, tmp_path: Path, sharding: str
) -> None:
    data = load(labeled, {"path": str(write(tmp_path, **arrays(9)))})
    dealt = batches(data, 6, sharding=sharding)  # 3 labelled of 12, 3 others of 9
    seen = []
    for epoch in range(3):
        for x, labels in dealt.epoch(epoch, 0, CPU):
            assert [n >= 100 for n in numbers(x)] == [False] * 3 + [True] * 3
            assert labels[3:].tolist() == [(n - 100) % 3 for n in numbers(x[3:])]
            seen += numbers(x[3:])
    for start in range(0, 36, 9):
        assert sorted(seen[start : start + 9]) == list(range(100, 109))
    assert seen[:9] != seen[9:18]
    late = [numbers(x) for x, _ in dealt.epoch(1, 2, CPU)]
    assert late == [numbers(x) for x, _ in dealt.epoch(1, 0, CPU)][2:]


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize(("world", "num_micro"), [(1, 1), (2, 1), (2, 3)])
def test_every_process_knows_how_many_labels_a_step_has(
    labeled: Path, tmp_path: Path, sharding: str, world: int, num_micro: int
) -> None:
    labels = np.where(np.arange(60) % 5 < 2, NO_LABEL, np.arange(60) % 3)
    data = load(labeled, {"path": str(write(tmp_path, **arrays(60, label=labels)))})
    assert not data.all_labeled
    options = {"num_micro": num_micro, "sharding": sharding}
    ranks = [batches(data, 12, rank, world, **options) for rank in range(world)]
    for epoch in range(2):
        steps = [list(r.epoch(epoch, 0, CPU)) for r in ranks]
        for step in range(2):
            mine = slice(step * num_micro, (step + 1) * num_micro)
            counted = sum(int((y != NO_LABEL).sum()) for own in steps for _, y in own[mine])
            for r in ranks:
                found = r.num_labeled(2 * epoch + step)
                assert found == pytest.approx(counted / (world * num_micro))


# ---- several sources ---------------------------------------------------------------------------


def test_several_sources_have_each_their_share_and_their_own_order(
    labeled: Path, tmp_path: Path
) -> None:
    first = write(tmp_path, **arrays(12))
    second = write_folder(tmp_path / "second", pixels(12) + np.uint8(100), np.arange(12) % 3)
    sources = [{"path": str(first), "fraction": 0.5}, {"path": str(second), "fraction": 0.25}]
    data = load(labeled, sources)
    assert data.all_labeled
    assert {*data.identity()} == {"train", "unlabeled", "unlabeled.1"}
    dealt = batches(data, 8, fraction=[0.5, 0.25])
    assert dealt.steps_per_epoch == 6
    seen: dict[int, list[int]] = {100: [], 200: []}
    for x, labels in dealt.epoch(0, 0, CPU):
        found = numbers(x)
        assert [n // 100 for n in found] == [0] * 2 + [1] * 4 + [2] * 2
        assert labels[2:].tolist() == [n % 100 % 3 for n in found[2:]]
        seen[100] += [n % 100 for n in found[2:6]]
        seen[200] += [n % 100 for n in found[6:]]
    assert sorted(seen[100][:12]) == sorted(seen[200]) == list(range(12))
    assert seen[100][:12] != seen[200]
    for rank in range(2):
        ((x, _), *_) = batches(data, 8, rank, 2, fraction=[0.5, 0.25]).epoch(0, 0, CPU)
        assert [n // 100 for n in numbers(x)] == [0, 1, 1, 2]


def test_the_first_of_a_list_is_dealt_as_one_alone(labeled: Path, tmp_path: Path) -> None:
    kept = {"fraction": 0.5}
    alone = load(labeled, kept, train_size=6, augment="crop_flip")
    second = {"path": str(write(tmp_path, **arrays(12))), "fraction": 0.25}
    listed = load(labeled, [kept, second], train_size=6, augment="crop_flip")
    assert isinstance(listed.unlabeled, MemoryImages)
    one = batches(alone, 4).epoch(2, 0, CPU)  # 2 labelled ones of 6, and 2
    with_another = batches(listed, 8, fraction=[0.25, 0.5]).epoch(2, 0, CPU)  # 2, 2 and 4
    for (x, labels), (x_listed, labels_listed) in zip(one, with_another, strict=True):
        assert torch.equal(x, x_listed[:4])
        assert torch.equal(labels, labels_listed[:4])


def test_shares_that_cannot_be_dealt_are_refused_with_one_that_could(
    labeled: Path, tmp_path: Path
) -> None:
    source = {"path": str(write(tmp_path, **arrays(12)))}
    data = load(labeled, [source | {"fraction": 0.5}, source | {"fraction": 0.3}])
    with pytest.raises(ValueError, match=r"number 1\) 0.3 makes 3 .* 2 processes .*of 0.4 could"):
        batches(data, 10, 0, 2, fraction=[0.6, 0.3])
    with pytest.raises(ValueError, match=r"batch_size: 2 has no room for labelled images"):
        batches(data, 2, fraction=[0.5, 0.45])
    with pytest.raises(ValueError, match=r"unlabeled\.1\.path: .*No such file"):
        load(labeled, [source | {"fraction": 0.5}, {"path": "none.npz", "fraction": 0.1}])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"path": "a", "fraction": 0.7}, {"path": "b", "fraction": 0.3}], "[0.7, 0.3] are 1 tog"),
        ([{"path": "a"}, {"path": "b"}], "[0.5, 0.5] are 1 together"),
        ([{"path": "a", "fraction": None}], "a fraction of each, not null, found [null]"),
        ([], "at least one source"),
        ([{"fraction": 0.2}], "data.train_size is not given"),
    ],
)
def test_lists_that_leave_no_share_are_refused(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DataSettings(path="x", unlabeled=sources)


# ---- the digest --------------------------------------------------------------------------------


def digest(labeled: Path, path: Path, **own: Any) -> str:
    return load(labeled, {"path": str(path)} | own).identity()["unlabeled"]["digest"]  # type: ignore[return-value]


@pytest.mark.parametrize("whole", [2**30, 100])
def test_a_changed_file_is_another_identity_and_a_copy_is_the_same(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(stored_module, "HASHED_WHOLE", whole)
    monkeypatch.setattr(stored_module, "HASHED_IMAGES", 2)
    content = arrays(30)
    before = digest(labeled, write(tmp_path, **content))
    (tmp_path / "copy").mkdir()
    labels = content["label"].astype(np.uint8)
    assert digest(labeled, write(tmp_path / "copy", **content | {"label": labels})) == before
    # the same arrays, whoever keeps them
    assert digest(labeled, write(tmp_path, compressed=True, **content)) == before
    one_pixel = content["image"].copy()
    one_pixel[7, 2, 2, 2] ^= 1
    changes: list[dict[str, Any]] = [
        {"image": one_pixel},
        {"label": np.roll(content["label"], 1)},
        {"image": content["image"][::-1].copy()},
        arrays(29),
    ]
    found = {digest(labeled, write(tmp_path, **content | change)) for change in changes}
    assert len(found | {before}) == 5
    assert digest(labeled, write(tmp_path, **content), size=10) != before


def test_a_folder_is_known_by_all_pixels_or_by_some(
    labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pixels(30)
    before = digest(labeled, write_folder(tmp_path / "made", images, np.arange(30) % 3))
    assert before == digest(labeled, write(tmp_path, **arrays(30)))
    images[7] ^= 1
    folder = write_folder(tmp_path / "made", images)
    assert digest(labeled, folder) != before
    monkeypatch.setattr(stored_module, "HASHED_WHOLE", 100)
    before = digest(labeled, folder)
    images[10:] ^= 1
    assert digest(labeled, write_folder(folder, images)) != before
