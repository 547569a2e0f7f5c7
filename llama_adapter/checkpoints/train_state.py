"""Where a training run stands, as files from which it continues exactly.

A checkpoint is one safetensors file, `step-00000120.safetensors`: tensors by name, and in its
metadata plain values as JSON and a SHA-256 of both. A file whose hash does not match is never used.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from llama_adapter.checkpoints.atomic import write_atomically

FORMAT = "llama-adapter training state 1"
_LENGTH_BYTES = 8
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class TrainState:
    """What a run needs to continue.

    Attributes:
        step: optimiser steps done; with the seed and the data it fixes the place in the epoch.
        tensors: parameters, optimiser state and random states, by name, of any shape and dtype.
        values: plain data that JSON can hold.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return Path(folder) / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Checkpoint files of a folder by step, ascending; empty where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return {}
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def save_train_state(folder: str | Path, state: TrainState, keep: int) -> Path:
    """Write a checkpoint, completely or not at all, then remove the ones it makes superfluous.

    Args:
        folder: an existing folder for checkpoints.
        state: what to write.
        keep: checkpoints to keep, this one included; those of later steps, from a continued run
            whose latest file was refused, do not count and are removed.

    Returns:
        The file written.

    Raises:
        ValueError: keep is less than 1.
        OSError: the system refused to write; the other checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    values = json.dumps({"step": state.step, "values": dict(state.values)})
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    metadata = {"format": FORMAT, "state": values, "content_sha256": content_hash(values, tensors)}
    path = checkpoint_path(folder, state.step)
    write_atomically(path, safetensors.save(tensors, metadata))
    checkpoints = list_checkpoints(folder)
    kept = [step for step in checkpoints if step <= state.step][-keep:]
    for step, file in checkpoints.items():
        if step not in kept:
            file.unlink()
    return path


def read_train_state(path: str | Path) -> TrainState:
    """Read one checkpoint.

    Args:
        path: a file that `save_train_state` wrote.

    Returns:
        Its state, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or of another format.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.load(data)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is truncated or damaged ({error})") from None
    metadata = _metadata(data)
    if metadata.get("format") != FORMAT:
        got = metadata.get("format")
        raise ValueError(f"checkpoint {path} must have the format {FORMAT!r}, got {got!r}")
    values = metadata.get("state", "")
    if metadata.get("content_sha256") != content_hash(values, tensors):
        raise ValueError(f"checkpoint {path} is damaged (its content does not match its hash)")
    content = json.loads(values)
    return TrainState(content["step"], tensors, content["values"])


def load_latest(folder: str | Path) -> TrainState | None:
    """Read the newest checkpoint that is whole; warn, by name, about each newer one that is not.

    Args:
        folder: a folder for checkpoints, which need not exist yet.

    Returns:
        The state, or None where the folder has no checkpoint.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    refused: list[str] = []
    for path in reversed(list_checkpoints(folder).values()):
        try:
            state = read_train_state(path)
        except (ValueError, OSError) as error:
            refused.append(str(error))
            continue
        for reason in refused:
            warnings.warn(f"{reason}: using {path.name} instead", stacklevel=2)
        return state
    if refused:
        raise ValueError(f"no checkpoint can be used: {'; '.join(refused)}")
    return None


def is_train_state(data: bytes) -> bool:
    """Whether a file's content calls itself a training checkpoint; it may be damaged further on."""
    try:
        return _metadata(data).get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError):
        return False


def _metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return header.get("__metadata__") or {}


def content_hash(values: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors on the CPU: their names, types, shapes and bytes."""
    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix` and a dot, by the rest of their names."""
    begin = f"{prefix}."
    return {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}


def optimiser_tensors(optimisers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State of one optimiser per parameter group as `optimiser.<group>.<index>.<key>`."""
    return {
        f"optimiser.{group}.{index}.{key}": value
        for group, optimiser in optimisers.items()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimisers(
    optimisers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimiser_tensors` took; other names are left alone."""
    for group, optimiser in optimisers.items():
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in named_under(f"optimiser.{group}", tensors).items():
            index, key = name.split(".")
            states.setdefault(int(index), {})[key] = value
        options = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": states, "param_groups": options})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """torch's random states, of the CPU and of `device`, as `random.cpu` and `random.cuda`."""
    found = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(device)
    return found


def load_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_tensors` took."""
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
