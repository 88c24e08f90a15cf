"""The training loop in this process: what it learns, leaves behind, and how it resumes."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from pictures import drawn
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SMALL, quick_run, resumes_exactly, run, same, weights

from robust_accel.commands.evaluate import evaluate_model
from robust_accel.data import Data, MemoryImages
from robust_accel.objectives import NOT_A_NUMBER
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_model
from robust_accel.training.facts import falls_of
from robust_accel.training.metrics import Averages, count_right
from robust_accel.training.run import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("runs") / "small"
    with drawn():
        return folder, run(folder)


@pytest.mark.parametrize("until", ["train.epochs=3", "train.max_steps=5"])
def test_the_last_weights_are_measured_however_rarely_others_are(
    tmp_path: Path, until: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    report = quick_run(folder.path, "train.validate_every=2", "train.select=best", until)
    lines = [line for line in folder.read_metrics() if "validation_robust_accuracy" in line]
    assert lines[-1]["step"] == report["steps"]
    assert len(lines) == (2 if "epochs" in until else 1)
    assert report["selection"]["split"] == "held out of train"


def test_it_learns_and_leaves_what_the_run_folder_promises(finished: tuple[Path, dict]) -> None:
    folder, report = finished
    assert report["clean_accuracy"]["accuracy"] > 0.5
    assert report["clean_accuracy"]["images"]["n"] == 100
    assert report["pgd_accuracy"]["accuracy"] <= report["clean_accuracy"]["accuracy"]
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "figures/training_loss.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    written = json.loads((folder / "report.json").read_text())
    assert all(written[key] == report[key] for key in written.keys() & report.keys())
    names = ("clean", "pgd", "train_clean", "train_pgd")
    assert [row["key"] for row in written["measurements"]] == [
        report[f"{name}_accuracy"]["key"] for name in names
    ]
    gap = report["train_pgd_accuracy"]
    assert (gap["purpose"], gap["images"]["n"], gap["images"]["source"]["split"]) == (
        "train", 360, "train",
    )  # fmt: skip
    for key in ("selection", "best_against_last", "versions", "train_seconds_per_epoch"):
        assert key in report
    validations = [m for m in RunFolder(folder).read_metrics() if "validation_robust_accuracy" in m]
    best = report["best_against_last"]
    robust = [m["validation_robust_accuracy"] for m in validations]
    assert (best["best"], best["last"], best["n"]) == (max(robust), robust[-1], 144)
    assert report["doubts"] == []
    assert report["bytes_sent_per_step"] == 0  # one process sends nothing
    metrics = RunFolder(folder).read_metrics()
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]


def test_timm_loads_the_model_folder(finished: tuple[Path, dict]) -> None:
    model = timm.create_model(f"local-dir:{finished[0] / 'model'}", pretrained=True)
    assert same(model.state_dict(), weights(finished[0]))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_one_call_loads_a_run_as_a_module_on_pixels(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, _ = finished
    model = load_model(folder)
    x = torch.rand(2, 1, 8, 8)
    assert not model.training
    assert model(x).equal(model.model((x - model.mean) / model.std))
    assert same(model.model.state_dict(), weights(folder))
    assert model(x).equal(load_model(f"local-dir:{folder / 'model'}")(x))
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    with pytest.raises(ValueError, match="no model there yet"):
        load_model(tmp_path)


def test_evaluate_adds_records_and_replaces_none(finished: tuple[Path, dict]) -> None:
    folder, report = finished
    before = RunFolder(folder).read_report()
    evaluate_model(str(folder), ["evaluate.pgd.num_steps=5"])  # known already
    assert RunFolder(folder).read_report()["measurements"] == before["measurements"]
    fewer = ["evaluate.images=50", "evaluate.train_images=null"]
    evaluate_model(str(folder), ["evaluate.eps=0.1", *fewer])
    again = RunFolder(folder).read_report()
    assert again["measurements"][:4] == before["measurements"]  # fewer images replace none
    (new,) = again["measurements"][4:]
    assert new["threat_model"] == {"norm": "linf", "eps": 0.1}
    assert new["images"]["n"] == 50
    assert again["train_seconds_per_epoch"] == report["train_seconds_per_epoch"]
    assert len((folder / "measurements.jsonl").read_text().splitlines()) == 6


def test_evaluate_measures_a_timm_folder(
    finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one name have two folders, and none of the other's numbers."""
    folder, report = finished
    monkeypatch.chdir(tmp_path)
    settings = ["data.path=sklearn:digits", "data.test_size=100", "evaluate.eps=0.2"]
    settings += ["evaluate.pgd.num_steps=5"]
    one, _ = evaluate_model(f"local-dir:{folder / 'model'}", settings)
    measured = one.read_report()["measurements"]
    for row, name in zip(measured, ("clean", "pgd"), strict=True):
        expected = report[f"{name}_accuracy"]
        assert row["accuracy"] == expected["accuracy"]
        assert row["function"] == expected["function"]
        assert row["images"]["digest"] == expected["images"]["digest"]
    other = tmp_path / "other" / "model"
    shutil.copytree(folder / "model", other)
    changed = {key: value + 0.1 for key, value in weights(folder).items()}
    save_file(changed, other / "model.safetensors")
    two, _ = evaluate_model(f"local-dir:{other}", [*settings, "evaluate.pgd=null"])
    assert two.path != one.path
    (row,) = two.read_report()["measurements"]
    assert row["function"] != report["function"]


