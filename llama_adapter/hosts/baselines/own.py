"""The host's own parameters as what is trained: a head alone, biases (BitFit), or everything."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from llama_adapter.hosts.baselines.parts import Parameters, Part, Undo
from llama_adapter.hosts.facts import tower_of
from llama_adapter.hosts.task_head import in_float32, set_parameters


def head_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a model's task head; None where it has none with parameters."""
    return tower_of(model).head()


def own_names(model: nn.Module, parts: Iterable[Part], biases: bool) -> list[str]:
    """Parameters, or bias terms alone, of some encoders, or of the whole; not the head's."""
    prefixes = tuple(part.tower.prefix for part in parts) or ("",)
    found = head_of(model)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    names = [name for name in names if found is None or not name.startswith(f"{found[0]}.")]
    return [name for name in names if not biases or name.rsplit(".", 1)[-1] == "bias"]


def train_own(model: nn.Module, names: Iterable[str], undo: list[Undo]) -> Parameters:
    """Exchange parameters for copies in float32, which are trained; undone, the host has its own.

    Raises:
        ValueError: a parameter's numbers are no floating-point ones, as in a quantised host.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        own = held[name]
        if not own.is_floating_point():
            raise ValueError(f"{name} must be of floating point to be trained, got {own.dtype}")
        if id(own) not in made:
            parameters[name] = made[id(own)] = nn.Parameter(own.detach().float().clone())
    # every name of a tied parameter
    pairs = [(name, own) for name, own in held.items() if id(own) in made]
    undo.append(partial(set_parameters, model, dict(pairs)))
    set_parameters(model, {name: made[id(own)] for name, own in pairs})
    return parameters


def train_head(model: nn.Module, undo: list[Undo]) -> Parameters:
    """Train a copy of the task head in float32, in which it computes; nothing without a head."""
    found = head_of(model)
    if found is None:
        return {}
    name, module = found
    names = [f"{name}.{key}" for key, _ in module.named_parameters()]
    parameters = train_own(model, names, undo)
    undo.append(module.register_forward_pre_hook(in_float32).remove)
    return parameters


def need_float32(model: nn.Module, method: str) -> None:
    """Raise ValueError unless a host can have some of its parameters trained beside the others."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{method} needs a model in float32, as it trains some of its own parameters, got "
                f"{parameter.dtype} in {name}: model.float()"
            )
