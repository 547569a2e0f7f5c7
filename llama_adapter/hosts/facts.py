"""Where each kind of host model keeps what prompts need: one row per model type of transformers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llama_adapter.checkpoints import hugging_face
from llama_adapter.checkpoints.fingerprint import (
    MODEL_TENSORS,
    SHAPE_FIELDS,
    Fingerprint,
    fingerprint_of,
    sampled_tensors,
)
from llama_adapter.checkpoints.quantize import is_quantized
from llama_adapter.config import LlamaConfig


@dataclass(frozen=True)
class Host:
    """A kind of host, in dotted names relative to the model, a layer or an attention.

    Attributes:
        layers: the list of layers.
        attention: a layer's attention, whose forward takes hidden states first and passes
            keywords on to transformers' attention interface.
        key, value: the attention's projections of keys and values.
        shape: fields of `LlamaConfig` and hidden_dim to their names in the host's configuration.
        tensors: Meta's names of the base's weights to the host's, for those that a fingerprint
            samples; a layer's without its index.
    """

    layers: str
    attention: str
    key: str
    value: str
    shape: dict[str, str]
    tensors: dict[str, str]


_DECODER = Host(
    layers="model.layers",
    attention="self_attn",
    key="k_proj",
    value="v_proj",
    shape={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size",
        "vocab_size": "vocab_size",
    },
    tensors=hugging_face.MODEL_TENSORS | hugging_face.LAYER_TENSORS,
)

# config.model_type to its facts; a new host is a new row
HOSTS: dict[str, Host] = {"llama": _DECODER, "mistral": _DECODER, "qwen2": _DECODER}


def host_of(model: Any) -> Host:
    """The facts of a model.

    Raises:
        ValueError: it is no model of transformers, or of a type without a row.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in HOSTS:
        got = type(model).__name__ if kind is None else f"{type(model).__name__} of type {kind!r}"
        raise ValueError(
            f"model must be a transformers model of type {', '.join(sorted(HOSTS))}, got {got}"
        )
    try:
        model.get_submodule(HOSTS[kind].layers)
    except AttributeError:
        raise ValueError(
            f"model must have {HOSTS[kind].layers}, as {kind} models for causal language modelling "
            f"do, got {type(model).__name__}"
        ) from None
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"model must be for causal language modelling, got {type(model).__name__}, whose head "
            "the adapter's file does not hold"
        )
    return HOSTS[kind]


def attentions_of(model: nn.Module, host: Host) -> list[nn.Module]:
    """The attention of every layer, in order."""
    layers = model.get_submodule(host.layers)
    return [layer.get_submodule(host.attention) for layer in layers.children()]


def _shape(model: Any, host: Host) -> dict[str, int]:
    found = {name: getattr(model.config, theirs) for name, theirs in host.shape.items()}
    width = getattr(model.config, "head_dim", None) or found["dim"] // found["n_heads"]
    return found | {"head_dim": width}


def shape_of_host(model: Any) -> LlamaConfig:
    """The host's shape as adapters know it: their rows' width, layers and heads."""
    shape = _shape(model, host_of(model))
    return LlamaConfig(
        dim=shape["dim"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        vocab_size=shape["vocab_size"],
        n_kv_heads=shape["kv_heads"],
        attention_head_dim=shape["head_dim"],
    )


def fingerprint_of_host(model: Any) -> Fingerprint:
    """The host's identity, equal to that of the lean model with the same weights.

    Of a quantised host it is the shape alone: its weights are no longer the base's.

    Raises:
        ValueError: a sampled weight is NaN or infinite.
    """
    host = host_of(model)
    # every name of a tied weight
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shape = _shape(model, host)
    label = str(getattr(model.config, "name_or_path", "")).rstrip("/").rsplit("/", 1)[-1]
    label = label or type(model).__name__
    ordered = {name: shape[name] for name in SHAPE_FIELDS}
    if is_quantized(model):
        return Fingerprint(label, ordered, ())
    found: dict[str, Tensor] = {}
    for name in sampled_tensors(shape["n_layers"]):
        if name in MODEL_TENSORS:
            theirs = host.tensors[name]
        else:
            _, layer, rest = name.split(".", 2)
            theirs = f"{host.layers}.{layer}.{host.tensors[rest]}"
        found[name] = parameters[theirs]
    return fingerprint_of(found, ordered, label)
