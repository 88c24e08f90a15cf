"""What becomes of images in each of PIL's modes, in memory and from files alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered_images import CPU, image, settings
from PIL import Image

from robust_accel.data import FileImages, MemoryImages, load_data, load_test
from robust_accel.data.decoding import UnusableImage, eight_bits

GREY = np.arange(0, 240, 8, dtype=np.uint8).reshape(5, 6)  # 0 to 232


def many_levels(white: int, dtype: str = "uint16") -> np.ndarray:
    """GREY in another range: where 8 bits say 255, this says ``white``."""
    return (GREY.astype(np.float64) / 255 * white).round().astype(dtype)


def folder(tmp_path: Path, save: Any) -> Path:
    """Two images in each split and class, which ``save`` writes to a path without an ending."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                save(tmp_path / split / name / f"{name}{i}")
    return tmp_path


def saved(picture: Image.Image, ending: str, **options: Any) -> Any:
    return lambda path: picture.save(path.with_suffix(f".{ending}"), **options)


FORMATS = {
    "8-bit png": saved(Image.fromarray(GREY), "png"),
    "16-bit png": saved(Image.fromarray(many_levels(2**16 - 1)), "png"),
    "16-bit tiff": saved(Image.fromarray(many_levels(2**16 - 1)), "tif"),
    "16-bit tiff with an orientation": saved(
        Image.fromarray(many_levels(2**16 - 1)), "tif", tiffinfo={274: 1}
    ),
    "16-bit big-endian": saved(
        Image.frombytes("I;16B", (6, 5), many_levels(2**16 - 1, ">u2").tobytes()), "tif"
    ),
    "16-bit pgm": lambda path: path.with_suffix(".pgm").write_bytes(
        b"P5 6 5 65535\n" + many_levels(2**16 - 1, ">u2").tobytes()
    ),
    "10-bit pgm": lambda path: path.with_suffix(".pgm").write_bytes(
        b"P5 6 5 1023\n" + many_levels(1023, ">u2").tobytes()
    ),
    "opaque alpha": saved(
        Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (6, 5), 255))), "png"
    ),
    "palette of greys": saved(Image.fromarray(GREY).convert("P"), "png"),
    "colour key that no pixel has": saved(Image.fromarray(GREY), "png", transparency=255),
}


@pytest.mark.parametrize("name", FORMATS)
def test_grey_of_any_depth_is_one_channel_of_the_same_shades(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path, FORMATS[name])
    data = load_data(settings(path))
    assert isinstance(data.train, MemoryImages)
    assert data.shape == (1, 5, 6)
    expected = torch.from_numpy(GREY.astype(int)).expand(4, 1, 5, 6)
    torch.testing.assert_close(data.train.images.int(), expected.int(), atol=1, rtol=0)
    # from files too, where every image has three channels
    files = load_test(settings(path, in_memory=False, image_size=5, num_workers=0)).images
    ((x, _),) = files.batches([torch.arange(4)], CPU)
    assert x.shape == (4, 3, 5, 5)
    assert (x[:, 0] == x[:, 1]).all() and 0.2 < x.mean() < 0.7
    assert x.min() < 0.2 and 0.7 < x.max() < 1


def test_colours_arrive_as_they_are_whatever_they_were_saved_as(tmp_path: Path) -> None:
    picture = image(3)
    expected = np.asarray(picture)
    opaque = picture.convert("RGBA")
    for other in (picture, opaque, picture.convert("RGBX"), picture.quantize(256)):
        found = eight_bits(other)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(other.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(eight_bits(opaque)), expected)
    for mode in ("CMYK", "YCbCr", "HSV"):
        found = np.asarray(eight_bits(picture.convert(mode))).astype(int)
        assert np.abs(found - expected).max() < 12, mode


def test_every_mode_of_pil_is_shown_or_refused_by_name() -> None:
    """None is clipped to white: what 8 bits cannot show says so."""
    shown, refused = set(), set()
    for mode in Image.MODES:
        try:
            assert eight_bits(Image.new(mode, (4, 3))).mode in ("L", "RGB")
            shown.add(mode)
        except UnusableImage as error:
            if f"mode {mode}," in str(error) or "transparent" in str(error):  # alpha is 0 here
                refused.add(mode)
    assert shown | refused == set(Image.MODES)
    assert refused >= {"I", "F", "LAB", "RGBA"}
    assert shown >= {"1", "L", "RGB", "CMYK", "YCbCr", "HSV"}
    assert eight_bits(Image.new("1", (2, 2), 1)).getextrema() == (255, 255)


REFUSED = {
    "float": (saved(Image.fromarray(GREY.astype(np.float32)), "tif"), "mode F"),
    "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "tif"), "mode I, of unknown range"),
    "transparent": (saved(Image.new("RGBA", (6, 5), (9, 9, 9, 254)), "png"), "transparent pixels"),
    "transparent grey": (saved(Image.new("LA", (6, 5), (9, 0)), "png"), "transparent pixels"),
    "transparent colour": (
        saved(Image.fromarray(GREY), "png", transparency=int(GREY[2, 2])),
        "transparent pixels",
    ),
    "transparent 16 bits": (
        saved(Image.fromarray(many_levels(2**16 - 1)), "png", transparency=0),
        "transparent pixels",
    ),
    "transparent palette": (
        saved(image(1).quantize(16), "png", transparency=3),
        "transparent pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pixels_without_a_sure_meaning_are_refused_and_the_file_is_named(
    tmp_path: Path, name: str
) -> None:
    save, message = REFUSED[name]
    path = folder(tmp_path, save)
    pattern = rf"^(data\.)?path: image 0 of split test of .*a0\.(png|tif)\) has .*{message}"
    with pytest.raises(ValueError, match=pattern):
        load_test(settings(path))
    options = {"in_memory": False, "image_size": 5}
    for num_workers in (0, 1):
        files = load_test(settings(path, num_workers=num_workers, **options)).images
        assert isinstance(files, FileImages)
        with pytest.raises(ValueError, match=pattern) as caught:
            list(files.batches([torch.arange(4)], CPU))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):  # all of them
        load_test(settings(path, on_bad="skip"))


def test_white_that_is_zero_and_upright_pixels(tmp_path: Path) -> None:
    negative = many_levels(2**16 - 1).max() - many_levels(2**16 - 1)
    for folder_name, info in (("plain", {}), ("inverted", {262: 0})):
        file = tmp_path / folder_name / "train" / "x" / "0.tif"
        for name in ("x", "y"):
            (file.parent.parent / name).mkdir(parents=True)
            Image.fromarray(negative).save(
                file.parent.parent / name / "0.tif", tiffinfo={274: 3, **info}
            )
    plain, inverted = (
        load_test(settings(tmp_path / name, test_split="train")).images.images.int()
        for name in ("plain", "inverted")
    )
    torch.testing.assert_close(plain + inverted, torch.full_like(plain, 255), atol=1, rtol=0)
    # turned by half a circle, as the file says
    assert plain[0, 0, 0, 0] < plain[0, 0, -1, -1]
