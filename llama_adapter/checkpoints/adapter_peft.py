"""PEFT's ADAPTION_PROMPT: a folder of adapter_model.safetensors (or .bin) and adapter_config.json.

    base_model.model.model.layers.{i}.self_attn.adaption_prompt   (1, P, C), of the last L layers
    base_model.model.model.layers.{i}.self_attn.adaption_gate     (1,), of the whole layer

The multiplier is the gate itself. Prompts and gates are the same in Meta's order of rows.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import (
    Pieces,
    ReadOptions,
    StoredAdapter,
    assemble,
)
from llama_adapter.checkpoints.adapter_source import (
    Source,
    open_source,
)
from llama_adapter.checkpoints.atomic import write_atomically

NAME = "peft"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LAYER = "base_model.model.model.layers.{}.self_attn.adaption_{}"
# a configuration of a page
MOST_CONFIG = 1 << 20


def matches(source: Source) -> bool:
    """Whether the names are this format's."""
    return any(".adaption_" in name for name in source.names)


def open_safetensors(path: Path) -> Source:
    """The tensors of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return Source(path, {name: file.get_tensor(name) for name in names})
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not readable as safetensors: {problem}") from None


def open_folder(folder: Path) -> Source:
    """The tensors of an adapter's folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has {CONFIG}, but neither {' nor '.join(WEIGHTS)}")
    path = found[0]
    return open_safetensors(path) if path.suffix == ".safetensors" else open_source(path)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_CONFIG:
        raise ValueError(f"{path} must be a small JSON file, got {path.stat().st_size} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {error!r}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "ADAPTION_PROMPT":
        raise ValueError(f"{path} must have peft_type ADAPTION_PROMPT, got {kind!r}")
    return config


def read(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    path = source.path
    if any(".h." in name for name in source.names):
        raise ValueError(
            f"{path} is of a GPT-2 model, whose prompts PEFT adds elsewhere: not a LLaMA's"
        )
    pattern = LAYER.replace(".", r"\.").format(r"(\d+)", r"\w+")
    layers = source.layer_numbers(pattern)
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise ValueError(f"{path} must have prompts of the last layers, got layers {layers[:8]}")
    prompts, gates = [], []
    for layer in layers:
        prompts.append(source.take(LAYER.format(layer, "prompt"), 1, "prompt_length", "dim")[0])
        gates.append(source.take(LAYER.format(layer, "gate"), 1))
    pieces = Pieces(torch.stack(prompts), torch.stack(gates), tuple(layers), activation="identity")
    beside = path.parent / CONFIG
    if beside.is_file():
        config = _read_config(beside)
        for key, got in (("adapter_layers", len(layers)), ("adapter_len", len(prompts[0]))):
            if config.get(key) != got:
                raise ValueError(f"{beside}: {key} is {config.get(key)!r}, but {path} has {got}")
    else:
        pieces.notes.append(f"no {CONFIG} beside it: nothing to compare its numbers with")
    return assemble(source, NAME, pieces, options, layers[-1] + 1)


def identity_gates(stored: StoredAdapter, notes: list[str]) -> Tensor:
    """Gates for a format that multiplies by the gate itself."""
    gates = stored.tensors["gates"]
    if stored.header.config.gate_activation == "tanh":
        notes.append("gates: tanh is applied, so that the format's plain product gives the same")
        return gates.tanh()
    return gates


def only_prompts(stored: StoredAdapter, format_name: str) -> None:
    """Raise ValueError if there are groups that a format of prompts and gates cannot hold."""
    groups = stored.header.tuning.groups
    if groups or not stored.header.layers:
        raise ValueError(
            f"{format_name} holds prompts and gates alone, got {', '.join(stored.header.groups)}"
        )


def write(folder: Path, stored: StoredAdapter) -> list[str]:
    """Write a folder; returns what to say about it.

    Raises:
        ValueError: it cannot be told in this format: gates that differ from head to head, other
            groups, other layers than the last ones.
    """
    notes: list[str] = []
    only_prompts(stored, NAME)
    gates, layers = identity_gates(stored, notes), stored.header.layers
    if not torch.equal(gates, gates[:, :1].expand_as(gates)):
        raise ValueError(
            "peft holds one gate per layer, and the adapter's differ from head to head: "
            "no number says the same"
        )
    count = stored.header.base.shape["n_layers"]
    if layers != tuple(range(count - len(layers), count)):
        raise ValueError(f"peft adapts the last layers only, got layers {layers}")
    tensors = {}
    for row, layer in enumerate(layers):
        tensors[LAYER.format(layer, "prompt")] = stored.tensors["prompts"][row][None].contiguous()
        tensors[LAYER.format(layer, "gate")] = gates[row, :1].clone()
    config = {
        "adapter_layers": len(layers),
        "adapter_len": stored.header.config.prompt_length,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "ADAPTION_PROMPT",
        "revision": None,
        "target_modules": "self_attn",
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(exist_ok=True)
    # of two files neither may be read with the other's older self
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS[0], safetensors.save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode())
    return notes
