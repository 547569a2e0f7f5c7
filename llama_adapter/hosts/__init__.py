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
from llama_adapter.config import AdapterConfig, HostConfig
from llama_adapter.hosts.attention import (
    NAME,
    Prompted,
    device_of,
    freeze_during,
    register,
    replace_methods,
    restore_configs,
    separate_configs,
)
from llama_adapter.hosts.facts import Tower, tower_of
from llama_adapter.hosts.files import (
    SUBMODULE,
    adapter_of,
    adapters_of,
    read_adapted,
    save_adapted,
    submodule_of,
)
from llama_adapter.hosts.task_head import (
    check_head,
    copy_head,
    give_back_head,
    head_config,
    train_head,
)
from llama_adapter.hosts.task_head import shift_positions as shift

__all__ = ["SUBMODULE", "adapt", "adapter_of", "adapters_of", "unadapt"]

_BEFORE = "_llama_adapter_before"
# where a model keeps what `attach` put on it
METHOD = "_llama_adapter_method"


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
    gate_activation: str | None = None,
    gate_scope: str = "head",
    prompt_kind: str = "hidden",
    encoder: str | None = None,
    shift_positions: bool = False,
    head: bool = True,
    generator: torch.Generator | None = None,
    adapter: Adapter | str | Path | None = None,
) -> Adapter:
    """Put an adapter on a host, on this instance only, and freeze the host.

        out = softmax(q k_tokens) v_tokens + gate * softmax(q k_prompt) v_prompt

    in the adapted layers, before the output projection; keys and values of a prompt are the layer's
    own projections of its rows, or with prompt_kind "kv" the trained numbers themselves. All tokens
    attend to the prompt, which no padding hides and which has no position. Gates start at zero: the
    host's outputs do not change, but for shifted positions, and a trained head's are float32.

    Args:
        model: a transformers model of a type in `facts.HOSTS`: LLaMA and its like with their head,
            ViT, BERT, RoBERTa, CLIP or one encoder of it, with a task's head or without.
        prompt_length: rows per adapted layer (the papers' K).
        layers: how many layers, counted from the top, or their indices; None is all, of a decoder
            all but the two lowest.
        prompt_std: standard deviation of the prompts' initial values.
        gate_activation: "tanh" or "identity"; None is "tanh" for decoders, as in the official
            training code, and "identity" elsewhere, as in equation 7.
        gate_scope: "head" or "layer".
        prompt_kind: "hidden" or "kv", as in P-tuning v2.
        encoder: "visual" or "text" of a CLIP, which may have an adapter on each; None is visual.
        shift_positions: of BERT and RoBERTa: let the tokens' positions begin behind the prompt, as
            in P-tuning v2.
        head: train the host's task head too, a classifier or what answers questions; its trained
            numbers are the adapter's, and the host's own come back with `unadapt`.
        generator: source of the prompts' random values.
        adapter: one that exists, in the place of a new one, or its file, or a folder that
            `save_pretrained` wrote; all arguments above but encoder are its own then.

    Returns:
        The adapter, float32, and trainable unless it came frozen: prompts (L, P, C) or
        (L, 2, P, G D), gates (L, H) or (L, 1) and the head, now a submodule of the host by the name
        SUBMODULE, for a CLIP's text encoder SUBMODULE_text; the host's `save_pretrained` writes
        adapters alone.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such file.
        ValueError: an argument is of another type, the host of an unknown one or float64, it has an
            adapter, or the adapter does not fit or was trained on another base.

    Source: LLaMA-Adapter, sections 3.2 and 3.4, equations 1 to 8.
    """
    _check_types(locals())
    tower = tower_of(model, encoder)
    _check_free(model, tower)
    shape = tower.shape()
    if adapter is None:
        if isinstance(layers, int) and not 1 <= layers <= shape.n_layers:
            raise ValueError(f"layers must be from 1 to {shape.n_layers}, got {layers}")
        count = layers if layers is None or isinstance(layers, int) else None
        activation = tower.host.gate_activation if gate_activation is None else gate_activation
        config = AdapterConfig(prompt_length, count, prompt_std, activation, gate_scope)
        if layers is None or isinstance(layers, int):
            layers = config.layers_of(shape.n_layers, tower.host.lowest)
        trained = head_config(tower) if head else None
        beside = tower.beside(None if trained is None else trained.name)
        own = HostConfig(tower.host.kind, trained, shift_positions, beside)
        adapter = Adapter(
            config,
            shape,
            layers=tuple(layers),
            generator=generator,
            prompt_kind=prompt_kind,
            host=own,
        )
        copy_head(tower, adapter)
    elif not isinstance(adapter, Adapter):
        adapter = read_adapted(tower, adapter)
    _check_fits(tower, adapter)
    attentions = tower.attentions()
    adapter = adapter.to(device_of(attentions[adapter.layers[0]]), torch.float32)
    register()
    if _BEFORE not in model.__dict__:
        methods = ("generate", "save_pretrained")
        model.__dict__[_BEFORE] = {
            "methods": {name: model.__dict__.get(name) for name in methods},
            "configs": separate_configs(model),
            "trainable": [name for name, x in model.named_parameters() if x.requires_grad],
            "towers": {},
        }
        freeze_during(model, "generate")
        model.__dict__["save_pretrained"] = partial(save_adapted, model)
        model.requires_grad_(False)
    model.set_attn_implementation(NAME)
    before = {
        # accelerate's hooks, for one, are forwards of an instance
        "forwards": {row: attentions[row].__dict__.get("forward") for row in adapter.layers},
        "head": train_head(tower, adapter),
        "hook": shift(tower, adapter),
    }
    for row, layer in enumerate(adapter.layers):
        module = attentions[layer]
        source, trained = partial(_row_of, adapter, row), partial(_trained, adapter)
        module.__dict__["forward"] = Prompted(
            module, module.forward, source, trained, tower.host.key, tower.host.value,
            shape.head_dim,
        )  # fmt: skip
    model.add_module(submodule_of(tower.slot), adapter)
    model.__dict__[_BEFORE]["towers"][tower.slot] = before
    return adapter


