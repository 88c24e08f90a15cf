"""CIFAR-sized pre-activation ResNets, registered with timm under their usual names.

timm's own ResNets begin with a stride of four, too much for a 32 x 32 image. Importing this module
makes ``timm.create_model("preact_resnet18", num_classes=10)`` work, and likewise:

    name                 parameters (10 classes)
    preact_resnet18      11.17 M
    preact_resnet18_w16   0.70 M
    wide_resnet28_10     36.48 M
    wide_resnet34_10     46.16 M
    wide_resnet16_2       0.69 M
    wide_resnet10_1       0.08 M

Each takes ``depth``, ``width``, ``act_layer``, ``stem_stride``, ``num_classes``, ``in_chans``,
``global_pool`` and ``drop_rate``.
"""

from collections.abc import Sequence
from typing import Any

import timm
from timm.layers import ClassifierHead, create_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

# timm's names of activations that have no parameters and are zero at zero; swish is silu
_ACT_LAYERS = ("relu", "leaky_relu", "elu", "celu", "gelu", "mish", "silu", "swish")


class PreActBlock(nn.Module):
    """Twice BatchNorm, activation, 3 x 3 convolution, beside a shortcut.

    Where the shape changes, the shortcut is a 1 x 1 convolution of the activated input.

    Args:
        act_layer: timm's name of the activation; the paper's is ReLU.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027).
    """

    def __init__(
        self, in_chs: int, out_chs: int, *, stride: int = 1, act_layer: str = "relu"
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        # whichever it is, it keeps this name: digests of measured models hold it
        self.relu = create_act_layer(act_layer)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chs, H, W] -> [B, out_chs, H / stride, W / stride]."""
        out = self.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.relu(self.norm2(self.conv1(out))))
        return out + shortcut


class CifarResNet(nn.Module):
    """A 3 x 3 stem without pooling, stages of pre-activation blocks, BatchNorm, ReLU and a head.

    Every stage but the first halves height and width. Global pooling lets any image in, 8 x 8
    included. Convolutions start as in He et al. 2015 (fan out), with ReLU's gain whichever the
    activation: BatchNorm, which starts as the identity, sets the scale. Nothing but biases starts
    at zero, as a zero weight has no norm for LAMB to adapt to.

    Args:
        stem_chs: Channels of the stem.
        stem_stride: 2 makes the stem halve height and width: what a CPU can afford.
        stage_chs: Channels of each stage.
        num_blocks: Blocks in each stage.
        num_classes: Number of logits; 0 for pooled features instead.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier, as everywhere in timm.
        act_layer: timm's name of the activation: ``relu``, or a smooth one such as ``silu`` or
            ``gelu``, with which adversarial training reaches more (Gowal et al. 2020, arXiv
            2010.03593, section 4.3.4).
    """

    def __init__(
        self,
        *,
        stem_chs: int,
        stage_chs: Sequence[int],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stem_stride: int = 1,
        act_layer: str = "relu",
    ) -> None:
        super().__init__()
        if act_layer not in _ACT_LAYERS:
            raise ValueError(f"act_layer must be one of {list(_ACT_LAYERS)}, got {act_layer!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = stage_chs[-1]
        self.stem = nn.Conv2d(in_chans, stem_chs, 3, stride=stem_stride, padding=1, bias=False)
        self.stages = nn.Sequential()
        in_chs = stem_chs
        for out_chs, blocks in zip(stage_chs, num_blocks, strict=True):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and len(self.stages) > 0 else 1
                stage.append(PreActBlock(in_chs, out_chs, stride=stride, act_layer=act_layer))
                in_chs = out_chs
            self.stages.append(stage)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.relu = create_act_layer(act_layer)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = self.num_features
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_features, h, w]."""
        return self.relu(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits [B, num_classes], or with ``pre_logits`` [B, num_features]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm counts layers, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None)]}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on top; 0 classes for none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)


class PreActResNet(CifarResNet):
    """Pre-activation ResNet of four stages.

    Args:
        depth: 10, 18 or 34.
        width: Channels of the stem and the first stage; each later stage has twice as many.
        kwargs: See ``CifarResNet``.
    """

    def __init__(self, *, depth: int = 18, width: int = 64, **kwargs: Any) -> None:
        num_blocks = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
        if depth not in num_blocks:
            raise ValueError(f"depth must be one of {list(num_blocks)}, got {depth}")
        _check_width(width)
        stage_chs = [width, 2 * width, 4 * width, 8 * width]
        super().__init__(
            stem_chs=width, stage_chs=stage_chs, num_blocks=num_blocks[depth], **kwargs
        )


class WideResNet(CifarResNet):
    """WRN-depth-width: three stages of 16, 32 and 64 channels, each times ``width``.

    Args:
        depth: 6 n + 4 for n blocks a stage: 10, 16, 22, 28, 34, ...
        width: The widening factor k.
        kwargs: See ``CifarResNet``.

    Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146), without dropout inside the blocks.
    """

    def __init__(self, *, depth: int = 28, width: int = 10, **kwargs: Any) -> None:
        num_blocks, rest = divmod(depth - 4, 6)
        if rest or num_blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
        _check_width(width)
        stage_chs = [16 * width, 32 * width, 64 * width]
        super().__init__(stem_chs=16, stage_chs=stage_chs, num_blocks=[num_blocks] * 3, **kwargs)


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be >= 1, got {width}")


def _cfg(pool_size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
        "std": (0.2471, 0.2435, 0.2616),
        "first_conv": "stem",
        "classifier": "head.fc",
    }


default_cfgs = generate_default_cfgs(
    {
        "preact_resnet18": _cfg(4),
        "preact_resnet18_w16": _cfg(4),
        "wide_resnet28_10": _cfg(8),
        "wide_resnet34_10": _cfg(8),
        "wide_resnet16_2": _cfg(8),
        "wide_resnet10_1": _cfg(8),
    }
)


def _build(
    cls: type[CifarResNet], name: str, pretrained: bool, kwargs: dict[str, Any], **defaults: int
) -> CifarResNet:
    return build_model_with_cfg(cls, name, pretrained, **{**defaults, **kwargs})


@timm.models.register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """PreActResNet-18, the usual network of CIFAR-10 adversarial training; ``width=64``."""
    return _build(PreActResNet, "preact_resnet18", pretrained, kwargs, depth=18, width=64)


@timm.models.register_model
def preact_resnet18_w16(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """PreActResNet-18 a quarter as wide: small enough for a CPU."""
    return _build(PreActResNet, "preact_resnet18_w16", pretrained, kwargs, depth=18, width=16)


@timm.models.register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-28-10."""
    return _build(WideResNet, "wide_resnet28_10", pretrained, kwargs, depth=28, width=10)


@timm.models.register_model
def wide_resnet34_10(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-34-10, the usual wide network of TRADES and its successors."""
    return _build(WideResNet, "wide_resnet34_10", pretrained, kwargs, depth=34, width=10)


@timm.models.register_model
def wide_resnet16_2(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-16-2: small enough for a CPU."""
    return _build(WideResNet, "wide_resnet16_2", pretrained, kwargs, depth=16, width=2)


@timm.models.register_model
def wide_resnet10_1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-10-1: for tests and trials in seconds."""
    return _build(WideResNet, "wide_resnet10_1", pretrained, kwargs, depth=10, width=1)
