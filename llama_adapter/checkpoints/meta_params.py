"""Reads Meta's params.json into a `LlamaConfig`, key by key, refusing what it does not know.

What the file does not say is decided here: the factor of a rotary scaling, the trained context.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.assemble import (
    is_positive,
    make_config,
    read_object,
    rope_scaling,
)
from llama_adapter.checkpoints.fingerprint import shape_of
from llama_adapter.config import PRESETS, LlamaConfig, RopeScaling

# keys of params.json; what is not read from it is inferred or has LlamaConfig's default
PARAMS: dict[str, type | tuple[type, ...]] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": (int, float),
    "norm_eps": (int, float),
    "rope_theta": (int, float),
    "use_scaled_rope": bool,
    "rope_scaling": dict,
    "max_seq_len": int,
    "max_batch_size": int,
}
REQUIRED_PARAMS = ("dim", "n_layers", "n_heads")
POSITIVE_PARAMS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
# keys of models that this one cannot be, by how they begin
REFUSED_PARAMS = {
    "quantization": "the weights are quantised",
    "lora": "the weights are a LoRA's",
    "vision": "the model reads images",
    "moe": "the model is a mixture of experts",
}


def read_params(path: Path, tokens: int) -> LlamaConfig:
    """Configuration of a params.json; whether embeddings are tied is known from the weights only.

    Args:
        path: the file; its content may lie under the key "model".
        tokens: size of the tokenizer's vocabulary, for files that say -1 or nothing.

    Raises:
        ValueError: the file is not JSON, or a key is unknown, missing, or of the wrong kind.
    """
    params = read_object(path)
    if set(params) == {"model"}:
        params = params["model"]
    if not isinstance(params, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(params).__name__}")
    params = {key: value for key, value in params.items() if value is not None}
    _check_params(params, path)
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = tokens
    if params["vocab_size"] != tokens:
        raise ValueError(
            f"{path}: vocab_size is {params['vocab_size']}, but tokenizer.model has {tokens} "
            "tokens; they belong to different models"
        )
    if "head_dim" in params:
        params["attention_head_dim"] = params["head_dim"]
    scaling = _rope_scaling(params, path)
    known = {spec.name for spec in fields(LlamaConfig)} - {"rope_scaling"}
    config = make_config(
        {key: value for key, value in params.items() if key in known} | {"rope_scaling": scaling},
        path,
    )
    return config if "max_seq_len" in params else replace(config, max_seq_len=_context(config))


def _check_params(params: dict[str, Any], path: Path) -> None:
    for key, value in params.items():
        for prefix, reason in REFUSED_PARAMS.items():
            # -1 is how Meta's own dumps say that there is none
            if key.startswith(prefix) and value != -1:
                raise ValueError(f"{path}: {key} is not supported: {reason}")
        if key not in PARAMS and not key.startswith(tuple(REFUSED_PARAMS)):
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(PARAMS)}")
        kind = PARAMS.get(key, object)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {key} must be {_kind_name(kind)}, got {value!r}")
    for key in REQUIRED_PARAMS:
        if key not in params:
            raise ValueError(f"{path}: key {key!r} is missing")
    for key in POSITIVE_PARAMS:
        value = params.get(key, 1.0)
        if not is_positive(value):
            raise ValueError(f"{path}: {key} must be positive and finite, got {value}")


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(kind.__name__ for kind in kinds)


def _rope_scaling(params: dict[str, Any], path: Path) -> RopeScaling | None:
    explicit = params.get("rope_scaling")
    if explicit is not None:
        return rope_scaling(explicit, f"{path}: rope_scaling")
    if not params.get("use_scaled_rope", False):
        return None
    # params.json does not tell LLaMA 3.2's factor 32 from LLaMA 3.1's 8: the size does
    size = (params["dim"], params["n_layers"])
    presets = [preset for preset in PRESETS.values() if preset.rope_scaling is not None]
    factors = {(preset.dim, preset.n_layers): preset.rope_scaling for preset in presets}
    return factors.get(size, RopeScaling())


def _context(config: LlamaConfig) -> int:
    """Positions that the published model of this configuration was trained for."""

    def key(other: LlamaConfig) -> tuple[Any, ...]:
        return (shape_of(other), other.norm_eps, other.rope_theta, other.rope_scaling)

    for preset in PRESETS.values():
        if key(preset) == key(config):
            return preset.max_seq_len
    return config.max_seq_len
