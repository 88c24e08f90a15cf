"""A folder has one owner at a time, and what an owner that is gone has left means nothing."""

import errno
import fcntl
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from robust_accel.locks import OWNER, locked

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, said: Any) -> None:
    """Own a folder until killed."""
    with locked(folder):
        said.send(os.getpid())
        said.recv()


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Another process that owns ``tmp_path / "run"``."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    here.recv()
    yield process
    process.kill()
    process.join()


def test_a_second_owner_is_refused_by_name_until_the_first_is_gone(
    tmp_path: Path, other: Any
) -> None:
    folder = tmp_path / "run"
    holder = f"process {other.pid} on {socket.gethostname()} since "
    for _ in range(2):  # a refusal takes nothing away
        with pytest.raises(ValueError, match=f"^output: {folder} is in use by {holder}"):
            locked(folder).__enter__()
    other.kill()
    other.join()
    assert (folder / OWNER).exists()
    with locked(folder) as text:
        assert f"process {os.getpid()} " in text
        assert (folder / OWNER).read_text() == text
    assert not (folder / OWNER).exists()


def test_removing_the_lock_lets_nobody_in(tmp_path: Path, other: Any) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        (folder / OWNER).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"^output: {folder} is in use by a process whose"):
            locked(folder).__enter__()
    other.kill()
    other.join()
    with locked(folder):
        assert (folder / OWNER).exists()


def test_who_reads_the_lock_or_is_forked_changes_nothing(tmp_path: Path) -> None:
    child = CONTEXT.Process(target=time.sleep, args=(60,))
    with locked(tmp_path):
        (tmp_path / OWNER).read_text()  # a lock of another kind is lost by this
        child.start()
        with pytest.raises(ValueError, match="is in use"):
            locked(tmp_path).__enter__()
    with locked(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()


def contend(folder: Path, together: Any, won: Any) -> None:
    together.wait()
    try:
        with locked(folder):
            with won.get_lock():
                won.value += 1
            together.wait()
    except ValueError:
        together.wait()


@pytest.mark.long
def test_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    for trial in range(20):
        together, won = CONTEXT.Barrier(4), CONTEXT.Value("i", 0)
        what = (tmp_path / str(trial), together, won)
        processes = [CONTEXT.Process(target=contend, args=what) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert won.value == 1


def own_often(folder: Path, said: Any) -> None:
    for _ in range(500):
        try:
            with locked(folder):
                pass
        except ValueError as error:
            said.send(str(error))
    said.send("")


def test_who_loses_at_any_moment_is_told_who_won(tmp_path: Path) -> None:
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(3)]
    processes = [
        CONTEXT.Process(target=own_often, args=(tmp_path / "run", there)) for _, there in ends
    ]
    for process in processes:
        process.start()
    said = [line for here, _ in ends for line in iter(here.recv, "")]
    for process in processes:
        process.join()
    assert said
    assert [line for line in said if " is in use by process " not in line] == []


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with locked(tmp_path):  # it was there, and is empty
        pass
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_folder_that_cannot_be_owned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match=r"^output: .*file is no folder"):
        locked(tmp_path / "file").__enter__()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^output: .*link is no folder"):
        locked(tmp_path / "link").__enter__()
    (tmp_path / OWNER).symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match=r"^output: .* cannot be written to"):
        locked(tmp_path).__enter__()
    assert (tmp_path / "file").read_text() == "a file"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert len(caplog.messages) == 1 and "no locks" in caplog.messages[0]


def test_a_lock_that_is_another_file_too_leaves_that_alone(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("mine")
    (folder / OWNER).hardlink_to(victim)
    with locked(folder) as text:
        assert (folder / OWNER).read_text() == text
    assert victim.read_text() == "mine"
