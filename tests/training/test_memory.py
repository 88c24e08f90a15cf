"""What an attack keeps of an image, and an objective of a class: its own, and resumed exactly."""

from functools import partial
from pathlib import Path

import pytest
from launching import SMALL as LAUNCHED
from launching import Forked, killed_and_resumed
from safetensors.torch import load_file
from small_runs import quick_run, resumes_exactly, same, weights
from training.test_finite_launch import ENGINES

from robust_accel.attacks.pgi import Visit
from robust_accel.recipe import RecipeError, load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.parts import check_kept_images

PGI = ("attack={name: fgsm-pgi, eps: 0.2, reset_epochs: 5, prior_weight: 2}",)


def kept(folder: Path, rank: int = 0, part: str = "attack") -> dict:
    return load_file(RunFolder(folder).steps()[-1] / f"{part}-{rank}.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ("train.gradient_accumulation=2", "objective.name=ikl", "data.augment=crop_flip"),
            id="momentum-class-means-accumulation",
        ),
        pytest.param(
            ("attack.momentum_decay=0", "attack.reset_epochs=2", "train.awp.gamma=0.01"),
            id="without-momentum-reset-awp",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_run_with_a_perturbation_of_each_image_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    micro = 2 if "accumulation" in settings[0] else 1
    settings = ("train.checkpoint_every=3", *PGI, *settings)
    resumes_exactly(tmp_path, monkeypatch, micro * 10, *settings)  # in the second epoch, of three
    whole, killed = (kept(tmp_path / name) for name in ("whole", "killed"))
    assert same(whole, killed)
    assert ("momentum" in whole) == (micro == 2)
    if micro == 2:
        means, others = (kept(tmp_path / name, part="objective") for name in ("whole", "killed"))
        assert same(means, others)
        assert means["means"].diag().mean() > 1 / 10  # of ten classes


def test_every_image_is_attacked_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pixels: an image's start in the second epoch is where its first attack has ended."""
    ended: dict[bytes, bytes] = {}
    called, met = Visit.__call__, []

    def noted(self, loss_fn, x, *, generator=None):
        x_adv = called(self, loss_fn, x, generator=generator)
        for image, start, end in zip(x, self.start, x_adv, strict=True):
            key = image.numpy().tobytes()
            if key in ended:
                met.append((ended[key] - start).abs().max().item())
            ended[key] = end
        return x_adv

    monkeypatch.setattr(Visit, "__call__", noted)
    quick_run(tmp_path / "run", *PGI, "attack.momentum_decay=0", "train.epochs=2")
    assert len(met) > 80
    assert max(met) < 0.2 / 250  # what rounding takes


@pytest.mark.long
def test_each_setting_has_an_effect(tmp_path: Path) -> None:
    ends = []
    for i, more in enumerate(
        (
            "train.seed=0",
            "attack.prior_weight=0",
            "attack.momentum_decay=0",
            "attack.reset_epochs=1",
        )
    ):
        folder = tmp_path / str(i)
        report = quick_run(folder, *PGI, more)
        ends.append(weights(folder))
        distances = [line.get("prior_distance") for line in RunFolder(folder).read_metrics()]
        assert any(distances) == (more != "attack.prior_weight=0")
        assert report["applied"]["attack"]["moved"] > 0
    assert not any(same(ends[0], other) for other in ends[1:])


REFUSED = {
    "data.mix={cutmix: 1.0}": "attack.name: keeps the perturbation of each image, and data.mix",
    "objective={name: smoothing, sigma: 0.1}": "this objective draws noise for each batch",
    "data.unlabeled={fraction: 0.5}": "data.unlabeled mixes in others",
    "data={in_memory: false, image_size: 8}": "data.in_memory: false is to spare",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_where_it_cannot_work_it_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"attack\.name: keeps the") as refused:
        load_recipe("quickstart", [*PGI, "data.train_size=640", setting])
    assert REFUSED[setting] in str(refused.value)


def test_several_processes_keep_to_their_own_images_or_are_refused() -> None:
    for sharding, processes in (("fixed", 2), ("global", 1)):
        check_kept_images(load_recipe("quickstart", [*PGI, f"data.sharding={sharding}"]), processes)
    with pytest.raises(ValueError, match=r"sharding: global deals images to other .*choose fixed"):
        check_kept_images(load_recipe("quickstart", PGI), 2)
    check_kept_images(load_recipe("quickstart"), 2)


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_resume_exactly(tmp_path: Path, engine: str) -> None:
    whole = tmp_path / "whole"
    start = partial(
        Forked,
        *("train", "quickstart", *LAUNCHED, *PGI, "data.sharding=fixed"),
        *("train.eps_schedule={shape: sine}", "train.swa_start=2", "train.epochs=3"),
        "objective.name=ikl",
        environment=ENGINES[engine],
    )
    code, output = start(f"output={whole}").wait()
    assert code == 0, output
    killed_and_resumed(whole, tmp_path / "killed", start)
    images = [set(kept(whole, rank)["images"].tolist()) for rank in range(2)]
    assert not images[0] & images[1]
    assert images[0] | images[1] == set(range(len(images[0]) + len(images[1])))
    assert all(same(kept(whole, rank), kept(tmp_path / "killed", rank)) for rank in range(2))
