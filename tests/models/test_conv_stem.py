"""Convolutional stems: timm's networks below them, and weights that are the plain network's."""

import logging
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_accel.models import ModelSettings, conv_stem, create_classifier, save_model

PLAIN = {
    "convnext_tiny_cvst": "convnext_tiny",
    "convnext_small_cvst": "convnext_small",
    "convnext_base_cvst": "convnext_base",
    "vit_small_cvst": "deit_small_patch16_224",
    "vit_base_cvst": "deit_base_patch16_224",
}
SMALL: dict[str, dict[str, Any]] = {
    "convnext_tiny_cvst": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "vit_small_cvst": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32},
}


def stem_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if key.startswith(f"{model.stem_name}.")}


def plain_of(name: str, **options: Any) -> nn.Module:
    """The plain network at small size, of 5 classes, none of its weights as they begin."""
    model = timm.create_model(PLAIN[name], num_classes=5, **SMALL[name], **options)
    for value in model.state_dict().values():
        value.add_(torch.rand_like(value))
    return model.eval()


def below(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k not in stem_keys(model)}


def is_plains(model: nn.Module, plain: nn.Module) -> bool:
    return all(value.equal(plain.state_dict()[key]) for key, value in below(model).items())


@pytest.mark.parametrize(
    "name",
    [n if n in SMALL else pytest.param(n, marks=pytest.mark.long) for n in conv_stem.default_cfgs],
)
def test_all_but_the_stem_is_timms_network(name: str) -> None:
    with torch.device("meta"):
        model, plain = timm.create_model(name), timm.create_model(PLAIN[name])
        assert model(torch.rand(2, 3, 224, 224)).shape == (2, 1000)
        wanted = {key: value.shape for key, value in plain.state_dict().items()}
        assert {*model.plain_keys} <= {*wanted}
        found = {key: value.shape for key, value in below(model).items()}
        assert found == {k: s for k, s in wanted.items() if k not in model.plain_keys}
        assert [*stem_keys(model)] and not stem_keys(model) & {*wanted}
        cfg, plains = model.pretrained_cfg, plain.pretrained_cfg
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        assert (cfg["input_size"], cfg["mean"], cfg["std"]) == (
            plains["input_size"], plains["mean"], plains["std"],
        )  # fmt: skip
        assert cfg["hf_hub_id"] == f"timm/{PLAIN[name]}.fb_in1k"
        # the resolution after the stem is the plain one's
        x = torch.rand(1, 3, 224, 224)
        assert model.forward_features(x).shape == plain.forward_features(x).shape


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # of the authors' and RobustBench's networks
        ("convnext_tiny_cvst", 28.63),
        ("convnext_small_cvst", 50.26),
        ("convnext_base_cvst", 88.75),
        ("vit_small_cvst", 22.78),
        ("vit_base_cvst", 87.15),
    ],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=6e-3)


