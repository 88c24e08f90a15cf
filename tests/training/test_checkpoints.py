"""Checkpoints are whole or not used: whatever happens to one, a run goes on exactly."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from robust_accel.evaluation.identity import digest_of_json
from robust_accel.evaluation.ledger import read_records
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Checkpoint
from robust_accel.training.manifest import MANIFEST, publish, read_whole
from robust_accel.training.run import train
from robust_accel.training.start import Start, find_start

SMALL = (
    "train.epochs=2",
    "train.checkpoint_every=3",
    "train.validate_every=1",
    "train.ema_decay=0.9",
    "train.select=best",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "data.train_size=640",
    "data.test_size=20",
    "evaluate.autoattack=null",
    "evaluate.pgd=null",
    "evaluate.train_images=null",
)
FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.pt")
FILES += ("ema.safetensors", "best.safetensors", MANIFEST)


ENGINE = {"engine": "torch", "zero_stage": None, "num_processes": 1, "device": "cpu"}


QUICK = ("random_states_0.pkl", "deleted")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
}


def run(folder: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    recipe = load_recipe("quickstart", [*SMALL, f"output={folder}", *settings])
    return train(recipe, resume=resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder)
    return RunFolder(folder)


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The run, killed as it had written its last checkpoint."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, folder.path)
    shutil.rmtree(folder.model)
    folder.report.unlink()
    return folder


def same_end(one: RunFolder, other: RunFolder) -> bool:
    a, b = (load_file(folder.model / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def start_of(folder: RunFolder, *settings: str, engine: dict[str, Any] = ENGINE) -> Start:
    """Where `train --resume` would begin."""
    recipe = load_recipe("quickstart", [*SMALL, *settings])
    return find_start(recipe, folder, engine, resume=True)


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.steps()]


def test_a_checkpoint_lists_all_its_files_and_the_newest_two_are_kept(finished: RunFolder) -> None:
    assert names(finished) == ["step-00000012", "step-00000014"]
    for step in finished.steps():
        assert {path.name for path in step.iterdir()} == set(FILES)
        manifest = read_whole(step)
        assert set(manifest["files"]) == set(FILES) - {MANIFEST}
        about = manifest["about"]
        assert about["settings"]["train"]["select"] == "best"
        assert about["data"]["train"]["images"] > 0
        assert about["engine"] == ENGINE
        assert "torch" in about["versions"]
    assert sorted(path.name for path in finished.checkpoints.iterdir()) == [
        "best.safetensors",
        *names(finished),
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_every_fault_of_every_file_is_found(finished: RunFolder, name: str, fault: str) -> None:
    whole = finished.steps()[-1]
    before = (whole / name).read_bytes()
    FAULTS[fault](whole / name)
    try:
        with pytest.raises(ValueError, match=f"^{name} "):
            read_whole(whole)
    finally:
        (whole / name).write_bytes(before)
    read_whole(whole)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, marks=() if (name, fault) == QUICK else pytest.mark.long)
        for name, fault in product(FILES, FAULTS)
    ],
)
def test_a_run_goes_on_exactly_from_the_checkpoint_before_a_damaged_one(
    finished: RunFolder,
    copied: RunFolder,
    name: str,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    FAULTS[fault](copied.steps()[-1] / name)
    copied.best.write_bytes(b"weights of an epoch that will be trained again")
    caplog.set_level("INFO")
    run(copied.path, resume=True)
    said = caplog.text
    assert f"step-00000014: {name} " in said
    assert "at step 12" in said
    assert same_end(copied, finished)
    assert names(copied) == ["step-00000012", "step-00000014"]
    assert (copied.checkpoints / "damaged-step-00000014").is_dir()
    assert copied.best.read_bytes() == finished.best.read_bytes()


def test_one_that_a_bad_disk_does_not_give_is_named(
    copied: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one before is used."""
    before, last = copied.steps()
    opened = Path.open

    def bad(path: Path, *how: Any, **more: Any) -> Any:
        if path == last / "optimizer.bin":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", bad)
    start = start_of(copied)
    assert start.checkpoint == before.name
    said = f"{last}: optimizer.bin cannot be read: Input/output error: it is not used"
    assert start.notes == (said,)


def test_without_a_whole_checkpoint_nothing_is_begun_anew(copied: RunFolder) -> None:
    for step in copied.steps():
        FAULTS["flipped"](step / "random_states_0.pkl")
    with pytest.raises(ValueError, match=r"no whole checkpoint to .*000014.*; .*000012"):
        start_of(copied)
    shutil.rmtree(copied.checkpoints)
    copied.model.mkdir()
    with pytest.raises(ValueError, match="has a trained model and no checkpoint to go on from"):
        start_of(copied)
    copied.model.rmdir()  # then it was killed before its first
    assert start_of(copied) == Start()


