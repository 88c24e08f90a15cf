"""Files that are written whole or not at all, and never through a link."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INCOMPLETE = ".incomplete-"  # how the name of a file begins that is being written


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it becomes ``path`` at the end.

    Then it is on disk, whole, and readable by whom the umask says. If the body raises, or the
    process dies, ``path`` is what it was. A link that lies at ``path`` is replaced, not followed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{INCOMPLETE}{secrets.token_hex(4)}-{path.name}")
    mode = _created(temporary)
    try:
        yield temporary
        temporary.chmod(mode)  # some libraries make a file of their own, for its owner alone
        _on_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _on_disk(path.parent)


def write_text(path: str | Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line, on a line of its own even after one that was cut off.

    Raises:
        OSError: The file is a link, among others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; one that was cut off when its process was killed is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _created(path: Path) -> int:
    """Make an empty file that was not there; its mode."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return os.fstat(file).st_mode & 0o777
    finally:
        os.close(file)


def _on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
