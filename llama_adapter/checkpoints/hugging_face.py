"""Reads a base in Hugging Face's format: config.json and safetensors, of LLaMA and Mistral models.

Query and key rows are brought from halves of a head to Meta's neighbouring pairs. What the lean
model cannot compute is refused by name. Of sliding windows it has none: within one window there
is no difference, so a model that has one gets it as its longest context.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from llama_adapter.config import LlamaConfig, width_of
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer, find_tokenizer
from llama_adapter.world import World

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# our names of the tensors, and theirs
MODEL_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
LAYER_TENSORS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# buffers of rotary frequencies, which follow from the configuration
IGNORED_TENSOR = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# model_type: the class, and what an absent key means
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": (
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
}
# integer keys of config.json and ours; those without a default have to be there
SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_seq_len",
}
OPTIONAL_SIZES = {"num_key_value_heads": "n_kv_heads", "head_dim": "attention_head_dim"}
# the one value that the lean model computes, absent or said
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "partial_rotary_factor": (1.0,),
    "auto_map": (),
}
DTYPE_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is meant as one of Hugging Face's: it has a config.json or safetensors."""
    return any((folder / name).exists() for name in (CONFIG, SINGLE, INDEX))


def read_hugging_face(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> tuple[Llama, Tokenizer]:
    """Read a model and its tokenizer.

    Args:
        folder: holds config.json, model.safetensors or its shards with their index, and
            tokenizer.model or tokenizer.json.
        dtype: of the loaded weights; None keeps the files' own.
        device: where the weights go.
        world: the processes that share the weights out; None leaves all to this one.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, does not fit the others, or the model is of another kind.
    """
    config = read_config(folder / CONFIG)
    paths = weight_paths(folder)
    tokenizer = find_tokenizer(folder)
    check_vocabulary(config, tokenizer, folder / CONFIG)
    expected = expected_shapes(config)
    theirs = {name: _their_name(name) for name in expected}
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in paths}
        owners = _owners(files, theirs, folder)
        found = [(path, name, _dtype(files[path], name, path)) for name, path in owners.items()]
        dtype = common_dtype(found, dtype)

        def write(name: str, out: Tensor, start: int) -> None:
            path = owners[theirs[name]]
            with _reading(theirs[name], path):
                rows = files[path].get_slice(theirs[name])
                check_shape(theirs[name], rows.get_shape(), expected[name], path)
                halves = name.endswith(("attention.wq.weight", "attention.wk.weight"))
                copy_rows(rows, out, start, config.head_dim if halves else None)

        if config.tied_embeddings and MODEL_TENSORS[OUTPUT] in owners:
            _check_tied(files, owners)
        model = assemble(config, write, dtype, device, world)
    return model, tokenizer


def read_config(path: Path) -> LlamaConfig:
    """Configuration of a config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is of another kind, or a key is missing or of the wrong kind.
    """
    given = read_object(path)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type must be {' or '.join(ARCHITECTURES)}, got {kind!r:.60}"
        )
    architecture, defaults = ARCHITECTURES[kind]
    if given.get("architectures") not in (None, [], [architecture]):
        raise ValueError(
            f"{path}: architectures must be [{architecture!r}], got {given['architectures']!r:.60}"
        )
    for key, allowed in FIXED.items():
        if given.get(key) is not None and given[key] not in allowed:
            wanted = f"must be {json.dumps(allowed[0])}" if allowed else "is not supported"
            raise ValueError(f"{path}: {key} {wanted}, got {given[key]!r:.60}")
    given = defaults | given
    values: dict[str, Any] = {
        ours: size_of(given, key, path)
        for key, ours in (SIZES | OPTIONAL_SIZES).items()
        if key in SIZES or given.get(key) is not None
    }
    if given.get("sliding_window") is not None:
        window = size_of(given, "sliding_window", path)
        values["max_seq_len"] = min(values["max_seq_len"], window)
    values |= width_of(values["dim"], values.pop("hidden_dim"))
    values |= _rotary(given, path)
    if not is_positive(given.get("rms_norm_eps")):
        raise ValueError(
            f"{path}: rms_norm_eps must be a positive number, got {given.get('rms_norm_eps')!r:.60}"
        )
    tied = given.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings must be true or false, got {tied!r:.60}")
    return make_config(values | {"norm_eps": given["rms_norm_eps"], "tied_embeddings": tied}, path)