def test_what_makes_it_another_run_is_refused_and_the_rest_said(copied: RunFolder) -> None:
    for setting, said in (
        ("train.seed=7", "train.seed: 0, now 7"),
        ("schedule.name=constant", "schedule.name: 'onecycle', now 'constant'"),
        ("evaluate.eps=0.1", "evaluate.eps: 0.2, now 0.1"),  # it chooses the best weights
    ):
        with pytest.raises(ValueError, match="was started with other settings") as refused:
            start_of(copied, setting)
        assert said in str(refused.value)
    copied.recipe.write_text(copied.recipe.read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(ValueError, match=r"train\.seed: 0, now 7"):  # the checkpoint knows better
        start_of(copied, "train.seed=7", "evaluate.seed=7")
    assert start_of(copied, "evaluate.eps=0.2", "output=elsewhere").notes == ()  # as it was
    assert start_of(copied, "train.keep=3", "evaluate.images=10").notes == (
        "changed since the checkpoint: evaluate.images: None, now 10; train.keep: 2, now 3",
    )
    assert start_of(copied, "data.num_workers=0", "train.checkpoint_every=5").notes == (
        "changed since the checkpoint: data.num_workers: 4, now 0; "
        "train.checkpoint_every: 3, now 5",
    )


def test_before_the_first_checkpoint_other_settings_are_refused_too(copied: RunFolder) -> None:
    shutil.rmtree(copied.checkpoints)
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.03, now 0\.5"):
        start_of(copied, "optimizer.lr=0.5")


def test_a_run_of_an_earlier_version_goes_on(copied: RunFolder) -> None:
    shutil.rmtree(copied.checkpoints)
    text = copied.recipe.read_text()
    assert "  attack_mode: eval\n" in text
    copied.recipe.write_text(text.replace("  attack_mode: eval\n", ""))
    assert start_of(copied) == Start()
    with pytest.raises(ValueError, match=r"train\.attack_mode: None, now 'train'"):
        start_of(copied, "train.attack_mode=train")


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ({}, {"engine": "DeepSpeed", "zero_stage": 0}, "torch on 1 .* DeepSpeed, ZeRO stage 0,"),
        ({"zero_stage": 1}, {"zero_stage": 2}, "ZeRO stage 1, on 1 .* ZeRO stage 2, on 1"),
        ({"zero_stage": 1}, {"zero_stage": 1, "num_processes": 2}, "on 1 processes.* on 2 pro"),
    ],
)
def test_another_engine_cannot_go_on(
    copied: RunFolder, was: dict[str, Any], now: dict[str, Any], words: str
) -> None:
    step = copied.steps()[-1]
    about = read_whole(step)["about"] | {"engine": ENGINE | was}
    publish(step, step.with_name("step-00000015"), set(FILES) - {MANIFEST}, about)
    with pytest.raises(ValueError, match=f"was trained by .*{words}.* cannot read its checkpoints"):
        start_of(copied, engine=ENGINE | now)


def test_what_may_have_changed_is_said(copied: RunFolder) -> None:
    assert start_of(copied).notes == ()
    start = start_of(copied, engine=ENGINE | {"num_processes": 2, "device": "x"})
    assert start.checkpoint == "step-00000014"
    assert start.notes == (
        "the checkpoint is from 1 processes, not 2: the run goes on, but not bit for bit",
        "the run goes on, perhaps not bit for bit: device cpu, now x",
    )


class Killed(BaseException):
    pass


def timeless(value: Any) -> Any:
    """But for what the clock says, and how much memory was needed."""
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if "second" not in k and "memory" not in k}
        return {k: timeless(v) for k, v in left.items() if k not in ("time", "output", "name")}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def killed_as_it_writes(folder: Path, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = os.replace, file

    def deadly(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deadly)
        with pytest.raises(Killed):
            run(folder, resume=True)


def test_a_run_that_is_killed_again_and_again_tells_what_an_uninterrupted_one_does(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as it writes: checkpoints, best weights, model, report."""
    folder = RunFolder(tmp_path / "run")
    for file in (5, 7, 9, 13, 9):
        killed_as_it_writes(folder.path, file, monkeypatch)
    run(folder.path, resume=True)
    assert same_end(folder, finished)
    assert timeless(folder.read_metrics()) == timeless(finished.read_metrics())
    assert timeless(folder.read_report()) == timeless(finished.read_report())
    assert len(read_records(folder.path)) == len(read_records(finished.path))


def test_best_weights_that_were_damaged_are_taken_from_a_checkpoint(
    copied: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do not spread into the next one."""
    shutil.rmtree(copied.steps()[-1])
    (before,) = copied.steps()
    save, kept = Checkpoint.save, []

    def damaged(self: Checkpoint) -> None:
        if not kept:
            FAULTS["flipped"](copied.best)
        save(self)
        kept.append(read_whole(copied.steps()[-1])["files"]["best.safetensors"])

    monkeypatch.setattr(Checkpoint, "save", damaged)
    run(copied.path, resume=True)
    assert kept[0] == read_whole(before)["files"]["best.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"x": 5}},
        {"files": [1]},
        {"about": {}},
        {"about": {"settings": 1}},
        {"digest": None},
    ],
    ids=str,
)
def test_a_strangers_manifest_is_damaged_or_whole(copied: RunFolder, change: dict) -> None:
    path = copied.steps()[-1] / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    changed = manifest | change
    path.write_text(json.dumps({"digest": digest_of_json(changed), **changed}))
    with pytest.raises(ValueError, match=f"^{MANIFEST} is damaged$"):
        read_whole(copied.steps()[-1])
    path.write_text(100_000 * "[")
    with pytest.raises(ValueError, match=f"^{MANIFEST} is damaged$"):
        read_whole(copied.steps()[-1])


def test_what_chooses_weights_stays(copied: RunFolder) -> None:
    for setting in ("evaluate.seed=7", "evaluate.batch_size=17", "evaluate.eps=0.1"):
        with pytest.raises(ValueError, match=f"other settings: {setting.partition('=')[0]}"):
            start_of(copied, setting)


def test_a_kill_while_a_checkpoint_replaces_another_loses_neither(copied: RunFolder) -> None:
    """Of one step: before and after its validation."""
    last = copied.steps()[-1]
    last.rename(last.with_name(f"replaced-{last.name}"))
    assert start_of(copied).checkpoint == last.name
    assert names(copied)[-1] == last.name
