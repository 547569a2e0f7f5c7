"""The official version 2 adapters: chat65b's and multimodal 7B's.

chat65b       {"model": ...}, y = W (s * x) + b in every linear map of the layers
layers.{}.attention.wq_bias, wq_scale and so on; norms; perhaps prompts and gates as version 1's
multimodal    {"model": ..., "config": ...}, names under llama. (in old files llma.)
biases of wq, wo, w1, w2, w3; norms; prompts and gates; the projector of adapter_visual.py
layers.{}.attention.lora_wq_l1 (rank, in), lora_wq_l2 (out, rank) and so on, of tokens alone
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import (
    Pieces,
    ReadOptions,
    StoredAdapter,
    assemble,
)
from llama_adapter.checkpoints.adapter_official import (
    BASE_LINEARS,
    GATE,
    PROMPTS,
    take_prompts,
    tensors_of,
)
from llama_adapter.checkpoints.adapter_source import (
    Source,
)
from llama_adapter.checkpoints.adapter_visual import PARTS, take_visual

CHAT, MULTIMODAL = "chat65b", "multimodal"
NORMS = {
    "attention_norm": "layers.{}.attention_norm.weight",
    "ffn_norm": "layers.{}.ffn_norm.weight",
    "norm": "norm.weight",
}
PLACES = {name: f"layers.{{}}.attention.{name}" for name in ("wq", "wk", "wv", "wo")} | {
    name: f"layers.{{}}.feed_forward.{name}" for name in ("w1", "w2", "w3")
}
CHAT_TABLE = {
    f"{kind}_{name}": f"{place}_{kind}"
    for kind in ("bias", "scale")
    for name, place in PLACES.items()
} | NORMS
MULTIMODAL_TABLE = {
    f"bias_{name}": f"{PLACES[name]}.bias" for name in ("wq", "wo", "w1", "w2", "w3")
} | NORMS
LORA_TABLE: dict[str, tuple[str, str]] = {}
for _name, _place in PLACES.items():
    _first, _second = (_place.replace(_name, f"lora_{_name}_l{n}.weight") for n in (1, 2))
    LORA_TABLE[_name] = (_first, _second)
NEW_GATE = r"layers\.\d+\.attention\.new_gate"
PREFIXED = re.compile(r"(llama|llma)\.(.*)", re.DOTALL)


def matches_chat(source: Source) -> bool:
    """Whether the names are chat65b's."""
    pattern = re.compile(r"layers\.\d+\.(attention|feed_forward)\.w\w_(bias|scale)")
    return any(pattern.fullmatch(name) for name in source.names)


def matches_multimodal(source: Source) -> bool:
    """Whether the names are multimodal 7B's."""
    return any(PREFIXED.fullmatch(name) or re.fullmatch(PARTS, name) for name in source.names)


def read_chat(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    pieces = Pieces(scale_side="input")
    if source.drop(BASE_LINEARS):
        pieces.notes.append("left out: the base's own weights")
    n_layers = max(source.layer_numbers(r"layers\.(\d+)\..*"), default=-1) + 1
    if source.has(PROMPTS):
        take_prompts(source, PROMPTS, GATE, options, pieces, every=False)
    pieces.tuned = source.tuned(CHAT_TABLE, n_layers, "input")
    pieces.notes.append("scales: on the input side, y = W (s * x) + b")
    return assemble(source, CHAT, pieces, options, n_layers)


def read_multimodal(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    renamed = {}
    for name in source.names:
        match = PREFIXED.fullmatch(name)
        short = match[2] if match else name
        if short in renamed:
            raise ValueError(f"{source.path} has {short} twice, under llama. and by itself")
        renamed[short] = name
    source.rename(renamed)
    pieces = Pieces()
    if source.drop(BASE_LINEARS):
        pieces.notes.append("left out: the base's own weights")
    leave_out_new_gates(source, NEW_GATE, (1, 1, 1, 1), options, pieces.notes)
    n_layers = take_prompts(source, PROMPTS, GATE, options, pieces)
    take_visual(source, "visual_query.weight", options, pieces)
    pieces.tuned = source.tuned(MULTIMODAL_TABLE, n_layers, "output")
    pieces.tuned |= source.lora(LORA_TABLE, n_layers)
    return assemble(source, MULTIMODAL, pieces, options, n_layers)


def leave_out_new_gates(
    source: Source,
    pattern: str,
    shape: Sequence[str | int],
    options: ReadOptions,
    notes: list[str],
) -> None:
    """Leave second gates aside: those of 1 change nothing.

    Raises:
        ValueError: one is another number, and nobody asked.
    """
    names = [name for name in source.names if re.fullmatch(pattern, name)]
    values = [source.take(name, *shape) for name in names]
    if values and any(not torch.equal(value, torch.ones_like(value)) for value in values):
        if "new_gate" not in options.leave_out:
            raise ValueError(
                f"{source.path} has new_gate tensors other than 1, as {names[0]}, which multiply "
                "the gates: leave them out with --leave-out new_gate or leave_out=['new_gate']"
            )
        notes.append(f"left out: {len(names)} new_gate tensors (answers change without them)")
    elif values:
        notes.append(f"left out: {len(names)} new_gate tensors, all 1")


def encode_chat(stored: StoredAdapter) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Content of a chat65b file, and what to say about it.

    Raises:
        ValueError: the scale is on the output side, the logits are tuned, a bias or a scale is
            missing, or as version 1.
    """
    tuning, notes = stored.header.tuning, list[str]()
    if tuning.scale_side == "output":
        raise ValueError("chat65b has scales on the input side, got output: not convertible")
    if "output" in tuning.linears:
        raise ValueError("chat65b leaves the projection to logits alone, got one with a bias")
    if stored.header.layers and stored.header.config.gate_activation != "tanh":
        raise ValueError("chat65b multiplies by tanh(gate), got gates of the identity")
    tensors: dict[str, Tensor] = {}
    if stored.header.layers:
        tensors, notes = tensors_of(stored)
        # layers without prompts have no gate either
        for layer in range(stored.header.layers[0]):
            del tensors[GATE.format(layer)]
    lacking = [name for name in CHAT_TABLE if name not in NORMS and name not in stored.tensors]
    if lacking:
        raise ValueError(
            f"chat65b holds biases and scales of all maps, got no {lacking[0]}: prompts alone go "
            "to official"
        )
    tensors |= unstacked(CHAT_TABLE, stored)
    return {"model": tensors}, notes


def unstacked(table: dict[str, str], stored: StoredAdapter) -> dict[str, Tensor]:
    """The tuned tensors by another format's names, layer by layer."""
    found: dict[str, Tensor] = {}
    for name, place in table.items():
        value = stored.tensors.get(name)
        if value is None:
            continue
        rows = {place.format(i): row for i, row in enumerate(value)} if "{}" in place else None
        found |= {place: value} if rows is None else {n: row.clone() for n, row in rows.items()}
    return found
