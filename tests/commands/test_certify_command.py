"""The certify command: the log it writes, how it goes on, and what it refuses."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.__main__ import main
from robust_accel.commands.certify import certify_model
from robust_accel.data import MemoryImages
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.certify import SmoothedClassifier, lower_bound, radius_of
from robust_accel.evaluation.certify_images import (
    COLUMNS,
    CertifySettings,
    certify_images,
    rounded_down,
    summary,
)
from robust_accel.evaluation.ledger import Ledger
from robust_accel.exit_codes import NO_MEMORY
from robust_accel.models import PixelClassifier
from robust_accel.recipe import load_recipe
from robust_accel.training.run import train

SETTINGS = ("certify.sigma=0.1", "certify.n=500", "certify.images=8", "certify.skip=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = ["train.epochs=2", "attack.num_steps=1", "attack.step_size=0.2"]
    settings += ["data.train_size=600", "evaluate.autoattack=null", "evaluate.pgd=null"]
    train(load_recipe("quickstart", [*settings, f"output={folder}"]))
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "certify" / "certify.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def without_time(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in rows(folder)]


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_the_fields_log_a_table_and_a_plot(
    run: Path, tmp_path: Path, method: str, pictures: None
) -> None:
    output = f"output={tmp_path / 'certified'}"
    folder, _ = certify_model(str(run), [*SETTINGS, output, f"certify.method={method}"])
    found = rows(folder.path)
    assert tuple(found[0]) == COLUMNS
    assert [int(row["idx"]) for row in found] == list(range(0, 24, 3))
    for row in found:
        radius, predict = float(row["radius"]), int(row["predict"])
        assert (predict == -1) == (radius == 0)
        assert row["correct"] == str(int(predict == int(row["label"])))
    (report,) = folder.read_report()["measurements"]
    assert report["images"]["n"] == 8
    assert report["images"]["selection"] == "one in 3, 8 images"
    at = {point["radius"]: point["accuracy"] for point in report["radii"]}
    reachable = [point["radius"] for point in report["radii"] if point["reachable"]]
    assert reachable == [0.05, 0.1, 0.15, 0.2]
    known = {"cohen": 0.5, "sequential": 0.2}[method]  # of the radii that can be reached
    assert max(report["curve"]["radius"]) == pytest.approx(known)
    right = [float(r["radius"]) >= 0.05 and r["correct"] == "1" for r in found]
    assert at[0.05] == pytest.approx(sum(right) / 8)
    assert at[0.05] > 0 and at[0.5] == 0
    most = {"cohen": 600, "sequential": 599}[method]
    assert report["samples_per_image"] <= most
    assert "certified.png" in (folder.path / "report.md").read_text()
    assert (folder.path / "figures" / "certified.png").exists()


def test_too_little_memory_is_a_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in any command."""
    words = ["certify.batch_size=2147483647", "certify.n=2000000000", f"output={tmp_path / 'new'}"]
    assert main(["certify", str(run), *SETTINGS, *words]) == NO_MEMORY
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"robust-accel: too little memory \(.*\): .*certify\.batch_size .*", said)


class Killed(Exception):
    pass


