"""Training on generated images that stay in their file, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import Forked
from peaks import growth
from PIL import Image
from published_arrays import pixels, write, write_hollow

from robust_accel.data.array_files import stored_array
from robust_accel.data.stored import StoredImages
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train

SMALL = (
    "data.validation_size=0",
    "evaluate.train_images=null",
    "train.epochs=1",
    "train.batch_size=20",
    "train.max_steps=2",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=1",
    "data.test_size=20",
)


def generated(folder: Path, *, compressed: bool = False) -> Path:
    """200 images of the digits' shape."""
    labels = np.arange(200) % 10
    images = pixels(120, (8, 8, 1))
    images = np.concatenate([images, images[:80]])
    return write(folder, compressed=compressed, image=images, label=labels)


def settings(folder: Path, *files: Path, share: float = 0.7) -> tuple[str, ...]:
    found = [f"{{path: {file}, fraction: {share / len(files):g}}}" for file in files]
    value = found[0] if len(found) == 1 else f"[{', '.join(found)}]"
    return (*SMALL, f"output={folder}", f"data.unlabeled={value}")


def test_a_run_trains_on_a_file_and_goes_on_only_with_the_same(tmp_path: Path) -> None:
    file, folder = generated(tmp_path), tmp_path / "run"
    own = settings(folder, file)
    assert train(load_recipe("quickstart", own))["steps"] == 2
    content = dict(np.load(file))
    content["image"][150, 3, 3, 0] ^= 1
    write(tmp_path, **content)
    with pytest.raises(ValueError, match=r"200 images \(digest .* as unlabeled, and now .* 200 im"):
        train(load_recipe("quickstart", own), resume=True)
    generated(tmp_path)
    assert train(load_recipe("quickstart", own), resume=True)["steps"] == 2


def test_crops_of_random_size_are_of_both_kinds_of_images(tmp_path: Path) -> None:
    own = (*settings(tmp_path / "run", generated(tmp_path)), "data.augment=resized_crop_flip")
    own = (*own, "data.crop_scale=0.5", "data.cutout=2")
    assert train(load_recipe("quickstart", own))["steps"] == 2


def test_what_is_read_of_a_file_is_no_part_of_peak_memory(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), dtype=np.uint8)
    file = write_hollow(tmp_path / "made.npz", images, 2**16)
    assert file.stat().st_size > 260e6

    def read() -> None:
        stored = StoredImages(stored_array(str(file), "image").open(), None)
        stored.digest()
        for _ in stored.batches(torch.arange(0, 30_000, 3).split(100), torch.device("cpu")):
            pass

    assert growth(read) < 40e6


@pytest.mark.long
@pytest.mark.launch
def test_two_processes_train_on_a_file_that_one_of_them_has_unpacked(tmp_path: Path) -> None:
    file = generated(tmp_path, compressed=True)
    (tmp_path / "second").mkdir()
    own = settings(tmp_path / "run", file, generated(tmp_path / "second"), share=0.8)
    script = tmp_path / "script.py"  # whose process has imported `datasets` with another cache
    script.write_text(
        "import sys, datasets\n"
        f"datasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'cache')!r}\n"
        "from robust_accel.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    code, output = Forked("train", "quickstart", *own, script=script).wait()
    assert code == 0, output
    assert output.count("is unpacked once") == 2  # images and labels, by one process
    assert len([*(tmp_path / "cache").rglob("*.npy")]) == 2
    checkpoint = RunFolder(tmp_path / "run").steps()[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = manifest["about"]["data"]
    assert data["unlabeled"] == data["unlabeled.1"]  # the same images, compressed or not
    assert data["unlabeled"]["images"] == 200


LIMITED = """
import resource, sys
import numpy as np
from robust_accel.recipe import load_recipe
from robust_accel.training.run import train

mib, file, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
recipe = load_recipe("quickstart", arguments)
used = [line for line in open("/proc/self/status") if line.startswith("VmData")][0].split()[1]
limit = int(used) * 1024 + mib * 2**20  # of all memory but mapped files, what is not touched too
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert train(recipe)["steps"] == 2
try:
    np.load(file)["image"]
except MemoryError:
    sys.exit(0)
sys.exit("the limit does not hold")
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), dtype=np.uint8)
    file = write_hollow(tmp_path / "made.npz", images, 2**20)
    assert file.stat().st_size > 2**32  # four times the limit
    for split in ("train", "test"):
        for i in range(20):
            path = tmp_path / "data" / split / ("dark" if i % 2 else "light") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 64), 10 * i).save(path)
    own = (*settings(tmp_path / "run", file), f"data.path={tmp_path / 'data'}")
    own = (*own, "data.augment=crop_flip")
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, "1024", str(file), *own],
        capture_output=True, text=True, check=False,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
