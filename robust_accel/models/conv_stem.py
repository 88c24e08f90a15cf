"""ConvNeXt and ViT with a convolutional stem, for adversarial training on ImageNet.

A stem of 3 x 3 convolutions in the place of one convolution of large patches: the same resolution
after it, and timm's own network below it. Importing this module registers with timm:

    name                 pretrained=True loads, but for the stem
    convnext_tiny_cvst   convnext_tiny.fb_in1k
    convnext_small_cvst  convnext_small.fb_in1k
    convnext_base_cvst   convnext_base.fb_in1k
    vit_small_cvst       deit_small_patch16_224.fb_in1k
    vit_base_cvst        deit_base_patch16_224.fb_in1k

Source: Singh, Croce and Hein 2023, "Revisiting Adversarial Training for ImageNet" (arXiv
2303.01870). Keys are those of the authors' checkpoints and of RobustBench.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d, get_act_layer
from timm.models import build_model_with_cfg, convnext, generate_default_cfgs, vision_transformer
from torch import Tensor, nn

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
Activation = str | Callable[[], nn.Module] | None


class ConvStem(nn.Module):
    """3 x 3 convolutions, each with LayerNorm and an activation after it.

    Args:
        in_chans: Channels of the images.
        widths: Channels after each convolution.
        strides: Of each.
        out_chs: Channels after one more 1 x 1 convolution, with nothing after it; None for none.
        act_layer: timm's name of the activation, or its class; None for the paper's, GELU.
    """

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        strides: Sequence[int],
        out_chs: int | None = None,
        *,
        act_layer: Activation = None,
    ) -> None:
        super().__init__()
        activation = get_act_layer(act_layer) or nn.GELU
        self.stem = nn.Sequential()
        for width, stride in zip(widths, strides, strict=True):
            self.stem.append(nn.Conv2d(in_chans, width, 3, stride=stride, padding=1))
            self.stem.append(LayerNorm2d(width))
            self.stem.append(activation())
            in_chans = width
        if out_chs is not None:
            self.stem.append(nn.Conv2d(in_chans, out_chs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, C, h, w], each stride of 2 halving both."""
        return self.stem(x)


