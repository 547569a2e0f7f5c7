"""LLaMA2-Accessory's llama_adapter: a folder of consolidated.{r}-of-{n}.model.pth.

    llma.prefix (L, 1, P, C), llma.prefix_gate (L, H / n), llma.prefix_new_gate (L,), perhaps
    llma.layers.{i}.attention.wq.bias, wq.lora_a.weight (rank, in), wq.lora_b.weight (out, rank)
    and so on, norms, the projector of adapter_visual.py

The multiplier is new_gate * tanh(gate). A text takes the prompts alone.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import (
    Pieces,
    ReadOptions,
    StoredAdapter,
    assemble,
    complete_shape,
)
from llama_adapter.checkpoints.adapter_official import BASE_LINEARS
from llama_adapter.checkpoints.adapter_source import (
    Source,
    open_source,
)
from llama_adapter.checkpoints.adapter_v2 import (
    MULTIMODAL_TABLE,
    PLACES,
    leave_out_new_gates,
    unstacked,
)
from llama_adapter.checkpoints.adapter_visual import take_visual

NAME = "accessory"
PREFIX = "llma."
FILE = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")
META = {"llama_type": "llama_adapter"}
# split over tensor-parallel ranks, and along which dimension; the others every rank holds whole
SPLIT = {"prefix_gate": 1, "wq.bias": 0, "w1.bias": 0, "w3.bias": 0} | {
    **{f"{name}.lora_b.weight": 0 for name in ("wq", "wk", "wv", "w1", "w3")},
    **{f"{name}.lora_a.weight": 1 for name in ("wo", "w2")},
}
LORA_TABLE = {
    name: (f"{place}.lora_a.weight", f"{place}.lora_b.weight") for name, place in PLACES.items()
}


def matches(source: Source) -> bool:
    """Whether the names are this format's."""
    return source.has(f"{PREFIX}prefix")


def shards(folder: Path) -> list[Path]:
    """The consolidated files of a folder in the order of their ranks.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: there are files of several numbers of ranks.
    """
    matches = [(p, m) for p in sorted(folder.iterdir()) if (m := FILE.fullmatch(p.name))]
    if not matches:
        return []
    counts = sorted({int(match[2]) for _, match in matches})
    if len(counts) > 1:
        raise ValueError(f"{folder} must hold files of one number of ranks, got those of {counts}")
    found, count = {int(match[1]): path for path, match in matches}, counts[0]
    missing = sorted(set(range(min(count, 1000))) - found.keys())
    if missing or len(found) != count:
        raise FileNotFoundError(
            f"{folder} must hold {count} consolidated files, got those of ranks {sorted(found)}"
        )
    return [found[rank] for rank in range(count)]


def open_folder(folder: Path) -> Source:
    """The tensors of a folder, those of several ranks joined.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the ranks do not fit each other.
    """
    sources = [open_source(path) for path in shards(folder)]
    first = sources[0]
    if len(sources) == 1:
        return first
    names = set(first.names)
    for other in sources[1:]:
        if set(other.names) != names:
            odd = sorted(set(other.names) ^ names)[0]
            raise ValueError(f"{other.path} and {first.path} must have one set of tensors: {odd}")
    joined: dict[str, Tensor] = {}
    for name in first.names:
        parts = [source.peek(name) for source in sources]
        if re.fullmatch(BASE_LINEARS, name.removeprefix(PREFIX)):
            # the base's, split over the ranks, which `read` leaves out
            joined[name] = parts[0]
            continue
        dim = next((dim for end, dim in SPLIT.items() if name.endswith(end)), None)
        if dim is None:
            if not all(torch.equal(part, parts[0]) for part in parts):
                raise ValueError(f"{folder}: {name} must be the same in every rank")
            joined[name] = parts[0]
            continue
        shapes = {(part.ndim, part.shape[:dim], part.dtype) for part in parts}
        if len(shapes) != 1 or parts[0].ndim <= dim:
            raise ValueError(f"{folder}: {name} must join along dimension {dim}")
        joined[name] = torch.cat(parts, dim)
    return Source(folder, joined)


def read(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    alien = [name for name in source.names if not name.startswith(PREFIX)]
    source.rename({name.removeprefix(PREFIX): name for name in source.names if name not in alien})
    if alien:
        raise ValueError(f"{source.path} has surplus tensors: {', '.join(sorted(alien)[:3])}")
    pieces = Pieces()
    if source.drop(BASE_LINEARS):
        pieces.notes.append("left out: the base's own weights")
    pieces.prompts = source.take("prefix", "adapted", 1, "prompt_length", "dim")[:, 0].contiguous()
    pieces.gates = source.take("prefix_gate", "adapted", "n_heads")
    take_visual(source, "visual_query", options, pieces)
    leave_out_new_gates(source, "prefix_new_gate", ["adapted"], options, pieces.notes)
    numbers = source.layer_numbers(r"layers\.(\d+)\..*")
    shape = {name: source.sizes[name] for name in ("dim", "n_heads")}
    if numbers:
        shape["n_layers"] = numbers[-1] + 1
    shape = complete_shape(shape, ["n_layers"], source.path, options, pieces.notes)
    n_layers, adapted = shape["n_layers"], len(pieces.gates)
    if adapted > n_layers:
        raise ValueError(f"{source.path}: prefix must be of up to {n_layers} layers, got {adapted}")
    pieces.layers = tuple(range(n_layers - adapted, n_layers))
    pieces.tuned = source.tuned(MULTIMODAL_TABLE, n_layers, "output")
    pieces.tuned |= source.lora(LORA_TABLE, n_layers)
    pieces.lora_prompts = True
    return assemble(source, NAME, pieces, options, n_layers)


def encode(stored: StoredAdapter) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Content of consolidated.00-of-01.model.pth, and what to say about it.

    Raises:
        ValueError: it cannot be told in this format.
    """
    header, tuning, notes = stored.header, stored.header.tuning, list[str]()
    if not header.layers:
        raise ValueError("accessory holds prompts and gates, got an adapter without them")
    if header.config.gate_activation != "tanh":
        raise ValueError("accessory multiplies by tanh(gate), got gates of the identity")
    alien = [name for name in tuning.linears if f"bias_{name}" not in MULTIMODAL_TABLE]
    if "scale" in tuning.groups or alien:
        raise ValueError("accessory has no scales, and biases of wq, wo, w1, w2 and w3 alone")
    count, heads = header.base.shape["n_layers"], header.base.shape.get("n_heads")
    if header.layers != tuple(range(count - len(header.layers), count)) or heads is None:
        raise ValueError(
            f"accessory holds a gate per head of the last layers, got layers {header.layers} and "
            f"n_heads {heads}"
        )
    gates = stored.tensors["gates"]
    if gates.shape[1] != heads:
        notes.append("gates: the layer's one is written for every head")
    tensors = {
        "prefix": stored.tensors["prompts"][:, None].clone(),
        "prefix_gate": gates.expand(-1, heads).contiguous().clone(),
        "prefix_new_gate": torch.ones(len(header.layers)),
    } | unstacked(MULTIMODAL_TABLE, stored)
    return {"model": {PREFIX + name: value for name, value in tensors.items()}}, notes


def meta() -> bytes:
    """Content of the meta.json beside the file."""
    return json.dumps(META).encode()
