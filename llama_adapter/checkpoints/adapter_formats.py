"""Adapters of every program, in and out: which format a file is of, and who reads and writes it.

Everything is read into this package's own header and tensors, `StoredAdapter`. A write that would
lose something is refused with the reason.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_adapter.checkpoints import (
    adapter_accessory,
    adapter_litgpt,
    adapter_official,
    adapter_peft,
    adapter_v2,
)
from llama_adapter.checkpoints.adapter_assembly import (
    ReadOptions,
    StoredAdapter,
)
from llama_adapter.checkpoints.adapter_file import encode, is_adapter_file, read_adapter
from llama_adapter.checkpoints.adapter_source import (
    Source,
    open_source,
)
from llama_adapter.checkpoints.atomic import write_atomically

OWN = "llama-adapter"
OWN_FILE = "adapter.safetensors"
# written into a folder
IN_FOLDERS = (adapter_peft.NAME, adapter_accessory.NAME)
# files that describe what lies beside them
DESCRIPTIONS = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Reader:
    """How a format is told by its names, and read."""

    matches: Callable[[Source], bool]
    read: Callable[[Source, ReadOptions], StoredAdapter]


# in the order in which they are tried: the names of the later ones are parts of the earlier ones'
READERS = (
    Reader(adapter_peft.matches, adapter_peft.read),
    Reader(adapter_litgpt.matches, adapter_litgpt.read),
    Reader(adapter_accessory.matches, adapter_accessory.read),
    Reader(adapter_v2.matches_chat, adapter_v2.read_chat),
    Reader(adapter_v2.matches_multimodal, adapter_v2.read_multimodal),
    Reader(adapter_official.matches, adapter_official.read),
)


def _write_own(path: Path, stored: StoredAdapter) -> list[str]:
    write_atomically(path, encode(stored.header, stored.tensors))
    return []


def _write_torch(
    encoder: Callable[[StoredAdapter], tuple[Any, list[str]]],
) -> Callable[[Path, StoredAdapter], list[str]]:
    def write(path: Path, stored: StoredAdapter) -> list[str]:
        content, notes = encoder(stored)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())
        return notes

    return write


def _write_accessory(folder: Path, stored: StoredAdapter) -> list[str]:
    content, notes = adapter_accessory.encode(stored)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "consolidated.00-of-01.model.pth", buffer.getvalue())
    write_atomically(folder / "meta.json", adapter_accessory.meta())
    return notes


# format to what writes it: a file, or for peft and accessory a folder
WRITERS: dict[str, Callable[[Path, StoredAdapter], list[str]]] = {
    OWN: _write_own,
    adapter_official.NAME: _write_torch(adapter_official.encode),
    adapter_v2.CHAT: _write_torch(adapter_v2.encode_chat),
    adapter_peft.NAME: adapter_peft.write,
    adapter_litgpt.NAME: _write_torch(adapter_litgpt.encode),
    adapter_litgpt.NAME_V2: _write_torch(adapter_litgpt.encode_v2),
    adapter_accessory.NAME: _write_accessory,
}


def adapter_path(path: Path) -> Path | None:
    """The file of an adapter, or the folder of PEFT's or Accessory's; None for another folder."""
    if not path.is_dir():
        return path
    for name in (OWN_FILE, *adapter_litgpt.FILES.values()):
        if (path / name).is_file():
            return path / name
    is_peft = (path / adapter_peft.CONFIG).is_file()
    return path if is_peft or adapter_accessory.shards(path) else None


def read_any_adapter(path: str | Path, options: ReadOptions | None = None) -> StoredAdapter:
    """Read an adapter of any known format.

    Args:
        path: a file, or a folder of PEFT, litgpt, Accessory or a run of this package.
        options: what the files do not say; None assumes each format's conventions.

    Returns:
        The adapter in this package's form, with a note for each thing that was assumed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no format matches, the file is damaged, a tensor is missing, surplus, or of
            another shape or dtype, or something that changes the answers would be left out.
    """
    found = adapter_path(Path(path))
    options = ReadOptions() if options is None else options
    if found is None:
        raise FileNotFoundError(f"{path} is a folder without an adapter of a known format")
    if not found.exists():
        raise FileNotFoundError(f"{found} does not exist")
    if not (found.is_file() or found.is_dir()):
        raise ValueError(f"{found} must be a file or a folder, got a device or a pipe")
    if found.suffix in DESCRIPTIONS:
        raise ValueError(f"{found} describes what lies beside it: give its folder, {found.parent}")
    if found.is_file() and is_adapter_file(found):
        return _read_own(found, options)
    source = _open(found)
    for reader in READERS:
        if reader.matches(source):
            stored = reader.read(source, options)
            held = stored.header.config.prompt_length
            if stored.header.layers and options.prompt_length not in (None, held):
                raise ValueError(
                    f"{found} holds prompts of {held} rows, got --prompt-length "
                    f"{options.prompt_length}"
                )
            return stored
    some = ", ".join(name[:80] for name in source.names[:3]) or "none"
    raise ValueError(f"{found} is no adapter of a known format: it has tensors {some}")


def _open(path: Path) -> Source:
    if path.is_dir():
        accessory = adapter_accessory.shards(path)
        return (adapter_accessory if accessory else adapter_peft).open_folder(path)
    with open(path, "rb") as file:
        named = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    return (adapter_peft.open_safetensors if named else open_source)(path)


def _read_own(path: Path, options: ReadOptions) -> StoredAdapter:
    told = [
        name.replace("_", "-")
        for name in ("gate_activation", "gate_scope", "prompt_length")
        if getattr(options, name) is not None
    ]
    if told:
        raise ValueError(f"{path} says itself what --{told[0]} would tell: leave it out")
    header, tensors = read_adapter(path)
    stored = StoredAdapter(header, tensors, OWN)
    known = options.fingerprint
    if known is None:
        return stored
    difference = header.base.difference(known)
    if difference:
        raise ValueError(f"{path} was trained on another base than {known.name!r}: {difference}")
    if header.base.samples:
        return stored
    return replace(stored, header=replace(header, base=known))


def write_adapter_as(path: str | Path, stored: StoredAdapter, format: str) -> tuple[str, ...]:
    """Write an adapter in another program's format, completely or not at all.

    Args:
        path: the file to create or replace; for peft and accessory the folder.
        stored: what `read_any_adapter` returned.
        format: one of WRITERS.

    Returns:
        What to say about the file: one line each.

    Raises:
        ValueError: there is no such format, or it cannot hold the adapter.
        FileNotFoundError: the folder above does not exist.
    """
    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, got {format!r}")
    if stored.header.visual is not None and format != OWN:
        raise ValueError(f"{format} holds no projector of images, and the adapter has one")
    if stored.header.lora is not None and format != OWN:
        raise ValueError(f"{format} is written without LoRA, and the adapter has it")
    of = stored.header.host.kind, stored.header.prompt_kind
    if of != ("llama", "hidden") and format != OWN:
        raise ValueError(
            f"{format} holds prompts of a llama that its layers project, got {of[1]} of a {of[0]}"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist: cannot write {path.name}")
    if path.exists() and path.is_dir() != (format in IN_FOLDERS):
        kind = "folder, got a file" if format in IN_FOLDERS else "file, got a folder"
        raise ValueError(f"{path} must be a {kind}, for {format}")
    return tuple(WRITERS[format](path, stored))
