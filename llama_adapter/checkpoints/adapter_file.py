"""The adapter's own file: safetensors with a JSON header, from which nothing is ever executed.

Layout: 8 bytes with the length of the safetensors header, that header, the tensors. Its metadata
hold a SHA-256 of the whole file, always at the same place, and what the tensors mean: groups,
layers, conventions, and the base model's fingerprint. A reader refuses what it does not know.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import (
    SHAPE_FIELDS,
    Fingerprint,
    fingerprint,
    sample_count,
)
from llama_adapter.checkpoints.train_state import is_train_state
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.model import Llama

FORMAT_VERSION = 1
PROMPT_KINDS = ("hidden",)

# the content hash lies behind a constant beginning, and counts as zeros in its own computation
_LENGTH_BYTES = 8
_OPENING = b'{"__metadata__":{"sha256":"'
_HASH_START = _LENGTH_BYTES + len(_OPENING)
_HASH_END = _HASH_START + 64
_ALIGNMENT = 8


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter file says about its tensors.

    Attributes:
        groups: names of the groups of tensors that the file holds.
        layers: the adapted layers, ascending.
        prompt_kind: "hidden": rows of width C that the layer projects to keys and values.
        scale_side: side of a linear map that a scale group multiplies; None without such a group.
        config: the adapter's configuration, among it the gate's activation and scope.
        base: the base model it was trained on.
    """

    groups: tuple[str, ...]
    layers: tuple[int, ...]
    config: AdapterConfig
    base: Fingerprint
    prompt_kind: str = "hidden"
    scale_side: str | None = None


def _prompt_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    return {"prompts": (len(header.layers), header.config.prompt_length, header.base.shape["dim"])}


def _gate_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    heads = header.base.shape["n_heads"] if header.config.gate_scope == "head" else 1
    return {"gates": (len(header.layers), heads)}


# group to the names and shapes of its tensors, all float32
GROUPS: dict[str, Callable[[AdapterHeader], dict[str, tuple[int, ...]]]] = {
    "prompts": _prompt_shapes,
    "gates": _gate_shapes,
}


def save_adapter(path: str | Path, adapter: Adapter, base: Fingerprint) -> None:
    """Write an adapter, completely or not at all.

    Args:
        path: the file to create or replace.
        adapter: prompts (L, P, C) and gates (L, H) or (L, 1), float32.
        base: fingerprint of the model it was trained on.

    Raises:
        ValueError: the adapter does not fit the base's shape.
        FileNotFoundError: the folder does not exist.
    """
    tensors = {name: value.detach().cpu() for name, value in adapter.state_dict().items()}
    header = AdapterHeader(
        groups=tuple(adapter.groups()), layers=adapter.layers, config=adapter.config, base=base
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
    return adapter.to(model.output_weight.device)


def read_adapter_for(path: str | Path, loaded: Fingerprint, model: LlamaConfig) -> Adapter:
    """Read an adapter for a base of any library; arguments, result and errors as `load_adapter`.

    Args:
        path: an adapter file.
        loaded: fingerprint of the loaded base.
        model: its shape.
    """
    header, tensors = read_adapter(path)
    difference = header.base.difference(loaded)
    if difference:
        raise ValueError(
            f"adapter {path} was trained on base {header.base.describe()}, but the loaded base is "
            f"{loaded.describe()}: {difference}"
        )
    return adapter_from_tensors(header.config, header.layers, tensors, model)


def adapter_from_tensors(
    config: AdapterConfig,
    layers: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    model: LlamaConfig,
) -> Adapter:
    """Make an adapter of tensors that come from a file or another format.

    Args:
        config: its configuration.
        layers: the layers that the rows belong to, ascending.
        tensors: "prompts" (L, P, C) and "gates" (L, H) or (L, 1), float32.
        model: shape of the base.

    Raises:
        ValueError: a tensor is missing, surplus, or has another shape or dtype.
    """
    # a generator of its own: reading a file draws no random number from the caller's
    adapter = Adapter(config, model, layers=layers, generator=torch.Generator())
    expected = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    _check_tensors(expected, tensors, "adapter")
    adapter.load_state_dict(dict(tensors))
    return adapter


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
    _check_tensors(_expected_tensors(header), tensors, "adapter")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    plain = safetensors.save(contiguous)
    length = int.from_bytes(plain[:_LENGTH_BYTES], "little")
    entries = json.loads(plain[_LENGTH_BYTES : _LENGTH_BYTES + length])
    metadata = {"sha256": "0" * 64, "llama_adapter": json.dumps(_to_json(header))}
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
            f"{where} is not an adapter file of this package, or its beginning is damaged"
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
        header = _from_json(json.loads(metadata["llama_adapter"]), where)
    except (
        SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, RecursionError
    ) as error:  # fmt: skip
        raise ValueError(f"{where} is not readable: {error!r}") from None
    _check_tensors(_expected_tensors(header), tensors, where)
    return header, tensors


def _content_hash(data: bytes | bytearray) -> bytes:
    digest = hashlib.sha256(data[:_HASH_START])
    digest.update(b"0" * (_HASH_END - _HASH_START))
    digest.update(memoryview(data)[_HASH_END:])
    return digest.hexdigest().encode()


def _to_json(header: AdapterHeader) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **asdict(header)}


