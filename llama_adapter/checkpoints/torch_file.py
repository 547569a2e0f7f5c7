"""Reads the tensors of a torch file, mapped from disk, and nothing that would need code to be run.

An archive's records must lie where its directory says, each be one whole tensor's, and the pickle
must have its checksum: a damaged archive is refused, not read as something else.
"""

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# what a damaged pickle or archive has been seen to raise
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
    zlib.error,
)
_CUT_OFF = "the directory at the end is missing"
_TENSOR_RECORD = re.compile(r"[^/]+/data/\d+")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_EXTRA_HEADER = struct.Struct("<2H")


def read_torch_file(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """The dictionary that a torch file holds, its tensors mapped where it is an archive.

    Args:
        path: of the file.
        whole: take one that is no archive too, all of which is read at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, needs code to be read, holds no dictionary by names, or
            would be read whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive and not whole:
        raise ValueError(
            f"{path} must be a torch archive, of which parts can be read, to be sharded: load it "
            "and save it again with torch.save"
        )
    try:
        if is_archive and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile(_CUT_OFF)
        sizes = _record_sizes(path) if is_archive else None
        # archives are mapped, so a tensor is read from disk when it is copied into the model
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if sizes is not None and sizes != sorted(_storage_sizes(content).values()):
            raise zipfile.BadZipFile("a tensor has more or less numbers than its record")
    except _DAMAGE as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise ValueError(
                f"{path} can only be read by running code ({needed[1]}), which is refused: "
                "save its tensors alone, with torch.save(state_dict, path)"
            ) from None
        if str(error) == _CUT_OFF:
            size = path.stat().st_size
            raise ValueError(f"{path} is cut off ({size} bytes): copy it again") from None
        raise ValueError(f"{path} is damaged or not a torch file: copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, got {type(content).__name__}")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"{path} must hold tensors by name, got the key {name!a}")
    return content


def check_checksums(path: Path) -> None:
    """Read an archive whole and compare its checksums, which the loader of mapped files does not.

    Raises:
        ValueError: a record has another, or cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} has another checksum; copy it again")


def check_tensors(
    content: dict[str, Any], path: Path, *, tied: tuple[str, str]
) -> dict[str, Tensor]:
    """The content of a torch file, once every value is a tensor with memory of its own.

    Args:
        content: values by name.
        path: of the file, for messages.
        tied: the two names that may be one tensor: embedding and output.

    Raises:
        ValueError: a value is no tensor, or a part of another's memory.
    """
    owners: dict[int, str] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_meta:
            raise ValueError(f"{path}: {name} must be a plain tensor of numbers on the CPU")
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        owner = owners.setdefault(value.data_ptr(), name) if value.numel() else name
        if not whole or (owner != name and {owner, name} != set(tied)):
            raise ValueError(
                f"{path}: {name} must have memory of its own, not a part of another tensor's: "
                "save its clone()"
            )
    return content


def _storage_sizes(content: Any) -> dict[int, int]:
    """Bytes of all memory that tensors in nested containers have, by address."""
    if isinstance(content, Tensor):
        if content.layout is not torch.strided or content.is_meta:
            return {}
        storage = content.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    inner = content.values() if isinstance(content, dict) else content
    if not isinstance(content, dict | list | tuple):
        return {}
    sizes: dict[int, int] = {}
    for value in inner:
        sizes |= _storage_sizes(value)
    return sizes


def _record_sizes(path: Path) -> list[int]:
    """Bytes of the records of an archive's tensors, in ascending order.

    Raises:
        BadZipFile: records lie elsewhere, or are others, than the directory says.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise zipfile.BadZipFile("a record is there twice")
        ends = [*sorted(record.header_offset for record in records)[1:], archive.start_dir]
        for record, end in zip(
            sorted(records, key=lambda record: record.header_offset), ends, strict=True
        ):
            file.seek(record.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            name_size, extra_size = header[-2:]
            name = file.read(name_size)
            extra = file.read(extra_size)
            start = record.header_offset + _LOCAL_HEADER.size + name_size + extra_size
            if (
                header[0] != b"PK\x03\x04"
                or name != record.filename.encode()
                or not _is_tiled(extra)
                or record.compress_type != zipfile.ZIP_STORED
                or record.compress_size != record.file_size
                or start + record.file_size > end
            ):
                raise zipfile.BadZipFile(f"record {record.filename} is damaged")
            if record.filename.endswith(".pkl"):
                file.seek(start)
                if zlib.crc32(file.read(record.file_size)) != record.CRC:
                    raise zipfile.BadZipFile(f"record {record.filename} is damaged")
        found = [record for record in records if _TENSOR_RECORD.fullmatch(record.filename)]
        return sorted(record.file_size for record in found if record.file_size)


def _is_tiled(extra: bytes) -> bool:
    """Whether a record's extra fields fill their place: else its data would be sought elsewhere."""
    at = 0
    while at < len(extra):
        if at + _EXTRA_HEADER.size > len(extra):
            return False
        at += _EXTRA_HEADER.size + _EXTRA_HEADER.unpack_from(extra, at)[1]
    return at == len(extra)
