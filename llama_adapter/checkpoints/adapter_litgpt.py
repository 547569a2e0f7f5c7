"""litgpt's adapter and adapter_v2: lit_model.pth.adapter and lit_model.pth.adapter_v2.

    transformer.h.{i}.attn.adapter_wte.weight (P, C), .attn.gating_factor (1, 1, H, 1)
    version 2, y = s * (W x + b): adapter_bias, adapter_scale of attn.qkv, attn.proj, mlp.fc_1,
    fc_2, proj, lm_head; norm_1, norm_2, ln_f

The multiplier is the gate itself. The rows of attn.qkv are [Q; K; V], those of Q and K in the order
of rotated halves: ours are rotated in neighbouring pairs, so they change places within a head.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import (
    Pieces,
    ReadOptions,
    StoredAdapter,
    assemble,
)
from llama_adapter.checkpoints.adapter_peft import identity_gates, only_prompts
from llama_adapter.checkpoints.adapter_source import (
    Source,
)
from llama_adapter.checkpoints.adapter_v2 import unstacked

NAME, NAME_V2 = "litgpt", "litgpt-v2"
FILES = {NAME: "lit_model.pth.adapter", NAME_V2: "lit_model.pth.adapter_v2"}
CONFIG = "model_config.yaml"
PROMPT = "transformer.h.{}.attn.adapter_wte.weight"
GATE = "transformer.h.{}.attn.gating_factor"
QKV = "transformer.h.{}.attn.qkv.adapter_{}"
PLACES = {
    "wo": "transformer.h.{}.attn.proj",
    "w1": "transformer.h.{}.mlp.fc_1",
    "w3": "transformer.h.{}.mlp.fc_2",
    "w2": "transformer.h.{}.mlp.proj",
    "output": "lm_head",
}
TABLE = {
    f"{kind}_{name}": f"{place}.adapter_{kind}"
    for kind in ("bias", "scale")
    for name, place in PLACES.items()
} | {
    "attention_norm": "transformer.h.{}.norm_1.weight",
    "ffn_norm": "transformer.h.{}.norm_2.weight",
    "norm": "transformer.ln_f.weight",
}
BASE = (
    r"(.*\.)?linear\.weight|transformer\.wte\.weight|transformer\.h\.\d+\.(attn|mlp)\.\w+\.weight"
)
LAST_START = 2


def matches(source: Source) -> bool:
    """Whether the names are this format's."""
    return any(name.startswith("transformer.h.") for name in source.names)


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) of rotated halves in the order of rotated pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _sizes(path: Path) -> dict[str, int]:
    """Numbers of the model_config.yaml beside a file, none where there is no such file."""
    beside = path.parent / CONFIG
    if not beside.is_file():
        return {}
    with open(beside, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 16)
    found = re.findall(
        r"(?m)^(n_head|n_query_groups|head_size|n_layer|n_embd): (\d{1,9})\s*$", text
    )
    return {name: int(value) for name, value in found}


def read(source: Source, options: ReadOptions) -> StoredAdapter:
    """Read what `adapter_formats.read_any_adapter` opened; errors as there."""
    pieces = Pieces(activation="identity")
    is_v2 = any(".adapter_bias" in name or ".adapter_scale" in name for name in source.names)
    if source.drop(rf"(?!.*adapter_wte)({BASE})"):
        pieces.notes.append("left out: the base's own weights")
    layers = source.layer_numbers(r"transformer\.h\.(\d+)\.attn\.(?:adapter_wte.*|gating_factor)")
    n_layers = max(source.layer_numbers(r"transformer\.h\.(\d+)\..*"), default=-1) + 1
    sizes = _sizes(source.path)
    n_layers = sizes.get("n_layer", n_layers)
    if layers:
        prompts = [source.take(PROMPT.format(i), "prompt_length", "dim") for i in layers]
        gates = [source.take_gate(GATE.format(i), 2, 1) for i in layers]
        if len({len(gate) for gate in gates}) != 1:
            raise ValueError(f"{source.path}: gates must have one shape in all layers")
        pieces.prompts, pieces.gates = torch.stack(prompts), torch.stack(gates)
        pieces.layers = tuple(layers)
    if is_v2:
        pieces.scale_side = "output"
        pieces.tuned = _split_qkv(source, n_layers, sizes, options, pieces.notes)
        pieces.tuned |= source.tuned(TABLE, n_layers, "output")
        pieces.notes.append("scales: on the output side, y = s * (W x + b)")
    return assemble(source, NAME_V2 if is_v2 else NAME, pieces, options, n_layers)


