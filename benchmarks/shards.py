"""How fast are images read from shards, beside a folder, and beside what a model needs? A table.

    python benchmarks/shards.py [--images 600] [--size 224] [--workers 1 2] [--repeats 3]
    python benchmarks/shards.py --model resnet50 --steps 3

The images are JPEGs of 500 x 375 pixels (as ImageNet's are on average), crops of the two
photographs that scikit-learn has, in ten shards and in a folder. An epoch is read shuffled, with
timm's random resized crop and mirror, as training reads it: folder and shards take turns, median
over repetitions, by so many worker processes. CPU ms an image are of all processes: other work on
the machine changes them less than images/s. `index` is what the first run does once: headers and
labels, of as many samples as `--indexed` says, without images.

With `--model`, also what training takes an image: PGD of so many steps, forward, backward.
"""

import argparse
import io
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from robust_accel import PGD, RobustModel
from robust_accel.data import DataSettings, load_test
from robust_accel.data.shards import indexed

CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--indexed", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a timm model")
    parser.add_argument("--steps", type=int, default=3, help="of its attack")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        datasets.config.HF_DATASETS_CACHE = Path(place, "cache")
        index(Path(place), args.indexed)
        write(Path(place), args.images)
        print("| read from | workers | images/s | CPU ms an image |\n|---|---|---|---|")
        for workers in args.workers:
            found: dict[str, list[tuple[float, float]]] = {"a folder": [], "shards": []}
            for _ in range(args.repeats):
                for name, path in (
                    ("a folder", f"{place}/folder"),
                    ("shards", f"{place}/train-*.tar"),
                ):
                    found[name].append(epoch(path, args.size, args.batch, workers))
            for name, times in found.items():
                wall, cpu = (median(column) for column in zip(*times, strict=True))
                rate, cost = args.images / wall, 1e3 * cpu / args.images
                print(f"| {name} | {workers} | {rate:.0f} | {cost:.1f} |")
    if args.model:
        need(args.model, args.steps, args.size)


def write(place: Path, number: int) -> None:
    """The same images in a folder and in ten shards."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(number):
        photo = photos[i % 2]
        top, left = rng.integers(0, photo.shape[0] - 300), rng.integers(0, photo.shape[1] - 400)
        crop = Image.fromarray(photo[top : top + 300, left : left + 400]).resize((500, 375))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=92)
        folder = place / "folder" / "train" / str(i % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(file.getvalue())
        with tarfile.open(place / f"train-{i * 10 // number}.tar", "a") as shard:
            add(shard, i, file.getvalue())


def add(shard: tarfile.TarFile, number: int, image: bytes) -> None:
    for ending, content in (("jpg", image), ("cls", str(number % CLASSES).encode())):
        member = tarfile.TarInfo(f"{number:08}.{ending}")
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))


def index(place: Path, number: int) -> None:
    """Of one shard, read from memory: what a disk takes to find its headers comes on top."""
    with tarfile.open(place / "index.tar", "w") as shard:
        for i in range(number):
            add(shard, i, b"")
    start, before = time.perf_counter(), cpu_seconds()
    indexed([str(place / "index.tar")])
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    print(f"index: {number / wall:,.0f} samples/s, {1e6 * cpu / number:.0f} CPU us a sample\n")


def epoch(path: str, size: int, batch: int, workers: int) -> tuple[float, float]:
    """Seconds of a shuffled epoch: by the clock, and of all processes' CPUs."""
    about = {"in_memory": False, "image_size": size, "num_workers": workers, "augment": "timm"}
    images = load_test(DataSettings(path=path, test_split="train", **about)).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(batch)
    start, before = time.perf_counter(), cpu_seconds()
    for _ in images.batches(order, torch.device("cpu"), 0):
        pass
    return time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process, and of its workers that have ended."""
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in of)


def need(name: str, steps: int, size: int) -> None:
    torch.manual_seed(0)
    model = RobustModel(timm.create_model(name, num_classes=CLASSES), PGD(num_steps=steps)).train()
    x, labels = torch.rand(8, 3, size, size), torch.arange(8) % CLASSES

    def seconds() -> Iterator[float]:
        for _ in range(3):
            start = cpu_seconds()
            model(x, labels)["loss"].backward()
            yield cpu_seconds() - start

    cost = 1e3 * median(seconds()) / len(x)
    print(
        f"\n{name}, PGD-{steps}: {cost:.0f} CPU ms an image on one thread ({os.cpu_count()} cores)"
    )


if __name__ == "__main__":
    main()
