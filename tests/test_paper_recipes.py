"""The recipes run two steps at reduced size: the same settings, less of everything.

Most of those for ImageNet with timm's test network in place of the ResNet-50, those at eps 4/255
with their own networks made small.
"""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from robust_accel import Smoothing
from robust_accel.models.timm_folder import read_config
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import RECIPES
from robust_accel.training.run import train

LESS = (
    "train.max_steps=2",
    "train.batch_size=8",
    "data.validation_size=8",
    "evaluate.images=8",
    "evaluate.autoattack=null",
)
STAND_IN = ("model.name=test_resnet", "model.pretrained=false", "data.num_workers=0")
SHRUNK = {  # the networks of the recipes at eps 4/255
    "at_4_255": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "vit_small": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32},
}


@pytest.fixture(autouse=True)
def _cache_in_tmp(datasets_in_tmp: None) -> None: ...


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
    for split, number in (("train", 40), ("test", 20)):
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files and classes in WebDataset's shards, as ImageNet is kept for large trainings."""
    folder = tmp_path_factory.mktemp("shards")
    for split, number in (("train-000", 24), ("train-001", 16), ("validation-000", 16)):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for index, image in enumerate(crops(number, 96, number)):
                picture = io.BytesIO()
                image.crop((0, 0, 64 + index, 96)).save(picture, "JPEG")
                label = str(index % 4).encode()
                for ending, content in (("jpg", picture.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{split}_{index:03}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def names(folder: str) -> list[str]:
    """Every recipe of a folder that trains, bases left out."""
    return sorted(p.stem for p in (RECIPES / folder).glob("*.yaml") if p.stem[0] != "_")


def most_long(found: list[str], *default: str) -> list[Any]:
    """All but a few are left to `make test-all`."""
    return [n if n in default else pytest.param(n, marks=pytest.mark.long) for n in found]


@pytest.fixture(scope="module")
def more_images(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes read beside CIFAR-10: pseudo-labelled images, in parquet, pickle and npz."""
    folder = tmp_path_factory.mktemp("more")
    features = datasets.Features({"img": datasets.Image(), "pseudo_label": datasets.Value("int64")})
    rows = {"img": crops(32, 32, 1), "pseudo_label": [i % 10 for i in range(32)]}
    parquet = datasets.Dataset.from_dict(rows, features=features)
    parquet.to_parquet(folder / "pseudo.parquet")
    parquet.remove_columns("pseudo_label").to_parquet(folder / "unlabeled.parquet")
    images, labels = np.stack([np.asarray(x) for x in rows["img"]]), np.array(rows["pseudo_label"])
    carmons = {"data": images, "extrapolated_targets": labels}
    (folder / "ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps(carmons))
    for name in ("1m", "20m", "pseudo"):  # as EDM's images are published, and ours written
        np.savez(folder / f"{name}.npz", image=images, label=labels)
    return folder


def recipes_of_cifar() -> list[Any]:
    found = [f"cifar10/{name}" for name in names("cifar10")]
    found += [f"cifar100/{name}" for name in names("cifar100")]
    default = [name for name in found if "generated" in name and name.startswith("cifar10/")]
    default += ["cifar10/dat_pgd", "cifar10/trades", "cifar10/mart", "cifar100/n_fgsm"]
    return most_long(found, *default)


@pytest.mark.parametrize("path", recipes_of_cifar())
def test_cifar(
    path: str,
    small_images: Path,
    more_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(more_images)  # recipes name files beside the user
    wide, name = load_recipe(path).model.name.startswith("wide"), path.split("/")[1]
    settings = [
        *LESS,
        f"output={tmp_path / name}",
        f"data.path={small_images}",
        "model.options.depth=10",
        f"model.options.width={1 if wide else 8}",
    ]
    if path.startswith("cifar100"):
        assert load_recipe(path).settings["data"]["label_column"] == "fine_label"
        settings.append("data.label_column=label")
    if name.startswith("cpu_"):
        settings.append("data.train_size=20")
    if name == "cpu_finetune":
        other = [s for s in settings if not s.startswith("output")]
        train(load_recipe("cifar10/cpu_pretrain", [*other, f"output={tmp_path / 'first'}"]))
        settings.append(f"model.checkpoint={tmp_path / 'first'}")
    recipe = load_recipe(path, settings)
    if name == "cpu_teacher":
        assert recipe.settings["attack"]["name"] == "none"
    if name == "cpu_teacher" or isinstance(recipe.objective, Smoothing):
        assert train(recipe)["steps"] == 2
        return
    report = train(recipe)
    assert report["steps"] == 2
    pgd = report["pgd_accuracy"]
    threat: dict[str, Any] = {"norm": "linf", "eps": 8 / 255}
    if name.endswith("multi_norm"):
        threat = {"union": [threat, {"norm": "l2", "eps": 0.5}, {"norm": "l1", "eps": 12}]}
    else:
        assert recipe.attack.eps == 8 / 255
    assert pgd["threat_model"] == threat
    assert (pgd["attack"]["num_steps"], pgd["images"]["n"]) == (20, 8)


@pytest.mark.parametrize("name", most_long(names("imagenet"), "dat_fgsm", *SHRUNK))
def test_imagenet(name: str, large_images: Path, shards: Path, tmp_path: Path) -> None:
    settings = [
        *LESS,
        f"output={tmp_path / name}",
        f"data.path={shards if name in SHRUNK else large_images}",
        "data.image_size=32",
    ]
    if name in SHRUNK:
        settings += [f"model.options={json.dumps(SHRUNK[name])}", *STAND_IN[1:]]
    else:
        settings += ["data.num_workers=1"] if name == "dat_pgd" else STAND_IN
    recipe = load_recipe(f"imagenet/{name}", settings)
    report = train(recipe)
    assert report["steps"] == 2
    if name == "smooth_at":
        return
    eps = 4 / 255 if name in SHRUNK else 2 / 255
    assert recipe.attack.eps == recipe.evaluate.eps == eps
    assert report["pgd_accuracy"]["attack"]["num_steps"] == 10
    if name in SHRUNK:
        trained = read_config(tmp_path / name / "model")["architecture"]
        assert trained == load_recipe(f"imagenet/{name}").model.name


@pytest.mark.parametrize("name", most_long(names("finetune"), "cifar10"))
def test_finetune(name: str, small_images: Path, tmp_path: Path) -> None:
    settings = [
        *LESS,
        f"output={tmp_path / name}",
        f"data.path={small_images}",
        "data.label_column=label",
        "model.pretrained=false",  # no hub is asked by a test
        "model.size=48",
        "model.name=test_resnet",
    ]
    recipe = load_recipe(f"finetune/{name}", settings)
    assert recipe.train.epochs == 3
    assert load_recipe(f"finetune/{name}").model.new_head
    assert train(recipe)["steps"] == 2


def test_baselines_differ_from_dat_in_what_they_are_named_for() -> None:
    for folder in ("cifar10", "imagenet"):
        for attack in ("pgd", "fgsm"):
            dat = load_recipe(f"{folder}/dat_{attack}").settings
            without = load_recipe(f"{folder}/dat_{attack}_wo_lalr").settings
            assert {key for key in dat if dat[key] != without[key]} == {"optimizer", "output"}
            assert without["optimizer"]["lr"] == 0.1
        lsgd = load_recipe(f"{folder}/dat_lsgd")
        assert lsgd.schedule.warmup_epochs == 5
        batch_of_reference = {"cifar10": 128, "imagenet": 256}[folder]
        scaled = 0.1 * lsgd.train.batch_size / batch_of_reference
        assert lsgd.optimizer.lr == pytest.approx(scaled, rel=1e-3)
    assert load_recipe("cifar10/fast_at").settings["schedule"]["name"] == "cyclic"


def test_table_3_is_in_the_recipes() -> None:
    for attack in ("pgd", "fgsm"):
        for suffix, model, batch_size in (
            ("", "preact_resnet18", 12 * 2048),
            ("_wrn", "wide_resnet28_10", 12 * 128),
        ):
            recipe = load_recipe(f"cifar10/semi_dat_{attack}{suffix}")
            assert recipe.model.name == model
            assert recipe.train.batch_size == batch_size
            assert recipe.data.unlabeled.path == "ti_500K_pseudo_labeled.pickle"


def test_table_2_is_in_the_recipes() -> None:
    for name, num_noise in (("smooth_at_n2", 2), ("smooth_dat_n20", 20)):
        for sigma in (0.12, 0.25):
            recipe = load_recipe(f"cifar10/{name}", [f"objective.sigma={sigma}"])
            assert recipe.objective.num_noise == num_noise
            assert recipe.certify.sigma == sigma
            assert recipe.certify.radii == (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
            assert recipe.attack.step_size == pytest.approx(2 * recipe.attack.eps / 10)
    assert load_recipe("cifar10/smooth_dat_n20").settings["optimizer"]["name"] == "lamb"


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
    for name in ("imagenet/convnext_tiny", "imagenet/vit_small", "finetune/cifar10"):
        assert load_recipe(name).model.pretrained
    assert load_recipe("cifar10/dat_pgd").attack.num_steps == 10
    assert load_recipe("cifar10/dat_pgd").train.epochs == 100


def test_the_papers_map_names_recipes_and_studies_that_are_there() -> None:
    text = (RECIPES / "paper/README.md").read_text()
    named = set(re.findall(r"`(paper/[\w/]+)`", text))
    assert len(named) > 25
    for name in named:
        path = RECIPES / name
        assert path.with_suffix(".yaml").exists() or (path / "study.yaml").exists(), name
    there = {p.relative_to(RECIPES).with_suffix("") for p in (RECIPES / "paper").rglob("*.yaml")}
    rows = {str(name) for name in there if name.name[0] != "_" and name.name != "study"}
    short = text.replace("..._sigma025", "smooth_at_sigma025` `smooth_dat_sigma025")
    assert {Path(row).name for row in rows} <= set(re.findall(r"`(?:paper/\w+/)?(\w+)`", short))
