"""Pixels to logits: normalisation and resizing inside, timm models by name, timm folders out."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

from robust_accel.models import (
    ModelSettings,
    PixelClassifier,
    create_classifier,
    normalized,
    save_model,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timm's test models are normalised by 0.5; most of its models as ImageNet is
AS_IMAGENET = {"pretrained_cfg_overlay": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}}


class Recorder(nn.Module):
    """Keeps what it is given and answers with the mean of each channel."""

    def forward(self, x):
        self.seen = x
        return x.mean((2, 3))


def normalised(x, mean, std):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), ([0.5], [0.2]), (0.5, 0.2)]
)
def test_normalises_by_the_mean_and_std_given(mean, std):
    model, x = Recorder(), torch.rand(2, 3, 4, 4)
    PixelClassifier(model, mean=mean, std=std)(x)
    equal(model.seen, normalised(x, mean, std))


def test_a_module_that_says_nothing_reads_pixels():
    model, x = Recorder(), torch.rand(2, 3, 4, 4)
    PixelClassifier(model)(x)
    assert torch.equal(model.seen, x)


def test_nothing_is_assumed_of_a_bare_module_and_what_is_done_is_said():
    x = torch.rand(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=4, **AS_IMAGENET).eval()
    bare = PixelClassifier(model)
    equal(bare(x), model(x))
    assert bare.statistics_source.startswith("none: the module reads [0, 1]")
    assert "0.485" in bare.statistics_source  # that there are others, too
    assert PixelClassifier(Recorder()).statistics_source == "none: the module reads [0, 1]"
    assert PixelClassifier(model, mean=0.5, std=0.5).statistics_source == "mean and std as given"


def test_who_asks_for_a_timm_models_own_statistics_gets_them():
    x = torch.rand(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=4, **AS_IMAGENET).eval()
    for asked in (normalized(model), normalized(torch.compile(model, backend="eager"))):
        equal(asked.mean.flatten(), torch.tensor(IMAGENET_MEAN))
        assert asked.statistics_source.startswith("timm's pretrained_cfg of test_resnet")
    equal(normalized(model)(x), model(normalised(x, IMAGENET_MEAN, IMAGENET_STD)))
    # what the user gives goes before it
    given = normalized(model, ("as given", {"mean": 0.5, "std": None}))
    equal(given.mean, torch.full((1, 1, 1, 1), 0.5))
    equal(given.std.flatten(), torch.tensor(IMAGENET_STD))
    assert given.statistics_source.startswith("mean: as given; std: timm's pretrained_cfg of")


def test_adds_nothing_to_the_models_own_state_dict():
    model = timm.create_model("test_resnet", num_classes=4)
    keys = list(model.state_dict())
    classifier = PixelClassifier(model)
    assert list(classifier.model.state_dict()) == keys
    assert list(classifier.state_dict()) == [f"model.{key}" for key in keys]


def test_resizes_inside():
    model, x = Recorder(), torch.rand(2, 3, 8, 8)
    classifier = PixelClassifier(model, mean=0.5, std=0.5, size=16)
    classifier(x)
    resized = interpolate(x, (16, 16), mode="bilinear", align_corners=False, antialias=True)
    equal(model.seen, 2 * resized - 1)
    PixelClassifier(model, size=(4, 6))(x)
    assert model.seen.shape == (2, 3, 4, 6)
    # smaller: every pixel counts, also those between two that plain interpolation reads
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::4] = 1
    PixelClassifier(model, size=4)(stripes)
    equal(model.seen[..., 1:3], torch.full((1, 3, 4, 2), 0.25))
    PixelClassifier(model, size=8)(x)
    assert torch.equal(model.seen, x)


def test_takes_an_output_with_logits():
    logits = torch.rand(2, 4)

    class Transformer(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=logits)

    assert torch.equal(PixelClassifier(Transformer())(torch.rand(2, 3, 4, 4)), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_works_in_its_own_type_and_pixels_stay_as_they_are(dtype):
    classifier = PixelClassifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), mean=0.5, std=0.5)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    expected = classifier(x).detach()
    seen = []
    classifier.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logits = classifier.to(dtype)(x)
    assert seen == [dtype]
    # not below fp32: losses are taken of these
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": 0.5, "std": 0.0}, "std must be > 0"),
        ({"mean": 0.5, "std": (0.2, 0.0, 0.2)}, "std must be > 0"),
        ({"mean": 0.5, "std": (0.2, -0.1, 0.2)}, "std must be > 0"),
        ({"mean": 0.5, "std": float("nan")}, "std must be > 0"),
        ({"mean": float("nan"), "std": 1.0}, "mean and std must be finite"),
        ({"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)}, "divide by 255"),
        ({"mean": 0.5, "std": 127.5}, "divide by 255"),
        ({"mean": [[0.5, 0.5]], "std": 1.0}, "mean must be one number or one a channel"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 4}, "different numbers of channels"),
        ({"mean": 0.5}, "mean and std go together"),
        ({"std": 0.5}, "mean and std go together"),
        ({"size": 0}, "size must be"),
        ({"size": (8, -8)}, "size must be"),
    ],
)
def test_impossible_statistics_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PixelClassifier(Recorder(), **arguments)


# create_classifier


def test_creates_any_timm_model_with_the_datas_classes_and_channels():
    classifier = create_classifier(ModelSettings(name="test_resnet"), num_classes=7, in_chans=3)
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    classifier = create_classifier(
        ModelSettings(name="test_resnet", num_classes=5), num_classes=7, in_chans=3
    )
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_creates_the_packages_own_models_and_passes_options():
    wide, narrow = (
        create_classifier(
            ModelSettings(name="preact_resnet18", options={"width": width}), num_classes=10
        )
        for width in (16, 8)
    )
    assert wide.model.num_features == 2 * narrow.model.num_features


def test_options_reach_a_transformer():
    settings = ModelSettings(name="test_vit", options={"img_size": 32}, size=32)
    classifier = create_classifier(settings, num_classes=4)
    assert classifier(torch.rand(2, 3, 8, 8)).shape == (2, 4)


GREY = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GREY),
        ({"mean": 0.3}, (0.3, GREY[1])),
        ({"std": "1/4"}, (GREY[0], 0.25)),
        ({"mean": [0.3], "std": [0.25]}, (0.3, 0.25)),
    ],
)
def test_grey_images_get_the_average_of_what_is_not_given(given, expected):
    settings = ModelSettings(name="test_resnet", options=AS_IMAGENET, **given)
    classifier = create_classifier(settings, num_classes=4, in_chans=1)
    assert (classifier.mean.item(), classifier.std.item()) == pytest.approx(expected)
    assert classifier(torch.rand(2, 1, 32, 32)).shape == (2, 4)


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(ValueError, match=r"resnet19.*resnet18"):
        create_classifier(ModelSettings(name="resnet19"))
    with pytest.raises(ValueError, match="no model 'zzzz'"):
        create_classifier(ModelSettings(name="zzzz"))


def test_an_unknown_activation_is_refused_with_those_there_are():
    settings = ModelSettings(name="wide_resnet10_1", options={"act_layer": "sillu"})
    message = r"^name: .*act_layer must be one of \['relu', .*'silu'.*\], got 'sillu'$"
    with pytest.raises(ValueError, match=message):
        create_classifier(settings, num_classes=10)


def test_options_that_the_model_refuses_are_named():
    settings = ModelSettings(name="test_resnet", options={"no_such_option": 1})
    with pytest.raises(ValueError, match="no_such_option"):
        create_classifier(settings, num_classes=4)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        create_classifier(
            ModelSettings(name=f"local-dir:{tmp_path / 'missing'}", pretrained=True), num_classes=4
        )


def test_impossible_model_settings_are_refused():
    for settings in ({"num_classes": 1}, {"in_chans": 0}, {"size": 0}, {"depth": 18}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ModelSettings(name="test_resnet", **settings)


# save_model

SAVED = {
    "resnet": ({"name": "test_resnet"}, 3),
    "grey": ({"name": "test_resnet"}, 1),
    "vit": ({"name": "test_vit", "options": {"img_size": 32}}, 3),
    "own": ({"name": "preact_resnet18", "options": {"width": 8}}, 3),
    "smooth": ({"name": "wide_resnet10_1", "options": {"act_layer": "silu"}}, 3),
    "own statistics": ({"name": "test_resnet", "mean": 0.4, "std": [0.2, 0.3, 0.25]}, 3),
}


def trained(settings: ModelSettings, in_chans: int) -> PixelClassifier:
    """A classifier whose every weight and statistic has left its initial value."""
    classifier = create_classifier(settings, num_classes=4, in_chans=in_chans)
    for tensor in classifier.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.01 * torch.rand_like(tensor))
    return classifier.eval()


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_model_is_timms_own(case, tmp_path):
    fields, in_chans = SAVED[case]
    settings = ModelSettings(**fields)
    classifier = trained(settings, in_chans)
    save_model(classifier, tmp_path / "a" / "b")

    loaded = timm.create_model(f"local-dir:{tmp_path / 'a' / 'b'}", pretrained=True).eval()
    cfg = loaded.pretrained_cfg
    assert len(cfg["mean"]) == len(cfg["std"]) == in_chans
    x = torch.rand(3, in_chans, 32, 32)
    with torch.no_grad():
        equal(loaded(normalised(x, cfg["mean"], cfg["std"])), classifier(x))
        again = create_classifier(
            ModelSettings(name=f"local-dir:{tmp_path / 'a' / 'b'}", pretrained=True)
        ).eval()
        equal(again(x), classifier(x))
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["num_classes"] == 4


def test_a_compiled_model_is_saved_under_timms_keys(tmp_path):
    classifier = trained(ModelSettings(name="test_resnet"), 3)
    x = torch.rand(2, 3, 32, 32)
    expected = classifier(x)
    classifier.model = torch.compile(classifier.model, backend="eager")
    save_model(classifier, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    equal(normalized(loaded)(x), expected)


# Fine-tuning: what a model starts from, and what of it learns

TINY = {"name": "wide_resnet10_1"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of a trained model with 4 classes."""
    folder = tmp_path_factory.mktemp("pretrained")
    classifier = trained(ModelSettings(name="preact_resnet18", options={"width": 4}), 3)
    save_model(classifier, folder)
    return folder, classifier


