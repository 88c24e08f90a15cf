"""A run's files: for whom the umask says, none through a link, no model in halves."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import drawn
from safetensors.torch import load_file

from robust_accel.commands.certify import certify_model
from robust_accel.commands.evaluate import evaluate_model
from robust_accel.files import INCOMPLETE
from robust_accel.models import ModelSettings, create_classifier, save_model
from robust_accel.models.weight_files import check_checkpoint
from robust_accel.recipe import load_recipe
from robust_accel.reporting.report import write_report
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_model
from robust_accel.training.run import train

TINY = (
    "train.epochs=1",
    "train.validate_every=1",
    "train.batch_size=50",
    "train.ema_decay=0.9",
    "train.log_with=[tensorboard]",
    "attack.num_steps=1",
    "data.train_size=100",
    "data.validation_size=20",
    "data.test_size=20",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=1",
)
UMASK = 0o027  # unlike what anybody's own is likely to be


def run(folder: Path, *, resume: bool = False) -> None:
    train(load_recipe("quickstart", [*TINY, f"output={folder}"]), resume=resume)


def run_under(umask: int, folder: Path) -> Path:
    old = os.umask(umask)
    try:
        with drawn():
            run(folder)
        COMMANDS["certify"](folder)  # which writes the report, too
    finally:
        os.umask(old)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_under(UMASK, tmp_path_factory.mktemp("umask") / "runs" / "tiny")


def follow(folder: Path, umask: int) -> None:
    paths = {folder.parent, folder, *folder.rglob("*")}
    assert sum(path.is_file() for path in paths) > 15
    for path in paths:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert (folder / "certify").is_dir() and (folder / "figures").is_dir()


def test_the_umask_says_who_reads_each_file(finished: Path) -> None:
    follow(finished, UMASK)


@pytest.mark.long
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000], ids=oct)
def test_it_does_under_others(tmp_path: Path, umask: int) -> None:
    follow(run_under(umask, tmp_path / "runs" / "tiny"), umask)


def test_what_a_killed_process_had_begun_is_gone(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(finished, folder)
    leftover = folder / "figures" / f"{INCOMPLETE}01234567-loss.png"
    leftover.write_bytes(b"half")
    run(folder, resume=True)
    assert not list(folder.rglob(f"{INCOMPLETE}*"))


CERTIFY = ("certify.sigma=0.1", "certify.images=1", "certify.n0=10", "certify.n=100")
COMMANDS: dict[str, Callable[[Path], object]] = {
    "train": lambda folder: run(folder, resume=True),
    "evaluate": lambda folder: evaluate_model(str(folder)),
    "certify": lambda folder: certify_model(str(folder), CERTIFY),
    "report": lambda folder: write_report(RunFolder(folder)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_through_a_link(finished: Path, tmp_path: Path, command: str) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(finished, folder)
    victim.write_text("mine")
    link = folder / "measurements" / "process-0.jsonl"
    link.unlink()
    link.symlink_to(victim)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"output: .*{link.name} is a link to {victim}"):
        COMMANDS[command](folder)
    assert victim.read_text() == "mine"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


POINTER = b"C\x08AAAA\x00\x00\x00\x00"
STATES = {
    "a command": b"\x80\x02cos\nsystem\nX%c\x00\x00\x00touch %s\x85R.",
    "objects over raw bytes": b"\x80\x02}X\x0c\x00\x00\x00random_statecnumpy\nndarray\nK\x01\x85"
    b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R" + POINTER.replace(b"C", b"U") + b"\x87Rs.",
    "a type of parts": b"\x80\x02cnumpy\ndtype\nX\x04\x00\x00\x00u1,O\x85R.",
    "deep tuples": b"\x80\x02}q\x00)" + b"\x85" * 500_000 + b"K\x01s.",
}


@pytest.mark.parametrize("name", STATES)
def test_a_hostile_checkpoint_is_not_gone_on_from(
    finished: Path, tmp_path: Path, name: str
) -> None:
    """Accelerate's own files: what it reads of them is not ours to say."""
    (step,) = RunFolder(finished).steps()
    folder, marker = tmp_path / step.name, tmp_path / "executed"
    shutil.copytree(step, folder)
    program = STATES[name]
    if name == "a command":
        program %= (len(str(marker)) + 6, str(marker).encode())
    state = folder / "random_states_0.pkl"
    with zipfile.ZipFile(state) as old:
        parts = {part: old.read(part) for part in old.namelist()}
    with zipfile.ZipFile(state, "w") as new:
        for part, content in parts.items():
            new.writestr(part, program if part.endswith("data.pkl") else content)
    refused = ""
    try:
        check_checkpoint(folder)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert str(state) in refused
    else:  # then torch itself refuses it
        with pytest.raises(pickle.UnpicklingError):
            torch.load(state, weights_only=True)
    assert not marker.exists()


def test_a_sound_checkpoint_is_gone_on_from(finished: Path) -> None:
    check_checkpoint(*RunFolder(finished).steps())


def test_a_model_is_whole_whenever_its_writer_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is readable, or the new one, and links are replaced."""
    victim, folder = tmp_path / "victim", tmp_path / "model"
    victim.write_text("mine")
    classifier = create_classifier(ModelSettings(name="wide_resnet10_1"), num_classes=3, in_chans=1)
    save_model(classifier, folder)
    (folder / "README.md").write_text("card")
    old = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1)
    real, left = os.replace, []

    def dies(source: object, target: object) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(source, target)  # type: ignore[arg-type]

    for moves in range(4):
        left[:] = [None] * moves
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dies)
            with pytest.raises(KeyboardInterrupt):
                save_model(classifier, folder)
        key, value = next(iter(load_model(folder).model.state_dict().items()))
        assert torch.equal(value, old[key]) or torch.equal(value, old[key] + 1)
    config = folder / "config.json"
    config.unlink()
    config.symlink_to(victim)
    save_model(classifier, folder)
    assert victim.read_text() == "mine"
    assert not config.is_symlink()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(INCOMPLETE)] == []
