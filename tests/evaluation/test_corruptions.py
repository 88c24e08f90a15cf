"""Error on corrupted images: published files and folders, images made here, means, refusals."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from robust_accel.data import DataSettings, FileImages, MemoryImages, load_data
from robust_accel.data import corrupted as corrupted_module
from robust_accel.data.corrupted import GeneratedImages, check_published, published
from robust_accel.evaluation import bench, evaluate
from robust_accel.evaluation.ledger import read_records, refresh_report
from robust_accel.evaluation.settings import CORRUPTIONS, Corruption, EvaluateSettings
from robust_accel.models import PixelClassifier
from robust_accel.reporting.report import comparison_table
from robust_accel.reporting.sections import sections
from robust_accel.reporting.views import read_runs
from robust_accel.run_folder import RunFolder

CPU = torch.device("cpu")
needs_generator = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None, reason="needs imagecorruptions-imaug"
)
NAMES = ("fog", "snow")
SIZE, N = 4, 10  # pixels a side; images a severity
WNIDS = ("n00000001", "n00000002", "n12345678")


class Brightness(nn.Module):
    """Three classes by the mean of the pixels: below 1/3, below 2/3, above."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean(dim=(1, 2, 3))[:, None]
        return -(level - torch.tensor([1 / 6, 1 / 2, 5 / 6])).abs()


def labels_of(number: int) -> np.ndarray:
    return np.arange(number) % 3


def pixels_of(labels: np.ndarray, wrong: int = 0) -> np.ndarray:
    """Images [N, H, W, 3] of their class's level; the first ``wrong`` have another's."""
    shown = np.where(np.arange(len(labels)) < wrong, (labels + 1) % 3, labels)
    return np.broadcast_to(
        (42 + 85 * shown).astype(np.uint8)[:, None, None, None], (len(labels), SIZE, SIZE, 3)
    )


def write_arrays(folder: Path, names: tuple[str, ...] = NAMES, **other: Any) -> Path:
    """As CIFAR-10-C: of fog severity s has s wrong images, of snow 2s."""
    folder.mkdir(exist_ok=True)
    labels = labels_of(N)
    np.save(folder / "labels.npy", np.tile(labels, 5))
    for factor, name in enumerate(names, 1):
        blocks = [pixels_of(labels, factor * severity) for severity in range(1, 6)]
        np.save(folder / f"{name}.npy", np.concatenate(blocks))
    for name, array in other.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_folders(folder: Path, classes: tuple[str, ...], kind: str = "") -> Path:
    """As ImageNet-C: the same images as ``write_arrays``."""
    for factor, name in enumerate(NAMES, 1):
        for severity in range(1, 6):
            labels = labels_of(N)
            for i, image in enumerate(pixels_of(labels, factor * severity)):
                place = folder / kind / name / str(severity) / classes[labels[i]]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(place / f"val_{i:04}.png")
    return folder


def test_images() -> MemoryImages:
    x = torch.from_numpy(pixels_of(labels_of(N)).copy()).permute(0, 3, 1, 2).contiguous()
    return MemoryImages(x, torch.from_numpy(labels_of(N)))


test_images.__test__ = False  # type: ignore[attr-defined]


def run(corruptions: Any, folder: Path | None = None, **about: Any) -> dict[str, Any]:
    images = about.pop("images", test_images())
    given = EvaluateSettings(pgd=None, norm="linf", eps=0.1, corruptions=corruptions, batch_size=4)
    classifier = about.pop("classifier", PixelClassifier(Brightness()).eval())
    classifier.class_names = about.pop("class_names", None)
    return evaluate(
        classifier,
        images,
        given,
        Accelerator(cpu=True),
        num_classes=3,
        folder=None if folder is None else RunFolder(folder),
        **about,
    )


