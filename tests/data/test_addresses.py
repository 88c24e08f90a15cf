"""What a data folder's own card may name: files in that folder, and nothing is looked up for it."""

import socket
from pathlib import Path

import datasets
import pytest

from robust_accel.data.sources import load_splits

AWAY = [
    "{outside}", "../outside/a.parquet", "sub/../../outside/a.parquet", "file://{outside}",
    "local://../outside/a.parquet", "http://127.0.0.1:9/a.parquet", "https://a.example/a.parquet",
    "hf://datasets/a/b/a.parquet", "s3://a/b.parquet", "zip://a::http://127.0.0.1:9/a", "/etc/*",
]  # fmt: skip
CARD = "---\nconfigs:\n- config_name: default\n  {}\n---\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder; who looks for a host is told that there is none, and it is a fault."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def asked(*about: object, **more: object) -> None:
        pytest.fail(f"the network is asked for {about[0]}")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: asked(to))
    for name, number in (("folder", 2), ("outside", 5)):
        (tmp_path / name).mkdir()
        rows = datasets.Dataset.from_dict({"label": [0] * number})
        rows.to_parquet(tmp_path / name / "a.parquet")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", AWAY)
@pytest.mark.parametrize("key", ["data_files: '{}'", "data_files: [{{split: test, path: ['{}']}}]"])
def test_a_card_names_no_files_elsewhere(folder: Path, name: str, key: str) -> None:
    name = name.format(outside=folder.parent / "outside" / "a.parquet")
    (folder / "README.md").write_text(CARD.format(key.format(name)))
    with pytest.raises(ValueError, match=r"^path: the card of ") as refused:
        load_splits(str(folder), None)
    assert f"names data at {name!r}: allowed are files in it" in str(refused.value)


def test_no_folder_elsewhere_either(folder: Path) -> None:
    (folder / "README.md").write_text(CARD.format("data_dir: ../outside"))
    with pytest.raises(ValueError, match=r"names data at '../outside'"):
        load_splits(str(folder), None)
    (folder / "README.md").unlink()
    (folder / ".huggingface.yaml").write_text("configs: [{config_name: a, data_files: ../*/a.*}]")
    with pytest.raises(ValueError, match=r"names data at '\.\./\*/a\.\*'"):
        load_splits(str(folder), None)


@pytest.mark.parametrize("name", ["a.parquet", "./a.parquet", "*.parquet", "**"])
def test_a_card_may_name_files_in_the_folder(folder: Path, name: str) -> None:
    (folder / "README.md").write_text(CARD.format(f"data_files: [{{split: test, path: '{name}'}}]"))
    assert {split: len(rows) for split, rows in load_splits(str(folder), None).items()} == {
        "test": 2
    }


def test_a_users_own_link_is_followed(folder: Path) -> None:
    (folder / "a.parquet").unlink()
    (folder / "train.parquet").symlink_to(folder.parent / "outside" / "a.parquet")
    assert len(load_splits(str(folder), None)["train"]) == 5


@pytest.mark.parametrize("name", ["folder", "folder/a.parquet", "folder/*.parquet", "a.arrow"])
def test_nothing_is_asked_for_what_lies_here(folder: Path, name: str) -> None:
    datasets.Dataset.from_dict({"label": [0] * 2}).save_to_disk(folder.parent / "saved")
    (arrow,) = (folder.parent / "saved").glob("*.arrow")
    arrow.rename(folder.parent / "a.arrow")
    assert len(load_splits(str(folder.parent / name), None)["train"]) == 2
    with pytest.raises(ValueError, match=r"^path: .* there is no such folder or file$"):
        load_splits(str(folder.parent / f"no_{name}".replace("*", "b")), None)


def test_nor_where_splits_name_their_classes_differently(folder: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    (folder / "a.parquet").unlink()
    splits = load_splits(str(folder), None)
    assert splits["test"].features["label"].names == ["b", "a"]
