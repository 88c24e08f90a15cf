"""The CIFAR models: counted by hand, any image size, and timm's interface."""

import json

import pytest
import timm
import torch
from torch import nn

from robust_accel.models import cifar

NAMES = sorted(cifar.default_cfgs)


def create(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, pretrained=False, **kwargs)


def num_parameters(name: str, **kwargs) -> int:
    with torch.device("meta"):
        model = create(name, **kwargs)
    return sum(param.numel() for param in model.parameters())


def count_by_hand(stem: int, stages: list[int], blocks: int, classes: int) -> int:
    """Weights of the architecture as the papers describe it."""
    total, channels = 3 * 9 * stem, stem
    for stage, width in enumerate(stages):
        for block in range(blocks):
            total += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            if channels != width or (stage > 0 and block == 0):
                total += channels * width  # 1 x 1 shortcut
            channels = width
    return total + 2 * channels + channels * classes + classes  # final BatchNorm and classifier


@pytest.mark.parametrize(
    ("name", "by_hand", "millions"),
    [
        # 11,171,146 in code without the final BatchNorm, and 2 x 512 more with it
        ("preact_resnet18", count_by_hand(64, [64, 128, 256, 512], 2, 10), 11.172170),
        ("preact_resnet18_w16", count_by_hand(16, [16, 32, 64, 128], 2, 10), 0.70),
        # Zagoruyko and Komodakis 2016, table 4: 36.5 M
        ("wide_resnet28_10", count_by_hand(16, [160, 320, 640], 4, 10), 36.479194),
        ("wide_resnet34_10", count_by_hand(16, [160, 320, 640], 5, 10), 46.16),
        ("wide_resnet16_2", count_by_hand(16, [32, 64, 128], 2, 10), 0.69),
        ("wide_resnet10_1", count_by_hand(16, [16, 32, 64], 1, 10), 0.08),
    ],
)
def test_parameter_counts(name, by_hand, millions):
    assert num_parameters(name) == by_hand
    assert by_hand / 1e6 == pytest.approx(millions, abs=5e-3)


def test_depth_and_width_can_be_given():
    assert num_parameters("preact_resnet18", width=16) == num_parameters("preact_resnet18_w16")
    assert num_parameters("wide_resnet28_10", depth=16, width=2) == num_parameters(
        "wide_resnet16_2"
    )
    assert num_parameters("wide_resnet16_2", num_classes=100) == count_by_hand(
        16, [32, 64, 128], 2, 100
    )
    with torch.device("meta"):
        assert [len(stage) for stage in create("preact_resnet18", depth=34).stages] == [3, 4, 6, 3]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wide_resnet28_10", {"depth": 27}, "depth must be 6 n"),
        ("wide_resnet28_10", {"depth": 4}, "depth must be 6 n"),
        ("preact_resnet18", {"depth": 20}, r"depth must be one of \[10, 18, 34\], got 20"),
        ("preact_resnet18", {"width": 0}, "width must be >= 1, got 0"),
        ("wide_resnet10_1", {"act_layer": "sillu"}, r"act_layer must be one of .*'silu'.*'sillu'"),
        ("wide_resnet10_1", {"act_layer": 1}, "act_layer must be one of .*got 1"),
    ],
)
def test_impossible_shapes_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


@pytest.mark.parametrize("name", ["preact_resnet18_w16", "wide_resnet16_2", "wide_resnet10_1"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 37), (3, 64)])
def test_any_image_from_8_by_8(name, channels, size):
    model = create(name, in_chans=channels, num_classes=7).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_resolution_halves_after_the_first_stage_only():
    x = torch.rand(1, 3, 32, 32)
    assert create("preact_resnet18_w16").forward_features(x).shape == (1, 128, 4, 4)
    assert create("wide_resnet16_2").forward_features(x).shape == (1, 128, 8, 8)


def test_one_block_is_the_papers_formula():
    torch.manual_seed(0)
    block = cifar.PreActBlock(2, 3, stride=2).eval()
    x = torch.randn(1, 2, 6, 6)
    conv, scale = nn.functional.conv2d, 1 / (1 + 1e-5) ** 0.5  # BatchNorm at its initial statistics
    first = (scale * x).relu()
    second = (scale * conv(first, block.conv1.weight, stride=2, padding=1)).relu()
    expected = conv(second, block.conv2.weight, padding=1)
    expected = expected + conv(first, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)


