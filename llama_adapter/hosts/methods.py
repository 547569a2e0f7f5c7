"""Every way of the papers' tables to train a frozen host, by name: zero-init and its baselines.

`attach` puts one on a transformers model, which is called as before, and returns an `Attached`,
whose `detach` takes it off: the host is bitwise what it was. What is trained is saved by its
`state_dict`; the model's own `save_pretrained` writes the whole host. `METHODS[name].options` names
the fields of `MethodOptions` that a method reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts import METHOD, adapt, adapters_of, unadapt
from llama_adapter.hosts.baselines.bottleneck import Bottlenecks
from llama_adapter.hosts.baselines.context import TEMPLATE_LENGTH, Context
from llama_adapter.hosts.baselines.gated import GatedLayers
from llama_adapter.hosts.baselines.low_rank import lora
from llama_adapter.hosts.baselines.own import (
    head_of,
    need_float32,
    own_names,
    train_head,
    train_own,
)
from llama_adapter.hosts.baselines.parts import (
    Generator,
    Installed,
    Parameters,
    Part,
    Undo,
    hang,
    parts_of,
)
from llama_adapter.hosts.baselines.prefix import Prefix
from llama_adapter.hosts.baselines.prompts import VisualPrompts, WordPrompts
from llama_adapter.hosts.baselines.side import SideNetwork
from llama_adapter.hosts.facts import ENCODERS
from llama_adapter.hosts.method_options import MethodOptions

__all__ = ["METHODS", "Attached", "Method", "MethodOptions", "attach"]

_VISUAL, _TEXT = ("vit", "clip"), ("roberta", "bert")
_ALL = ("vit", "roberta", "bert", "clip")

Build = Callable[[Any, dict[str, Part], MethodOptions, Generator, list[Undo]], Parameters]


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        hosts: the kinds of host it can go on, of "vit", "roberta", "bert" and "clip".
        source: the paper, or the library that it comes from.
        build: puts it on a host.
        options: the fields of `MethodOptions` that it reads.
        encoders: the kinds of encoder that it goes into; the first of these that a host has is the
            usual one.
        head: what becomes of the task head: "added" to what is trained where there is one,
            "needed", or "built" by the method itself.
        whole: without encoders named it takes the whole model.
    """

    hosts: tuple[str, ...]
    source: str
    build: Build
    options: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ENCODERS
    head: str = "added"
    whole: bool = False


def _hung(make: Callable[[Part, MethodOptions, Generator], Installed]) -> Build:
    """A method that is a module per encoder, with an `install` that puts its hooks there."""

    def build(
        model: Any, parts: dict[str, Part], options: MethodOptions, generator: Generator,
        undo: list[Undo],
    ) -> Parameters:  # fmt: skip
        modules = {name: make(part, options, generator) for name, part in parts.items()}
        parameters: Parameters = {}
        for name, module in modules.items():
            part = parts[name]
            parameters |= hang(model, f"llama_adapter_{name}", module, part.device, undo)
            undo += module.install(part)
        return parameters

    return build


