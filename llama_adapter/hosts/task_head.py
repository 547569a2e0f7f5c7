"""A host's task head as a part of the adapter, and tokens whose positions begin behind the prompt.

Both change the host in place and are taken back: the head's parameters are exchanged for the
adapter's, whose numbers alone are trained and saved, and positions are shifted by a hook.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.fingerprint import count_differing
from llama_adapter.checkpoints.quantize import is_quantized
from llama_adapter.config import HeadConfig, HostConfig
from llama_adapter.hosts.facts import Tower


@dataclass(frozen=True)
class GivenHead:
    """What `train_head` changed: a module, its own parameters, and the hook before it."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    hook: RemovableHandle


def head_config(tower: Tower) -> HeadConfig | None:
    """The task head of a model as an adapter's file describes it; None without one.

    Raises:
        ValueError: it cannot be trained: it has no outputs, its weights are quantised or not there.
    """
    found = tower.head()
    if found is None:
        return None
    name, module = found
    parameters = dict(module.named_parameters())
    for own, parameter in parameters.items():
        what = None
        if not parameter.is_floating_point():
            what = str(parameter.dtype)
        elif parameter.is_meta:
            what = "offloaded or not loaded yet"
        elif not parameter.numel():
            what = f"of shape {tuple(parameter.shape)}"
        if what is not None:
            raise ValueError(
                f"head must be False for a {name} whose {own} is {what}: it cannot be trained"
            )
    if is_quantized(module):
        raise ValueError(
            f"head must be False for a {name} whose weights are quantised: it cannot be trained"
        )
    shapes = {own: tuple(parameter.shape) for own, parameter in parameters.items()}
    outputs = list(shapes.values())[-1][0]
    known = getattr(tower.model.config, "id2label", None) or {}
    # by output, in whatever order the dictionary was written
    named = [str(known[n]) for n in range(len(known)) if n in known]
    labels = ("start", "end") if name == "qa_outputs" else tuple(named)
    if len(labels) != outputs:
        labels = tuple(map(str, range(outputs)))
    return HeadConfig(name, labels, shapes)


def check_head(tower: Tower, adapter: Adapter) -> None:
    """Raise ValueError unless the model has the head that an adapter brings numbers for.

    Outputs that the model calls by other names than the adapter's are warned of, and frozen parts
    outside of the layers that are not those it was trained with: of a pooler or a head that a base
    does not hold, transformers makes random ones.
    """
    wanted = adapter.host.head
    _check_beside(tower, adapter.host)
    if wanted is None:
        return
    has = head_config(tower)
    if has is None or (has.name, has.shapes) != (wanted.name, wanted.shapes):
        described = "none" if has is None else f"{has.name} with {has.shapes}"
        raise ValueError(
            f"model must have the head that the adapter was trained with, {wanted.name} with "
            f"{wanted.shapes} ({', '.join(wanted.labels)}), got {described}"
        )
    if has.labels != wanted.labels:
        warnings.warn(
            f"model should name its outputs as the adapter was trained with them, "
            f"{', '.join(wanted.labels)}, got {', '.join(has.labels)}: set config.id2label",
            stacklevel=4,
        )


def _check_beside(tower: Tower, host: HostConfig) -> None:
    has = tower.beside(None if host.head is None else host.head.name)
    others = [
        name
        for name, numbers in host.beside.items()
        if len(has.get(name, ())) == len(numbers) and count_differing(has[name], numbers)
    ]
    if others:
        warnings.warn(
            f"model should have the {others[0]} that the adapter was trained with, got another: "
            "what goes through it differs. Where the base does not hold it, save the whole model "
            "once before adapting, and load that",
            stacklevel=5,
        )


@torch.no_grad()
def copy_head(tower: Tower, adapter: Adapter) -> None:
    """Give a new adapter the numbers of the model's head to begin with."""
    found = tower.head()
    if adapter.head is not None and found is not None:
        for name, parameter in found[1].named_parameters():
            adapter.head.get_parameter(name).copy_(parameter)


def train_head(tower: Tower, adapter: Adapter) -> GivenHead | None:
    """Put the adapter's numbers into the model's head, which computes in their float32.

    Returns:
        What `give_back_head` takes; None where the adapter has no head.
    """
    found = tower.head()
    if adapter.head is None or found is None:
        return None
    module = found[1]
    before = dict(module.named_parameters())
    set_parameters(module, {name: adapter.head.get_parameter(name) for name in before})
    return GivenHead(module, before, module.register_forward_pre_hook(in_float32))


def give_back_head(before: GivenHead | None) -> None:
    """Undo `train_head`; a head that was put in its module's place since stays as it is."""
    if before is not None:
        before.hook.remove()
        set_parameters(before.module, before.parameters)


def check_trained(tower: Tower, adapter: Adapter) -> None:
    """Raise ValueError if the model's head no longer computes with the adapter's numbers."""
    if adapter.head is None:
        return
    found, own = tower.head(), dict(adapter.head.named_parameters())
    used = {} if found is None else dict(found[1].named_parameters())
    if used.keys() != own.keys() or any(used[name] is not x for name, x in own.items()):
        raise ValueError(
            "model must have the head that adapt(model) gave the adapter's parameters, got one "
            "that was replaced or loaded with assign=True: unadapt(model) before changing it"
        )


def set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Put parameters into a module in the place of its own, by dotted name."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = parameter


def in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A half-precision host's hidden states for a head that is trained in float32."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in args)


def shift_positions(tower: Tower, adapter: Adapter) -> RemovableHandle | None:
    """Let the positions of a BERT's or RoBERTa's tokens begin behind the prompt, if it asks for it.

    Positions that a caller gives are the caller's own.

    Returns:
        The handle that takes it back; None where nothing is shifted.
    """
    if not adapter.host.shift_positions:
        return None
    return shift_by(tower, adapter.config.prompt_length)


def shift_by(tower: Tower, length: int) -> RemovableHandle:
    """Let the positions of a BERT's or RoBERTa's tokens begin behind `length` others."""
    embeddings = tower.model.get_submodule(tower.prefix + tower.host.embeddings)
    return embeddings.register_forward_pre_hook(partial(_shift, length), with_kwargs=True)


def _shift(
    length: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs.get("position_ids") is not None:
        return args, kwargs
    given = next(
        (kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None),
        args[0] if args else None,
    )
    # RoBERTa's positions begin behind that of its padding
    table = module.get_submodule("position_embeddings")
    first = 0 if (padding := getattr(table, "padding_idx", None)) is None else padding + 1
    positions = getattr(table, "num_embeddings", 0) - first
    behind = length + kwargs.get("past_key_values_length", 0)
    tokens = 0 if given is None else given.shape[1]
    if behind + tokens > positions:
        raise ValueError(
            f"tokens must be at most {positions - behind} with positions shifted by the prompt's "
            f"{length}, got {tokens} for a model of {positions} positions"
        )
    return args, kwargs | {"past_key_values_length": behind}
