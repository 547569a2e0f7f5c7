"""What a run trained, on disk: an adapter's own file, or of a baseline its trained tensors.

A baseline's file is safetensors; its header tells the method, its options, the host and a hash of
all that is in the file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import Fingerprint
from llama_adapter.checkpoints.train_state import content_hash
from llama_adapter.hosts.facts import tower_of
from llama_adapter.hosts.files import FILE, file_of, load_adapted
from llama_adapter.hosts.methods import METHODS, Attached, MethodOptions

FORMAT = "llama-adapter method 1"
HEADER = "llama-adapter"
BASELINE = "method.safetensors"
ZERO_INIT = "zero_init"


def result_name(method: str, options: MethodOptions) -> str:
    """The name of the file in a run folder."""
    if method != ZERO_INIT:
        return BASELINE
    return file_of("text") if options.encoders == ("text",) else FILE


def result_names(method: str, options: MethodOptions) -> tuple[str, ...]:
    """The names of all that a finished run has written: a CLIP's encoders have a file each."""
    first = result_name(method, options)
    both = method == ZERO_INIT and len(set(options.encoders)) > 1
    return (first, file_of("text")) if both else (first,)


def host_fingerprint(model: Any) -> Fingerprint:
    """The host's identity: of a CLIP that of its visual encoder."""
    return tower_of(model, None).fingerprint()


def save_trained(folder: Path, attached: Attached, host: Fingerprint) -> None:
    """Write what was trained into a folder that exists.

    Args:
        folder: of the run.
        attached: zero_init writes adapter files, any other method BASELINE.
        host: the host's identity without the method.
    """
    if attached.name == ZERO_INIT:
        attached.model.save_pretrained(folder)
        return
    state = {name: value.cpu().contiguous() for name, value in attached.state_dict().items()}
    header = {
        "format": FORMAT,
        "method": attached.name,
        "options": asdict(attached.options),
        "host": asdict(host),
    }
    header["sha256"] = content_hash(json.dumps(header), state)
    # one entry: of several the library shuffles the order, and equal runs write equal bytes
    metadata = {HEADER: json.dumps(header)}
    write_atomically(folder / BASELINE, safetensors.save(state, metadata))


def load_trained(folder: Path, attached: Attached, host: Fingerprint) -> None:
    """Read what `save_trained` wrote into a method on a host.

    Args:
        folder: of the run.
        attached: the same method with the same options.
        host: the host's identity without the method.

    Raises:
        FileNotFoundError: there is no such file: the run has not come to its end.
        ValueError: the file is damaged, of another method, of other options or of another host.
    """
    for name in result_names(attached.name, attached.options):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist: the run has not come to its end (finetune "
                "--resume)"
            )
    if attached.name == ZERO_INIT:
        load_adapted(attached.model, folder)
        return
    path = folder / BASELINE
    header, state = _read(path)
    wanted = {"method": attached.name, "options": json.loads(json.dumps(asdict(attached.options)))}
    for name, value in wanted.items():
        if header[name] != value:
            raise ValueError(f"{path} must be of {name} {value}, got {header[name]}")
    before = _host_in(header)
    difference = before.difference(host)
    if difference:
        raise ValueError(f"{path} was trained on another model ({difference})")
    attached.load_state_dict(state)


def describe_trained(path: Path) -> list[str] | None:
    """What a baseline's file is, a line for each property; None where it is none.

    Args:
        path: a file, or a run folder.
    """
    path = path / BASELINE if path.is_dir() else path
    try:
        header, state = _read(path)
    except (OSError, ValueError):
        return None
    host = _host_in(header)
    reads = METHODS[header["method"]].options
    options = ", ".join(f"{name} {header['options'][name]}" for name in reads)
    count = sum(value.numel() for value in state.values())
    return [
        f"method      {header['method']} ({count:,} parameters, {path.stat().st_size:,} bytes)",
        f"source      {METHODS[header['method']].source}",
        f"host        {host.describe()}",
        f"options     {options or 'none'}",
    ]


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Header and tensors of a baseline's file.

    Raises:
        ValueError: it is no such file, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            if header["format"] != FORMAT:
                raise ValueError(f"the format is {header['format']!r}, not {FORMAT!r}")
            state = {name: file.get_tensor(name) for name in iter(file.keys())}
        if header.pop("sha256") != content_hash(json.dumps(header), state):
            raise ValueError("its content does not match the hash inside")
        _check(header, state)
    except KeyError as error:
        raise ValueError(f"{path} is no file of a trained method: it has no {error}") from None
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no file of a trained method, or damaged ({error})") from None
    return header, state


def _check(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, KeyError or TypeError unless a header has what is read of it."""
    if header["method"] not in METHODS:
        raise ValueError(f"method {header['method']!r} is unknown")
    lacking = sorted({spec.name for spec in fields(MethodOptions)} - set(header["options"]))
    if lacking:
        raise ValueError(f"options lack {lacking[0]}")
    host = _host_in(header)
    for value in (*host.shape.values(), *host.samples):
        if not isinstance(value, int | float):
            raise TypeError(f"host must be described by numbers, got {value!r}")
    for name, value in state.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {value.dtype}")


def _host_in(header: Mapping[str, Any]) -> Fingerprint:
    """The host that a header names."""
    host = header["host"]
    return Fingerprint(str(host["name"]), dict(host["shape"]), tuple(host["samples"]))