def _vpt(deep: bool, part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return VisualPrompts(part, options.prompt_length, deep, generator)


def _prompt_tuning(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return WordPrompts(part, options.prompt_length, options.prompt_std, generator)


def _p_tuning_v2(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return Prefix(
        part, options.prompt_length, part.topmost(options.layers), options.prompt_std,
        options.prefix_dropout, options.shift_positions, generator,
    )  # fmt: skip


def _adapter(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return Bottlenecks(part, options.reduction, generator)


def _side(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return SideNetwork(part, options.reduction, options.side_layers, options.side_alpha, generator)


def _coop(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    template = TEMPLATE_LENGTH if options.template_length is None else options.template_length
    return Context(part, options.prompt_length, template, options.context_ids, generator)


def _flamingo(part: Part, options: MethodOptions, generator: Generator) -> Installed:
    return GatedLayers(
        part, options.prompt_length, part.topmost(options.layers), options.prompt_std, generator
    )


def _lora(
    model: Any, parts: dict[str, Part], options: MethodOptions, generator: Generator,
    undo: list[Undo],
) -> Parameters:  # fmt: skip
    return lora(
        model, list(parts.values()), options.rank, options.lora_alpha, options.lora_dropout,
        generator, undo,
    )  # fmt: skip


def _nothing(
    model: Any, parts: dict[str, Part], options: MethodOptions, generator: Generator,
    undo: list[Undo],
) -> Parameters:  # fmt: skip
    return {}


def _own(
    method: str, model: Any, parts: dict[str, Part], options: MethodOptions, generator: Generator,
    undo: list[Undo],
) -> Parameters:  # fmt: skip
    if method == "bias" or parts:
        need_float32(model, method)
    return train_own(model, own_names(model, parts.values(), biases=method == "bias"), undo)


def _zero_init(
    model: Any, parts: dict[str, Part], options: MethodOptions, generator: Generator,
    undo: list[Undo],
) -> Parameters:  # fmt: skip
    # where there is one encoder there is nothing to name
    names = list(parts) if getattr(model.config, "model_type", "") == "clip" else [None]
    for name in names:
        adapt(
            model,
            prompt_length=options.prompt_length,
            layers=options.layers,
            prompt_std=options.prompt_std,
            gate_activation=options.gate_activation,
            prompt_kind=options.prompt_kind,
            encoder=name,
            shift_positions=options.shift_positions,
            generator=generator,
        )
        undo.append(partial(unadapt, model, name))
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


_PROMPTS = ("prompt_length", "layers", "prompt_std", "encoders")

METHODS: dict[str, Method] = {
    "zero_init": Method(
        _ALL, "LLaMA-Adapter, sections 3.2 and 3.4", _zero_init,
        (*_PROMPTS, "gate_activation", "prompt_kind", "shift_positions"), head="built",
    ),
    "frozen": Method(_ALL, "the host as it is, CLIP's zero-shot", _nothing, head="built"),
    "full": Method(_ALL, "torch", partial(_own, "full"), ("encoders",), whole=True),
    "linear": Method(_ALL, "torch", _nothing, head="needed"),
    "bias": Method(
        _ALL, "BitFit, arXiv 2106.10199", partial(_own, "bias"), ("encoders",), whole=True
    ),
    "adapter": Method(
        _ALL, "Houlsby et al., arXiv 1902.00751", _hung(_adapter), ("reduction", "encoders")
    ),
    "vpt_shallow": Method(
        _VISUAL, "VPT, arXiv 2203.12119", _hung(partial(_vpt, False)), ("prompt_length",),
        ("visual",),
    ),
    "vpt_deep": Method(
        _VISUAL, "VPT, arXiv 2203.12119", _hung(partial(_vpt, True)), ("prompt_length",),
        ("visual",),
    ),
    "prompt_tuning": Method(
        _TEXT, "Lester et al., arXiv 2104.08691", _hung(_prompt_tuning),
        ("prompt_length", "prompt_std"), ("text",),
    ),
    "p_tuning_v2": Method(
        _ALL, "P-tuning v2, arXiv 2110.07602", _hung(_p_tuning_v2),
        (*_PROMPTS, "prefix_dropout", "shift_positions"),
    ),
    "side": Method(
        _ALL, "Side-tuning, arXiv 1912.13503", _hung(_side),
        ("reduction", "side_layers", "side_alpha", "encoders"),
    ),
    "coop": Method(
        ("clip",), "CoOp, arXiv 2109.01134", _hung(_coop),
        ("prompt_length", "template_length", "context_ids"), ("text",),
    ),
    "lora": Method(
        _ALL, "PEFT; LoRA, arXiv 2106.09685", _lora,
        ("rank", "lora_alpha", "lora_dropout", "encoders"),
    ),
    "flamingo": Method(_ALL, "Flamingo, arXiv 2204.14198", _hung(_flamingo), _PROMPTS),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Attached:
    """A method on a host.

    Attributes:
        name: of the method.
        model: the host, which is called as it ever was.
        options: what it was made with.
    """

    name: str
    model: Any
    options: MethodOptions
    _groups: dict[str, Parameters] = field(repr=False)
    _undo: list[Undo] = field(repr=False)

    def groups(self) -> dict[str, Parameters]:
        """What is trained, "method" and "head", each by name; empty ones are left out."""
        return {name: dict(group) for name, group in self._groups.items() if group}

    def parameters(self) -> Parameters:
        """All that is trained, the head included, by name; float32."""
        return {name: x for group in self._groups.values() for name, x in group.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that is trained, by name."""
        return {name: x.detach().clone() for name, x in self.parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write back what `state_dict` gave.

        Raises:
            ValueError: names or shapes differ from what is trained.
        """
        own = self.parameters()
        differing = sorted(set(own) ^ set(state))
        if differing:
            word = "lacks" if differing[0] in own else "has an unknown"
            raise ValueError(f"state {word} {differing[0]}, for {self.name}")
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} must be {tuple(parameter.shape)}, got {tuple(state[name].shape)}"
                )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def detach(self) -> None:
        """Take the method off: the host is bitwise what it was, trainable parameters too.

        Raises:
            ValueError: it is off already.
        """
        if self.model.__dict__.get(METHOD) is not self:
            raise ValueError(f"{self.name} is off this model already")
        del self.model.__dict__[METHOD]
        _undo(self._undo)


def _undo(steps: list[Undo]) -> None:
    for step in reversed(steps):
        step()


def chosen_parts(model: Any, name: str, options: MethodOptions) -> dict[str, Part]:
    """The encoders that a method goes into, as asked for or as usual.

    Raises:
        ValueError: the method is not for this host, or for this encoder.
    """
    method, held = METHODS[name], parts_of(model)
    kind = model.config.model_type.split("_")[0]
    can = [encoder for encoder in held if encoder in method.encoders]
    got = f"got a {type(model).__name__}"
    if kind not in method.hosts or not can:
        where = "" if method.encoders == ENCODERS else f", in a {method.encoders[0]} encoder"
        raise ValueError(f"{name} is for {', '.join(method.hosts)}{where}, {got}")
    if method.head == "needed" and head_of(model) is None:
        raise ValueError(f"{name} is for a host with a task head, {got}")
    # other methods' options may be of no use to this one
    wanted = options.encoders if "encoders" in method.options else ()
    for encoder in wanted:
        if encoder not in can:
            raise ValueError(f"encoders must be of {', '.join(can)} for {name}, got {encoder!r}")
    if not wanted and method.whole:
        return {}
    return {encoder: held[encoder] for encoder in wanted or can[:1]}


def attach(
    model: Any,
    name: str,
    options: MethodOptions | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Attached:
    """Put a method on a host, on this instance only, and freeze the rest.

    Args:
        model: a transformers ViT, RoBERTa, BERT or CLIP, with a task head or without; a head is
            trained with every method but "frozen".
        name: of METHODS.
        options: what the method is made with; it reads those that its row names.
        generator: source of the initial values, on the CPU.

    Returns:
        The method on the host; what it trains is float32, in the model's place and device.

    Raises:
        ImportError: transformers is missing, or PEFT, for LoRA.
        ValueError: the name is unknown, the method is not for this host, the host has one already,
            or an option does not fit.
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}")
    options = MethodOptions() if options is None else options
    if not isinstance(options, MethodOptions):
        raise ValueError(f"options must be MethodOptions, got {options!r}")
    parts = chosen_parts(model, name, options)
    other = model.__dict__.get(METHOD)
    if other is not None or adapters_of(model):
        has = "an adapter" if other is None else other.name
        raise ValueError(f"model has {has} on it already: take that off first")
    method = METHODS[name]
    flags = [(x, x.requires_grad) for x in model.parameters()]
    undo: list[Undo] = [partial(_restore_flags, flags)]
    found = head_of(model)
    of_head = () if found is None else (f"{found[0]}.",)
    groups: dict[str, Parameters] = {"method": {}, "head": {}}
    done = False
    try:
        model.requires_grad_(False)
        for key, parameter in method.build(model, parts, options, generator, undo).items():
            groups["head" if key.startswith(of_head) else "method"][key] = parameter
        if method.head != "built":
            groups["head"] = train_head(model, undo)
        done = True
    finally:
        if not done:
            _undo(undo)
    for group in groups.values():
        for parameter in group.values():
            parameter.requires_grad_(True)
    attached = Attached(name, model, options, groups, undo)
    model.__dict__[METHOD] = attached
    return attached


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
