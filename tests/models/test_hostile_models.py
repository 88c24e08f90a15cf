"""Models of strangers: nothing of theirs is executed, fetched, or larger than it is."""

import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import mark, outcome
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robust_accel.models import ModelSettings, create_classifier, save_model
from robust_accel.models.timm_folder import network_up_to
from robust_accel.trained_model import load_model

ARCHITECTURE = "wide_resnet10_1"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sound"
    settings = ModelSettings(name=ARCHITECTURE, num_classes=3, in_chans=1)
    save_model(create_classifier(settings), folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


class Executed:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (mark(self.marker),)


# ---- config.json -------------------------------------------------------------------------------


def changed(**entries: Any) -> Callable[[Path], None]:
    """config.json with other entries; ``__`` stands before those within one."""

    def change(file: Path) -> None:
        config = json.loads(file.read_text())
        for key, value in entries.items():
            section, _, name = key.partition("__")
            if name:
                config[section] = (config.get(section) or {}) | {name: value}
            else:
                config[section] = value
        file.write_text(json.dumps(config))

    return change


def written(content: bytes) -> Callable[[Path], None]:
    return lambda file: void(file.write_bytes(content))


def void(_: object) -> None:
    pass


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else at the place of a file."""

    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(10 * 2**30)


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (instead(os.mkfifo), "is no file"),
    "a folder": (instead(Path.mkdir), "is no file"),
    "a device": (instead(lambda file: file.symlink_to("/dev/zero")), "is no file"),
    "a link to nothing": (instead(lambda file: file.symlink_to("nothing")), "nor config.json"),
    "ten gigabytes of nothing": (instead(sparse), "more than .* bytes"),
    "empty": (written(b""), "no JSON"),
    "binary": (written(b"\x80\x04\xff" * 99), "no text"),
    "cut off": (written(b'{"architecture": "wide'), "no JSON"),
    "deep": (written(b"[" * 200_000), "recursion"),
    "deep objects": (written(b'{"a":' * 200_000), "recursion"),
    "a number of many digits": (written(b'{"num_classes": ' + b"9" * 5000 + b"}"), "digits"),
    "a list": (written(b"[]"), "no JSON object"),
    "no architecture": (written(b"{}"), "names no architecture"),
    "a number for a name": (changed(architecture=7), "architecture: 7 is not allowed"),
    "a module for a name": (changed(architecture="os:system"), "cannot be built"),
    "a path for a name": (changed(architecture="../../etc/passwd"), "cannot be built"),
    "a list for arguments": (changed(model_args=[1]), "model_args"),
    "another file by argument": (
        changed(model_args__checkpoint_path="/etc/passwd"),
        "checkpoint_path is no argument of a network",
    ),
    "another config by argument": (
        changed(model_args__pretrained_cfg={"file": "x"}),
        "pretrained_cfg is no argument of a network",
    ),
    "no network by argument": (changed(model_args__features_only=True), "features_only is no arg"),
    "a long argument": (changed(model_args__act_layer="x" * 10**6), "is longer than"),
    "depth": (changed(model_args__depth=6 * 10**4 + 4), "far larger than its weights"),
    "width": (changed(model_args__width=5 * 10**4), "far larger than its weights"),
    "depth without end": (changed(model_args__depth=6 * 10**9 + 4), "depth has a number beyond"),
    "width without end": (changed(model_args__width=-1e99), "width has a number beyond"),
    "a list without end": (changed(model_args__a=[{"b": 2**17}]), "a has a number beyond 65536"),
    "tables without end": (
        changed(architecture="swin_tiny_patch4_window7_224", model_args={"img_size": 8960}),
        "far larger than its weights",
    ),
    "classes without end": (changed(num_classes=2**40), "num_classes"),
    "many classes": (changed(model_args__num_classes=2**20), "far larger than its weights"),
    "a text for a mean": (changed(pretrained_cfg__mean="black"), "pretrained_cfg.mean"),
    "a mean without end": (changed(pretrained_cfg__mean=[1e999]), "pretrained_cfg.mean"),
    "a std of nothing": (changed(pretrained_cfg__std=[0.0]), "pretrained_cfg.std"),
    "a description that is none": (changed(pretrained_cfg=[1]), "pretrained_cfg"),
    "a size without end": (changed(robust_accel={"size": [10**9, 10**9]}), "robust_accel.size"),
    "a size in words": (changed(robust_accel={"size": "large"}), "robust_accel.size"),
    "our section as text": (changed(robust_accel="x"), "robust_accel"),
    "names that are no text": (changed(label_names=[[1], {}]), "label_names"),
    "a name without end": (changed(label_names=["x" * 10**6] * 3), "label_names"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused_in_a_line(folder: Path, name: str) -> None:
    change, message = CONFIGS[name]
    change(folder / "config.json")
    told = outcome(lambda: load_model(folder))
    assert told.startswith("refused: ")
    assert len(told) < 1500
    assert re.search(message, told), told


def test_layers_that_hold_nothing_are_counted() -> None:
    with network_up_to(2**20):
        nn.Sequential(*[nn.Identity()] * 5000)
    with pytest.raises(ValueError, match="far larger than its weights"), network_up_to(2**20):
        nn.Sequential(*[nn.Identity()] * 2**16)


def test_a_config_does_not_say_where_weights_are(folder: Path, tmp_path: Path) -> None:
    marker, elsewhere = tmp_path / "executed", tmp_path / "other.bin"
    elsewhere.write_bytes(pickle.dumps(Executed(marker)))
    sources = {
        "url": f"file://{elsewhere}",
        "file": str(elsewhere),
        "hf_hub_id": "nobody/nothing",
        "hf_hub_filename": "x.bin",
        "source": "hf-hub",
        "custom_load": "hf",
        "state_dict": {"stem.weight": [1]},
    }
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= sources
    (folder / "config.json").write_text(json.dumps(config | sources))
    own = load_file(folder / "model.safetensors")
    loaded = load_model(folder).model.state_dict()
    assert all(torch.equal(own[key], loaded[key]) for key in own)
    assert not marker.exists()


# ---- weights -----------------------------------------------------------------------------------

State = dict[str, Tensor]


def header(text: bytes, size: int | None = None) -> Callable[[Path, State, Path], None]:
    """Safetensors of a header that says what is not so."""
    length = struct.pack("<Q", len(text) if size is None else size)
    return lambda file, own, marker: void(file.write_bytes(length + text + b"\0" * 64))


def saved(change: Callable[[State, Path], Any], **options: Any) -> Callable[..., None]:
    return lambda file, own, marker: torch.save(change(own, marker), file, **options)


def pickled(program: bytes, *, archive: bool = True) -> Callable[..., None]:
    """A checkpoint whose pickle is this program."""

    def write(file: Path, own: State, marker: Path) -> None:
        if not archive:
            head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
            file.write_bytes(b"".join(head) + program)
            return
        torch.save({}, file)
        with zipfile.ZipFile(file) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(file, "w") as new:
            for name, content in parts.items():
                new.writestr(name, program if name.endswith("data.pkl") else content)

    return write


def deflated(file: Path, own: State, marker: Path) -> None:
    torch.save({"weight": torch.zeros(2**26)}, file)
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def tarred(file: Path, own: State, marker: Path) -> None:
    (file.parent / "pickle").write_bytes(pickle.dumps(Executed(marker)))
    with tarfile.open(file, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(file.parent / "pickle", name)


def other(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """One tensor is another one."""
    key = "stem.weight"
    return saved(lambda own, marker: own | {key: change(own[key])})


DEEP = b"\x80\x02}q\x00)" + b"\x85" * 1_000_000 + b"K\x01s."
DOUBLED = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 70 + b"K\x01s."


def both(file: Path, own: State, marker: Path) -> None:
    """A file of old torch, and of new torch where one looks from its end."""
    torch.save(own, file)
    archive = file.read_bytes()
    pickled(DEEP, archive=False)(file, own, marker)
    file.write_bytes(file.read_bytes() + archive)


WEIGHTS: dict[str, tuple[str, Callable[[Path, State, Path], Any], str]] = {
    "a pipe": ("a.safetensors", lambda file, own, marker: os.mkfifo(file), "is no file"),
    "a pipe of torch": ("a.pth", lambda file, own, marker: os.mkfifo(file), "is no file"),
    "a device": ("a.pth", lambda file, own, marker: file.symlink_to("/dev/zero"), "is no file"),
    "a folder": ("a.pth", lambda file, own, marker: file.mkdir(), "neither"),
    "a link to nothing": ("a.pth", lambda file, own, marker: file.symlink_to("b"), "no such file"),
    "empty": ("a.safetensors", lambda file, own, marker: file.touch(), "cannot be read"),
    "empty, of torch": ("a.pth", lambda file, own, marker: file.touch(), "cannot be read"),
    "ten gigabytes of nothing": (
        "a.pth",
        lambda file, own, marker: (file.touch(), os.truncate(file, 10 * 2**30)),
        "cannot be read",
    ),
    "a header without end": ("a.safetensors", header(b"{}", 2**62), "cannot be read"),
    "a deep header": ("a.safetensors", header(b'{"a":' * 50_000), "cannot be read"),
    "a tensor beyond the file": (
        "a.safetensors",
        header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        "cannot be read",
    ),
    "tensors over each other": (
        "a.safetensors",
        header(
            b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
            b'"b":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
        ),
        "cannot be read",
    ),
    "a pickle by another name": (
        "a.safetensors",
        lambda file, own, marker: file.write_bytes(pickle.dumps(Executed(marker))),
        "cannot be read",
    ),
    "a pickle": (
        "a.pth",
        lambda file, own, marker: file.write_bytes(pickle.dumps(Executed(marker))),
        "cannot be read",
    ),
    "a module": ("a.pth", saved(lambda own, marker: own | {"x": Executed(marker)}), "system"),
    "a module of old torch": (
        "a.pth",
        saved(
            lambda own, marker: own | {"x": Executed(marker)}, _use_new_zipfile_serialization=False
        ),
        "cannot be read",
    ),
    "a tar": ("a.pth", tarred, "cannot be read"),
    "an archive that unpacks": ("a.pth", deflated, "is compressed"),
    "deep tuples": ("a.pth", pickled(DEEP), "tuples in tuples"),
    "deep tuples of old torch": ("a.pth", pickled(DEEP, archive=False), "tuples in tuples"),
    "deep tuples before an archive": ("a.pth", both, "tuples in tuples"),
    "doubled tuples": ("a.pth", pickled(DOUBLED), "tuples in tuples"),
    "a pickle to come": ("a.pth", pickled(b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f"), "cannot be"),
    "marks without end": ("a.pth", pickled(b"\x80\x02" + b"(" * 1000), "cannot be read"),
    "a repeated number": (
        "a.pth",
        other(lambda weight: torch.zeros(1).expand(2**20, 2**20)),
        "repeats 4 bytes",
    ),
    "a sparse tensor": ("a.pth", other(lambda weight: weight.to_sparse()), "no plain tensor"),
    "a quantised tensor": (
        "a.pth",
        other(lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)),
        "no plain tensor",
    ),
    "a tensor of nothing": ("a.pth", other(lambda weight: weight.to("meta")), "no plain tensor"),
    "a complex tensor": ("a.pth", other(lambda weight: weight + 0j), "no plain tensor"),
    "a number for a tensor": (
        "a.pth",
        saved(lambda own, marker: own | {"stem.weight": 3}),
        "stem.weight is missing",
    ),
    "mappings in mappings of themselves": (
        "a.pth",
        pickled(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."),
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_hostile_checkpoint_is_refused_in_a_line(sound: Path, tmp_path: Path, name: str) -> None:
    file_name, write, message = WEIGHTS[name]
    marker, path = tmp_path / "executed", tmp_path / file_name
    write(path, load_file(sound / "model.safetensors"), marker)
    settings = ModelSettings(name=ARCHITECTURE, num_classes=3, in_chans=1, checkpoint=str(path))
    told = outcome(lambda: create_classifier(settings))
    assert told.startswith("refused: checkpoint: ")
    assert message in told
    assert len(told) < 1500
    assert not marker.exists()


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "folder" not in name])
def test_a_folder_of_hostile_weights_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """As timm would read them: in place of model.safetensors."""
    file_name, write, _ = WEIGHTS[name]
    marker, own = tmp_path / "executed", load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / {".pth": "pytorch_model.bin"}.get(Path(file_name).suffix, "model.safetensors")
    write(path, own, marker)
    told = outcome(lambda: load_model(folder))
    assert told.startswith("refused: ")
    assert not marker.exists()


def test_a_namespace_is_no_object_of_a_stranger(sound: Path, tmp_path: Path) -> None:
    """timm's checkpoints hold one: what stands in it is data."""
    marker = tmp_path / "executed"
    program = (
        b"\x80\x02}q\x00X\x04\x00\x00\x00argscargparse\nNamespace\n)\x81}X\x09\x00\x00\x00__class__"
        b"cos\nsystem\nsbs."
    )
    pickled(program)(tmp_path / "a.pth", {}, marker)
    settings = ModelSettings(
        name=ARCHITECTURE, num_classes=3, in_chans=1, checkpoint=str(tmp_path / "a.pth")
    )
    assert "os.system" in outcome(lambda: create_classifier(settings))


def test_sound_weights_of_all_kinds_are_read(sound: Path, tmp_path: Path) -> None:
    own = load_file(sound / "model.safetensors")
    save_file(own, tmp_path / "a.safetensors")
    torch.save(own, tmp_path / "a.pth")
    torch.save(own, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "b.pth"):
        settings = ModelSettings(
            name=ARCHITECTURE, num_classes=3, in_chans=1, checkpoint=str(tmp_path / name)
        )
        loaded = create_classifier(settings).model.state_dict()
        assert all(torch.equal(own[key], loaded[key]) for key in own)