def start_from(checkpoint, **settings):
    fields = {"name": "preact_resnet18", "options": {"width": 4}} | settings
    return create_classifier(ModelSettings(checkpoint=str(checkpoint), **fields), num_classes=4)


@pytest.mark.parametrize("kind", ["folder", "safetensors", "torch", "wrapped by DDP"])
def test_a_checkpoint_gives_its_weights(kind, pretrained, tmp_path):
    folder, classifier = pretrained
    weights = classifier.model.state_dict()
    path = {"folder": folder, "safetensors": folder / "model.safetensors"}.get(kind)
    if path is None:
        path = tmp_path / "weights.pth"
        prefix = "module." if kind == "wrapped by DDP" else ""
        torch.save({"state_dict": {prefix + key: w for key, w in weights.items()}}, path)
    found = start_from(path).model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_head_is_new_if_asked_or_if_the_classes_differ(pretrained):
    folder, classifier = pretrained
    weights = classifier.model.state_dict()
    for settings in ({"new_head": True}, {"num_classes": 7}):
        found = start_from(folder, **settings).model.state_dict()
        for key, weight in weights.items():
            same = found[key].shape == weight.shape and torch.equal(found[key], weight)
            assert same == (not key.startswith("head.fc")), key


def test_a_model_that_started_from_a_folder_is_saved_whole(pretrained, tmp_path):
    classifier = create_classifier(
        ModelSettings(name=f"local-dir:{pretrained[0]}", pretrained=True), num_classes=6, in_chans=3
    )
    save_model(classifier, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_classes == 6
    equal(loaded.eval()(torch.zeros(1, 3, 32, 32)).shape, (1, 6))


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_does_not_fit_is_refused(pretrained, tmp_path, capsys):
    folder, classifier = pretrained
    missing = classifier.model.state_dict()
    del missing["stem.weight"]
    cases = {
        "no such file": tmp_path / "none.pth",
        "stem.weight is missing": missing,
        "does not fit": {"unknown": torch.zeros(1)},
        "cannot be read": {"stem.weight": Malicious()},
    }
    for message, content in cases.items():
        path = content
        if isinstance(content, dict):
            path = tmp_path / "bad.pth"
            torch.save(content, path)
        with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
            start_from(path)
    with pytest.raises(ValueError, match=r"stem.weight is \[4, 3, 3, 3\], not \[8, 3, 3, 3\]"):
        start_from(folder, options={"width": 8})
    assert "executed" not in capsys.readouterr().out


def test_a_frozen_backbone_keeps_its_weights_and_statistics():
    classifier = create_classifier(ModelSettings(freeze_backbone=True, **TINY), num_classes=4)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=1.0)
    classifier.train()
    classifier(torch.rand(8, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in classifier.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"model.head.fc.weight", "model.head.fc.bias"}
    assert classifier.model.head.fc.training
    assert not classifier.model.norm.training
    classifier.eval()
    assert not any(module.training for module in classifier.model.modules())


def test_a_model_without_a_head_cannot_freeze_its_backbone():
    with pytest.raises(ValueError, match="freeze_backbone"):
        PixelClassifier(nn.Linear(2, 2), freeze_backbone=True)
