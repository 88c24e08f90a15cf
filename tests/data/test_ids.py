"""Listed images of the test split: found by number or by name, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
from numbered_images import image, numbers, pair, settings, write_parquet
from picture_folders import write_folder

from robust_accel.data import DataSettings, load_data, load_test
from robust_accel.data.ids import IMAGENET5000
from robust_accel.recipe import load_recipe


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_row_numbers_choose_images_in_their_order(tmp_path: Path) -> None:
    path = pair(tmp_path)
    digest = "(5226d3e24253)"
    for ids, words in (
        ((4, 0, 5), "3 listed ids"),
        ([4, 0, 5], "3 listed ids"),
        (listed(tmp_path, "4", "", "0  # the first", "5"), f"ids of {tmp_path / 'list.txt'}"),
    ):
        test, selection = load_test(settings(path), ids=ids), f"{words} {digest}"
        assert (numbers(test.images), test.selection) == ([104, 100, 105], selection)
        assert test.images.labels.tolist() == [1, 0, 2]
        data = load_data(settings(path), ids=ids)
        assert (numbers(data.test), data.selection) == ([104, 100, 105], selection)
        assert len(data.train) == 12
    files = load_test(settings(path, in_memory=False, image_size=4, num_workers=0), ids=(4, 0))
    assert files.images.labels.tolist() == [1, 0]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write_folder(tmp_path / "pets", "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "pets", "test", {"cat": 3, "dog": 3}, start=100)
    return tmp_path / "pets"


def test_file_names_are_found_with_and_without_ending_and_folders(
    pets: Path, tmp_path: Path
) -> None:
    names = listed(tmp_path, "105.png", "cat/101", "dog/103.jpg", "2")
    assert numbers(load_test(settings(pets), ids=names).images) == [105, 101, 103, 102]
    (pets / "test" / "dog" / "101.png").write_bytes(
        (pets / "test" / "dog" / "103.png").read_bytes()
    )
    with pytest.raises(ValueError, match=r"^ids: several images of split test .*\[101.png\]"):
        load_test(settings(pets), ids=listed(tmp_path, "101.png"))
    one = load_test(settings(pets), ids=listed(tmp_path, "cat/101.png")).images
    assert numbers(one) == [101]


def imagenet(folder: Path, names: list[str]) -> DataSettings:
    import datasets

    content = [{"bytes": png(i), "path": name} for i, name in enumerate(names)]
    path = write_parquet(folder, "val", content, [0] * len(names), {"img": datasets.Image()})
    return settings(path, test_split="train")


def png(number: int) -> bytes:
    import io

    buffer = io.BytesIO()
    image(number).save(buffer, "png")
    return buffer.getvalue()


def test_imagenets_names_are_its_numbers_wherever_they_lie(tmp_path: Path) -> None:
    data = imagenet(
        tmp_path,
        ["ILSVRC2012_val_00000003_n01440764.JPEG", "x/ILSVRC2012_val_00000007.JPEG", "other.JPEG"],
    )
    names = listed(
        tmp_path, "n01751748/ILSVRC2012_val_00000007.JPEG", "n01/ILSVRC2012_val_00000003.JPEG"
    )
    assert numbers(load_test(data, ids=names).images) == [1, 0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "the list is empty"),
        ((1, 6, -1), r"\[6, -1\] are no rows of split test of .*: it has 0 to 5"),
        ((1, 2, 1), r"\[1, 1\] are listed more than once"),
        (("a",), r"split test of .* has no image \[a\]"),
        (("100", "dog/101"), r"has no image \[dog/101\]"),
        (("1", "101.png"), r"\[1, 101.png\] are listed more than once, or name one image"),
        ("nowhere.txt", r"'nowhere.txt' is neither a readable text file nor robustbench/imagenet"),
        ("robustbench/cifar10", r"is neither"),
    ],
)
def test_what_is_not_there_or_there_twice_is_refused(
    pets: Path, tmp_path: Path, ids: Any, message: str
) -> None:
    if isinstance(ids, tuple) and ids and isinstance(ids[0], str):
        ids = listed(tmp_path, *ids)
    with pytest.raises(ValueError, match=rf"^ids: .*{message}") as caught:
        load_test(settings(pets), ids=ids)
    assert caught.value.section == "evaluate"  # type: ignore[attr-defined]


def test_ids_beside_other_choices(tmp_path: Path) -> None:
    path = pair(tmp_path)
    with pytest.raises(ValueError, match=r"^ids: .*data.test_size 2 both choose"):
        load_test(settings(path, test_size=2), ids=(0, 1, 2))
    chosen = load_test(settings(path, classes=(1, 0)), ids=(4, 0))
    assert chosen.images.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"^ids: row 2 is of class 2, which data.classes \[1, 0\]"):
        load_test(settings(path, classes=(1, 0)), ids=(4, 2))
    without_names = listed(tmp_path, "cat.png")
    with pytest.raises(ValueError, match=r"^ids: the images of .* have no file names: list row"):
        load_test(settings("sklearn:digits"), ids=without_names)
    assert load_test(settings(path, test_size=2)).selection == "2 drawn by a fixed seed"


def test_robustbenchs_list_is_that_of_its_package_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pair(tmp_path / "data")
    package = tmp_path / "robustbench"
    (package / "helper_files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('executed')")
    names = package / "helper_files" / "imagenet_test_image_ids.txt"
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^ids: .*Python package robustbench, which has no"):
        load_test(settings(path), ids=IMAGENET5000)
    names.write_text("n01440764/ILSVRC2012_val_00000293.JPEG\n")
    with pytest.raises(ValueError, match=r"^ids: .*imagenet_test_image_ids.txt is not the list"):
        load_test(settings(path), ids=IMAGENET5000)


def test_the_error_names_the_section_that_holds_the_key() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ValueError, match=r": evaluate\.ids: \[360\] are no rows of split test"):
        recipe.checked("data", lambda: load_test(recipe.data, ids=(360,)))
