"""The model's card: what the hub reads, and what a user must know."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import ModelCard
from reporting_rows import (
    MODEL,
    RECIPE,
    clean,
    pgd,
    write_config,
    write_run,
    write_whole,
)

from robust_accel.models import PixelClassifier, save_model
from robust_accel.reporting.model_card import model_card
from robust_accel.reporting.report import write_report
from robust_accel.reporting.views import read_runs
from robust_accel.run_folder import RunFolder


def card_of(folder: RunFolder) -> ModelCard:
    """Refuses metadata that are not the hub's."""
    (run,) = read_runs([folder.path])
    return ModelCard(model_card(run, json.loads((folder.model / "config.json").read_text())))


def card(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> ModelCard:
    config = changes.pop("config", {})
    folder = write_run(tmp_path / "robust", rows, **changes)
    write_config(folder, **config)
    return card_of(folder)


def recipe_with(**sections: dict[str, Any]) -> dict[str, Any]:
    return RECIPE | {key: RECIPE[key] | value for key, value in sections.items()}


def test_each_accuracy_is_a_result_with_its_threat_model_and_images(tmp_path: Path) -> None:
    found = card_of(write_whole(tmp_path / "robust")).data
    results = {r.metric_name: r for r in found.eval_results}
    assert set(results) == {
        "clean accuracy",
        "PGD-20 accuracy, linf eps 8/255",
        "PGD-20 x5 accuracy, linf eps 8/255",
        "AutoAttack standard accuracy, linf eps 8/255",
        "PGD-20 accuracy, l2 eps 0.5",
        "AutoAttack rand accuracy, l2 eps 0.5",
        *(f"certified accuracy, l2 radius {r}, sigma 0.25" for r in ("0", "0.2", "0.5", "0.7")),
    }
    robust = results["AutoAttack standard accuracy, linf eps 8/255"]
    assert robust.metric_value == 0.705 and robust.metric_args["images"] == 200
    assert (robust.task_type, robust.dataset_split) == ("image-classification", "test")
    assert found.metrics == ["accuracy"] and found.pipeline_tag == "image-classification"
    assert found.model_name == "robust"


def test_the_card_says_threat_models_measurements_and_doubts(tmp_path: Path) -> None:
    text = card_of(write_whole(tmp_path / "robust")).text
    assert "**Threat models:** L-infinity, eps = 8/255; L2, eps = 0.5: on pixels" in text
    assert "70.50 [63.84, 76.39] | linf, eps 8/255 | AutoAttack standard" in text
    assert "3 images met NaN or Inf" in text
    assert "mean of 20 draws" in text
    assert "- doubt: trained against l2" in text
    assert "under noise of sigma 0.25" in text and "without the noise, has no certificate" in text
    assert "mean 0.5, std 0.25" in text
    assert "(in_chans 1, depth 16, width 4)" in text  # not what the name says


def test_a_plain_model_of_timm_is_timms(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "model_args": {}}
    found = card(tmp_path, [clean()], config=config)
    assert found.data.library_name == "timm" and "import robust_accel" not in found.text
    assert "Threat model" not in found.text  # nothing is claimed


def test_timms_wide_resnet_is_not_taken_for_this_packages(tmp_path: Path) -> None:
    config = {"architecture": "wide_resnet50_2", "model_args": {}}
    assert card(tmp_path, [clean()], config=config).data.library_name == "timm"


def test_what_timm_alone_cannot_do_is_said(tmp_path: Path) -> None:
    own = {"size": [64, 64], "resize": "bilinear, antialiased"}
    config = {"architecture": "resnet18", "model_args": {}, "robust_accel": own}
    found = card(tmp_path, [clean()], config=config, model=MODEL | {"size": [64, 64]})
    assert found.data.library_name == "robust-accel"
    assert "resizes inside to 64x64 (bilinear, antialiased): timm alone does not" in found.text
    own = card(tmp_path / "own", [clean()])
    assert own.data.library_name == "robust-accel" and "import robust_accel.models" in own.text


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("cifar10", "cifar10"),
        ("sklearn:digits", None),
        ("/home/me/images", None),
        ("./images", None),
        ("images.parquet", None),
    ],
)
def test_only_a_data_set_of_the_hub_is_named_as_one(
    tmp_path: Path, path: str, hub: str | None
) -> None:
    recipe = recipe_with(data={"path": path})
    found = card(tmp_path, [clean(source={"path": path, "split": "test"})], recipe=recipe).data
    assert found.datasets == ([hub] if hub else None)
    (result,) = found.eval_results
    assert result.dataset_type == (hub or "other")
    assert "/home/me" not in result.dataset_name


def test_a_folder_that_is_here_is_no_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "images").mkdir(parents=True)
    recipe = recipe_with(data={"path": "my/images"})
    assert card(tmp_path, [clean()], recipe=recipe).data.datasets is None


@pytest.mark.parametrize(("pretrained", "license"), [(True, "apache-2.0"), (False, None)])
def test_the_license_is_that_of_the_weights_it_was_tuned_from(
    tmp_path: Path, pretrained: bool, license: str | None
) -> None:
    recipe = recipe_with(model={"pretrained": pretrained})
    assert card(tmp_path, [clean()], recipe=recipe).data.license == license


def test_the_card_of_a_folder_that_was_saved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [clean(), pgd()])
    model = timm.create_model("preact_resnet18", num_classes=10, in_chans=1, width=8, depth=10)
    classifier = PixelClassifier(model, mean=0.5, std=0.25)
    classifier.model_args = {"in_chans": 1, "width": 8, "depth": 10}
    save_model(classifier, folder.model)
    write_report(folder)
    found = ModelCard.load(folder.model / "README.md")
    arguments = json.loads((folder.model / "config.json").read_text())["model_args"]
    assert all(f"{key} {value}" in found.text for key, value in arguments.items())
