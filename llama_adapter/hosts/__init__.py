"""Adapters on models of other libraries: `adapt` is the one entry, `unadapt` takes it back.

The host stays what it is, of its own class, and is frozen; the adapter becomes a submodule of it,
so optimisers, devices and `Trainer` find its parameters. The facts of each kind of host are rows of
a table in facts.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.config import AdapterConfig
from llama_adapter.hosts.attention import (
    NAME,
    Prompted,
    device_of,
    freeze_during,
    register,
    replace_methods,
    separate_config,
    use_config,
)
from llama_adapter.hosts.facts import attentions_of, host_of, shape_of_host
from llama_adapter.hosts.files import SUBMODULE, adapter_of, read_adapted, save_adapted

__all__ = ["SUBMODULE", "adapt", "adapter_of", "unadapt"]

_BEFORE = "_llama_adapter_before"


def _trained(adapter: Adapter) -> tuple[Tensor, Tensor]:
    return adapter.prompts, adapter.gates


def _row_of(adapter: Adapter, row: int) -> tuple[Tensor, Tensor]:
    return adapter.prompts[row], adapter.multipliers()[row]


def adapt(
    model: Any,
    *,
    prompt_length: int = 10,
    layers: int | Sequence[int] | None = None,
    prompt_std: float = 1.0,
    gate_activation: str = "tanh",
    gate_scope: str = "head",
    generator: torch.Generator | None = None,
    adapter: Adapter | str | Path | None = None,
) -> Adapter:
    """Put an adapter on a host, on this instance only, and freeze the host.

        out = softmax(q k_tokens) v_tokens + gate * softmax(q k_prompt) v_prompt

    in the adapted layers, before the output projection; keys and values of a prompt are the layer's
    own projections of its rows. Gates start at zero: the host's outputs do not change.

    Args:
        model: a transformers model of a type in `facts.HOSTS`.
        prompt_length: rows per adapted layer (the papers' K).
        layers: how many layers, counted from the top, or their indices; None is all but the two
            lowest.
        prompt_std: standard deviation of the prompts' initial values.
        gate_activation: "tanh" or "identity".
        gate_scope: "head" or "layer".
        generator: source of the prompts' random values.
        adapter: one that exists, in the place of a new one, or its file, or a folder that
            `save_pretrained` wrote; all arguments above are its own then.

    Returns:
        The adapter, float32 and trainable: prompts (L, P, C) and gates (L, H), now a submodule of
        the host by the name SUBMODULE, whose `save_pretrained` writes the adapter alone.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such file.
        ValueError: the host is of an unknown type, has an adapter, or the adapter does not fit or
            was trained on another base.

    Source: LLaMA-Adapter, section 3.2, equations 1 to 8.
    """
    host, shape = host_of(model), shape_of_host(model)
    if adapter_of(model) is not None or _BEFORE in model.__dict__:
        raise ValueError("model has an adapter already: unadapt(model) takes it off")
    if shape.head_dim % 8 or not 8 <= shape.head_dim <= 256:
        raise ValueError(
            f"model must have heads of 8 to 256 channels in steps of 8, got {shape.head_dim}"
        )
    if adapter is None:
        count = layers if layers is None or isinstance(layers, int) else None
        rows = None if layers is None or isinstance(layers, int) else tuple(layers)
        config = AdapterConfig(prompt_length, count, prompt_std, gate_activation, gate_scope)
        adapter = Adapter(config, shape, layers=rows, generator=generator)
    elif not isinstance(adapter, Adapter):
        adapter = read_adapted(model, adapter)
    if adapter.tuning.groups or not adapter.layers:
        groups = ", ".join(adapter.groups())
        raise ValueError(
            f"adapter must have prompts and gates alone on a host, got {groups}: biases, scales "
            "and norms run in the lean model"
        )
    width, heads = adapter.prompts.shape[-1], adapter.n_heads
    if (width, heads) != (shape.dim, shape.n_heads) or adapter.layers[-1] >= shape.n_layers:
        raise ValueError(
            f"adapter must be for width {shape.dim}, {shape.n_heads} heads and {shape.n_layers} "
            f"layers, got width {width}, {heads} heads and layers {adapter.layers}"
        )
    attentions = attentions_of(model, host)
    for layer in adapter.layers:
        for name in (host.key, host.value):
            if name not in dict(attentions[layer].named_modules()):
                raise ValueError(
                    f"model must have the {name} of its own layers, got a "
                    f"{type(attentions[layer]).__name__}: take off other adapters first"
                )
        if device_of(attentions[layer]).type == "meta":
            raise ValueError(
                "model must have its weights on a device, got some that are offloaded or not "
                "loaded yet"
            )
    register()
    methods = ("generate", "save_pretrained")
    before = {
        "methods": {name: model.__dict__.get(name) for name in methods},
        "config": separate_config(model),
        "trainable": [name for name, x in model.named_parameters() if x.requires_grad],
        # accelerate's hooks, for one, are forwards of an instance
        "forwards": {row: attentions[row].__dict__.get("forward") for row in adapter.layers},
    }
    model.set_attn_implementation(NAME)
    model.requires_grad_(False)
    for row, layer in enumerate(adapter.layers):
        module = attentions[layer]
        source, trained = partial(_row_of, adapter, row), partial(_trained, adapter)
        module.__dict__["forward"] = Prompted(
            module, module.forward, source, trained, host.key, host.value, shape.head_dim
        )
    model.add_module(SUBMODULE, adapter.to(device_of(attentions[adapter.layers[0]])))
    model.__dict__[_BEFORE] = before
    freeze_during(model, "generate")
    model.__dict__["save_pretrained"] = partial(save_adapted, model)
    return adapter


def unadapt(model: Any) -> Adapter:
    """Take the adapter off: the host is bitwise what it was, trainable parameters included.

    Returns:
        The adapter that was on it.

    Raises:
        ValueError: there is none.
    """
    adapter, before = adapter_of(model), model.__dict__.get(_BEFORE)
    if adapter is None or before is None:
        raise ValueError("model must have an adapter, put there by adapt(model)")
    attentions = attentions_of(model, host_of(model))
    for layer, forward in before["forwards"].items():
        attentions[layer].__dict__.pop("forward")
        if forward is not None:
            attentions[layer].__dict__["forward"] = forward
    use_config(model, before["config"])
    delattr(model, SUBMODULE)
    del model.__dict__[_BEFORE]
    replace_methods(model, before["methods"])
    trainable = set(before["trainable"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return adapter
