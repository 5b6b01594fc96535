"""Files appear whole or not at all.

Everything is written under a temporary name beside its destination, flushed to the disk and renamed. Whoever reads
while we write, or after we were killed, sees the old state or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import OutputError

TEMPORARY_PREFIX = ".pissa-partial-"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


@contextmanager
def output_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: `out` already holds something, at the beginning or by the end, or cannot be written (disk full, no
            permission, no directory).
    """
    out = Path(out)
    check_free(out)
    out = Path(os.path.realpath(out))  # a link to an empty directory keeps pointing there
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=out.parent))
    try:
        with explained(out):
            yield partial
            flush_tree(partial)
            _put_directory(partial, out)
            flush(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def output_files(out: str | os.PathLike[str], *, last: str) -> Iterator[Path]:
    """A temporary directory whose files are moved into the existing directory `out` when the block ends well.

    Each file replaces its namesake in one step; the file named `last`, without which no reader accepts the
    others, is taken away first and comes last, so that a mixture of old and new is never readable.
    """
    out = Path(out)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=out))
    try:
        with explained(out):
            yield partial
            flush_tree(partial)
            (out / last).unlink(missing_ok=True)
            for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
                file.replace(out / file.name)
            flush(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def output_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path whose file becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: `out` exists, at the beginning or by the end, or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise OutputError(f"{out} already exists; name a new file, or remove it first")
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=out.parent))
    try:
        with explained(out):
            yield partial / out.name
            flush_tree(partial)
            _put_file(partial / out.name, out)
            flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document, whole or not at all."""
    with explained(path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=2, sort_keys=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            usual_mode(Path(name))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_free(out: str | os.PathLike[str]) -> None:
    """Refuse an output directory that already holds something.

    Raises:
        OutputError: `out` is a file or a directory with content.
    """
    out = Path(out)
    with explained(out):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        raise OutputError(f"{out} already holds something; name a new or empty directory, or remove it first")


def check_writable(out: str | os.PathLike[str]) -> None:
    """Refuse a file, and a place where nothing can be made, before the work and not after it.

    Raises:
        OutputError: naming what is in the way.
    """
    out = Path(out)
    places = (out.absolute(), *out.absolute().parents)
    nearest = next(place for place in places if place.exists() or place.is_symlink())
    if not nearest.is_dir():
        raise OutputError(f"{nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission in {nearest}; choose another directory")


def durable_rename(partial: Path, final: Path) -> None:
    """Flush a directory and everything in it to the disk, then give it its name, in place of an older one."""
    flush_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    flush(final.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says of a full, read-only or forbidden disk into one clear line.

    Raises:
        OutputError: in place of such an error; any other passes as it is.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors wraps the system's error in one of its own that has no errno
        if full or "No space left on device" in str(error):
            raise OutputError(
                f"the disk that holds {path} is full; make room and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise OutputError(f"{path} cannot be written: {error.strerror}; choose another directory") from error
        raise


def locked(descriptor: int) -> bool:
    """Take the lock that ends with the process; True also where the system or the file system has none."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def flush_tree(directory: Path) -> None:
    """Flush a directory and everything in it to the disk, with the permissions that the user's new files have."""
    for path in [*directory.rglob("*"), directory]:
        usual_mode(path)
        flush(path)


def usual_mode(path: Path) -> None:
    """Give a file or directory of ours the permissions that the umask leaves: temporary names, and what safetensors
    writes, are for the owner alone."""
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())


def flush(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_directory(partial: Path, out: Path) -> None:
    """Give a directory its name, unless there is something by now.

    Raises:
        OutputError: another process was quicker.
    """
    try:
        if out.exists():
            out.rmdir()  # an empty one
        partial.rename(out)  # succeeds where there is nothing, or an empty directory
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and out.exists():
            raise OutputError(_taken(out)) from error
        raise


def _put_file(partial: Path, out: Path) -> None:
    """Give a file its name, unless there is something by now.

    Raises:
        OutputError: another process was quicker.
    """
    try:
        os.link(partial, out)  # unlike a rename it replaces nothing
    except FileExistsError as error:
        raise OutputError(_taken(out)) from error
    except (OSError, AttributeError, NotImplementedError):  # a file system without links
        if out.exists():
            raise OutputError(_taken(out)) from None
        os.replace(partial, out)


def _taken(out: Path) -> str:
    return f"another process wrote {out} meanwhile, and what it wrote stays; name a new one, or remove it first"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
