"""Weights fit many networks: those of other options are refused where it is known that they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from robust_accel.models import ModelSettings, create_classifier, save_model, with_classes_of
from robust_accel.models.classifier import PixelClassifier


def built(name: str, options: dict[str, Any], checkpoint: Path | None = None) -> PixelClassifier:
    path = None if checkpoint is None else str(checkpoint)
    settings = ModelSettings(name=name, options=options, checkpoint=path)
    return create_classifier(settings, num_classes=4).eval()


OPTIONS = [
    ("wide_resnet10_1", {}, {"act_layer": "silu"}, "act_layer relu, the one here silu"),
    ("wide_resnet10_1", {"stem_stride": 2}, {}, "stem_stride 2, the one here 1"),
    ("wide_resnet10_1", {}, {"global_pool": "max"}, "global_pool avg, the one here max"),
    ("test_resnet", {"act_layer": "silu"}, {}, "act_layer silu, the one here its default"),
    ("test_vit", {}, {"num_heads": 4}, "num_heads its default, the one here 4"),
]


@pytest.mark.parametrize(("name", "there", "here", "said"), OPTIONS)
def test_weights_of_other_options_are_refused(
    name: str, there: dict[str, Any], here: dict[str, Any], said: str, tmp_path: Path
) -> None:
    first, x = built(name, there), torch.rand(2, 3, 160, 160)
    save_model(first, tmp_path)
    with pytest.raises(ValueError, match=f"^checkpoint: .* has {said}: give model.options."):
        built(name, here, tmp_path)
    assert built(name, there, tmp_path)(x).equal(first(x))
    assert built(f"local-dir:{tmp_path}", {}, tmp_path)(x).equal(first(x))
    # a file alone does not tell: it is taken
    (tmp_path / "config.json").unlink()
    assert not built(name, here, tmp_path / "model.safetensors")(x).equal(first(x))


def test_names_and_defaults_of_one_option_are_one(tmp_path: Path) -> None:
    save_model(built("wide_resnet10_1", {"act_layer": "silu", "drop_rate": 0.1}), tmp_path)
    for more in ({"act_layer": "swish"}, {"act_layer": "silu", "stem_stride": 1}):
        built("wide_resnet10_1", more, tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", [[0.5, 0.5], [0.5] * 4])
def test_a_mean_of_another_number_of_channels_is_refused(channels: int, given: list[float]) -> None:
    settings = ModelSettings(name="wide_resnet10_1", mean=given, std=given, in_chans=channels)
    with pytest.raises(ValueError, match=rf"mean of the recipe.* has {len(given)} numbers"):
        create_classifier(settings, num_classes=4)


def test_the_rows_of_a_classifier_follow_the_datas_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, x = ("ant", "bee", "cat", "dog"), torch.rand(2, 3, 16, 16)
    first = built("wide_resnet10_1", {})
    first.class_names = names
    save_model(first, tmp_path)

    def start(own: tuple[str, ...] | None) -> torch.Tensor:
        caplog.clear()
        again = built("wide_resnet10_1", {}, tmp_path)
        with_classes_of(again, own)
        assert again.class_names == own
        return again(x)

    for order in ([3, 0, 2, 1], [1, 2, 3, 0]):
        assert start(tuple(names[i] for i in order)).equal(first(x)[:, order])
        assert "put into the data's order" in caplog.text
    assert start(("ant", "bee", "cat", "eel")).equal(first(x))
    assert "is of other classes: model.new_head=true" in caplog.text
    for own in (names, None, ("0", "1", "2", "3")):
        assert start(own).equal(first(x)) and not caplog.records