def test_another_model_is_not_measured_in_a_runs_folder(finished: tuple[Path, dict]) -> None:
    with pytest.raises(ValueError, match=r"output: model.size=16 makes another model"):
        evaluate_model(str(finished[0]), ["model.size=16"])


def test_an_evaluation_that_differs_from_training_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = quick_run(tmp_path / "run", "train.max_steps=1", "evaluate.eps=0.3")
    expected = "trained against linf, eps 0.2; measured against linf, eps 0.3"
    assert expected in report["doubts"][0]
    assert expected in caplog.text


@pytest.mark.parametrize(
    ("fatal_step", "settings"),
    [
        # 6 steps an epoch: all die in the 11th step, in the middle of the second epoch
        pytest.param(11, (), id="plain", marks=pytest.mark.long),
        pytest.param(
            22,
            (
                "train.ema_decay=0.9",
                "train.gradient_accumulation=2",
                "train.max_grad_norm=1.0",
                "train.select=best",
                "train.precision=bf16",
                "optimizer.name=sgd",
                "optimizer.lr=0.05",
            ),
            id="ema-accumulation-clipping-best-bf16-sgd",
        ),
        pytest.param(
            11,
            (
                "data.augment=crop_flip",
                "data.policy=rand",
                "data.cutout=3",
                "data.mix={cutmix: 1.0, mixup: 0.2, prob: 0.8}",
                "objective.label_smoothing=0.1",
            ),
            id="mixed-labels-policy-cutout",
            marks=pytest.mark.long,
        ),
    ],
)
def test_killed_in_the_middle_and_resumed_ends_with_the_same_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fatal_step: int,
    settings: tuple[str, ...],
) -> None:
    caplog.set_level("INFO")
    always = ("train.epochs=2", "train.checkpoint_every=3", "evaluate.pgd={num_steps: 5}")
    resumes_exactly(tmp_path, monkeypatch, fatal_step, *always, *settings)
    assert f"continuing {tmp_path / 'killed'} at step 9" in caplog.messages


def test_a_run_is_never_overwritten(finished: tuple[Path, dict]) -> None:
    before = weights(finished[0])
    with pytest.raises(ValueError, match="already holds a run"):
        run(finished[0])
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.03, now 0\.5"):
        run(finished[0], "optimizer.lr=0.5", resume=True)
    assert same(weights(finished[0]), before)