class ConvStemConvNeXt(convnext.ConvNeXt):
    """timm's ConvNeXt behind a stem of stride 4.

    Args:
        dims: Channels of each stage. The stem has half as many as the first, then all of them; from
            128 on half, three quarters, and all at stride 1.
        kwargs: timm's, but for its own stem's; ``act_layer`` is the stem's too.
    """

    stem_name = "stem"
    plain_keys = ("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias")

    def __init__(
        self, in_chans: int = 3, *, dims: Sequence[int] = (96, 192, 384, 768), **kwargs: Any
    ) -> None:
        _refuse(kwargs, "stem_type", "patch_size")
        super().__init__(in_chans=in_chans, dims=tuple(dims), **kwargs)
        width = dims[0]
        widths, strides = [width // 2, width], [2, 2]
        if width >= 128:
            widths, strides = [width // 2, 3 * width // 4, width], [2, 2, 1]
        stem = ConvStem(in_chans, widths, strides, act_layer=kwargs.get("act_layer"))
        self.stem = stem  # type: ignore[assignment]


class ConvStemViT(vision_transformer.VisionTransformer):
    """timm's ViT with patches of 16 x 16, made by a stem of stride 16.

    Args:
        embed_dim: Of the tokens, a multiple of 8. The stem has an eighth, a quarter, half and all
            of it, 384 at most, and ends with a 1 x 1 convolution.
        kwargs: timm's, but for the patches'; ``act_layer`` is the stem's too.
    """

    stem_name = "patch_embed.proj"
    plain_keys = ("patch_embed.proj.weight", "patch_embed.proj.bias")

    def __init__(self, *, in_chans: int = 3, embed_dim: int = 384, **kwargs: Any) -> None:
        _refuse(kwargs, "patch_size", "embed_layer")
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, patch_size=16, **kwargs)
        first = min(embed_dim // 8, 48)
        widths = [first, 2 * first, 4 * first, 8 * first]
        act_layer = kwargs.get("act_layer")
        self.patch_embed.proj = ConvStem(in_chans, widths, [2] * 4, embed_dim, act_layer=act_layer)


CONV_STEMS = (ConvStemConvNeXt, ConvStemViT)


def keys_of_plain(model: nn.Module, own: Mapping[str, Tensor]) -> State | None:
    """The keys of timm's own network, whose stem this model's replaces; None for other models.

    Args:
        own: The model's state dict.

    Returns:
        Its entries below the stem, and empty ones for timm's stem.
    """
    if not isinstance(model, CONV_STEMS):
        return None
    below = {k: v for k, v in own.items() if not k.startswith(f"{model.stem_name}.")}
    return below | {key: torch.empty(0) for key in model.plain_keys}


def with_own_stem(
    model: nn.Module, own: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> State:
    """A plain network's weights below the stem, with this model's stem as it is."""
    assert isinstance(model, CONV_STEMS)
    logger.info("%s: the stem is new, all below it is loaded", type(model).__name__)
    below = {key: value for key, value in plain.items() if key not in model.plain_keys}
    return below | {k: v for k, v in own.items() if k.startswith(f"{model.stem_name}.")}


def _filter(convert: Callable[..., State]) -> Callable[[State, nn.Module], State]:
    """timm's filter of what it has read; where that is a plain network, without its stem."""

    def filtered(state: State, model: nn.Module) -> State:
        own = model.state_dict()
        if any(key in state for key in own.keys() - (keys_of_plain(model, own) or {}).keys()):
            return convert(state, model)  # it has a stem such as ours
        assert isinstance(model, CONV_STEMS)
        below = {key: value for key, value in state.items() if key not in model.plain_keys}
        return with_own_stem(model, own, convert(below, model))

    return filtered


def _refuse(kwargs: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in kwargs:
            raise ValueError(f"{name}: the stem here is convolutional and takes none")


def _cfg(plain: str, first_conv: str) -> dict[str, Any]:
    """timm's description of a plain model, with its weights on the hub alone."""
    found = timm.models.get_pretrained_cfg(plain)
    assert found is not None
    cfg = {
        key: value for key, value in found.to_dict().items() if key not in ("architecture", "tag")
    }
    return cfg | {"url": "", "custom_load": False, "first_conv": first_conv}


default_cfgs = generate_default_cfgs(
    {
        "convnext_tiny_cvst": _cfg("convnext_tiny.fb_in1k", "stem.stem.0"),
        "convnext_small_cvst": _cfg("convnext_small.fb_in1k", "stem.stem.0"),
        "convnext_base_cvst": _cfg("convnext_base.fb_in1k", "stem.stem.0"),
        "vit_small_cvst": _cfg("deit_small_patch16_224.fb_in1k", "patch_embed.proj.stem.0"),
        "vit_base_cvst": _cfg("deit_base_patch16_224.fb_in1k", "patch_embed.proj.stem.0"),
    }
)


def _convnext(
    name: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any
) -> ConvStemConvNeXt:
    return build_model_with_cfg(
        ConvStemConvNeXt,
        name,
        pretrained,
        pretrained_filter_fn=_filter(convnext.checkpoint_filter_fn),
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**defaults, **kwargs},
    )


def _vit(name: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> ConvStemViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        ConvStemViT,
        name,
        pretrained,
        pretrained_filter_fn=_filter(vision_transformer.checkpoint_filter_fn),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@timm.models.register_model
def convnext_tiny_cvst(pretrained: bool = False, **kwargs: Any) -> ConvStemConvNeXt:
    """ConvNeXt-T with a convolutional stem."""
    return _convnext("convnext_tiny_cvst", pretrained, kwargs, depths=(3, 3, 9, 3))


@timm.models.register_model
def convnext_small_cvst(pretrained: bool = False, **kwargs: Any) -> ConvStemConvNeXt:
    """ConvNeXt-S with a convolutional stem."""
    return _convnext("convnext_small_cvst", pretrained, kwargs, depths=(3, 3, 27, 3))


@timm.models.register_model
def convnext_base_cvst(pretrained: bool = False, **kwargs: Any) -> ConvStemConvNeXt:
    """ConvNeXt-B with a convolutional stem."""
    about: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
    return _convnext("convnext_base_cvst", pretrained, kwargs, **about)


@timm.models.register_model
def vit_small_cvst(pretrained: bool = False, **kwargs: Any) -> ConvStemViT:
    """ViT-S/16 with a convolutional stem."""
    return _vit("vit_small_cvst", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@timm.models.register_model
def vit_base_cvst(pretrained: bool = False, **kwargs: Any) -> ConvStemViT:
    """ViT-B/16 with a convolutional stem."""
    return _vit("vit_base_cvst", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)
