"""What is trained in pieces is what copies train: by packaged recipes, and step by step."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import CPU, FSDP2, Forked, Launched, weights
from PIL import Image
from sharded_runs import PLAIN, losses, trained
from sklearn.datasets import load_sample_images
from torch import Tensor

from robust_accel import load_model
from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import RECIPES
from robust_accel.run_folder import RunFolder
from robust_accel.training.parts import classifier_for, read_data

pytestmark = pytest.mark.skipif(not has_hooks(), reason="refused before torch 2.9")
# no draw is a process's own, and no rate hides clipping or the optimizer's state
STEPS = (*PLAIN, "train.log_every=1", "train.max_steps=4", "train.checkpoint_every=2")
STEPS += ("train.keep=9", "attack.random_start=false", "evaluate.pgd=null")
STEPS += ("optimizer={name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.0005}",)
STEPS += ("schedule={name: constant}", "train.ema_decay=0.9", "train.max_grad_norm=0.5")
STEPS += ("train.gradient_accumulation=2",)


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "ddp", *STEPS, environment=CPU)


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "pieces", *STEPS)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Between all weights."""
    assert one.keys() == other.keys()
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def moved(folder: RunFolder) -> float:
    """How far a run has come from where all of them begin."""
    recipe = load_recipe("quickstart", STEPS[2:])
    assert recipe.train is not None
    torch.manual_seed(recipe.train.seed)
    first = classifier_for(recipe, read_data(recipe)).model.state_dict()
    return distance(weights(folder.path), first)


def test_accumulated_clipped_and_averaged_as_by_ddp(
    in_pieces: RunFolder, by_ddp: RunFolder
) -> None:
    assert len(losses(by_ddp)) == 4
    assert losses(in_pieces) == pytest.approx(losses(by_ddp), rel=1e-5)
    apart = distance(weights(in_pieces.path), weights(by_ddp.path))
    assert apart < 1e-3 * moved(by_ddp)


def test_bf16_is_near_fp32_by_ddp(by_ddp: RunFolder, tmp_path: Path) -> None:
    half = trained(tmp_path / "run", *STEPS, "train.precision=bf16")
    assert losses(half) != losses(by_ddp)
    assert losses(half) == pytest.approx(losses(by_ddp), rel=0.02)
    assert distance(weights(half.path), weights(by_ddp.path)) < 0.3 * moved(by_ddp)


