"""The adapter's own file: safetensors with a JSON header, from which nothing is ever executed.

Layout: 8 bytes with the length of the safetensors header, that header, the tensors. Its metadata
hold a SHA-256 of the whole file, always at the same place, and what the tensors mean: groups,
layers, conventions, and the base model's fingerprint. A reader refuses what it does not know.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_header import (
    QUANTIZED,
    AdapterHeader,
    expected_tensors,
    from_json,
    to_json,
)
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import Fingerprint, fingerprint
from llama_adapter.checkpoints.train_state import is_train_state
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

# the content hash lies behind a constant beginning, and counts as zeros in its own computation
_LENGTH_BYTES = 8
_OPENING = b'{"__metadata__":{"sha256":"'
_HASH_START = _LENGTH_BYTES + len(_OPENING)
_HASH_END = _HASH_START + 64
_ALIGNMENT = 8


def save_adapter(path: str | Path, adapter: Adapter, base: Fingerprint) -> None:
    """Write an adapter, completely or not at all.

    Args:
        path: the file to create or replace.
        adapter: prompts (L, P, C) and gates (L, H) or (L, 1), float32.
        base: fingerprint of the model it was trained on; without samples it was quantised.

    Raises:
        ValueError: the adapter does not fit the base's shape.
        FileNotFoundError: the folder does not exist.
    """
    tensors = {name: value.cpu() for name, value in adapter.tensors().items()}
    header = AdapterHeader(
        groups=tuple(adapter.groups()),
        layers=adapter.layers,
        config=adapter.config,
        base=base,
        scale_side=adapter.tuning.scale_side,
        linears=adapter.tuning.linears,
        origin=None if base.samples else QUANTIZED,
        visual=None if adapter.projector is None else adapter.projector.config,
        lora=adapter.tuning.lora,
        prompt_kind=adapter.prompt_kind,
        host=adapter.host,
    )
    write_atomically(path, encode(header, tensors))


def load_adapter(
    path: str | Path, model: Llama, name: str, *, base: Fingerprint | None = None
) -> Adapter:
    """Read an adapter for the base model it was trained on.

    Args:
        path: an adapter file.
        model: the loaded base.
        name: what to call that base in messages.
        base: its fingerprint, taken before it was quantised; None takes it of `model`.

    Returns:
        The adapter, trainable, in float32 on the model's device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds what this version does not know, or was trained on
            another base.
    """
    loaded = fingerprint(model, name) if base is None else base
    adapter = read_adapter_for(path, loaded, model.config)
    if adapter.prompt_kind != "hidden":
        raise ValueError(
            f"adapter {path} has prompts of kind {adapter.prompt_kind!r}, which run on models of "
            "transformers alone, through adapt of llama_adapter.hosts"
        )
    return adapter.to(model.output_weight.device)


def read_adapter_for(
    path: str | Path, loaded: Fingerprint, model: LlamaConfig, kind: str = "llama"
) -> Adapter:
    """Read an adapter for a base of any library; arguments, result and errors as `load_adapter`.

    Args:
        path: an adapter file.
        loaded: fingerprint of the loaded base.
        model: its shape.
        kind: what the base is, as `HostConfig` names it.
    """
    header, tensors = read_adapter(path)
    if header.host.kind != kind:
        raise ValueError(
            f"adapter {path} was trained on a {header.host.kind} ({header.base.describe()}), but "
            f"the loaded base is a {kind} ({loaded.describe()})"
        )
    difference = header.base.difference(loaded)
    if difference:
        raise ValueError(
            f"adapter {path} was trained on base {header.base.describe()}, but the loaded base is "
            f"{loaded.describe()}: {difference}"
        )
    if not header.base.samples:
        warnings.warn(
            f"adapter {path} comes from {header.origin}, which does not tell its base: "
            f"its shape fits {loaded.name!r}, its weights are not known",
            stacklevel=3,
        )
    return adapter_from_tensors(header, tensors, model)


def adapter_from_tensors(
    header: AdapterHeader, tensors: Mapping[str, Tensor], model: LlamaConfig
) -> Adapter:
    """Make an adapter of tensors that come from a file or another format.

    Args:
        header: configuration, layers and groups; its base is not looked at.
        tensors: "prompts" (L, P, C), "gates" (L, H) or (L, 1), those of `Tuning.shapes`; float32.
        model: shape of the base.

    Raises:
        ValueError: a tensor is missing, surplus, or has another shape or dtype.
    """
    # a generator of its own: reading a file draws no random number from the caller's
    adapter = Adapter(
        header.config,
        model,
        layers=header.layers,
        generator=torch.Generator(),
        tuning=header.tuning,
        visual=header.visual,
        prompt_kind=header.prompt_kind,
        host=header.host,
    )
    expected = {name: tuple(value.shape) for name, value in adapter.tensors().items()}
    _check_tensors(expected, tensors, "adapter")
    adapter.load_state_dict(dict(tensors), strict=False)
    return adapter


def is_adapter_file(path: Path) -> bool:
    """Whether a file begins as this package's adapter files do."""
    with open(path, "rb") as file:
        return file.read(_HASH_START)[_LENGTH_BYTES:] == _OPENING