def test_initialisation_is_he_and_no_weight_is_zero():
    torch.manual_seed(0)
    model = create("preact_resnet18_w16", width=32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
    # signals neither vanish nor explode on their way
    logits = model(torch.randn(16, 3, 32, 32))
    assert 0.05 < logits.std() < 5


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "gelu": timm.layers.GELU}


@pytest.mark.parametrize("name", ["preact_resnet18_w16", "wide_resnet16_2"])
@pytest.mark.parametrize("act_layer", ACTIVATIONS)
def test_every_activation_is_the_one_asked_for_and_nothing_else_differs(name, act_layer):
    torch.manual_seed(0)
    plain = create(name)
    torch.manual_seed(0)
    model = create(name, act_layer=act_layer)
    others = [m for m in model.modules() if not isinstance(m, ACTIVATIONS[act_layer])]
    assert not any(isinstance(m, (*ACTIVATIONS.values(), nn.ReLU)) for m in others)
    assert [*model.state_dict()] == [*plain.state_dict()]
    for key, value in plain.state_dict().items():
        assert value.equal(model.state_dict()[key]), key
    x = torch.randn(16, 3, 32, 32)
    logits = model(x)
    assert logits.equal(plain(x)) == (act_layer == "relu")
    assert 0.05 < logits.std() < 5  # signals neither vanish nor explode on their way


def test_a_smooth_activation_is_smooth_in_the_pixels():
    """Where ReLU bends, the gradient jumps: SiLU's changes in proportion to the step."""
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(x)
    changes = {}
    for act_layer in ("relu", "silu"):
        torch.manual_seed(0)
        model = create("wide_resnet10_1", act_layer=act_layer).double().eval()

        def gradient(step, model=model):
            moved = (x + step * direction).requires_grad_()
            return torch.autograd.grad(model(moved)[0, 0], moved)[0]

        far, near = ((gradient(step) - gradient(0.0)).norm().item() for step in (1e-4, 1e-6))
        changes[act_layer] = far / max(near, 1e-300)
    assert changes["silu"] == pytest.approx(100, rel=0.01)
    assert changes["relu"] != pytest.approx(100, rel=0.01)


def test_timms_interface():
    model = create("wide_resnet16_2", num_classes=5).eval()
    assert (model.num_classes, model.num_features) == (5, 128)
    x = torch.rand(2, 3, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))

    model.reset_classifier(3)
    assert (model.num_classes, model(x).shape) == (3, (2, 3))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert create("wide_resnet16_2", num_classes=0)(x).shape == (2, 128)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_describes_the_model(name):
    with torch.device("meta"):
        model = create(name)
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    assert (cfg["input_size"], cfg["num_classes"], model.num_classes) == ((3, 32, 32), 10, 10)
    assert len(cfg["mean"]) == len(cfg["std"]) == 3
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    features = model.forward_features(torch.rand(1, 3, 32, 32, device="meta"))
    assert features.shape[-2:] == cfg["pool_size"]


def test_drop_rate_is_the_classifiers_dropout():
    torch.manual_seed(0)
    model = create("wide_resnet10_1", drop_rate=0.5)
    features = torch.rand(2, 64, 8, 8)
    dropped = model.forward_head(features, pre_logits=True)
    assert 0.2 < dropped.eq(0).float().mean() < 0.8
    assert not model.eval().forward_head(features, pre_logits=True).eq(0).any()


@pytest.mark.parametrize("name", ["preact_resnet18_w16", "wide_resnet16_2"])
def test_a_saved_folder_gives_the_same_logits(name, tmp_path):
    options = {"width": 3, "in_chans": 1, "num_classes": 4, "act_layer": "silu"}
    model = create(name, **options)
    model(torch.rand(8, 1, 8, 8))  # BatchNorm statistics worth saving
    config = {"model_args": options, "num_classes": 4}
    timm.models.save_for_hf(model, str(tmp_path), model_config=config, safe_serialization=True)

    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name
    # for fine-tuning: another number of classes keeps everything else
    finetuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)
    assert torch.equal(finetuned.stem.weight, model.stem.weight)
    assert finetuned(x).shape == (2, 9)


def test_a_model_learns():
    torch.manual_seed(0)
    model = create("wide_resnet10_1", in_chans=1, num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 2
    x[y == 1, :, :4] += 0.5
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