def test_killed_it_goes_on_and_writes_the_same_log(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = certify_model(str(run), [*SETTINGS, f"output={tmp_path / 'whole'}"])
    certify, calls = SmoothedClassifier.certify, 0

    def deadly(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return certify(*arguments, **options)

    monkeypatch.setattr(SmoothedClassifier, "certify", deadly)
    killed = [*SETTINGS, f"output={tmp_path / 'killed'}"]
    with pytest.raises(Killed):
        certify_model(str(run), killed)
    (part,) = (tmp_path / "killed" / "measurements").glob("process-*.jsonl")
    with part.open("a") as file:
        file.write('{"key": "9", "radius"')
    certify_model(str(run), killed)
    assert calls == 4 + 5
    assert without_time(tmp_path / "killed") == without_time(whole.path)
    certify_model(str(run), killed)  # nothing is left to do
    assert calls == 9
    more, _ = certify_model(str(run), [*killed, "certify.images=10"])
    assert calls == 11 and len(rows(more.path)) == 10


def test_another_certification_stands_beside_the_first(run: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'certified'}"
    folder, _ = certify_model(str(run), [*SETTINGS, output])
    (first,) = folder.read_report()["measurements"]
    certify_model(str(run), [*SETTINGS, output, "certify.sigma=0.2"])
    both = folder.read_report()["measurements"]
    assert both[0] == first
    assert [row["attack"]["sigma"] for row in both] == [0.1, 0.2]


def test_the_same_labels_with_other_pixels_are_certified_anew(tmp_path: Path) -> None:
    """Another crop, another encoding: the first log, byte for byte, would say nothing of them."""
    classifier = PixelClassifier(Bright())
    labels = torch.ones(6, dtype=torch.int64)
    settings = CertifySettings(sigma=0.1, n=100, n0=10, alpha=0.05, radii=(0.05,))
    found = []
    for level in (255, 100):
        images = MemoryImages(torch.full((6, 1, 2, 2), level, dtype=torch.uint8), labels)
        accelerator = Accelerator(cpu=True)
        ledger = Ledger(tmp_path, accelerator)
        bench = Bench(classifier, images, accelerator, batch_size=1, ledger=ledger)
        found.append(certify_images(bench, torch.arange(6), settings)["accuracy"])
    assert found == [1, 0]


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_radii_out_of_reach_are_said_before_anything_is_spent(method: str) -> None:
    settings = CertifySettings(sigma=0.5, n=200, alpha=0.001, radii=(0.5, 0.95, 1.0), method=method)
    assert settings.doubt is not None and "radii: 0.95, 1 cannot be certified" in settings.doubt
    every = np.arange(0, 201)
    alpha = 0.001 if method == "cohen" else 0.0005
    reached = radius_of(lower_bound(every, 200, alpha), 0.5).max()
    assert settings.largest_radius == pytest.approx(reached)
    assert CertifySettings(sigma=0.5, n=200, radii=(0.5,)).doubt is None


@pytest.mark.parametrize("radius", [0.4574, 0.45799, 0.1, 0.0001239, 1.9957, 0.2])
def test_written_radii_are_never_larger_than_they_are(radius: float) -> None:
    shown = float(rounded_down(radius))
    assert shown <= radius and shown == pytest.approx(radius, rel=0.01)


def test_a_sequential_curve_ends_where_nothing_is_known() -> None:
    per_image = {"label": [1], "prediction": [1], "radius": [0.12], "samples": [100]}
    settings = CertifySettings(sigma=0.1, n=200, radii=(0.05, 0.1), method="sequential")
    assert max(summary(settings, per_image)["curve"]["radius"]) == 0.1
    far = settings.model_copy(update={"radii": (0.05, 5.0)})
    assert max(summary(far, per_image)["curve"]["radius"]) == 0.05
    cohen = settings.model_copy(update={"method": "cohen"})
    assert max(summary(cohen, per_image)["curve"]["radius"]) == pytest.approx(0.12)


class Bright(nn.Module):
    """Class 1 where the mean is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([0.5 - mean, mean - 0.5], dim=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), r"certify.sigma: missing: the objective has no sigma"),
        (("certify.sigma=0",), r"certify.sigma: 0 is not allowed"),
        (("certify.sigma=0.1", "certify.alpha=1"), r"certify.alpha: 1 is not allowed"),
        (("certify.sigma=0.1", "certify.n=50"), r"n: 50 is fewer than n0: 100"),
        (("certify.sigma=0.1", "certify.radii=[]"), r"certify.radii"),
    ],
)
def test_impossible_settings_are_one_clear_error(
    run: Path, settings: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", str(run), *settings]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "certify").exists()