def read_header(path: str | Path) -> AdapterHeader:
    """Read what an adapter file says about itself; checks and raises as `read_adapter`."""
    return read_adapter(path)[0]


def read_adapter(path: str | Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Read an adapter file without a model.

    Returns:
        The header and the tensors, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an adapter file, is damaged, or holds what this version does
            not know.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"adapter file {path} is a folder: name the adapter.safetensors of a run folder"
        )
    if not path.is_file():
        raise FileNotFoundError(f"adapter file {path} does not exist")
    return decode(path.read_bytes(), f"adapter file {path}")


def encode(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> bytes:
    """Content of the file of a header and its tensors.

    Raises:
        ValueError: the tensors are not those that the header speaks of.
    """
    _check_tensors(expected_tensors(header, "adapter"), tensors, "adapter")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    plain = safetensors.save(contiguous)
    length = int.from_bytes(plain[:_LENGTH_BYTES], "little")
    entries = json.loads(plain[_LENGTH_BYTES : _LENGTH_BYTES + length])
    metadata = {"sha256": "0" * 64, "llama_adapter": json.dumps(to_json(header))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = bytearray(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    data += plain[_LENGTH_BYTES + length :]
    data[_HASH_START:_HASH_END] = _content_hash(data)
    return bytes(data)


def decode(data: bytes, where: str) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Header and tensors of a file's content; the inverse of `encode`.

    Args:
        data: the whole file.
        where: what to call it in messages.

    Raises:
        ValueError: it is not an adapter file, is damaged, or holds what this version does not know.
    """
    if data[_LENGTH_BYTES:_HASH_START] != _OPENING:
        if is_train_state(data):
            raise ValueError(
                f"{where} is a training checkpoint, for finetune --resume: the adapter of its run "
                "is adapter.safetensors or best.safetensors in the folder above"
            )
        raise ValueError(
            f"{where} is not an adapter file of this package, or its beginning is damaged; "
            "llama-adapter convert brings those of other programs into this format"
        )
    if data[_HASH_START:_HASH_END] != _content_hash(data):
        raise ValueError(
            f"{where} is damaged or cut off ({len(data)} bytes): its content does not match the "
            "hash inside; copy it again from where it came"
        )
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        tensors = safetensors.load(data)
        metadata = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])["__metadata__"]
        header = from_json(json.loads(metadata["llama_adapter"]), where)
    except (
        SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, RecursionError
    ) as error:  # fmt: skip
        raise ValueError(f"{where} is not readable: {error!r}") from None
    _check_tensors(expected_tensors(header, where), tensors, where)
    return header, tensors


def _content_hash(data: bytes | bytearray) -> bytes:
    digest = hashlib.sha256(data[:_HASH_START])
    digest.update(b"0" * (_HASH_END - _HASH_START))
    digest.update(memoryview(data)[_HASH_END:])
    return digest.hexdigest().encode()


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
    for problem, names in (
        ("does not have", expected.keys() - tensors.keys()),
        ("has surplus", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{where} {problem} tensors: {', '.join(sorted(names))}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{where}: {name} must be float32, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")