def test_a_moving_average_follows_a_short_run(finished: tuple[Path, dict], tmp_path: Path) -> None:
    settings = ("evaluate.pgd=null", "evaluate.train_images=null")
    report = run(tmp_path / "run", "train.ema_decay=0.999", *settings)
    assert report["clean_accuracy"]["accuracy"] > finished[1]["clean_accuracy"]["accuracy"] - 0.1
    assert report["applied"]["ema_decay"] == 0.0  # of the first step: the average is the weights


def test_the_report_says_what_the_first_step_did(finished: tuple[Path, dict]) -> None:
    attack = finished[1]["applied"]["attack"]
    assert attack["images"] == attack["moved"] == 64
    assert attack["norm"] == "linf"
    assert attack["median"] == pytest.approx(attack["eps"], rel=1e-4)
    assert attack["weights_moved"] is None


def test_a_line_has_the_classifiers_rate_and_the_number_of_its_images(tmp_path: Path) -> None:
    settings = ("optimizer.layer_decay=0.5", "optimizer.lr=0.04", "schedule={name: constant}")
    quick_run(tmp_path, *settings, "train.max_steps=6")
    lines = [line for line in RunFolder(tmp_path).read_metrics() if "lr" in line]
    assert [(line["lr"], line["labeled_images"]) for line in lines] == [(0.04, 80), (0.04, 16)]


def test_trackers_are_told(tmp_path: Path) -> None:
    quick_run(tmp_path / "run", "train.log_with=[tensorboard]", "train.epochs=1")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"images_per_second" in content
    assert b"validation_robust_accuracy" in content


def validated(folder: Path) -> list[float]:
    """Robust accuracy at each validation."""
    key = "validation_robust_accuracy"
    return [line[key] for line in RunFolder(folder).read_metrics() if key in line]


def test_early_stopping_and_best_weights(tmp_path: Path) -> None:
    # a learning rate of almost nothing: only BatchNorm's averages move, and soon no more
    report = quick_run(
        tmp_path / "run",
        "optimizer.lr=1e-12",
        "train.epochs=40",
        "train.early_stopping=2",
        "train.select=best",
    )
    assert report["stopped_early"]
    found = validated(tmp_path / "run")
    best = 1 + found.index(max(found))
    assert report["epochs"] == len(found) == best + 2
    assert report["selection"]["epoch"] == best
    assert report["selection"]["n"] == 144


def test_select_best_restores_the_weights_that_were_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = quick_run(folder, "train.select=best", "train.epochs=2")
    assert same(weights(folder), _without_prefix(load_file(RunFolder(folder).best)))
    assert report["selection"]["robust_accuracy"] == max(validated(folder))


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("model."): value for key, value in state.items()}


