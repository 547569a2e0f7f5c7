"""The official version 1 adapter: every layer's prompts in one block of rows, a gate per layer.

    adapter_query.weight             (L * P, C), the last L layers, from the lowest to the highest
    layers.{0..N-1}.attention.gate   (1, H, 1, 1), in the oldest files (1,); 0 below the last L

Their training multiplies by tanh(gate), their inference by the gate: a file does not say which.
"""

import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import (
    Pieces,
    ReadOptions,
    StoredAdapter,
    assemble,
)
from llama_adapter.checkpoints.adapter_source import (
    Source,
)

NAME = "official"
PROMPTS, GATE = "adapter_query.weight", "layers.{}.attention.gate"
PROMPT_LENGTH = 10
# the frozen base in a whole state dictionary
BASE_LINEARS = (
    r"tok_embeddings\.weight|output\.weight|(.*\.)?rope\.freqs|"
    r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight"
)
BASE = BASE_LINEARS + r"|norm\.weight|layers\.\d+\.(attention_norm|ffn_norm)\.weight"


def matches(source: Source) -> bool:
    """Whether the names are this format's."""
    return source.has(PROMPTS)


def read(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    pieces = Pieces()
    if source.drop(BASE):
        pieces.notes.append("left out: the base's own weights")
    n_layers = take_prompts(source, PROMPTS, GATE, options, pieces)
    return assemble(source, NAME, pieces, options, n_layers)


def take_prompts(
    source: Source,
    prompts_name: str,
    gate_name: str,
    options: ReadOptions,
    pieces: Pieces,
    *,
    every: bool = True,
) -> int:
    """Take the block of prompts and the gates of all layers; returns the number of layers.

    chat65b does not keep the gates of layers without prompts: with it, `every` is False.

    Raises:
        ValueError: the rows are no whole number of layers, or a layer without prompts has a gate.
    """
    pattern = gate_name.replace(".", r"\.").replace("{}", r"(\d+)")
    numbers = source.layer_numbers(pattern)
    n_layers = max(numbers, default=-1) + 1
    block = source.take(prompts_name, "prompt_rows", "dim")
    length = options.prompt_length or _prompt_length(source, gate_name, n_layers, len(block))
    adapted, rest = divmod(len(block), length)
    if rest or not 0 < adapted <= max(n_layers, 1):
        raise ValueError(
            f"{source.path}: {prompts_name} must hold {length} rows for each of up to {n_layers} "
            f"layers, got {len(block)} rows: convert it with --prompt-length"
        )
    pieces.layers = tuple(range(n_layers - adapted, n_layers))
    gates = [
        source.take_gate(gate_name.format(layer), 1)
        for layer in range(n_layers)
        if every or layer in pieces.layers or source.has(gate_name.format(layer))
    ]
    for gate in gates[: len(gates) - adapted]:
        if gate.any():
            raise ValueError(
                f"{source.path}: a layer below the last {adapted} has a gate other than 0: "
                "convert it with --prompt-length"
            )
    try:
        pieces.gates = torch.stack(gates[len(gates) - adapted :])
    except RuntimeError:
        raise ValueError(f"{source.path}: gates must have one shape in all layers") from None
    pieces.prompts = block.unflatten(0, (adapted, length))
    if options.prompt_length is None:
        pieces.notes.append(f"prompt length: {length}, as the layers with gates and the rows tell")
    return n_layers


def _prompt_length(source: Source, gate_name: str, n_layers: int, rows: int) -> int:
    """Rows per layer: the file does not say them, but trained layers have gates other than 0."""
    gates = [source.peek(n) for i in range(n_layers) if source.has(n := gate_name.format(i))]
    trained = sum(bool(gate.any()) for gate in gates)
    return rows // trained if trained and rows % trained == 0 else PROMPT_LENGTH


def tensors_of(stored: StoredAdapter) -> tuple[dict[str, Tensor], list[str]]:
    """The prompts and gates in this format, and what to say about them.

    Raises:
        ValueError: the adapted layers are not the last ones, or the heads are not known.
    """
    header, notes = stored.header, list[str]()
    count, heads = header.base.shape["n_layers"], header.base.shape.get("n_heads")
    if header.layers != tuple(range(count - len(header.layers), count)):
        raise ValueError(
            f"this format holds prompts of the last layers only, got layers {header.layers}"
        )
    if heads is None:
        raise ValueError("this format holds a gate per head, and the base's n_heads is not known")
    gates = torch.zeros(count, heads)
    gates[count - len(header.layers) :] = stored.tensors["gates"]
    if header.config.gate_scope == "layer":
        notes.append("gates: the layer's one is written for every head")
    tensors = {PROMPTS: stored.tensors["prompts"].flatten(0, 1).contiguous()}
    tensors |= {GATE.format(i): gates[i].view(1, -1, 1, 1).clone() for i in range(count)}
    return tensors, notes


def encode(stored: StoredAdapter) -> tuple[dict[str, Tensor], list[str]]:
    """Content of the file, and what to say about it; errors as `tensors_of`."""
    if stored.header.tuning.groups:
        raise ValueError(
            f"official holds prompts and gates alone, got {', '.join(stored.header.tuning.groups)}"
        )
    tensors, notes = tensors_of(stored)
    activation = stored.header.config.gate_activation
    reader = "their training code" if activation == "tanh" else "their inference code"
    notes.append(f"gates: to be read as {activation}, as {reader} does")
    return tensors, notes
