"""Writing that is either whole or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError


@contextlib.contextmanager
def friendly_io(path: Path) -> Iterator[None]:
    """A full disk or a read-only folder as one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LorakitError(
                f"{path}: no space left to write it; nothing half-written was kept. Free some and run again"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise LorakitError(f"{path}: cannot be written (read-only, or not yours)") from None
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise LorakitError(f"{path}: a file stands where a folder is needed, or a folder where a file is") from None
        raise LorakitError(f"{path}: {error.strerror or error}") from None


def sync(path: Path) -> None:
    """Make a file, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Write a folder under a temporary name beside `final`, then put it in place at once.

    What is at `final` is never half-written: it is the new folder, or the old one. (Between the two
    renames of a replacement there is an instant with the old one under a hidden name beside it.)
    """
    with friendly_io(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
        scratch.mkdir()
    try:
        with friendly_io(final):
            yield scratch
            for file in scratch.iterdir():
                sync(file)
            sync(scratch)
            old = None
            if final.exists():
                old = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.old"
                final.rename(old)
            scratch.rename(final)
            sync(final.parent)
            if old is not None:
                shutil.rmtree(old)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Indented, sorted, replaced in one step."""
    with friendly_io(path):
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(scratch)
        scratch.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one line that says where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, IsADirectoryError):
        raise LorakitError(f"{path} is not a text file") from None
    except json.JSONDecodeError as error:
        raise LorakitError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
