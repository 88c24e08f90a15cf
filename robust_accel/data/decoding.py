"""Encoded images to 8 bits of grey or RGB; what cannot be shown so is refused by name."""

import functools
import io
import os
import warnings
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from robust_accel.data.addresses import check_address
from robust_accel.data.shards import PLACE, ShardChanged, read_place

# Pixels in a file of their own. PIL knows more: EPS starts Ghostscript, IPTC opens what is inside.
_FORMATS = {
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM",
    "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP",
}  # fmt: skip
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_COLOUR = ("RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION = 274  # tag of EXIF
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
SKIP = "data.on_bad: skip leaves such images out"
_MOST_PIXELS = 178_956_970  # PIL's own limit, if nobody has switched it off
_PATIENCE = 20  # seconds in which an address must answer
_MAIN_IS_FIRST = ("MPO", "PSD")  # a photo and its previews, a picture and its layers


class UnusableImage(ValueError):
    """An image that is missing, damaged or several, or whose pixels 8 bits cannot show surely."""

    of_one_process = True  # where training comes to it, the others do not know of it


# ---- one image ---------------------------------------------------------------------------------


def open_image(encoded: dict[str, Any] | None) -> Image.Image:
    """Decode what ``datasets.Image(decode=False)`` gives, upright, as ``eight_bits`` says.

    Raises:
        UnusableImage: Why not.
    """
    if encoded is None:
        raise UnusableImage("is missing")
    try:
        image = _opened(encoded["bytes"], encoded["path"])
        if image.width * image.height > _MOST_PIXELS:
            raise UnusableImage(f"has {image.width} x {image.height} pixels, a bomb by its header")
        if image.format not in _MAIN_IS_FIRST and getattr(image, "n_frames", 1) > 1:
            raise UnusableImage(f"holds {image.n_frames} frames, not one")  # type: ignore[attr-defined]
        image.load()
        levels = _levels(image)  # of the file: a turned image has forgotten it
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return eight_bits(image, levels)
    except (UnusableImage, MemoryError):
        raise
    except Exception as error:  # a broken file may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnusableImage(f"cannot be read ({text})") from error


def _opened(content: bytes | None, path: str | None) -> Image.Image:
    """An image whose header alone is read."""
    if content is None and path is not None and "://" in path:
        check_address(path)
        # datasets asks a server that does not answer twenty times
        by_http = path.startswith(("http://", "https://"))
        with urlopen(path, timeout=_PATIENCE) if by_http else xopen(path, "rb") as file:
            content = file.read()
    if content is not None:
        source: str | io.BytesIO = io.BytesIO(content)
    elif path is not None and os.path.isfile(path):  # reading a pipe would wait for ever
        source = path
    else:
        raise UnusableImage("is missing")
    if (os.path.getsize(source) if isinstance(source, str) else source.getbuffer().nbytes) == 0:
        raise UnusableImage("is empty")
    try:
        with warnings.catch_warnings():  # of half that size
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        raise UnusableImage(_of_another_format(source)) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this PIL can read, in its own order: the vaguest come last."""
    Image.init()
    return tuple(name for name in Image.ID if name in _FORMATS)


def _of_another_format(source: str | io.BytesIO) -> str:
    """What is wrong with a file that is in none of the formats, by its first bytes."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            start = file.read(16)
    else:
        start = source.getvalue()[:16]
    for name in Image.ID:
        accepts = Image.OPEN[name][1]
        if name not in _FORMATS and accepts is not None and accepts(start) is True:
            return f"has the format {name}; allowed are {', '.join(sorted(_FORMATS))}"
    return "has no format that PIL knows"


def eight_bits(image: Image.Image, levels: int | None = None) -> Image.Image:
    """An image of any of PIL's modes as one of mode ``L`` or ``RGB``.

    Grey stays grey: one bit, more than 8 (scaled by their depth), a palette of greys. An alpha
    channel that hides nothing is dropped.

    Args:
        levels: The value of white where a grey image has more than 8 bits, negative where white is
            0; None: not known.

    Raises:
        UnusableImage: Transparent pixels, as what they show is up to the background; modes ``I``
            and ``F`` without a known range; ``LAB``, for which PIL has no conversion.
    """
    if image.mode.startswith("I"):  # I, I;16, I;16L, I;16B, I;16N
        return _of_many_levels(image, levels)
    own_palette = image.palette if image.mode in ("P", "PA") else None
    grey = image.mode in ("1", "L", "LA", "La")
    if own_palette is not None:
        colours = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
        grey = bool((colours == colours[:, :1]).all())
        if own_palette.mode.endswith("A") or "transparency" in image.info:
            image = image.convert("RGBA")
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        if image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            raise UnusableImage("has transparent pixels: put it on a background first")
        return image.convert("L" if grey else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "P") or image.mode in _COLOUR:
        return image.convert("L" if grey else "RGB")
    raise UnusableImage(f"has the mode {image.mode}, which 8 bits a channel cannot show")


def _levels(image: Image.Image) -> int | None:
    """White of a grey image of more than 8 bits, as its file says: negative if 0 is white."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.tag_v2  # type: ignore[attr-defined]
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
        return -white if tags.get(_PHOTOMETRIC) == 0 else white
    # older PIL reads 16 bits of PNG and PPM as I, and scales a PPM's own range to them
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 2**16 - 1
    return None


def _of_many_levels(image: Image.Image, levels: int | None) -> Image.Image:
    if levels is None and image.mode != "I":
        levels = 2**16 - 1
    if levels is None:
        raise UnusableImage("has the mode I, of unknown range: save it in 8 or 16 bits")
    pixels, white = np.asarray(image).astype(np.int64), abs(levels)
    if pixels.min() < 0 or pixels.max() > white:
        raise UnusableImage(f"has pixels from {pixels.min()} to {pixels.max()}, white is {white}")
    if (pixels == image.info.get("transparency", -1)).any():
        raise UnusableImage("has transparent pixels: put it on a background first")
    pixels = white - pixels if levels < 0 else pixels
    return Image.fromarray(((pixels * 255 + white // 2) // white).astype(np.uint8))


# ---- many --------------------------------------------------------------------------------------


class Source:
    """The image column of a split, undecoded.

    Args:
        rows: All rows of the split, in its own order.
        column: Of images.
        where: The split in words, for errors.
    """

    def __init__(self, rows: datasets.Dataset, column: str, where: str) -> None:
        self.where = where
        self.mode = rows.features[column].mode  # that the data set's author asks for
        undecoded = datasets.Image(decode=False)
        self.in_shards = PLACE in rows.features
        kept = [column, PLACE] if self.in_shards else [column]
        self._rows = rows.select_columns(kept).cast_column(column, undecoded)
        self.column = column

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, number: int) -> dict[str, Any] | None:
        """``bytes`` and ``path`` of a row, one of which may be None.

        Raises:
            ShardChanged: As ``read_place``.
        """
        found = self._stored(self.column, number)
        if not self.in_shards:
            return found
        content = read_place(self._stored(PLACE, number))
        return None if content is None else found | {"bytes": content}

    def _stored(self, column: str, number: int) -> Any:
        return self._rows.data.column(column)[number].as_py()  # a tenth of what rows[] takes

    def decode(self, number: int) -> Image.Image:
        """The image of a row, of mode ``L`` or ``RGB``.

        Raises:
            UnusableImage: ``path: image 3 of ... (cat/3.png) ...``.
        """
        try:
            image = open_image(self.encoded(number))
        except ShardChanged as error:
            raise UnusableImage(f"path: {self.name(number)} {error}") from error
        except UnusableImage as error:
            raise UnusableImage(f"path: {self.name(number)} {error}; {SKIP}") from error
        return image.convert(self.mode) if self.mode in ("L", "RGB") else image

    def name(self, number: int) -> str:
        """A row in words."""
        stored = self._stored(self.column, number)
        file = f" ({stored['path']})" if stored and stored["path"] else ""
        return f"image {number} of {self.where}{file}"

    def paths(self) -> list[str | None]:
        """The file names that the rows remember, of images in files of their own or not."""
        return pc.struct_field(self._rows.data.column(self.column), "path").to_pylist()

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of the encoded images of some rows, without reading them; -1: not there."""
        if self.in_shards:
            return pc.struct_field(self._rows.data.column(PLACE), "size").to_numpy()[numbers]
        content = pc.struct_field(self._rows.data.column(self.column), "bytes")
        sizes = pc.fill_null(pc.binary_length(content), -1).to_numpy().astype(np.int64)[numbers]
        if (sizes < 0).any():
            paths = self.paths()
            for i in np.flatnonzero(sizes < 0):
                path = paths[numbers[i]]
                sizes[i] = os.path.getsize(path) if path and os.path.exists(path) else -1
        return sizes

    def content(self, number: int) -> bytes:
        """The encoded image of a row; nothing where there is none."""
        encoded = self.encoded(number) or {"bytes": b"", "path": None}
        if encoded["bytes"] is not None:
            return encoded["bytes"]
        try:
            with open(encoded["path"], "rb") as file:
                return file.read()
        except (OSError, TypeError):
            return b""


@dataclass(frozen=True)
class Pictures:
    """Encoded images, each of which remembers the split and the row it came from.

    Args:
        sources: Splits.
        source: Each image's, by its place in ``sources``: [N].
        numbers: Each image's row there: [N].
    """

    sources: tuple[Source, ...]
    source: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, source: Source, numbers: Tensor) -> "Pictures":
        """Some rows of one split: numbers [N]."""
        return cls((source,), np.zeros(len(numbers), dtype=np.int8), numbers.numpy())

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, indices: Tensor) -> "Pictures":
        chosen = indices.numpy()
        return Pictures(self.sources, self.source[chosen], self.numbers[chosen])

    def joined(self, other: "Pictures") -> "Pictures":
        return Pictures(
            self.sources + other.sources,
            np.concatenate([self.source, other.source + len(self.sources)]),
            np.concatenate([self.numbers, other.numbers]),
        )

    def decode(self, index: int) -> Image.Image:
        """See ``Source.decode``."""
        return self.sources[self.source[index]].decode(int(self.numbers[index]))

    def name(self, index: int) -> str:
        """See ``Source.name``."""
        return self.sources[self.source[index]].name(int(self.numbers[index]))

    def content(self, index: int) -> bytes:
        """See ``Source.content``."""
        return self.sources[self.source[index]].content(int(self.numbers[index]))

    def sizes(self) -> np.ndarray:
        """See ``Source.sizes``: [N]."""
        sizes = np.zeros(len(self), dtype=np.int64)
        for number, source in enumerate(self.sources):
            own = self.source == number
            sizes[own] = source.sizes(self.numbers[own])
        return sizes
