"""Where baselines take hold of a host, and the hooks that they do it with."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts.attention import device_of
from llama_adapter.hosts.facts import Tower, tower_of

Undo = Callable[[], Any]
Generator = torch.Generator | None
# what a method trains, by name
Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Sites:
    """What baselines need of a kind of encoder beside its row in `facts`, in dotted names.

    Attributes:
        encoder: "visual" or "text".
        query: the attention's projection.
        feed_forward: the part of a layer whose output is added to the residual stream.
        runner: the part of the body that runs the layers; "" where the body does it itself.
        norm: what comes after the layers where the body runs them.
    """

    encoder: str
    query: str
    feed_forward: str
    runner: str = "encoder"
    norm: str = ""


# by `facts.Host.kind`
SITES: dict[str, Sites] = {
    "vit": Sites("visual", "q_proj", "mlp", runner="", norm="layernorm"),
    "bert": Sites("text", "query", "output.dense"),
    "roberta": Sites("text", "query", "output.dense"),
    "clip_vision": Sites("visual", "q_proj", "mlp"),
    "clip_text": Sites("text", "q_proj", "mlp"),
}


@dataclass(frozen=True)
class Part:
    """One encoder of a host, as baselines see it."""

    tower: Tower

    @property
    def sites(self) -> Sites:
        """Where things are."""
        return SITES[self.tower.host.kind]

    @property
    def body(self) -> Any:
        """The module that takes the inputs."""
        return self.tower.body

    @property
    def embeddings(self) -> Any:
        """What makes the first hidden states."""
        return self.body.get_submodule("embeddings")

    @property
    def config(self) -> Any:
        """The configuration of this encoder."""
        return self.body.config

    @property
    def width(self) -> int:
        """C, of the hidden states."""
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return device_of(self.body)

    def layers(self) -> list[nn.Module]:
        """All layers, in order."""
        return list(self.body.get_submodule(self.tower.host.layers).children())

    def topmost(self, count: int | None) -> range:
        """Indices of the `count` topmost layers, None for all.

        Raises:
            ValueError: there are not that many.
        """
        total = len(self.layers())
        if count is not None and not 1 <= count <= total:
            raise ValueError(f"layers must be 1 to {total} for this host, got {count}")
        return range(total - (total if count is None else count), total)


def parts_of(model: Any) -> dict[str, Part]:
    """The encoders of a model, by "visual" and "text", the usual one first.

    Raises:
        ValueError: it is no model of transformers of a known type, or a decoder.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    first = tower_of(model)
    if first.host.kind not in SITES:
        raise ValueError(f"model must be a ViT, RoBERTa, BERT or CLIP, got {kind}")
    towers = [first]
    if kind == "clip" and model._modules.get("text_model") is not None:
        towers.append(tower_of(model, "text"))
    return {part.sites.encoder: part for part in map(Part, towers)}


class Installed(nn.Module, ABC):
    """A module of trained parameters that hooks work for in one encoder."""

    @abstractmethod
    def install(self, part: Part) -> list[Undo]:
        """Put the hooks into an encoder; what is given back takes them out."""


@lru_cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def keywords(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return dict(zip(_names(type(module)), args, strict=False)) | kwargs


def before(module: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Undo:
    """Let `change` see and replace the arguments of a module, all by name."""
    # no closures: a copy of the model must hold copies of what its hooks do
    return module.register_forward_pre_hook(partial(_change_all, change), with_kwargs=True).remove


def before_layer(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Undo:
    """Let `change` replace the hidden states (B, T, C) that a layer takes first."""
    return layer.register_forward_pre_hook(partial(_change_first, change), with_kwargs=True).remove


def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Undo:
    """Let `change` replace the tensor that a module gives."""
    return module.register_forward_hook(partial(_change_output, change)).remove


def _change_all(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), change(keywords(module, args, kwargs))


def _change_first(
    change: Callable[[Tensor], Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def _change_output(
    change: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], out: Tensor
) -> Tensor:
    return change(out)


def show_rows(part: Part, start: int, length: int) -> Undo:
    """Let a mask (B, T) that the host is called with show `length` rows more, from `start` on."""

    return before(part.body, partial(_show, start, length))


def _show(start: int, length: int, given: dict[str, Any]) -> dict[str, Any]:
    mask = given.get("attention_mask")
    if mask is None:
        return given
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be (B, T), got {tuple(mask.shape)}")
    ones = mask.new_ones(len(mask), length)
    return given | {"attention_mask": torch.cat([mask[:, :start], ones, mask[:, start:]], 1)}


def without_rows(start: int, length: int, x: Tensor) -> Tensor:
    """(B, T, C) without `length` rows from `start` on."""
    return torch.cat([x[:, :start], x[:, start + length :]], 1)


def normal(shape: tuple[int, ...], std: float, generator: Generator) -> nn.Parameter:
    """A float32 parameter of normally distributed numbers."""
    return nn.Parameter(torch.randn(shape, generator=generator) * std)


def uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> nn.Parameter:
    """A float32 parameter of numbers from -bound to bound."""
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)


@torch.no_grad()
def initialise(module: nn.Module, generator: Generator) -> None:
    """Draw all matrices of a module from ±1/sqrt(inputs); biases 0, norms as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            continue
        for parameter in layer.parameters(recurse=False):
            if parameter.ndim < 2:
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(uniform(tuple(parameter.shape), bound, generator))


def hang(
    model: nn.Module, name: str, module: nn.Module, device: torch.device, undo: list[Undo]
) -> Parameters:
    """Make a module part of a model, as what is trained."""
    model.add_module(name, module.to(device).train(model.training))
    undo.append(partial(delattr, model, name))
    return {f"{name}.{key}": x for key, x in module.named_parameters()}
