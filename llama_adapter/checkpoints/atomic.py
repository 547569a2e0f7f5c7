"""How a file is replaced so that a kill at any moment leaves the old one or the new one, whole.

A temporary file beside the target is written, synced and renamed over it, then the folder itself
is synced. A kill can leave a temporary file behind; it is never mistaken for the target.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
# characters of a name, of up to four bytes each: the temporary one stays within 255 bytes
_SHOWN = 60


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, completely or not at all.

    Args:
        path: the file to create or replace; its folder must exist.
        data: the whole content, in bytes.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the system refused to write; the old file is untouched.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of the one at `path` when the block ends well.

    Args:
        path: the file to create or replace; its folder must exist.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the system refused to write; the old file is untouched, as after any other error.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist: cannot write {path.name} into it")
    name = f"{temporary_prefix(path)}{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    temporary = folder / name
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # a full disk's error names no file of its own
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(folder)


def temporary_prefix(path: Path) -> str:
    """How the names of a file's temporary ones begin, which a kill leaves behind."""
    return f".{path.name[:_SHOWN]}."


def _sync_folder(folder: Path) -> None:
    # the rename itself is durable only once the folder is; Windows has no such call
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
