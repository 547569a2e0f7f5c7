"""Opens what torch.save wrote: tensors and plain values, never code.

Archives are mapped, so that a tensor is read from disk when it is used. Whatever is no file of
torch's, is cut off, packed, or needs code to be read is an error of one line.
"""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

# what a damaged pickle has been seen to raise
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    EOFError,
    OverflowError,
    struct.error,
)


def open_torch(path: Path) -> dict[Any, Any]:
    """Content of a torch file, on the CPU.

    Args:
        path: the file; it exists.

    Returns:
        What was saved, a dictionary; nothing about its keys and values is checked.

    Raises:
        ValueError: the file is damaged, needs code to be read, or holds no dictionary.
    """
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut off ({path.stat().st_size} bytes): copy it again")
    if is_archive:
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except _DAMAGE as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise ValueError(
                f"{path} can only be read by running code ({needed[1]}), which is refused: "
                "save its tensors alone, with torch.save(state_dict, path)"
            ) from None
        raise ValueError(f"{path} is damaged or not a torch file: copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, got {type(content).__name__}")
    if is_archive and _storage_sizes(content) != _record_sizes(path):
        raise ValueError(f"{path} is damaged: its tensors lie in records of other sizes")
    return content


def _storage_sizes(content: object) -> list[int]:
    """Bytes of every storage that is mapped, in the order of the file."""
    found, seen, left = dict[int, int](), set[int](), [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.device.type == "cpu":
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            # a pickle may hold itself
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    return [found[at] for at in sorted(found) if found[at]]


def _record_sizes(path: Path) -> list[int]:
    """Bytes of every record of numbers, in the order of the file.

    The loader maps as many bytes as a tensor says, be its record shorter: those of the next one.
    """
    with zipfile.ZipFile(path) as archive:
        records = [one for one in archive.infolist() if "/data/" in one.filename]
    ordered = sorted(records, key=lambda one: one.header_offset)
    return [record.file_size for record in ordered if record.file_size]


def _check_archive(path: Path) -> None:
    """Raise ValueError unless every record lies in the file as it is, under a name of its own.

    A mapped record is not unpacked, and of two records with one name either may be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (*_DAMAGE, zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from None
    names = {record.filename for record in records}
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or len(names) != len(records):
        raise ValueError(f"{path} is an archive, but not one that torch.save wrote: save it again")
