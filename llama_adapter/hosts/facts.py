"""Where each kind of host model keeps what prompts need: one row per model type of transformers."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llama_adapter.checkpoints import hugging_face
from llama_adapter.checkpoints.fingerprint import (
    MODEL_TENSORS,
    SHAPE_FIELDS,
    Fingerprint,
    fingerprint_of,
    rounded,
    sampled_tensors,
    weights_at,
)
from llama_adapter.checkpoints.quantize import is_quantized
from llama_adapter.config import LlamaConfig

ENCODERS = ("visual", "text")
# numbers that are kept of each parameter outside of the layers
_BESIDE = 4


@dataclass(frozen=True)
class Host:
    """A kind of host, in dotted names relative to the model's body, a layer or an attention.

    Attributes:
        kind: what an adapter's file calls it; decoders of LLaMA's shape are all "llama".
        layers: the list of layers.
        attention: a layer's attention, whose forward takes hidden states first and passes
            keywords on to transformers' attention interface.
        key, value: the attention's projections of keys and values.
        shape: fields of `LlamaConfig` and hidden_dim to their names in the body's configuration;
            without vocab_size it is the number of positions.
        tensors: Meta's names of the base's weights to the host's, for those that a fingerprint
            samples; a layer's without its index. An encoder's stand-ins are tensors of the same
            place: position embeddings for the output, a bias for the third feed-forward matrix.
        gate_activation: of a new adapter that is not told.
        lowest: layers that are left without prompts where no number is given.
        embeddings: the module that makes positions and takes `past_key_values_length`; "" where
            there is none.
    """

    kind: str
    layers: str
    attention: str
    key: str
    value: str
    shape: dict[str, str]
    tensors: dict[str, str]
    # LLaMA-Adapter, equation 7
    gate_activation: str = "identity"
    lowest: int = 0
    embeddings: str = ""


_SHAPE = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
}
_WORDS = _SHAPE | {"vocab_size": "vocab_size"}
_DECODER = Host(
    kind="llama",
    layers="model.layers",
    attention="self_attn",
    key="k_proj",
    value="v_proj",
    shape=_WORDS | {"kv_heads": "num_key_value_heads"},
    tensors=hugging_face.MODEL_TENSORS | hugging_face.LAYER_TENSORS,
    gate_activation="tanh",
    lowest=2,
)
_VIT = Host(
    kind="vit",
    layers="layers",
    attention="attention",
    key="k_proj",
    value="v_proj",
    shape=_SHAPE,
    tensors={
        "tok_embeddings.weight": "embeddings.patch_embeddings.projection.weight",
        "norm.weight": "layernorm.weight",
        "output.weight": "embeddings.position_embeddings",
        "attention_norm.weight": "layernorm_before.weight",
        "ffn_norm.weight": "layernorm_after.weight",
        "attention.wq.weight": "attention.q_proj.weight",
        "attention.wk.weight": "attention.k_proj.weight",
        "attention.wv.weight": "attention.v_proj.weight",
        "attention.wo.weight": "attention.o_proj.weight",
        "feed_forward.w1.weight": "mlp.fc1.weight",
        "feed_forward.w2.weight": "mlp.fc2.weight",
        "feed_forward.w3.weight": "mlp.fc1.bias",
    },
)


def _bert(kind: str) -> Host:
    return Host(
        kind=kind,
        layers="encoder.layer",
        attention="attention.self",
        key="key",
        value="value",
        shape=_WORDS,
        tensors={
            "tok_embeddings.weight": "embeddings.word_embeddings.weight",
            "norm.weight": "embeddings.LayerNorm.weight",
            "output.weight": "embeddings.position_embeddings.weight",
            "attention_norm.weight": "attention.output.LayerNorm.weight",
            "ffn_norm.weight": "output.LayerNorm.weight",
            "attention.wq.weight": "attention.self.query.weight",
            "attention.wk.weight": "attention.self.key.weight",
            "attention.wv.weight": "attention.self.value.weight",
            "attention.wo.weight": "attention.output.dense.weight",
            "feed_forward.w1.weight": "intermediate.dense.weight",
            "feed_forward.w2.weight": "output.dense.weight",
            "feed_forward.w3.weight": "intermediate.dense.bias",
        },
        embeddings="embeddings",
    )


def _clip(kind: str, shape: dict[str, str], embedding: str, norm: str) -> Host:
    return Host(
        kind=kind,
        layers="encoder.layers",
        attention="self_attn",
        key="k_proj",
        value="v_proj",
        shape=shape,
        tensors={
            "tok_embeddings.weight": f"embeddings.{embedding}.weight",
            "norm.weight": f"{norm}.weight",
            "output.weight": "embeddings.position_embedding.weight",
            "attention_norm.weight": "layer_norm1.weight",
            "ffn_norm.weight": "layer_norm2.weight",
            "attention.wq.weight": "self_attn.q_proj.weight",
            "attention.wk.weight": "self_attn.k_proj.weight",
            "attention.wv.weight": "self_attn.v_proj.weight",
            "attention.wo.weight": "self_attn.out_proj.weight",
            "feed_forward.w1.weight": "mlp.fc1.weight",
            "feed_forward.w2.weight": "mlp.fc2.weight",
            "feed_forward.w3.weight": "mlp.fc1.bias",
        },
    )


_CLIP_VISION = _clip("clip_vision", _SHAPE, "patch_embedding", "post_layernorm")
_CLIP_TEXT = _clip("clip_text", _WORDS, "token_embedding", "final_layer_norm")

# config.model_type of a body to its facts; a new host is a new row
HOSTS: dict[str, Host] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "vit": _VIT,
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "clip_vision_model": _CLIP_VISION,
    "clip_text_model": _CLIP_TEXT,
}
# model_type of what has several bodies to their attributes and kinds, the usual one first
_TOWERS = {"clip": {"visual": "vision_model", "text": "text_model"}}
# where a model with a head keeps its one body of these types, other than by base_model_prefix
_INNER = {"clip_vision_model": "vision_model", "clip_text_model": "text_model"}
# task heads that are trained beside the prompts
_HEADS = ("classifier", "qa_outputs")


@dataclass(frozen=True)
class Tower:
    """The part of a model that an adapter goes into: all of it, but for CLIP's two encoders.

    Attributes:
        model: the whole.
        host: facts of this part.
        prefix: of the part's names in the model: "", "roberta.", "vision_model.".
        slot: what distinguishes it from the usual one: "" or the encoder's name.
    """

    model: Any = field(repr=False)
    host: Host
    prefix: str
    slot: str = ""

    @property
    def body(self) -> Any:
        """The module whose configuration is this part's."""
        return self.model.get_submodule(self.prefix.rstrip(".")) if self.prefix else self.model

    def attentions(self) -> list[nn.Module]:
        """The attention of every layer, in order."""
        layers = self.model.get_submodule(self.prefix + self.host.layers)
        return [layer.get_submodule(self.host.attention) for layer in layers.children()]

    def head(self) -> tuple[str, nn.Module] | None:
        """Name and module of the model's task head, if it has one with parameters."""
        if self.slot or self.host is _DECODER:
            return None
        for name in _HEADS:
            module = self.model._modules.get(name)
            if module is not None and any(True for _ in module.parameters()):
                return name, module
        return None

    def beside(self, trained: str | None) -> dict[str, tuple[float, ...]]:
        """Numbers of what lies outside of an encoder's layers, as `HostConfig` keeps them.

        Args:
            trained: name of the head that is the adapter's.
        """
        if self.host is _DECODER:
            return {}
        parts = (self.prefix, *(f"{name}." for name in _TOWERS["clip"].values()))
        out = ("llama_adapter", *(part for part in parts if part), f"{trained}.")
        found: dict[str, tuple[float, ...]] = {}
        for name, parameter in self.model.named_parameters():
            own = name.removeprefix(self.prefix)
            inside = name.startswith(self.prefix) and own.startswith("pooler.")
            outside = bool(self.prefix) and not name.startswith(out)
            numbers = type(parameter.data) is Tensor and parameter.is_floating_point()
            numbers = numbers and parameter.numel() > 0 and parameter.device.type != "meta"
            if numbers and (inside or outside):
                kept = own if inside else name
                found[kept] = rounded(weights_at(parameter.detach(), _BESIDE))
        return found

    def _sizes(self) -> dict[str, int]:
        config = self.body.config
        found = {name: getattr(config, theirs) for name, theirs in self.host.shape.items()}
        width = getattr(config, "head_dim", None) or found["dim"] // found["n_heads"]
        found = {"kv_heads": found["n_heads"], "head_dim": width} | found
        if "vocab_size" not in found:
            positions = self.model.get_parameter(self.prefix + self.host.tensors["output.weight"])
            found["vocab_size"] = positions.shape[-2]
        return found

    def shape(self) -> LlamaConfig:
        """The host's shape as adapters know it: their rows' width, layers and heads."""
        sizes = self._sizes()
        return LlamaConfig(
            dim=sizes["dim"],
            n_layers=sizes["n_layers"],
            n_heads=sizes["n_heads"],
            vocab_size=sizes["vocab_size"],
            n_kv_heads=sizes["kv_heads"],
            attention_head_dim=sizes["head_dim"],
        )

    def fingerprint(self) -> Fingerprint:
        """The host's identity; a decoder's is equal to that of the lean model with its weights.

        Of a quantised host it is the shape alone: its weights are no longer the base's. What PEFT
        put beside a weight is no part of it.

        Raises:
            ValueError: a sampled weight is NaN or infinite, or is not where the facts say.
        """
        # every name of a tied weight
        parameters = {
            # PEFT keeps what it wraps behind another name
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        sizes = self._sizes()
        label = str(getattr(self.model.config, "name_or_path", "")).rstrip("/").rsplit("/", 1)[-1]
        label = label or type(self.model).__name__
        ordered = {name: sizes[name] for name in SHAPE_FIELDS}
        if is_quantized(self.model):
            return Fingerprint(label, ordered, ())
        found: dict[str, Tensor] = {}
        for name in sampled_tensors(sizes["n_layers"]):
            if name in MODEL_TENSORS:
                theirs = self.host.tensors[name]
            else:
                _, layer, rest = name.split(".", 2)
                theirs = f"{self.host.layers}.{layer}.{self.host.tensors[rest]}"
            theirs = self.prefix + theirs
            if theirs not in parameters:
                raise ValueError(
                    f"model must have {theirs}, as a {self.host.kind} of transformers does, got a "
                    f"{type(self.model).__name__} without: take off other adapters first"
                )
            found[name] = parameters[theirs]
        return fingerprint_of(found, ordered, label)


def tower_of(model: Any, encoder: str | None = None) -> Tower:
    """The part of a model that prompts go into, and its facts.

    Args:
        model: a model of transformers.
        encoder: "visual" or "text" of a CLIP; None is the usual one, and the only one elsewhere.

    Raises:
        ValueError: it is no model of transformers, of a type without a row, or has no such encoder.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    towers = _TOWERS.get(kind or "", {})
    held = {name: at for name, at in towers.items() if model._modules.get(at) is not None}
    if encoder is not None and encoder not in held:
        has = f"one of {', '.join(held)}" if held else "left out for this model"
        raise ValueError(f"encoder must be {has}, got {encoder!r} for a {type(model).__name__}")
    if held:
        chosen = encoder or next(iter(held))
        slot = "" if chosen == next(iter(held)) else chosen
        body = getattr(model, held[chosen])
        return Tower(model, HOSTS[body.config.model_type], f"{held[chosen]}.", slot)
    if kind not in HOSTS:
        got = type(model).__name__ if kind is None else f"{type(model).__name__} of type {kind!r}"
        known = ", ".join(sorted({*HOSTS, *_TOWERS}))
        raise ValueError(f"model must be a transformers model of type {known}, got {got}")
    host = HOSTS[kind]
    if host is _DECODER:
        _check_decoder(model, kind)
        return Tower(model, host, "")
    inner = _INNER.get(kind) or getattr(model, "base_model_prefix", "")
    prefix = f"{inner}." if model._modules.get(inner) is not None else ""
    try:
        model.get_submodule(prefix + host.layers)
    except AttributeError:
        raise ValueError(
            f"model must have {prefix}{host.layers}, as {kind} models of transformers do, got "
            f"{type(model).__name__}: pass the whole model, and of one in PEFT get_base_model()"
        ) from None
    return Tower(model, host, prefix)


def _check_decoder(model: Any, kind: str) -> None:
    try:
        model.get_submodule(_DECODER.layers)
    except AttributeError:
        raise ValueError(
            f"model must have {_DECODER.layers}, as {kind} models for causal language modelling "
            f"do, got {type(model).__name__}"
        ) from None
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"model must be for causal language modelling, got {type(model).__name__}, whose head "
            "the adapter's file does not hold"
        )