def _rotary(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Base and scaling of the rotary frequencies, as transformers 4 or 5 says it."""
    new, old = given.get("rope_parameters"), given.get("rope_scaling")
    key = "rope_parameters" if new is not None else "rope_scaling"
    chosen = new if new is not None else old
    if not isinstance(chosen, dict | None):
        raise ValueError(f"{path}: {key} must be an object, got {chosen!r:.60}")
    scaling = dict(chosen or {})
    theta = scaling.pop("rope_theta", None)
    theta = given.get("rope_theta", 10000.0) if theta is None else theta
    if not is_positive(theta):
        raise ValueError(f"{path}: rope_theta must be a positive number, got {theta!r:.60}")
    kinds = [scaling.pop(name) for name in ("rope_type", "type") if name in scaling]
    kind = kinds[0] if kinds else "default"
    if any(other != kind for other in kinds):
        raise ValueError(
            f"{path}: {key} must have one rope_type, got {kinds[0]!r} and {kinds[1]!r}"
        )
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: {key}'s rope_type must be default or llama3, got {kind!r:.60}")
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: {key}'s partial_rotary_factor must be 1")
    if kind == "default":
        if scaling:
            raise ValueError(f"{path}: {key} must say its rope_type, got only {sorted(scaling)}")
        return {"rope_theta": float(theta)}
    lacking = {"factor", "low_freq_factor", "high_freq_factor"} - scaling.keys()
    if lacking:
        raise ValueError(f"{path}: {key} must have a {min(lacking)}, got {sorted(scaling)}")
    original = "original_max_position_embeddings"
    # where it is not told, transformers takes the context's length
    scaling.setdefault(original, given.get(original, given.get("max_position_embeddings")))
    found = rope_scaling(scaling, f"{path}: {key}")
    return {"rope_theta": float(theta), "rope_scaling": found}


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those of its index where it is sharded.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged, or there is a single file beside it.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds {SINGLE} and {INDEX}: remove the one that is not meant")
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = any(folder.glob("pytorch_model*.bin*"))
        remedy = (
            "load the model with transformers and save_pretrained(folder)"
            if pickled
            else "the weights are missing"
        )
        raise FileNotFoundError(f"{folder} holds no {SINGLE} and no {INDEX}: {remedy}")
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map must be an object of file names, got {names!r:.60}")
    for name in names.values():
        # a path could lead out of the folder
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index}: weight_map must hold names of files, got {name!a:.60}")
    paths = [folder / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: copy the shard into the folder")
    return paths


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({_line(error)}): copy it again"
        ) from None


def _owners(files: dict[Path, Any], theirs: dict[str, str], folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, once every one is there and none is there twice."""
    owners: dict[str, Path] = {}
    for path, file in files.items():
        names = file.keys()
        for name in names:
            if IGNORED_TENSOR.fullmatch(name):
                continue
            if name in owners:
                raise ValueError(f"{path}: {ascii(name)[1:-1]} is in {owners[name].name} too")
            owners[name] = path
    if len(files) > 1 or (folder / INDEX).is_file():
        _check_index(owners, folder / INDEX)
    expected = set(theirs.values())
    if OUTPUT not in theirs:
        # a second copy of a tied embedding
        expected |= {MODEL_TENSORS[OUTPUT]} & owners.keys()
    where = next(iter(files)) if len(files) == 1 else folder
    check_names(owners, sorted(expected), where, "is config.json another model's?")
    return owners


def _check_index(owners: dict[str, Path], index: Path) -> None:
    said = read_object(index)["weight_map"]
    for name, path in owners.items():
        if said.get(name) != path.name:
            raise ValueError(
                f"{index} says that {ascii(name)[1:-1]} is in {said.get(name)}, but it is in "
                f"{path.name}"
            )
    for name in said:
        if name not in owners and not IGNORED_TENSOR.fullmatch(name):
            raise ValueError(f"{index.parent / said[name]} lacks {ascii(name)[1:-1]}")


def _dtype(file: Any, name: str, path: Path) -> Any:
    """torch's dtype, or the file's name of it."""
    found = file.get_slice(name).get_dtype()
    return DTYPE_NAMES.get(found, found)


@contextmanager
def _reading(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {name} cannot be read: {_line(error)}") from None


def _check_tied(files: dict[Path, Any], owners: dict[str, Path]) -> None:
    tensors: list[Tensor] = []
    names = (MODEL_TENSORS[OUTPUT], MODEL_TENSORS[EMBEDDING])
    for name in names:
        with _reading(name, owners[name]):
            tensors.append(files[owners[name]].get_tensor(name))
    if not is_copy(*tensors):
        raise ValueError(
            f"{owners[names[0]]}: {names[0]} must be the embedding, because config.json has "
            "tie_word_embeddings, but it differs"
        )


def _their_name(name: str) -> str:
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_TENSORS[rest]}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
