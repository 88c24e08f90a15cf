"""Files that are written whole or not at all, never through a link, and read with suspicion."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

INCOMPLETE = ".incomplete-"  # how the name of a file begins that is being written
_LARGEST, _LONGEST = 2**28, 2**26  # bytes of a text, and of a line of one
_LONGEST_PART, _LONGEST_PATH = 255, 4096  # bytes that Linux has room for
_FULL = 2**16  # a disk with fewer free bytes


def check_path(path: str) -> str:
    """The path, ``~`` written out, if a file can have it: else system calls raise ``OSError``.

    Raises:
        ValueError: It is empty, it or a part of it is too long, or it holds a NUL; or nobody has
            this ``~``.
    """
    if not path:
        raise ValueError("an empty text names no file")
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError("a ~ stands for somebody's home, and nobody here has this name; or ./~")
    content = path.encode(errors="surrogatepass")
    # braces stand for several names
    names = (part for part in content.split(b"/") if not {*b"{}"}.intersection(part))
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_PART:
        raise ValueError(f"a name in a path has at most {_LONGEST_PART} bytes, not {longest:,}")
    if len(content) > _LONGEST_PATH:
        raise ValueError(f"a path has at most {_LONGEST_PATH} bytes, not {len(content):,}")
    if b"\0" in content:
        raise ValueError("a path holds no NUL")
    return path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it becomes ``path`` at the end.

    Then it is on disk, whole, and readable by whom the umask says. If the body raises, or the
    process dies, ``path`` is what it was. A link that lies at ``path`` is replaced, not followed.

    Raises:
        OSError: It cannot be written; names ``path`` where that could not be told before.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _created_beside(path)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    except OSError as error:
        error.filename = str(path)  # nobody knows the other name
        raise
    try:
        yield temporary
        # some libraries make a file of their own, for its owner alone
        temporary.chmod(_mode(file))
        on_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path) if error.filename is None else error.filename
        raise
    except Exception as error:  # safetensors and torch do not say why they could not write
        if shutil.disk_usage(path.parent).free >= _FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(file)
    on_disk(path.parent)


def opened(path: str | Path) -> BufferedReader:
    """Open a file to read, which others may have put there: nothing is waited for.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no file, but a folder, pipe or device", str(path))
    return os.fdopen(file, "rb")


def write_text(path: str | Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(content: Any) -> Any:
    """As JSON has it: tuples are lists, and what is not finite is null."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def write_json(path: str | Path, content: Any) -> None:
    """Write as ``as_json`` has it."""
    write_text(path, json.dumps(as_json(content), indent=2) + "\n")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line as ``as_json`` has it, on a line of its own even after one that was cut off.

    A file that has another name, too (a hard link: ``cp -al`` makes them), becomes one of its own:
    what stands under the other name stays as it is.

    Raises:
        OSError: The file is a link, among others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and path.lstat().st_nlink > 1:
        with written_whole(path) as own:
            shutil.copyfile(path, own)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(as_json(line)).encode() + b"\n")


def read_text(path: str | Path) -> str:
    """The text of a file that others may have put there.

    Raises:
        ValueError: It cannot be read, is no file, or none of text, or of more than 256 MiB.
    """
    try:
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size > _LARGEST:
                raise ValueError(f"{path} has more than {_LARGEST} bytes: too many for such a file")
            return file.read(_LARGEST).decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: There is none.
    """
    try:
        return _object(read_text(path), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; one that was cut off when its process was killed is left
    out.

    Raises:
        ValueError: The file cannot be read, or a line is no object.
    """
    lines = []
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), b""), 1):
                if len(line) > _LONGEST:
                    raise ValueError(f"{path}, line {number} has more than {_LONGEST} bytes")
                with suppress(json.JSONDecodeError, UnicodeDecodeError):
                    lines.append(_object(line.decode("utf-8"), f"{path}, line {number}"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return lines


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; too deep
        raise ValueError(f"{where}: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: no JSON object, but {type(found).__name__}")
    return found


def check_contained(folder: Path) -> None:
    """Raise ValueError if writing into a folder could reach what lies outside of it.

    The folder itself may be a link, and links in it may lead to other places in it.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(root):  # follows no link
        for name in (*folders, *names):
            path = Path(place, name)
            with suppress(FileNotFoundError):  # another process has just removed it
                kind = path.lstat().st_mode
                if stat.S_ISLNK(kind) and not Path(os.path.realpath(path)).is_relative_to(root):
                    raise ValueError(
                        f"{path} is a link to {os.readlink(path)}, outside of {folder}: nothing is "
                        "written into a folder with such links; remove it"
                    )
                if not (stat.S_ISLNK(kind) or stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
                    raise ValueError(f"{path} is a pipe or device, no file: remove it")


def give_to_umask(folder: Path) -> None:
    """Let the umask say who reads a folder's files: some libraries write for their owner alone."""
    probe, file = _created_beside(folder / "probe")
    mode = _mode(file)
    probe.unlink()
    os.close(file)
    for place, _, names in os.walk(folder):
        for name in names:
            Path(place, name).chmod(mode)


def remove_incomplete(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in a folder, at any depth.

    A file that another process is writing, a report's, is left alone.
    """
    for place, folders, names in os.walk(folder):
        for name in names:
            if name.startswith(INCOMPLETE):
                _remove_unless_held(Path(place, name))
        for name in [name for name in folders if name.startswith(INCOMPLETE)]:
            folders.remove(name)
            shutil.rmtree(Path(place, name), ignore_errors=True)


def _created_beside(path: Path) -> tuple[Path, int]:
    """Make an empty file, with a name of its own and the suffix of ``path``, and hold its lock."""
    while True:
        start = f"{INCOMPLETE}{secrets.token_hex(4)}-"
        room = _LONGEST_PART - len(start)
        end = os.fsencode(path.name)[-room:].decode(errors="ignore")  # of halves of a character
        temporary = path.with_name(start + end)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        if _is_held(file) or os.fstat(file).st_nlink == 0:  # just removed as somebody's rest
            os.close(file)
            continue
        return temporary, file


def _remove_unless_held(path: Path) -> None:
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, a pipe, or gone: nobody's work
        path.unlink(missing_ok=True)
        return
    if not _is_held(file):
        path.unlink(missing_ok=True)
    os.close(file)


def _is_held(file: int) -> bool:
    """Take an open file's lock, which the kernel lets go at the end; whether another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        pass
    return False


def _mode(file: int) -> int:
    return os.fstat(file).st_mode & 0o777


def on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
