"""Published CIFAR networks whose code names the parts otherwise: their checkpoints load into ours.

Only networks that compute what ours do, whatever the weights: the tests compare logits. Most such
files hold no mean and std of the pixels, so what the code does with pixels is said. Networks that
are known to compute something else are refused by name.

Names are those of the code of TRADES, AWP, fast_adversarial and RobustBench, which were compared.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from robust_accel.data.classes import tell
from robust_accel.models.checkpoint_files import FoundWeights, find_weights, keys_of
from robust_accel.models.cifar import CifarResNet, PreActResNet, WideResNet
from robust_accel.models.classifier import PixelClassifier
from robust_accel.models.timm_folder import Surroundings

_COUNTER = "num_batches_tracked"  # torch before 0.4.1 saves none, and here it changes nothing
# of all their code
_MODEL_ARGS: dict[str, Any] = {"act_layer": "relu", "global_pool": "avg", "stem_stride": 1}


@dataclass(frozen=True)
class _Published:
    """A network of others that computes what one of ours does.

    Attributes:
        said: What it is called.
        network: Ours.
        marks: Keys of theirs, as patterns, that tell it from others.
        names: Parts of our keys, and of theirs in their place, one after the other.
        pixels: What such networks do with pixels.
        unused: A module that their code makes and never calls.
        alike: Of networks that have the same keys and compute something else.
    """

    said: str
    network: type[CifarResNet]
    marks: tuple[str, ...]
    names: Mapping[str, str]
    pixels: str
    unused: str | None = None
    alike: str | None = None

    def key(self, ours: str) -> str:
        for part, theirs in self.names.items():
            ours = ours.replace(part, theirs)
        return ours


@dataclass(frozen=True)
class _Refused:
    """A network that none of ours computes: it has some keys and lacks another (patterns)."""

    said: str
    marks: tuple[str, ...]
    lacks: str | None = None


_NORMS = {".norm1.": ".bn1.", ".norm2.": ".bn2."}
_PUBLISHED = (
    _Published(
        said="the WideResNet of TRADES, AWP and RobustBench",
        network=WideResNet,
        marks=(r"block1\.layer\.0\.bn1\.weight",),
        names={"stem.": "conv1."}
        | {f"stages.{i}.": f"block{i + 1}.layer." for i in range(3)}
        | _NORMS
        | {".shortcut.": ".convShortcut.", "norm.": "bn1.", "head.fc.": "fc."},
        pixels="of TRADES and most of RobustBench take pixels in [0, 1] as they are "
        "(model.mean=0 model.std=1), others normalise them",
        unused="sub_block1",
    ),
    _Published(
        said="the PreActResNet of AWP and RobustBench",
        network=PreActResNet,
        marks=(r"layer1\.0\.bn1\.weight", r"bn\.weight", r"linear\.weight"),
        names={"stem.": "conv1."}
        | {f"stages.{i}.": f"layer{i + 1}." for i in range(4)}
        | _NORMS
        | {".shortcut.": ".shortcut.0.", "norm.": "bn.", "head.fc.": "linear."},
        pixels="of AWP and most of RobustBench normalise pixels by the mean and std of their "
        "images, others take [0, 1] as they are (model.mean=0 model.std=1)",
        alike="its shortcuts take activated inputs. That of fast_adversarial has the same keys, "
        "and shortcuts that take inputs as they are: its weights do not belong here",
    ),
)
_REFUSED = (
    _Refused(
        "DeepMind's network, which pads on one side where it halves the image (most have SiLU too)",
        marks=(r"batchnorm_0\.weight", r"logits\.weight"),
    ),
    _Refused(
        "a network with BatchNorm in its shortcuts, such as the post-activation ResNet-18",
        marks=(r"layer2\.0\.shortcut\.1\.weight", r"linear\.weight"),
    ),
    _Refused(
        "a PreActResNet without BatchNorm after the last stage, such as Fast AT's",
        marks=(r"layer1\.0\.bn1\.weight", r"linear\.weight"),
        lacks=r"bn\.weight",
    ),
    _Refused(
        "a WideResNet whose classifier has no bias, such as Pang et al.'s of normalised features",
        marks=(r"block1\.layer\.0\.bn1\.weight", r"fc\.weight"),
        lacks=r"fc\.bias",
    ),
)


def find_published(content: Any, model: nn.Module) -> FoundWeights | None:
    """Find the weights of a network of ``cifar.py`` under the names of other code.

    Args:
        content: Of the file, from ``read_weights``.
        model: That the weights are for.

    Returns:
        By the model's own keys, its counters of batches as they are; None where the file is not
        known to be of other code, or the model is none of ``cifar.py``.

    Raises:
        ValueError: The file holds another network than the model, or not all of it.
    """
    if not isinstance(model, CifarResNet):
        return None
    keys = keys_of(content)
    for other in _REFUSED:
        if _has(keys, *other.marks) and not (other.lacks and _has(keys, other.lacks)):
            raise ValueError(f"it holds {other.said}: no network here computes that")
    known = next((code for code in _PUBLISHED if _has(keys, *code.marks)), None)
    if known is None:
        return None
    if not isinstance(model, known.network):
        raise ValueError(f"it holds {known.said}: it fits none but {known.network.__name__}")
    if known.alike:
        tell(f"checkpoint: taken for {known.said}: {known.alike}")
    return _found(content, keys, model.state_dict(), known)


def _found(
    content: Any, keys: Set[str], own: Mapping[str, Tensor], known: _Published
) -> FoundWeights:
    theirs = {key: known.key(key) for key in own if not key.endswith(_COUNTER)}
    unused = re.compile(rf"(^|\.){known.unused}\.") if known.unused else None
    found = find_weights(content, {theirs[key]: own[key] for key in theirs}, unused)
    said = f"{found.said}; by the names of {known.said}"
    if unused and any(unused.search(key) for key in keys):
        said += f", whose {known.unused} no code calls: left"
    weights = {key: found.weights[theirs[key]] for key in theirs}
    found = replace(found, weights={**own, **weights}, said=said)
    return replace(found, model_args=_MODEL_ARGS, pixels=known.pixels)


def with_code(around: Surroundings, found: FoundWeights, path: str) -> Surroundings:
    """What stands beside weights, and what is known of the code whose names they have."""
    if around.model_args is None and found.model_args is not None:
        around = replace(around, model_args=found.model_args, said=around.said or path)
    return around if found.statistics else replace(around, pixels=found.pixels)


def tell_pixels(classifier: PixelClassifier, start: Surroundings) -> None:
    """Warn where published weights come without a mean and std, and the classifier has some."""
    mean, std = (value.flatten().tolist() for value in (classifier.mean, classifier.std))
    if not start.pixels or start.statistics or (not any(mean) and {*std} == {1.0}):
        return
    here = "; ".join(", ".join(f"{v:.4g}" for v in values) for values in (mean, std))
    tell(
        f"model: {classifier.weights_source} comes without mean and std of the pixels: networks "
        f"{start.pixels}. Here they are {here} ({classifier.statistics_source})"
    )


def _has(keys: Set[str], *patterns: str) -> bool:
    """Whether there is a key for each pattern, after any prefix."""
    return all(any(re.search(rf"(^|\.){p}$", key) for key in keys) for p in patterns)
