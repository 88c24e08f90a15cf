"""Files are written whole, for whom the umask says, and nowhere else; files alone are read."""

import errno
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from robust_accel.files import (
    INCOMPLETE,
    append_line,
    check_contained,
    opened,
    read_lines,
    remove_incomplete,
    write_text,
    written_whole,
)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def test_the_umask_says_who_reads(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "a", "text")
    append_line(tmp_path / "b", {})
    with written_whole(tmp_path / "c") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as some libraries do
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "report.md"
    victim.write_text("mine")
    path.symlink_to(victim)
    write_text(path, "text")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("mine", "text", False)
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        append_line(path, {})
    assert victim.read_text() == "mine"


def test_a_line_goes_to_this_name_of_a_file_alone(tmp_path: Path) -> None:
    """``cp -al`` keeps a run as it is."""
    path, other = tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"
    append_line(path, {"step": 1})
    os.link(path, other)
    append_line(path, {"step": 2})
    append_line(path, {"step": 3})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert [line["step"] for line in read_lines(other)] == [1]


@pytest.mark.parametrize("place", ["metrics.jsonl", "model/config.json", "a/b/c/figures"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing", "link"])
def test_a_link_out_of_a_folder_is_named(tmp_path: Path, place: str, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    path = tmp_path / "run" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="is a link to") as caught:
        check_contained(tmp_path / "run")
    assert str(path) in str(caught.value)
    assert str(tmp_path / target) in str(caught.value)


def test_a_folder_behind_links_and_links_within_it_are_fine(tmp_path: Path) -> None:
    disk = tmp_path / "scratch" / "run"
    (disk / "checkpoints" / "step-1").mkdir(parents=True)
    (disk / "checkpoints" / "last").symlink_to("step-1")
    (disk / "itself").symlink_to(".")
    (tmp_path / "run").symlink_to(disk)
    check_contained(tmp_path / "run")
    check_contained(tmp_path / "new")
    (disk / "up").symlink_to("../other")
    with pytest.raises(ValueError, match=r"up is a link to \.\./other"):
        check_contained(tmp_path / "run")


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="is a pipe or device"):
        check_contained(tmp_path)
    with pytest.raises(OSError, match="is no file"):
        opened(tmp_path / "metrics.jsonl")
    for place in (tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="is no file"):
            opened(place)


def test_what_killed_processes_had_begun_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "a.png"
    write_text(path, "whole")
    child = os.fork()
    if not child:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / f"{INCOMPLETE}folder" / "more").mkdir(parents=True)
    assert len(list(tmp_path.rglob(f"{INCOMPLETE}*"))) == 2
    remove_incomplete(tmp_path)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert path.read_text() == "whole"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    """A report is written without owning the folder, maybe beside a run that begins there."""
    path = tmp_path / "figures" / "a.png"
    tell, told = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            os.write(tell[1], b".")
            os.read(told[0], 1)
            temporary.write_text("whole")
        os._exit(0)
    os.read(tell[0], 1)
    (begun,) = path.parent.iterdir()
    rest = path.with_name(f"{INCOMPLETE}01234567-b.png")
    rest.touch()
    remove_incomplete(tmp_path)
    assert begun.read_text() == "half" and not rest.exists()
    os.write(told[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() == "whole" and not begun.exists()


def test_what_is_begun_and_no_file_is_removed_without_waiting(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    os.mkfifo(folder / f"{INCOMPLETE}pipe")
    (folder / f"{INCOMPLETE}link").symlink_to(mine)
    remove_incomplete(folder)
    assert list(folder.iterdir()) == [] and mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "\u00e9" * 125 + "x.png", "x" * 255])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with written_whole(path) as temporary:
        str(temporary).encode()  # no half of a character, which other libraries could not open
        assert temporary.suffix == path.suffix
        temporary.write_text("whole")
    assert [found.name for found in tmp_path.iterdir()] == [name]
    assert path.read_text() == "whole"


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("before")
    said = r"No space left on device: '.*/a\.safetensors'$"
    with pytest.raises(OSError, match=said), written_whole(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fault = RuntimeError("I/O error")  # of a library that does not say which
    with pytest.raises(RuntimeError), written_whole(path):
        raise fault
    full = namedtuple("Usage", "free")(4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=said), written_whole(path):
        raise fault
    assert [found.read_text() for found in tmp_path.iterdir()] == ["before"]


def test_a_file_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    path, until = tmp_path / "report.json", time.monotonic() + 0.5
    write_text(path, "a" * 100_000)

    def write() -> None:
        while time.monotonic() < until:
            for letter in "ab":
                write_text(path, letter * 100_000)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while time.monotonic() < until:
        seen.add(path.read_text())
    writer.join()
    assert seen <= {"a" * 100_000, "b" * 100_000}
