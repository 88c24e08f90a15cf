"""How many samples does a certificate need? Published logs replayed, and a real model timed.

replay  For each row of a log (100,000 samples an image), the number of successes is read off the
        radius; the image is then certified again with draws of that probability, by Cohen's rule
        and sequentially. Samples saved, and certified accuracy at each radius, by both.
model   Images and samples a second of both rules on a model, beside a plain loop of forwards.

python benchmarks/certify.py replay
python benchmarks/certify.py model --model preact_resnet18 --images 5
python benchmarks/certify.py model --model runs/cifar10/cpu_gaussian --images 20
"""

import argparse
import csv
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from robust_accel.data import load_test
from robust_accel.evaluation.certify import (
    Sequential,
    SmoothedClassifier,
    certified_accuracy,
    certified_radius,
    looks,
    lower_bound,
    radius_of,
)
from robust_accel.models import ModelSettings, create_classifier
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_classifier, recipe_of

ROOT = Path(__file__).resolve().parent.parent
RADII = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of Table 2
N, N0, ALPHA, BATCH = 100_000, 100, 0.001, 1000


def read_log(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Successes of each row (0 where it abstained), whether it was right, and sigma."""
    sigma = float(re.search(r"sigma(\d+\.\d+)", path.name)[1])  # type: ignore[index]
    with path.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    printed = [row["radius"] for row in rows]
    counts = successes(printed, sigma)
    return counts, np.array([row["correct"] == "1" for row in rows]), sigma


def successes(printed: Sequence[str], sigma: float) -> np.ndarray:
    """The k of n whose radius prints as these digits; 0 for none.

    Raises:
        ValueError: A radius that no k gives.
    """
    ks = np.arange(N // 2, N + 1)
    radii = certified_radius(ks, N, alpha=ALPHA, sigma=sigma)
    values = np.array([float(text) for text in printed])
    nearest = np.searchsorted(radii, values)
    found = np.zeros(len(printed), dtype=np.int64)
    for row, (text, value, at) in enumerate(zip(printed, values, nearest, strict=True)):
        if value == 0:
            continue
        near = range(max(at - 1, 0), min(at + 2, len(ks)))
        # to the digits printed: many k share them where radii are dense
        same = [k for k in near if f"{radii[k]:.3}" == f"{float(text):.3}"]
        if not same:
            raise ValueError(f"row {row}: no count of {N} gives radius {text} at sigma {sigma}")
        found[row] = ks[same[len(same) // 2]]
    return found


def replay(counts: np.ndarray, radii: Sequence[float], sigma: float, seed: int) -> tuple:
    """Samples and radii of each image by the sequential rule, n0 included."""
    rng = np.random.default_rng(seed)
    rule = Sequential(tuple(radii), N, ALPHA, sigma)
    p = np.where(counts > 0, counts / N, 0.5)  # an image that abstained: as hard as it can be
    won, taken = np.zeros(len(p), dtype=np.int64), np.zeros(len(p), dtype=np.int64)
    active = np.arange(len(p))
    for size in looks(N, BATCH):
        won[active] += rng.binomial(size, p[active])
        taken[active] += size
        active = active[~rule.decided(won[active], taken[active])]
        if len(active) == 0:
            break
    return taken + N0, radius_of(rule.bound(won, taken), sigma)


def replay_table(args: argparse.Namespace) -> None:
    print(f"| log | rows | radii | samples, times fewer | {' | '.join(f'r {r}' for r in RADII)} |")
    print("|" + " --- |" * (4 + len(RADII)))
    for path in sorted(args.logs.glob("*.tsv")):
        counts, right, sigma = read_log(path)
        fixed = radius_of(lower_bound(counts, N, ALPHA), sigma)
        exact = certified_accuracy(RADII, right, fixed)
        row = " | ".join(f"{100 * a:.2f}" for a in exact)
        print(f"| {path.stem} | {len(counts)} | as published | 1 | {row} |")
        p = np.where(counts > 0, counts / N, 0.5)
        drawn = [np.random.default_rng(seed).binomial(N, p) for seed in range(args.replays)]
        again = [
            certified_accuracy(RADII, right, radius_of(lower_bound(d, N, ALPHA), sigma))
            for d in drawn
        ]
        row = " | ".join(f"{100 * a:.2f}" for a in np.mean(again, axis=0))
        print(f"| | | fixed n, drawn again | 1 | {row} |")
        for radii in (RADII, (0.25,)):
            replays = [replay(counts, radii, sigma, seed) for seed in range(args.replays)]
            saved = len(counts) * (N + N0) / np.mean([samples.sum() for samples, _ in replays])
            found = np.mean([certified_accuracy(RADII, right, r) for _, r in replays], axis=0)
            cells = [
                f"{100 * a:.2f} ({100 * (a - e):+.2f})" if r in radii else ""
                for r, a, e in zip(RADII, found, exact, strict=True)
            ]
            name = "sequential, seven" if radii == RADII else "sequential, 0.25"
            print(f"| | | {name} | {saved:.1f} | {' | '.join(cells)} |", flush=True)


def model_table(args: argparse.Namespace) -> None:
    """Time on this machine. Random weights take as many samples as an image that is undecided."""
    if RunFolder(args.model).recipe.exists():
        recipe = recipe_of(args.model, (), required=("model", "data"))
        test = load_test(recipe.data)
        classifier = load_classifier(recipe, args.model, test.images, test.num_classes).eval()
        ((images, _),) = test.images.batches([torch.arange(args.images)], torch.device("cpu"))
    else:
        settings = ModelSettings(name=args.model, num_classes=10)
        classifier = create_classifier(settings, in_chans=3).eval()
        images = torch.rand(args.images, 3, 32, 32)
    smoothed = SmoothedClassifier(classifier, 0.25, BATCH)
    rule = Sequential(RADII, args.n, ALPHA, 0.25)

    def plain() -> int:
        batch = torch.rand(BATCH, *images.shape[1:])
        with torch.no_grad():
            for _ in range(max(1, args.images * args.n // BATCH)):
                classifier(batch)
        return max(1, args.images * args.n // BATCH) * BATCH

    def fixed() -> int:
        generator = torch.Generator().manual_seed(0)
        return sum(smoothed.certify(x, N0, args.n, ALPHA, generator).samples for x in images)

    def sequential() -> int:
        generator = torch.Generator().manual_seed(0)
        found = [smoothed.certify_sequentially(x, N0, rule, generator) for x in images]
        return sum(certificate.samples for certificate in found)

    print(f"{args.model}, {torch.get_num_threads()} threads, at most {args.n} samples an image")
    print("| rule | samples | samples/s | images/s | share of the plain loop |")
    print("|---|---|---|---|---|")
    plain()
    base = 0.0
    for name, run in (("plain forwards", plain), ("fixed n", fixed), ("sequential", sequential)):
        start = time.perf_counter()
        samples = run()
        seconds = time.perf_counter() - start
        base = base or samples / seconds
        rate = f"{args.images / seconds:.3f}" if name != "plain forwards" else ""
        share = samples / seconds / base
        print(
            f"| {name} | {samples} | {samples / seconds:.0f} | {rate} | {share:.2f} |", flush=True
        )


def main() -> int:
    data = Path(os.environ.get("ROBUST_ACCEL_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["replay", "model"])
    parser.add_argument("--logs", type=Path, default=data / "certify-logs")
    parser.add_argument("--replays", type=int, default=8, help="draws that are averaged")
    parser.add_argument("--model", default="preact_resnet18_w16", help="or a run's folder")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--n", type=int, default=10_000)
    args = parser.parse_args()
    (replay_table if args.what == "replay" else model_table)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
