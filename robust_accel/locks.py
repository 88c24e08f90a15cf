"""A folder has one owner at a time: who holds its lock."""

import errno
import fcntl
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)

OWNER = "owner.lock"  # in the folder, for as long as somebody owns it
_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_owned: set[int] = set()  # files that this process has locked


def _disown() -> None:
    """A forked process (one that decodes images) may outlive the owner, and is none."""
    for file in _owned:
        os.close(file)
    _owned.clear()


os.register_at_fork(after_in_child=_disown)


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Own a folder, which is made if it is not there; gives what ``owner.lock`` says of the owner.

    The kernel lets go when this process ends, in whatever way; a file that is left behind means
    nothing. Processes that it forks own nothing. On NFS the server keeps the lock, so that it holds
    between machines; a file system without locks is said to have none, and is used. Where folders
    can be locked, too, removing the file lets nobody in.

    Raises:
        ValueError: ``output: ...``: another process owns it, or it cannot be written to.
    """
    is_new = not folder.exists()
    try:
        file = _open_locked(folder)
        try:
            itself = _locked_itself(folder)
        except ValueError:
            (folder / OWNER).unlink()
            os.close(file)
            raise
        text = f"{_about_this_process()}\n{secrets.token_hex(16)}\n"
        os.truncate(file, 0)
        os.write(file, text.encode())
        held = [file] if itself is None else [file, itself]
        _owned.update(held)
    except FileExistsError:
        raise ValueError(f"output: {folder} is no folder: choose another") from None
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be written to: {error.strerror}") from error
    try:
        yield text
    finally:
        _owned.difference_update(held)
        if itself is not None:  # before the next one can have the file
            fcntl.flock(itself, fcntl.LOCK_UN)  # a process that is being forked has it open yet
            os.close(itself)
        with suppress(OSError):  # the folder may be gone, or filled
            (folder / OWNER).unlink()  # while it is held: the next one makes its own
            if is_new:
                folder.rmdir()
        os.close(file)


def _open_locked(folder: Path) -> int:
    path = folder / OWNER
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileExistsError, FileNotFoundError):
            with suppress(FileNotFoundError):  # one look: it may come and go
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise
            continue  # an owner has just removed the folder that it had made
        if os.fstat(file).st_nlink > 1:  # it is also another file: leave that one alone
            os.close(file)
            path.unlink(missing_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    f"{folder}: its file system has no locks: see that no second run writes there"
                )
                return file
            holder = _holder(file)
            os.close(file)
            if error.errno not in _HELD:
                raise
            raise ValueError(
                f"output: {folder} is in use by {holder or 'another process'}: wait for its end, "
                "or choose another folder by output=FOLDER"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)  # an owner has removed it since it was opened
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _holder(file: int) -> str:
    """What an owner says of itself, which it does a moment after it has the lock."""
    for _ in range(20):
        holder = os.pread(file, 1000, 0).decode(errors="replace").split("\n")[0]
        if holder:
            break
        time.sleep(0.01)
    return holder


def _locked_itself(folder: Path) -> int | None:
    """The folder, locked as well; None where folders cannot be, as on NFS."""
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(found)
        if error.errno not in _HELD:
            return None
        raise ValueError(
            f"output: {folder} is in use by a process whose {OWNER} was removed: wait for its end, "
            "or choose another folder by output=FOLDER"
        ) from None
    return found


def _about_this_process() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"