def _split_qkv(
    source: Source,
    n_layers: int,
    sizes: Mapping[str, int],
    options: ReadOptions,
    notes: list[str],
) -> dict[str, Tensor]:
    """Bias and scale of the fused projection as those of wq, wk and wv."""
    known = source.sizes
    if options.base is not None:
        known.setdefault("n_heads", options.base.n_heads)
        head_dim: int | None = options.base.head_dim
    else:
        head_dim = sizes.get("head_size")
    if "n_head" in sizes:
        known.setdefault("n_heads", sizes["n_head"])
    if head_dim is None and "dim" in known and "n_heads" in known:
        head_dim = known["dim"] // known["n_heads"]
        notes.append(f"heads: of width {head_dim} assumed, dim / n_heads ({CONFIG} is not there)")
    if head_dim is None or "n_heads" not in known or head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"{source.path} does not tell its base's heads: name the base, with --base"
        )
    heads, found = known["n_heads"], dict[str, list[Tensor]]()
    for layer in range(n_layers):
        for kind in ("bias", "scale"):
            name = QKV.format(layer, kind)
            rows = source.take(name, "qkv_width")
            groups, rest = divmod(len(rows) - heads * head_dim, 2 * head_dim)
            if rest or groups < 1 or heads % groups:
                raise ValueError(
                    f"{source.path}: {name} must have rows of {heads} query heads and some key and "
                    f"value heads of width {head_dim}, got {len(rows)}"
                )
            q, k, v = rows.split([heads * head_dim, groups * head_dim, groups * head_dim])
            known["query_width"], known["key_width"] = len(q), len(k)
            for linear, part in (
                ("wq", to_pairs(q, heads)),
                ("wk", to_pairs(k, groups)),
                ("wv", v.clone()),
            ):
                found.setdefault(f"{kind}_{linear}", []).append(part)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _prompt_tensors(stored: StoredAdapter, notes: list[str]) -> dict[str, Tensor]:
    header, tensors = stored.header, dict[str, Tensor]()
    if not header.layers:
        return tensors
    gates = identity_gates(stored, notes)
    heads = header.base.shape.get("n_heads")
    if gates.shape[1] == 1 and heads is None:
        raise ValueError("litgpt holds a gate per head, and the base's n_heads is not known")
    if gates.shape[1] == 1 and heads is not None:
        notes.append("gates: the layer's one is written for every head")
        gates = gates.expand(-1, heads)
    first, count = header.layers[0], header.base.shape["n_layers"]
    if header.layers != tuple(range(first, count)):
        raise ValueError(f"litgpt adapts the last layers only, got layers {header.layers}")
    if first != LAST_START:
        notes.append(f"layers: litgpt must be told adapter_start_layer {first}")
    for row, layer in enumerate(header.layers):
        tensors[PROMPT.format(layer)] = stored.tensors["prompts"][row].clone()
        tensors[GATE.format(layer)] = gates[row].reshape(1, 1, -1, 1).clone()
    return tensors


def encode(stored: StoredAdapter) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Content of lit_model.pth.adapter, and what to say about it.

    Raises:
        ValueError: it cannot be told in this format.
    """
    notes: list[str] = []
    only_prompts(stored, NAME)
    return {"model": _prompt_tensors(stored, notes)}, notes


def encode_v2(stored: StoredAdapter) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Content of lit_model.pth.adapter_v2, and what to say about it.

    Raises:
        ValueError: as `encode`; the scale is on the input side, or norms are missing.
    """
    header, notes = stored.header, list[str]()
    tuning, shape = header.tuning, header.base.shape
    if tuning.scale_side == "input":
        raise ValueError("litgpt-v2 has scales on the output side, got input: not convertible")
    if "norm" not in tuning.groups:
        raise ValueError("litgpt-v2 holds the norms, and the adapter leaves them to its base")
    missing = [name for name in ("n_heads", "kv_heads", "head_dim") if name not in shape]
    if missing:
        raise ValueError(f"litgpt-v2 orders rows by head, and the base's {missing[0]} is not known")
    tensors = _prompt_tensors(stored, notes)
    tensors |= unstacked(TABLE, stored)
    whole = [f"{k}_{n}" for k in ("bias", "scale") for n in ("wq", "wk", "wv", *PLACES)]
    lacking = [name for name in whole if name not in stored.tensors]
    if lacking:
        raise ValueError(f"litgpt-v2 holds biases and scales of all maps, got no {lacking[0]}")
    for kind in ("bias", "scale"):
        for layer in range(shape["n_layers"]):
            q, k, v = (stored.tensors[f"{kind}_{name}"][layer] for name in ("wq", "wk", "wv"))
            q, k = to_halves(q, shape["n_heads"]), to_halves(k, shape["kv_heads"])
            tensors[QKV.format(layer, kind)] = torch.cat((q, k, v))
    return {"model": tensors}, notes
