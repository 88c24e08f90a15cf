"""Files of arrays as others publish generated images: a row's first pixel tells its number."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def pixels(number: int, shape: tuple[int, int, int] = (5, 6, 3)) -> np.ndarray:
    """Images with the numbers from 100 on: uint8 [N, H, W, C]."""
    found = np.random.default_rng(0).integers(0, 256, (number, *shape), dtype=np.uint8)
    found[:, 0, 0, 0] = 100 + np.arange(number)
    return found


def arrays(number: int = 8, **others: Any) -> dict[str, Any]:
    """As EDM's images are published; three classes."""
    return {"image": pixels(number), "label": np.arange(number) % 3} | others


def write(folder: Path, *, compressed: bool = False, **content: Any) -> Path:
    path = folder / "made.npz"
    save: Any = np.savez_compressed if compressed else np.savez
    save(path, **content)
    return path


def write_folder(folder: Path, images: Any, labels: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", images)
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    return folder


def write_hollow(path: Path, images: np.ndarray, number: int) -> Path:
    """A ``.npz`` of so many images, the first of which are given and the others a hole of zeros."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("label.npy", "w") as file:
            np.lib.format.write_array(file, np.arange(number) % 2)
        assert archive.fp is not None
        info = zipfile.ZipInfo("image.npy")
        info.CRC, info.header_offset = 0, archive.fp.tell()
        shape = (number, *images.shape[1:])
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        info.file_size = info.compress_size = 128 + int(np.prod(shape))
        archive.fp.write(info.FileHeader(zip64=True))
        start = archive.fp.tell()
        np.lib.format.write_array_header_1_0(archive.fp, about)
        assert archive.fp.tell() - start == 128
        archive.fp.write(images.tobytes())
        archive.fp.seek(start + info.file_size)
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
        archive.start_dir = archive.fp.tell()  # type: ignore[attr-defined]
        archive._didModify = True  # type: ignore[attr-defined]
    return path
