"""Reads a base in litgpt's format: lit_model.pth and model_config.yaml (lit_config.json).

Queries, keys and values are one tensor, [Q | K | V] by rows, in Hugging Face's order of rows. What
the lean model cannot compute is refused by name.
"""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.checkpoints.assemble import (
    EMBEDDING,
    OUTPUT,
    assemble,
    check_names,
    check_shape,
    check_vocabulary,
    common_dtype,
    copy_rows,
    expected_shapes,
    is_copy,
    is_positive,
    make_config,
    read_object,
    rope_scaling,
    size_of,
)
from llama_adapter.checkpoints.torch_file import check_tensors, read_torch_file
from llama_adapter.config import LlamaConfig, width_of
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer, find_tokenizer
from llama_adapter.world import World

WEIGHTS, CONFIGS = "lit_model.pth", ("model_config.yaml", "lit_config.json")
TIED = ("transformer.wte.weight", "lm_head.weight")

# our names of the tensors, and theirs; of a fused tensor with the part that is ours
MODEL_TENSORS = {EMBEDDING: TIED[0], "norm.weight": "transformer.ln_f.weight", OUTPUT: TIED[1]}
LAYER_TENSORS = {
    "attention.wq.weight": "attn.qkv.weight",
    "attention.wk.weight": "attn.qkv.weight",
    "attention.wv.weight": "attn.qkv.weight",
    "attention.wo.weight": "attn.proj.weight",
    "feed_forward.w1.weight": "mlp.fc_1.weight",
    "feed_forward.w2.weight": "mlp.proj.weight",
    "feed_forward.w3.weight": "mlp.fc_2.weight",
    "attention_norm.weight": "norm_1.weight",
    "ffn_norm.weight": "norm_2.weight",
}

# integer keys and ours; those of the first table have to be there
SIZES = {
    "n_embd": "dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "padded_vocab_size": "vocab_size",
    "intermediate_size": "hidden_dim",
    "block_size": "max_seq_len",
}
OPTIONAL_SIZES = {"head_size": "attention_head_dim", "n_query_groups": "n_kv_heads"}
# what makes the model a LLaMA, and has to be said, under the newer or the older key
FIXED: dict[tuple[str, ...], Any] = {
    ("norm_class_name", "_norm_class"): "RMSNorm",
    ("mlp_class_name", "_mlp_class"): "LLaMAMLP",
    ("parallel_residual",): False,
    ("bias",): False,
    ("rotary_percentage",): 1.0,
}
# keys of the files' own, which change nothing in such a model
FREE = (
    "name",
    "org",
    "hf_config",
    "vocab_size",
    "padding_multiple",
    "norm_eps",
    "norm_qk_type",
    "gelu_approximate",
    "sliding_window_size",
    "sliding_window_indices",
    "rope_base",
    "rope_adjustments",
)
# keys that are 1 or true where nothing is added
NEUTRAL = ("rope_condense_ratio", "routed_scaling_factor", "norm_1", "norm_2")


def is_litgpt(folder: Path) -> bool:
    """Whether a folder is meant as one of litgpt's: it has its configuration or its weights."""
    return any((folder / name).exists() for name in (WEIGHTS, *CONFIGS))


