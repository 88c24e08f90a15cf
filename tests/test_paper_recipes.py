"""The paper's recipes run two steps at reduced size: the same settings, less of everything."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from robust_accel.recipe import load_recipe
from robust_accel.train import train

LESS = (
    "train.max_steps=2",
    "train.batch_size=8",
    "data.validation_size=8",
    "evaluate.images=8",
    "evaluate.autoattack=null",
)


def crops(number: int, size: int, seed: int) -> list[Image.Image]:
    """Pieces of scikit-learn's two photographs."""
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    pieces = []
    for index in range(number):
        photo = photos[index % 2]
        top, left = (rng.integers(0, side - size) for side in photo.shape[:2])
        pieces.append(Image.fromarray(photo[top : top + size, left : left + size]))
    return pieces


@pytest.fixture(scope="module")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 x 32 images in parquet, with CIFAR-10's columns."""
    folder = tmp_path_factory.mktemp("cifar")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split, number in (("train", 40), ("test", 16)):
        rows = {"img": crops(number, 32, number), "label": [i % 10 for i in range(number)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of several sizes in one folder a class, as ImageNet comes."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, number in (("train", 40), ("validation", 16)):
        for index, image in enumerate(crops(number, 96, number)):
            target = folder / split / f"class{index % 4}"
            target.mkdir(parents=True, exist_ok=True)
            image.crop((0, 0, 64 + index, 96)).save(target / f"{index}.jpg")
    return folder


@pytest.mark.parametrize("name", ["at", "dat_pgd", "dat_fgsm", "cpu"])
def test_cifar10(name: str, small_images: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        f"cifar10/{name}",
        [
            *LESS,
            f"output={tmp_path / name}",
            f"data.path={small_images}",
            "model.options.depth=10",
            "model.options.width=8",
        ],
    )
    assert recipe.attack.eps == 8 / 255
    report = train(recipe, quiet=True)
    assert report["steps"] == 2
    assert report["threat_model"] == {"norm": "linf", "eps": 8 / 255}
    assert report["pgd_accuracy"]["num_steps"] == 20
    assert report["pgd_accuracy"]["n"] == 8


@pytest.mark.parametrize("name", ["at", "dat_pgd", "dat_fgsm"])
def test_imagenet(name: str, large_images: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        f"imagenet/{name}",
        [
            *LESS,
            f"output={tmp_path / name}",
            f"data.path={large_images}",
            "data.image_size=32",
            "data.num_workers=1",
        ],
    )
    assert recipe.attack.eps == 2 / 255
    report = train(recipe, quiet=True)
    assert report["steps"] == 2
    assert report["pgd_accuracy"]["num_steps"] == 10


def test_table_1_and_section_4_1_are_in_the_recipes() -> None:
    for name in ("imagenet/dat_pgd", "imagenet/dat_fgsm"):
        recipe = load_recipe(name)
        assert recipe.settings["model"]["name"] == "resnet50"
        assert recipe.optimizer.name == "lamb"
        assert recipe.optimizer.weight_decay == 1e-4
        assert recipe.schedule.milestones == (20, 25, 28)
        assert recipe.train.epochs == 30
        assert recipe.train.batch_size == 36 * 85
    assert load_recipe("imagenet/dat_pgd").attack.num_steps == 4
    assert load_recipe("imagenet/at").train.batch_size == 512
    assert load_recipe("cifar10/dat_pgd").attack.num_steps == 10
    assert load_recipe("cifar10/dat_pgd").train.epochs == 100