def test_the_stem_is_the_papers() -> None:
    """Convolution, LayerNorm over channels, GELU: one layer written out, and the keys by name."""
    torch.manual_seed(0)
    stem = conv_stem.ConvStem(3, [4, 6], [2, 2], 5)
    x = torch.rand(1, 3, 8, 8)
    conv = stem.stem[0](x)
    mean = conv.mean(dim=1, keepdim=True)
    scale = (conv.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(stem.stem[:3](x), nn.functional.gelu((conv - mean) / scale))
    assert stem(x).shape == (1, 5, 2, 2)
    numbers = sorted({int(key.split(".")[1]) for key in stem.state_dict()})
    assert numbers == [0, 1, 3, 4, 6]


@pytest.mark.parametrize("name", SMALL)
def test_pretrained_weights_are_the_plain_networks_but_for_the_stem(
    name: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plain_of(name)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    overlay = {"file": str(tmp_path / "plain.safetensors"), "num_classes": 5}
    options = {**SMALL[name], "pretrained_cfg_overlay": overlay}
    torch.manual_seed(0)
    fresh = timm.create_model(name, num_classes=5, **SMALL[name])
    for channels in (3, 1):
        torch.manual_seed(0)
        with caplog.at_level(logging.INFO, logger="robust_accel"):
            model = timm.create_model(
                name, pretrained=True, num_classes=5, in_chans=channels, **options
            )
        assert is_plains(model, plain)
        assert "the stem is new, all below it is loaded" in caplog.text
        x = torch.rand(2, channels, 32, 32)
        assert model(x).isfinite().all()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=True, num_classes=5, **options)
    assert all(model.state_dict()[k].equal(fresh.state_dict()[k]) for k in stem_keys(model))
    # of other classes: all but the classifier, too
    other = timm.create_model(name, pretrained=True, num_classes=7, **options)
    assert other(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    assert sum(not v.equal(plain.state_dict()[k]) for k, v in below(model).items()) == 0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["file", "folder", "wrapped"])
def test_a_checkpoint_of_the_plain_network_is_taken_and_said(
    name: str, kind: str, tmp_path: Any
) -> None:
    plain = plain_of(name)
    path = tmp_path / "plain.safetensors"
    if kind == "folder":
        path = tmp_path / "plain"
        timm.models.save_for_hf(plain, str(path), model_config={"num_classes": 5})
    elif kind == "wrapped":
        path = tmp_path / "plain.pt"
        torch.save({"model": {f"module.{k}": v for k, v in plain.state_dict().items()}}, path)
    else:
        save_file(plain.state_dict(), path)
    settings = ModelSettings(name=name, options=SMALL[name], checkpoint=str(path))
    classifier = create_classifier(settings, num_classes=5)
    assert is_plains(classifier.model, plain)
    assert "the plain network's, below a new stem" in str(classifier.weights_source)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_saved_is_restored_with_its_stem(name: str, tmp_path: Any) -> None:
    settings = ModelSettings(name=name, options=SMALL[name])
    classifier = create_classifier(settings, num_classes=5).eval()
    for value in classifier.model.state_dict().values():
        value.add_(0.1 * torch.rand_like(value))
    save_model(classifier, tmp_path / "saved")
    x = torch.rand(2, 3, 32, 32)
    again = create_classifier(ModelSettings(name=f"local-dir:{tmp_path}/saved", pretrained=True))
    assert again.eval()(x).equal(classifier(x))
    started = create_classifier(
        ModelSettings(name=name, options=SMALL[name], checkpoint=str(tmp_path / "saved")),
        num_classes=5,
    )
    assert started.eval()(x).equal(classifier(x))
    assert "new stem" not in str(started.weights_source)


def test_a_published_checkpoints_keys_are_found(tmp_path: Any) -> None:
    """RobustBench's: ``normalize`` and ``model`` in one, the stem under its own name."""
    settings = ModelSettings(name="vit_small_cvst", options=SMALL["vit_small_cvst"])
    model = create_classifier(settings, num_classes=5).model
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {
        "normalize.mean": torch.full((1, 3, 1, 1), 0.4),
        "normalize.std": torch.full((1, 3, 1, 1), 0.3),
    }
    torch.save(state, tmp_path / "published.pt")
    found = create_classifier(
        settings.model_copy(update={"checkpoint": str(tmp_path / "published.pt")}), num_classes=5
    )
    assert found.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    for key, value in model.state_dict().items():
        assert found.model.state_dict()[key].equal(value)


ACTIVATIONS = [({}, nn.GELU), ({"act_layer": "silu"}, nn.SiLU), ({"act_layer": nn.ELU}, nn.ELU)]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("options", "made"), ACTIVATIONS)
def test_an_activation_that_is_asked_for_is_the_stems_too(
    name: str, options: dict[str, Any], made: type[nn.Module]
) -> None:
    model = timm.create_model(name, **SMALL[name], **options)
    names = {type(m).__name__ for m in model.modules()}
    assert names & {"GELU", "SiLU", "ELU"} == {made.__name__}
    stem = model.get_submodule(model.stem_name).stem
    activations = [type(module) for module in stem[2::3]]
    assert activations == [made] * (len(stem) // 3)


def test_what_the_stem_would_ignore_is_refused() -> None:
    for name, option in (
        ("convnext_tiny_cvst", {"stem_type": "overlap"}),
        ("convnext_tiny_cvst", {"patch_size": 2}),
        ("vit_small_cvst", {"patch_size": 8}),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}: the stem here is"):
            create_classifier(ModelSettings(name=name, options=option), num_classes=5)


def test_another_network_is_still_refused_by_its_own_keys(tmp_path: Any) -> None:
    other = timm.create_model("test_resnet", num_classes=5)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    settings = ModelSettings(
        name="convnext_tiny_cvst", options=SMALL["convnext_tiny_cvst"],
        checkpoint=str(tmp_path / "other.safetensors"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^checkpoint: .*does not fit"):
        create_classifier(settings, num_classes=5)