def read_litgpt(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> tuple[Llama, Tokenizer]:
    """Read a model and its tokenizer.

    Args:
        folder: holds lit_model.pth, model_config.yaml or lit_config.json, and tokenizer.model or
            tokenizer.json.
        dtype: of the loaded weights; None keeps the files' own.
        device: where the weights go.
        world: the processes that share the weights out; None leaves all to this one.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, does not fit the others, or the model is of another kind.
    """
    path = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(CONFIGS)}")
    config = read_config(path)
    tokenizer = find_tokenizer(folder)
    check_vocabulary(config, tokenizer, path)
    weights = folder / WEIGHTS
    tensors = _read_weights(weights, whole=world is None)
    config = replace(config, tied_embeddings=is_copy(*(tensors.get(name) for name in TIED)))
    if config.tied_embeddings:
        del tensors[TIED[1]]
    expected = expected_shapes(config)
    theirs = {name: _their_name(name) for name in expected}
    check_names(
        tensors, dict.fromkeys(theirs.values()), weights, f"is {path.name} another model's?"
    )
    dtype = common_dtype(((weights, name, value.dtype) for name, value in tensors.items()), dtype)
    rows = {"q": config.n_heads, "k": config.kv_heads, "v": config.kv_heads}
    sizes = [heads * config.head_dim for heads in rows.values()]

    def write(name: str, out: Tensor, start: int) -> None:
        tensor = tensors[theirs[name]]
        part = name.removesuffix(".weight").rpartition("attention.w")[2]
        if part in rows:
            check_shape(theirs[name], tensor.shape, (sum(sizes), config.dim), weights)
            tensor = dict(zip(rows, tensor.split(sizes), strict=True))[part]
        else:
            check_shape(theirs[name], tensor.shape, expected[name], weights)
        copy_rows(tensor, out, start, config.head_dim if part in ("q", "k") else None)

    return assemble(config, write, dtype, device, world), tokenizer


def read_config(path: Path) -> LlamaConfig:
    """Configuration of a model_config.yaml or lit_config.json; the weights tell whether it is tied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is of another kind, a key is missing or of the wrong kind, or PyYAML
            is not there to read it.
    """
    given = read_object(path) if path.suffix == ".json" else _read_yaml(path)
    given = {key: value for key, value in given.items() if value is not None}
    fixed = [key for keys in FIXED for key in keys]
    for keys, wanted in FIXED.items():
        got = next((given[key] for key in keys if key in given), None)
        if got != wanted:
            raise ValueError(f"{path}: {keys[0]} must be {wanted}, got {got!r:.60}")
    for key, value in given.items():
        neutral = value == 1 if key in NEUTRAL else value in (0, False, "")
        if key not in {*fixed, *SIZES, *OPTIONAL_SIZES, *FREE} and not neutral:
            raise ValueError(f"{path}: {ascii(key)[1:-1]} is not supported, got {value!r:.60}")
    values: dict[str, Any] = {
        ours: size_of(given, key, path)
        for key, ours in (SIZES | OPTIONAL_SIZES).items()
        if key in SIZES or key in given
    }
    if "sliding_window_size" in given:
        window = size_of(given, "sliding_window_size", path)
        values["max_seq_len"] = min(values["max_seq_len"], window)
    for key, ours in (("norm_eps", "norm_eps"), ("rope_base", "rope_theta")):
        if key not in given and key == "rope_base":
            continue
        if not is_positive(given.get(key)):
            raise ValueError(f"{path}: {key} must be a positive number, got {given.get(key)!r:.60}")
        values[ours] = float(given[key])
    scaling = given.get("rope_adjustments")
    if scaling is not None:
        if not isinstance(scaling, dict) or "factor" not in scaling or len(scaling) < 4:
            raise ValueError(f"{path}: rope_adjustments must be LLaMA 3.1's, got {scaling!r:.60}")
        values["rope_scaling"] = rope_scaling(scaling, f"{path}: rope_adjustments")
    return make_config(values | width_of(values["dim"], values.pop("hidden_dim")), path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ValueError(
            f"{path} needs PyYAML to be read: pip install 'llama-adapter-kernels[hf]'"
        ) from None
    try:
        text = path.read_text(encoding="utf-8")
        # an alias can stand for any number of copies of what it names
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not YAML: {line}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def _read_weights(path: Path, whole: bool) -> dict[str, Tensor]:
    content = read_torch_file(path, whole=whole)
    if set(content) == {"model"} and isinstance(content["model"], dict):
        # as litgpt's training saves it
        content = content["model"]
    tensors = check_tensors(content, path, tied=TIED)
    for name in tensors:
        if name.endswith(".attn.attn.weight"):
            raise ValueError(
                f"{path}: {ascii(name)[1:-1]} has the rows of queries, keys and values "
                "interleaved, as litgpt before 2025: load and save it with litgpt"
            )
    return tensors


def _their_name(name: str) -> str:
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, layer, rest = name.split(".", 2)
    return f"transformer.h.{layer}.{LAYER_TENSORS[rest]}"