def test_too_few_classes_for_autoattack_are_refused_before_training(tmp_path: Path) -> None:
    images = [Image.fromarray(np.full((8, 8), 80 * i, np.uint8)) for i in range(3)] * 4
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}
    )
    rows = {"image": images, "label": [0, 1, 2] * 4}
    for split in ("train", "test"):
        target = tmp_path / "data" / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(target)
    settings = [f"data.path={tmp_path / 'data'}", f"output={tmp_path / 'run'}"]
    recipe = load_recipe("quickstart", [*settings, "train.batch_size=4", "data.validation_size=2"])
    with pytest.raises(ValueError, match="needs at least 4 classes"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        ("objective.name=trades", "train.gradient_accumulation=2", "train.awp.gamma=0.01"),
        ("objective={name: smoothing, sigma: 0.1, num_noise: 2}", "model.num_classes=12"),
    ],
    ids=["trades-awp-accumulation", "smoothing-of-more-classes"],
)
def test_mixed_labels_train_and_their_accuracies_are_of_the_larger_share(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    report = run(tmp_path / "run", "data.mix={mixup: 0.2}", "train.epochs=6", *settings)
    assert report["clean_accuracy"]["accuracy"] > 0.5
    lines = [m for m in RunFolder(tmp_path / "run").read_metrics() if "loss" in m]
    for key in ("clean_batch_accuracy", "robust_batch_accuracy"):
        assert 0.2 < lines[-1][key] <= 1


def test_accuracy_of_mixed_labels_is_that_of_the_larger_share() -> None:
    labels = torch.tensor([[0.0, 0.6, 0.4], [1.0, 0.0, 0.0], [0.3, 0.0, 0.7], [0.1, 0.9, 0.0]])
    assert count_right(torch.tensor([1, 0, 0, NOT_A_NUMBER]), labels).tolist() == [2, 4]
    assert count_right(torch.tensor([1, 0, 0]), torch.tensor([1, -1, 2])).tolist() == [1, 2]
    assert count_right(torch.tensor([NOT_A_NUMBER, 0]), torch.tensor([-1, 0])).tolist() == [1, 1]


def test_each_image_with_a_label_counts_alike() -> None:
    averages, out = Averages(), {"loss": torch.tensor(2.0), "logits": torch.eye(3)}
    for labels in ([0, 1, 2], [0, 2, -1], [-1, -1, -1]):
        averages.add(out, torch.tensor(labels))
    averages.settle(taken=True)
    sums = {"loss": [6, 3], "robust_batch_accuracy": [4, 5]}
    assert {name: pair.tolist() for name, pair in averages.sums.items()} == sums
    # a part that an objective has only sometimes
    averages.add(out | {"aux_loss": torch.tensor(5.0)}, torch.tensor([0, 1, 2]))
    averages.settle(taken=True)
    assert averages.sums["aux_loss"].tolist() == [5, 1] and averages.sums["loss"].tolist() == [8, 4]


def test_accuracies_that_fall_by_a_draw_raise_no_alarm() -> None:
    """Of mixed batches, or of balls in turn; of others, or on the held-out split, it is told."""
    images = torch.zeros(50, 1, 2, 2, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64)
    for held_out, key in ((0, "robust_batch_accuracy"), (50, "validation_robust_accuracy")):
        metrics = [
            {"epoch": e, key: share, "labeled_images": 64} for e, share in ((1, 1.0), (2, 0.1))
        ]
        train_set, some = (
            MemoryImages(*images),
            MemoryImages(*images).subset(torch.arange(held_out)),
        )
        data = Data(train_set, some, train_set, 4)
        balls = "attack.balls=[{norm: linf, eps: 0.1}, {norm: l2, eps: 0.5}]"
        random = ["attack.name=multi-norm", balls, "attack.strategy=random"]
        drawn = (["data.mix={cutmix: 1}"], random)
        for more, expected in (*((own, held_out > 0) for own in drawn), ([], True)):
            assert bool(falls_of(metrics, load_recipe("quickstart", more), data)) == expected


def test_mixing_needs_labels_and_says_so_before_training(tmp_path: Path) -> None:
    settings = ["data.mix={cutmix: 1}", "data.unlabeled={fraction: 0.5}", "objective.name=trades"]
    with pytest.raises(ValueError, match=r"data\.mix: .*have no labels.*pseudo-label"):
        run(tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss since step 2, the gradient since"):
        run(tmp_path / "run", "optimizer.name=sgd", "optimizer.lr=1e30")


def test_standard_training_is_not_robust_and_adversarial_training_is(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    recipe = load_recipe(
        "quickstart_standard",
        [s for s in SMALL if not s.startswith("attack.")] + [f"output={tmp_path / 'standard'}"],
    )
    standard = train(recipe)
    assert standard["clean_accuracy"]["accuracy"] > 0.8
    assert standard["pgd_accuracy"]["accuracy"] < finished[1]["pgd_accuracy"]["accuracy"]
