"""What a model's folder keeps, and what is said where a model is not found."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn

from robust_accel.commands.evaluate import evaluate_model
from robust_accel.data import MemoryImages
from robust_accel.models import (
    ModelSettings,
    PixelClassifier,
    beyond_timm,
    create_classifier,
    save_model,
)
from robust_accel.plain_yaml import RecipeError
from robust_accel.trained_model import load_classifier, load_model, recipe_of
from robust_accel.training.checkpoint import save_weights

TINY: dict[str, Any] = {"name": "wide_resnet10_1"}
NAMES = ("cat", "dog", "ship", "truck")


def trained(**settings: Any) -> PixelClassifier:
    torch.manual_seed(3)
    classifier = create_classifier(ModelSettings(**TINY, **settings), num_classes=4).eval()
    for tensor in classifier.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand_like(tensor))
    return classifier


def a_run(folder: Path, classifier: PixelClassifier, **settings: Any) -> Path:
    """What a finished run leaves, of what a model is loaded from."""
    model = TINY | settings
    recipe = {"model": model, "data": {"path": "sklearn:digits"}, "evaluate": {"eps": 0.1}}
    save_model(classifier, folder / "model")
    save_weights(classifier, folder / "checkpoints" / "best.safetensors")
    (folder / "checkpoints" / "step-00000012").mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same(a: torch.nn.Module, b: torch.nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(a(x), b(x), atol=1e-5)


# What is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize("statistics", [{}, {"mean": (0.2, 0.3, 0.4), "std": 0.3}])
@pytest.mark.parametrize("names", [None, NAMES])
def test_every_way_to_load_a_run_gives_the_same_classifier(
    size: int | None, statistics: dict, names: tuple[str, ...] | None, x: Tensor, tmp_path: Path
) -> None:
    classifier = trained(size=size, **statistics)
    classifier.class_names = names
    run = a_run(tmp_path / "run", classifier, size=size, **statistics)
    found = {
        way: load_model(way)
        for way in (run, run / "model", str(run / "model"), f"local-dir:{run / 'model'}")
    }
    checkpoint = {"fine-tuned": run, "from the folder": run / "model"}
    checkpoint["best"] = run / "checkpoints" / "best.safetensors"
    for way, path in checkpoint.items():
        settings = ModelSettings(**TINY, checkpoint=str(path))
        found[way] = create_classifier(settings, num_classes=4).eval()
    for way, loaded in found.items():
        assert same(loaded, classifier, x), way
        assert loaded.class_names == names, way
        assert loaded.size == classifier.size, way
        assert loaded.weights_source, way
        assert statistics or "none" not in loaded.statistics_source, way
    # while the run goes on, its recipe is all that is known
    shutil.rmtree(run / "model")
    settings = ModelSettings(**TINY, checkpoint=str(run / "checkpoints" / "best.safetensors"))
    assert same(create_classifier(settings, num_classes=4).eval(), classifier, x)


def test_a_classifier_to_be_measured_is_never_partly_new(x: Tensor, tmp_path: Path) -> None:
    classifier = trained()
    run, name = a_run(tmp_path / "run", classifier), TINY["name"]
    images = MemoryImages((x * 255).byte(), torch.zeros(3, dtype=torch.int64))
    weights = f"model.checkpoint={run / 'checkpoints' / 'best.safetensors'}"
    recipe = recipe_of(name, [weights], required=("model",))
    with pytest.raises(RecipeError, match=r"has 4 classes, the model 10 \(model.num_classes\)"):
        load_classifier(recipe, name, images, 4)
    recipe = recipe_of(name, [weights, "model.num_classes=4"], required=("model",))
    assert same(load_classifier(recipe, name, images, 4).eval(), classifier, x)
    folder = f"local-dir:{run / 'model'}"
    recipe = recipe_of(folder, ["model.num_classes=5"], required=("model",))
    with pytest.raises(RecipeError, match=r"num_classes: the weights of .*model have 4, not 5"):
        load_classifier(recipe, folder, images, 4)


def test_a_model_of_the_hub_keeps_it_too(
    x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = trained(size=20)
    classifier.class_names = NAMES
    save_model(classifier, tmp_path)

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        assert (repo_id, kwargs.get("revision")) == ("someone/robust", "v1")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    loaded = load_model("hf-hub:someone/robust@v1")
    assert same(loaded, classifier, x)
    assert (loaded.size, loaded.class_names) == ((20, 20), NAMES)


def test_timm_reads_the_names_and_what_it_does_not_do_is_told(x: Tensor, tmp_path: Path) -> None:
    classifier = trained(size=20)
    classifier.class_names = NAMES
    save_model(classifier, tmp_path / "sized")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'sized'}", pretrained=True)
    assert tuple(by_timm.pretrained_cfg["label_names"]) == NAMES
    (told,) = beyond_timm(config_of(tmp_path / "sized"))
    assert told == "resizes inside to 20x20 (bilinear, antialiased): timm alone does not"
    plain = trained()
    save_model(plain, tmp_path / "plain")
    assert beyond_timm(config_of(tmp_path / "plain")) == []
    assert "label_names" not in json.dumps(config_of(tmp_path / "plain"))


@pytest.mark.parametrize("settings", [{"new_head": True}, {"num_classes": 5}])
def test_the_names_of_a_head_that_is_gone_go_with_it(settings: dict, tmp_path: Path) -> None:
    classifier = trained()
    classifier.class_names = NAMES
    save_model(classifier, tmp_path / "old")
    for start in (
        {"name": f"local-dir:{tmp_path / 'old'}", "pretrained": True},
        TINY | {"checkpoint": str(tmp_path / "old")},
    ):
        again = create_classifier(ModelSettings(**(start | {"num_classes": 4} | settings)))
        assert again.class_names is None
        save_model(again, tmp_path / "new")
        assert "cat" not in json.dumps(config_of(tmp_path / "new"))
        assert load_model(tmp_path / "new").class_names is None


def test_statistics_say_where_they_are_from(tmp_path: Path) -> None:
    def source(**settings: Any) -> str:
        return create_classifier(
            ModelSettings(**({"name": "test_resnet"} | settings)), num_classes=4
        ).statistics_source

    timms = "timm's pretrained_cfg of test_resnet.r160_in1k"
    assert source() == timms
    assert source(mean=0.5, std=0.5) == "the recipe's model.mean and model.std"
    assert source(mean=0.5) == f"mean: the recipe; std: {timms}"
    assert source(in_chans=1) == f"{timms} (averaged over the channels)"
    save_model(trained(), tmp_path)
    assert source(**TINY, checkpoint=str(tmp_path)) == f"{tmp_path}/config.json"
    assert source(name=f"local-dir:{tmp_path}") == f"{tmp_path}/config.json"


# What is said where there is none ---------------------------------------------------------------


def test_a_model_that_is_not_there_is_said_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "dat_pgd", trained())
    for folder in ("nothing", "transformers", "unfinished"):
        (tmp_path / folder).mkdir()
    (tmp_path / "transformers" / "config.json").write_text('{"architectures": ["ViT"]}')
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "unfinished" / "recipe.yaml").write_text("model: {name: wide_resnet10_1}")
    (tmp_path / "unfinished" / "checkpoints" / "step-00000003").mkdir(parents=True)
    cases = {
        "NOTHERE": r"^NOTHERE: no model: no folder 'NOTHERE', and timm has no model 'NOTHERE'",
        "resnet19": "close names: .*resnet18",
        "resnet50.nope": r"timm has resnet50, but no weights resnet50.nope; .*resnet50.a1_in1k",
        "runs/dat_pdg": "close names: runs/dat_pgd",
        "timm/resnet50.a1_in1k": "hf-hub:timm/resnet50.a1_in1k would be the hub's",
        "local-dir:runs/dat_pdg": r"no folder runs/dat_pdg \(close: runs/dat_pgd\)",
        "local-dir:runs/dat_pgd": "is a run: local-dir:runs/dat_pgd/model names its network",
        "nothing": r"neither recipe.yaml \(a run\) nor config.json \(a timm folder\)",
        "transformers": "names no architecture of timm",
        "weights.pth": r"is a file: .*model.checkpoint=weights.pth",
        "unfinished": "trained to its end, its last checkpoint is step-00000003",
    }
    for name, message in cases.items():
        for use in (load_model, evaluate_model, lambda n: recipe_of(n, (), required=("data",))):
            with pytest.raises(ValueError, match=message):
                use(name)


def test_a_recipe_takes_a_timm_folder_by_its_path_and_refuses_a_run_by_name(
    x: Tensor, tmp_path: Path
) -> None:
    classifier = trained()
    run = a_run(tmp_path / "run", classifier)
    settings = ModelSettings(name=str(run / "model"), pretrained=True)
    assert same(create_classifier(settings).eval(), classifier, x)
    with pytest.raises(ValueError, match=r"^name: .* is a run: .*model.checkpoint="):
        create_classifier(ModelSettings(name=str(run)))


def test_of_a_runs_model_other_weights_are_taken_and_another_network_is_refused(
    x: Tensor, tmp_path: Path
) -> None:
    run, better = a_run(tmp_path / "run", trained()), trained(mean=0.5, std=0.5)
    with torch.no_grad():
        better.model.head.fc.weight.add_(1)
    a_run(tmp_path / "better", better, mean=0.5, std=0.5)
    images = MemoryImages((x * 255).byte(), torch.zeros(3, dtype=torch.int64))
    overrides = [f"model.checkpoint={tmp_path / 'better' / 'checkpoints' / 'best.safetensors'}"]
    recipe = recipe_of(str(run), overrides, required=("model",))
    assert same(load_classifier(recipe, str(run), images, 4).eval(), better, x)
    for wrong in ("model.name=resnet18", "model.options={width: 2}", "model.num_classes=5"):
        with pytest.raises(ValueError, match=rf"{wrong.split('=')[0]} is not allowed"):
            recipe_of(str(run), [wrong], required=("model",))


def test_a_network_that_timm_could_not_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = types.ModuleType("bare")
    monkeypatch.setitem(sys.modules, "bare", bare)

    def bare_network(pretrained: bool = False, **options: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    bare_network.__module__ = "bare"
    timm.models.register_model(bare_network)
    with pytest.raises(
        ValueError, match="'bare_network' has no pretrained_cfg, num_classes, num_f"
    ):
        create_classifier(ModelSettings(name="bare_network"))