@pytest.mark.parametrize("layout", ["arrays", "folders", "kinds", "wnids"])
def test_errors_are_those_of_the_published_images(tmp_path: Path, layout: str) -> None:
    """Fog is wrong on s of 10 images at severity s, snow on 2s: means 0.3 and 0.6."""
    about: dict[str, Any] = {"class_names": ("ant", "bee", "cat")}
    if layout == "arrays":
        path = write_arrays(tmp_path / "c")
    elif layout == "wnids":  # whatever the model calls ImageNet's classes
        path = write_folders(tmp_path / "c", WNIDS)
    else:
        kind = "weather" if layout == "kinds" else ""
        path = write_folders(tmp_path / "c", ("ant", "bee", "cat"), kind)
    own = {"path": str(path), "names": NAMES, "reference": {"fog": 0.6, "snow": "80/100"}}
    found = run(own, tmp_path / "run", **about)
    fog, mean = found["corruption"]["fog"], found["corruptions"]
    assert [one["accuracy"] for one in fog["by_severity"]] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert [one["n"] for one in fog["by_severity"]] == [N] * 5
    assert fog["images"]["n"] == 5 * N and mean["images"]["n"] == N
    assert fog["interval"] is None  # five severities of an image are no five images
    assert mean["mean_error"] == pytest.approx((0.3 + 0.6) / 2)
    assert mean["mce"] == pytest.approx((0.3 / 0.6 + 0.6 / 0.8) / 2)
    few = run(own | {"severities": [5, 2], "reference": None, "images": 4}, **about)
    fives = few["corruption"]["fog"]["by_severity"]
    assert [(one["severity"], one["accuracy"], one["n"]) for one in fives] == [
        (5, 0, 4),
        (2, 0.5, 4),
    ]
    assert "mce" not in few["corruptions"]


def test_classes_that_the_model_numbers_otherwise(tmp_path: Path) -> None:
    """Labels of arrays are the data's numbers; folders are known by name."""
    images = test_images()
    images.labels = torch.tensor([2, 0, 1])[images.labels]

    class Turned(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, [1, 2, 0]]

    turned = {"images": images, "class_names": ("bee", "cat", "ant"), "positions": [2, 0, 1]}
    for path in (
        write_arrays(tmp_path / "a"),
        write_folders(tmp_path / "f", ("ant", "bee", "cat")),
        write_folders(tmp_path / "w", WNIDS),
    ):
        own = {"path": str(path), "names": ["fog"]}
        found = run(own, classifier=PixelClassifier(Turned()).eval(), **turned)
        assert found["corruptions"]["mean_error"] == pytest.approx(0.3)


def test_a_second_evaluation_does_nothing_anew_and_the_report_shows_errors(tmp_path: Path) -> None:
    own = {"path": str(write_arrays(tmp_path / "c")), "names": NAMES}
    folder = RunFolder(tmp_path / "run")
    first = run(own, folder.path)
    work = (folder.path / "measurements" / "process-0.jsonl").read_text()
    again = run(own | {"reference": {"fog": 0.5, "snow": 0.5}}, folder.path)
    assert (folder.path / "measurements" / "process-0.jsonl").read_text() == work
    assert again["corruption"] == first["corruption"]
    assert again["corruptions"]["key"] != first["corruptions"]["key"]
    limited = run(own | {"images": 3}, folder.path)
    assert limited["corruption"]["fog"]["images"]["selection"] == "first 3 of each severity"
    for record in read_records(folder.path):
        if record["purpose"] == "corruption":
            assert len(record["outcomes"]["image"]) == record["images"]["n"]
    refresh_report(folder, model={"function": first["function"]}, facts={})
    text = "".join(
        f"{table.markdown()}{table.caption}"
        for section in sections(*read_runs([folder.path]))
        for table in section.tables
    )
    assert "mean error 45.00% (2 corruptions x 5 severities, n=10 each)" in text
    assert "mCE 90.00% of the reference errors given" in text
    assert re.search(r"\| snow +\| 20.00 +\| 40.00 +\| 60.00 +\| 80.00 +\| 100.00 +\| 60.00 ", text)
    assert "45.00 (mean of 2 x 5, published images, n=10)" in comparison_table([folder.path])
    # another image of the file is another measurement
    pixels = np.load(tmp_path / "c" / "fog.npy")
    np.save(tmp_path / "c" / "fog.npy", 255 - pixels)
    other = run(own, folder.path)["corruption"]
    assert other["fog"]["key"] != first["corruption"]["fog"]["key"]
    assert other["snow"] == first["corruption"]["snow"]


def test_the_classifier_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Mock(side_effect=bench.digest_of_function)
    monkeypatch.setattr(bench, "digest_of_function", digest)
    found = run({"path": str(write_arrays(tmp_path / "c")), "names": NAMES}, tmp_path / "run")
    assert digest.call_count == 1
    assert {one["function"] for one in found["corruption"].values()} == {found["function"]}