def _from_json(content: Any, where: str) -> AdapterHeader:
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version}, this package reads version {FORMAT_VERSION}"
        )
    values = {name: value for name, value in content.items() if name != "format_version"}
    _check_fields(AdapterHeader, values, f"{where}: header")
    _check_fields(AdapterConfig, values["config"], f"{where}: config")
    _check_fields(Fingerprint, values["base"], f"{where}: base")
    base = Fingerprint(**values["base"] | {"samples": tuple(values["base"]["samples"])})
    _check_base(base, where)
    try:
        config = AdapterConfig(**values["config"])
    except ValueError as error:
        raise ValueError(f"{where}: config: {error}") from None
    header = AdapterHeader(
        groups=tuple(values["groups"]),
        layers=tuple(values["layers"]),
        config=config,
        base=base,
        prompt_kind=values["prompt_kind"],
        scale_side=values["scale_side"],
    )
    _check_known("prompt_kind", header.prompt_kind, PROMPT_KINDS, where)
    _check_known("scale_side", header.scale_side, (None,), where)
    for group in header.groups:
        _check_known("group", group, tuple(GROUPS), where)
    count = base.shape["n_layers"]
    ascending = sorted(set(header.layers)) == list(header.layers)
    if not ascending or not all(0 <= layer < count for layer in header.layers):
        raise ValueError(
            f"{where}: layers must be ascending indices below {count}, got {header.layers}"
        )
    return header


def _check_base(base: Fingerprint, where: str) -> None:
    if sorted(base.shape) != sorted(SHAPE_FIELDS):
        raise ValueError(
            f"{where}: base shape must have {', '.join(SHAPE_FIELDS)}, got {', '.join(base.shape)}"
        )
    for name, size in base.shape.items():
        if size < 1:
            raise ValueError(f"{where}: base: {name} must be at least 1, got {size}")
    expected = sample_count(base.shape["n_layers"])
    if len(base.samples) != expected:
        raise ValueError(
            f"{where}: base must have {expected} sampled weights, got {len(base.samples)}"
        )


def _check_fields(kind: type, values: dict[str, Any], where: str) -> None:
    specs = {spec.name: spec.type for spec in fields(kind)}
    for problem, names in (
        ("unknown", values.keys() - specs.keys()),
        ("missing", specs.keys() - values.keys()),
    ):
        if names:
            raise ValueError(f"{where} has {problem} fields: {', '.join(sorted(names))}")
    for name, annotation in specs.items():
        if not _fits(values[name], annotation):
            wanted = annotation.__name__ if isinstance(annotation, type) else annotation
            raise ValueError(f"{where}: {name} must be {wanted}, got {values[name]!r}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value can stand for a dataclass field of this annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if is_dataclass(annotation):
        return isinstance(value, dict)
    # JSON writes 1.0 as a float, but an int is as good
    kinds = (int | float) if annotation is float else annotation
    return isinstance(value, kinds) and not isinstance(value, bool)


def _check_known(what: str, value: Any, known: tuple[Any, ...], where: str) -> None:
    if value not in known:
        raise ValueError(f"{where} has {what} {value!r}, this version knows {known}")


def _expected_tensors(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for group in header.groups:
        expected |= GROUPS[group](header)
    return expected


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