def _check_free(model: Any, tower: Tower) -> None:
    """Raise ValueError if something is on the model already, or its heads are of other widths."""
    if (attached := model.__dict__.get(METHOD)) is not None:
        raise ValueError(f"model has {attached.name} on it already: take that off first")
    if tower.slot in adapters_of(model) or (_BEFORE in model.__dict__ and not adapters_of(model)):
        raise ValueError("model has an adapter already: unadapt(model) takes it off")
    width = tower.shape().head_dim
    if width % 8 or not 8 <= width <= 256:
        raise ValueError(f"model must have heads of 8 to 256 channels in steps of 8, got {width}")


def _check_types(given: dict[str, Any]) -> None:
    """Raise ValueError unless the arguments of `adapt` are of the types that it names."""
    kinds: dict[str, tuple[type, ...]] = {
        "prompt_length": (int,),
        "layers": (int, Sequence, type(None)),
        "prompt_std": (int, float),
        "encoder": (str, type(None)),
        "shift_positions": (bool,),
        "head": (bool,),
        "generator": (torch.Generator, type(None)),
        "adapter": (Adapter, str, Path, type(None)),
    }
    for name, kind in kinds.items():
        value, items = given[name], ()
        if name == "layers" and isinstance(value, Sequence):
            items = value
        # a bool is an int, a str is a sequence: neither is meant
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind == (bool,))
        if not fits or any(not isinstance(x, int) or isinstance(x, bool) for x in items):
            wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kind)
            of = " of int" if name == "layers" else ""
            raise ValueError(f"{name} must be {wanted}{of}, got {value!r}")


def _check_fits(tower: Tower, adapter: Adapter) -> None:
    """Raise ValueError unless the host can have the adapter."""
    shape, host = tower.shape(), tower.host
    if adapter.tuning.groups or not adapter.layers or adapter.projector is not None:
        groups = ", ".join(adapter.groups())
        raise ValueError(
            f"adapter must have prompts and gates alone on a host, got {groups}: biases, scales, "
            "norms and images run in the lean model"
        )
    if adapter.host.kind != host.kind:
        raise ValueError(f"adapter must be for a {host.kind}, got one for a {adapter.host.kind}")
    rows = shape.dim if adapter.prompt_kind == "hidden" else shape.kv_heads * shape.head_dim
    width, heads = adapter.prompts.shape[-1], adapter.n_heads
    if (width, heads) != (rows, shape.n_heads) or adapter.layers[-1] >= shape.n_layers:
        raise ValueError(
            f"adapter must be for width {rows}, {shape.n_heads} heads and {shape.n_layers} "
            f"layers, got width {width}, {heads} heads and layers {adapter.layers}"
        )
    if adapter.host.shift_positions and not host.embeddings:
        raise ValueError(
            f"shift_positions must be False for a {host.kind}: bert and roberta can shift"
        )
    check_head(tower, adapter)
    attentions = tower.attentions()
    for layer in adapter.layers:
        for name in (host.key, host.value):
            if name not in dict(attentions[layer].named_modules()):
                raise ValueError(
                    f"model must have the {name} of its own layers, got a "
                    f"{type(attentions[layer]).__name__}: take off other adapters first"
                )
        if (dtype := next(attentions[layer].parameters()).dtype) == torch.float64:
            raise ValueError(
                f"model must be float32, bfloat16 or float16 in its layers, got {dtype}"
            )
        if device_of(attentions[layer]).type == "meta":
            raise ValueError(
                "model must have its weights on a device, got some that are offloaded or not "
                "loaded yet"
            )


def unadapt(model: Any, encoder: str | None = None) -> Adapter:
    """Take an adapter off: without any the host is bitwise what it was, trainable parameters too.

    Changes of the model's configuration that were made meanwhile are undone, too.

    Args:
        model: a host that `adapt` put an adapter on.
        encoder: as `adapt` was given it.

    Returns:
        The adapter that was on it.

    Raises:
        ValueError: there is none, or `attach` put it there, whose `detach` takes it off.
    """
    if (attached := getattr(model, "__dict__", {}).get(METHOD)) is not None:
        raise ValueError(f"model must be freed of {attached.name} by its detach(), not by unadapt")
    adapter, before = adapter_of(model, encoder), getattr(model, "__dict__", {}).get(_BEFORE)
    if adapter is None or before is None:
        held = " or ".join(repr(slot) for slot in adapters_of(model))
        one = f": encoder must be {held}, got {encoder!r}" if held else ""
        raise ValueError(f"model must have an adapter, put there by adapt(model){one}")
    tower = tower_of(model, encoder)
    own, attentions = before["towers"].pop(tower.slot), tower.attentions()
    for layer, forward in own["forwards"].items():
        attentions[layer].__dict__.pop("forward")
        if forward is not None:
            attentions[layer].__dict__["forward"] = forward
    give_back_head(own["head"])
    if own["hook"] is not None:
        own["hook"].remove()
    delattr(model, submodule_of(tower.slot))
    if before["towers"]:
        return adapter
    restore_configs(model, before["configs"])
    del model.__dict__[_BEFORE]
    replace_methods(model, before["methods"])
    trainable = set(before["trainable"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return adapter