def test_gradients_are_sent_once_a_step(in_pieces: RunFolder) -> None:
    """Each by gloo's all-reduce, whatever the number of micro-batches and attacks."""
    report = in_pieces.read_report()
    shapes = [w.shape for w in weights(in_pieces.path).values()]
    padded = sum(2 * -(-s[0] // 2) * s[1:].numel() for s in shapes)
    assert report["bytes_sent_per_step"] == report["applied"]["bytes_sent"] == 4 * padded


def test_weights_are_counted_in_each_step(in_pieces: RunFolder, by_ddp: RunFolder) -> None:
    report, lines = in_pieces.read_report(), in_pieces.read_metrics()
    sent = [line["bytes_of_weights_sent"] for line in lines if "loss" in line]
    per_step = report["bytes_of_weights_sent_per_step"]
    assert per_step * report["steps"] == sent[-1]
    each = [sent[0], *np.diff(sent)]
    # the line's own clean accuracy takes one more forward
    first = report["applied"]["bytes_of_weights_sent"]
    assert all(first < n < 1.2 * first for n in each)
    assert "bytes_of_weights_sent_per_step" not in by_ddp.read_report()
    assert not any("bytes_of_weights_sent" in line for line in by_ddp.read_metrics())


def test_another_number_of_processes_takes_the_same_steps(
    in_pieces: RunFolder, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(in_pieces.path, folder.path)
    _, *later = folder.steps()
    for path in (*later, folder.model):
        shutil.rmtree(path)
    folder.report.unlink()
    resumed = (*STEPS, f"output={folder.path}", "--resume")
    code, output = Forked(*resumed, environment=FSDP2, num_processes=4).wait()
    assert code == 0, output
    assert "the checkpoint is from 2 processes, not 4" in output
    found, expected = losses(folder), losses(in_pieces)
    assert found[:2] == expected[:2]
    assert found == pytest.approx(expected, rel=1e-5)
    apart = distance(weights(folder.path), weights(in_pieces.path))
    assert apart < 1e-3 * moved(in_pieces)


@pytest.mark.long
def test_a_finished_run_leaves_the_same_weights_by_another_number_of_processes(
    in_pieces: RunFolder, tmp_path: Path
) -> None:
    """Resumed, it measures and leaves those of its checkpoint."""
    before, folder = weights(in_pieces.path), RunFolder(tmp_path / "run")
    shutil.copytree(in_pieces.path, folder.path)
    folder.model.joinpath("model.safetensors").unlink()
    resumed = (*STEPS, f"output={folder.path}", "--resume")
    code, output = Forked(*resumed, environment=FSDP2, num_processes=4).wait()
    assert code == 0, output
    after = weights(folder.path)
    assert all(before[key].equal(after[key]) for key in before | after)


def test_weights_that_stay_gathered_are_the_same_and_are_sent_once(
    in_pieces: RunFolder, tmp_path: Path
) -> None:
    kept = trained(tmp_path / "run", *STEPS, "train.keep_gathered=true")
    assert losses(kept) == losses(in_pieces)
    sent = [r.read_report()["applied"]["bytes_of_weights_sent"] for r in (kept, in_pieces)]
    size = 4 * sum(w.numel() for w in weights(in_pieces.path).values())
    assert size <= sent[0] < 1.2 * size  # of all weights half, once in each of two micro-batches
    assert sent[1] > 4 * sent[0]  # two steps of the attack and the outer loss, there and back


@pytest.mark.long
def test_activations_that_are_computed_twice_are_the_same(
    in_pieces: RunFolder, tmp_path: Path
) -> None:
    again = FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    folder = trained(tmp_path / "run", *STEPS, environment=again)
    assert losses(folder) == pytest.approx(losses(in_pieces), rel=1e-4)


def photographs(folder: Path) -> Path:
    """Pieces of scikit-learn's two, one a class."""
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, number in (("train", 16), ("validation", 8)):
            target = folder / split / name
            target.mkdir(parents=True)
            for index in range(number):
                top, left = (rng.integers(0, side - 64) for side in photo.shape[:2])
                piece = photo[top : top + 64, left : left + 64]
                Image.fromarray(piece).save(target / f"{index}.jpg")
    return folder


@pytest.mark.launch
def test_a_packaged_recipe_by_the_real_launcher(tmp_path: Path) -> None:
    """The how-to's first command, with less of everything."""
    less = (
        f"data.path={photographs(tmp_path / 'images')}",
        "data.image_size=32",
        "data.num_workers=0",
        "data.validation_size=8",
        "model.pretrained=false",
        "model.options={img_size: 32, depth: 2, embed_dim: 32, num_heads: 2}",
        "train.batch_size=8",
        "train.max_steps=2",
        "evaluate.autoattack=null",
        "evaluate.images=8",
        f"output={tmp_path / 'run'}",
    )
    recipe = load_recipe("imagenet/vit_small", less)
    assert recipe.train is not None and recipe.train.channels_last
    flags = ("--config_file", str(RECIPES / "accelerate/fsdp2.yaml"))
    code, output = Launched("train", "imagenet/vit_small", *less, flags=flags, cpu=True).wait()
    assert code == 0, output
    assert "FSDP2: 3 units, of Block and the rest" in output
    assert "which are in pieces on 2 processes" in output
    found = load_model(tmp_path / "run").model.state_dict()
    assert found.keys() == weights(tmp_path / "run").keys()