def test_arrays_stay_in_their_file(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "c")
    about: Any = {"like": test_images(), "num_classes": 3, "positions": None}
    found = published(str(path), "fog", (1, 5), None, labels_of=len, **about)
    assert found.images._pixels.path == str(path / "fog.npy")  # type: ignore[union-attr]
    assert found.severity.tolist() == [1] * N + [5] * N


def test_images_of_the_size_that_is_measured_are_not_cropped(tmp_path: Path) -> None:
    """ImageNet-C's are cropped already; the test images have borders that are cut off."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for place in ("train/a", "test/a", "train/b", "test/b"):
        (tmp_path / "data" / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / place / "0.png")
    settings = DataSettings(
        path=str(tmp_path / "data"), in_memory=False, image_size=32, num_workers=0
    )
    test = load_data(settings).test
    (tmp_path / "c" / "fog" / "3" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "c" / "fog" / "3" / "a" / "0.png")
    about: Any = {"like": test, "num_classes": 2, "positions": None}
    about["labels_of"] = lambda names: torch.zeros(len(names), dtype=torch.int64)
    found = published(str(tmp_path / "c"), "fog", (3,), None, **about).images
    assert isinstance(found, FileImages)
    ((x, _),) = found.batches([torch.tensor([0])], CPU)
    assert np.array_equal((255 * x[0]).round().byte().permute(1, 2, 0).numpy(), pixels)


REFUSED: dict[str, Any] = {
    "no folder": ({}, r"path: '.*nowhere' is no folder"),
    "absent": ({"names": ["fog", "frost"]}, r"path: .* has no corruption 'frost': frost\.npy or"),
    "no labels": ({}, r"path: .*labels\.npy: No such file"),
    "few labels": (
        {},
        r"labels\.npy of .* must be one integer an image, \[50\], found int64 \[9\]",
    ),
    "wrong label": ({}, r"path: row 2 of labels\.npy of .* is 7, allowed are 0 to 2"),
    "size": ({}, r"fog\.npy of .* must be uint8 \[5 x N, 4x4x3\], .* found uint8 \[50, 8, 8, 3\]"),
    "type": ({}, r"fog\.npy of .* must be uint8 .* found float64 \[50, 4, 4, 3\]"),
    "severity": ({}, r"path: .*fog has no folder of severity 4"),
    "class": (
        {},
        r"path: .* has the classes \[dog\], which the model has not: .*\[ant, bee, cat\]",
    ),
    "wnids": ({}, r"path: .* has the classes \[n00000003\], .* are \[n\d+, n\d+, n\d+\]$"),
    "empty": ({}, r"path: .*1 holds no image"),
    "chosen": ({}, r"has images of all classes, of which data\.classes chooses some"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_or_not_as_published_is_refused(tmp_path: Path, case: str) -> None:
    more, said = REFUSED[case]
    path, about = write_arrays(tmp_path / "c"), {"class_names": ("ant", "bee", "cat")}
    if case == "no labels":
        (path / "labels.npy").unlink()
    elif case == "no folder":
        path = tmp_path / "nowhere"
    elif case == "few labels":
        np.save(path / "labels.npy", np.zeros(9, dtype=int))
    elif case == "wrong label":
        np.save(path / "labels.npy", np.full(50, 7) * (np.arange(50) > 1))
    elif case == "size":
        np.save(path / "fog.npy", np.zeros((50, 8, 8, 3), dtype=np.uint8))
    elif case == "type":
        np.save(path / "fog.npy", np.zeros((50, 4, 4, 3)))
    elif case == "chosen":
        about["source"] = {"classes": [0, 1]}
    elif case in ("severity", "class", "wnids", "empty"):
        classes = {"class": ("ant", "bee", "dog"), "wnids": (*WNIDS[:2], "n00000003")}
        path = write_folders(tmp_path / "f", classes.get(case, ("ant", "bee", "cat")))
        if case == "wnids":
            about["class_names"] = WNIDS
        if case == "severity":
            (path / "fog" / "4").rename(path / "fog" / "no")
        if case == "empty":
            for image in (path / "fog" / "1").rglob("*.png"):
                image.unlink()
    with pytest.raises(ValueError, match=rf"^evaluate\.corruptions\..*{said}"):
        run({"path": str(path), "names": NAMES} | more, tmp_path / "run", **about)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"names": ["fog", "fog"]}, "corruptions.names: .* fog is named twice"),
        ({"names": ["rain"]}, "corruptions.names.*'rain' is not allowed: .*'gaussian_noise', "),
        ({"names": []}, "corruptions.names: .*at least 1"),
        ({"severities": [6]}, "corruptions.severities.*less than or equal to 5"),
        ({"reference": {"fog": 88.6}}, "corruptions.reference.fog: .*less than or equal to 1"),
        ({"reference": {"fog": 0.5}}, "reference: there is no error of gaussian_noise"),
        (
            {"names": ["fog"], "severities": [1], "reference": {"fog": 0.5}},
            r"reference: mCE is over the severities 1 to 5, not \[1\]",
        ),
        ({"path": "x", "ids": [1]}, "corruptions.path: evaluate.ids lists test images"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    more = {"ids": settings.pop("ids")} if "ids" in settings else {}
    with pytest.raises(ValueError, match=said):
        EvaluateSettings(corruptions=settings, **more)  # type: ignore[arg-type]


def test_without_the_generator_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def lost(name: str) -> str:
        if name == corrupted_module.GENERATOR:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(corrupted_module.importlib.metadata, "version", lost)
    with pytest.raises(ValueError, match=r"^evaluate.corruptions.path: not given, .* pip install"):
        run(True)


# ---- made here ---------------------------------------------------------------------------------


def photos(number: int = 6) -> MemoryImages:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return MemoryImages(x, torch.arange(number) % 3)


def made(images: GeneratedImages, *parts: list[int]) -> Tensor:
    return torch.cat([x for x, _ in images.batches(map(torch.tensor, parts), CPU)])


@needs_generator
@pytest.mark.parametrize(
    "name",
    [
        "gaussian_noise",
        "impulse_noise",
        "snow",
        "frost",
        pytest.param("glass_blur", marks=pytest.mark.long),  # which numba compiles
    ],
)
def test_images_follow_from_seed_corruption_severity_and_place(name: str) -> None:
    images = GeneratedImages(photos(), name, (1, 5), 6, seed=0)
    x = made(images, [*range(12)])
    torch.rand(5), np.random.rand(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = made(GeneratedImages(photos(), name, (1, 5), 6, seed=0), [11, 3], [0, 7])
    assert torch.equal(again, x[[11, 3, 0, 7]])
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(made(images, [11, 3], [0, 7]), again)  # of what was kept
    other = made(GeneratedImages(photos(), name, (1, 5), 6, seed=1), [11, 3], [0, 7])
    assert not torch.equal(other, again)
    fewer = made(GeneratedImages(photos(), name, (5,), 3, seed=0), [0, 1, 2])
    assert torch.equal(fewer, x[6:9])


@needs_generator
def test_workers_that_decode_files_make_the_same_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        place = tmp_path / ("train" if i < 4 else "test") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        image.save(place / f"{i}.png")

    def of(num_workers: int) -> Tensor:
        about: Any = {"in_memory": False, "image_size": 32, "num_workers": num_workers}
        test = load_data(DataSettings(path=str(tmp_path), **about)).test
        return made(GeneratedImages(test, "gaussian_noise", (3,), 4, 0), [0, 1], [2, 3])

    assert torch.equal(of(0), of(1))


@needs_generator
def test_generated_images_are_told_from_published_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "robust_accel")
    about = {"images": photos(), "source": {"path": "photos"}}
    found = run({"names": ["fog"], "severities": [1, 3]}, tmp_path, **about)
    version = importlib.metadata.version("imagecorruptions-imaug")
    assert found["corruption"]["fog"]["attack"]["by"] == f"imagecorruptions-imaug {version}"
    assert found["corruptions"]["images"]["source"] == {"path": "photos"}
    assert f"imagecorruptions-imaug {version}" in caplog.text
    with pytest.raises(ValueError, match=r"colour images of at least 32 x 32, not 3x4x4"):
        run(True)


@needs_generator
def test_the_generator_knows_all_and_the_fifteen() -> None:
    import imagecorruptions

    assert set(imagecorruptions.get_corruption_names("common")) == set(CORRUPTIONS)
    assert set(imagecorruptions.get_corruption_names("all")) == {*get_args(Corruption)}


def test_a_file_that_is_cut_off_is_seen_before_anything_is_measured(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "c")
    content = bytearray((path / "fog.npy").read_bytes())
    (path / "fog.npy").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"path: .* wants \d+ bytes, found"):
        check_published(str(path), NAMES, (1,), like=test_images(), num_classes=3, labels_of=len)
