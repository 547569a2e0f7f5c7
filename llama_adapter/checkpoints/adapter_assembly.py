"""What a format's reader found is brought into this package's own header and tensors.

`Pieces` are what it found, `ReadOptions` what it was told, `StoredAdapter` is the result. Numbers
of the base's shape that no tensor tells come from the caller, or from all published bases that fit.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import adapter_from_tensors
from llama_adapter.checkpoints.adapter_header import AdapterHeader
from llama_adapter.checkpoints.adapter_source import Source
from llama_adapter.checkpoints.fingerprint import Fingerprint
from llama_adapter.config import (
    PRESETS,
    SHAPE_FIELDS,
    AdapterConfig,
    LlamaConfig,
    VisualConfig,
    shape_of,
)
from llama_adapter.tuning import GROUPS, LINEARS, Lora, Tuning, tuned_group


@dataclass(frozen=True)
class ReadOptions:
    """What a reader is told, because the files do not say it.

    Attributes:
        gate_activation: "tanh" or "identity" in place of the format's own convention.
        gate_scope: "head" or "layer" in place of what the gates' shapes say.
        prompt_length: rows per layer, where the format stores them in one block; None is 10.
        leave_out: of "new_gate" and "visual", what may be dropped although it changes answers.
        base: shape of the base, where it is known.
        fingerprint: of the base's weights, where it is known.
    """

    gate_activation: str | None = None
    gate_scope: str | None = None
    prompt_length: int | None = None
    leave_out: Collection[str] = ()
    base: LlamaConfig | None = None
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as this package holds it, and what was assumed when it was read.

    Attributes:
        header, tensors: as `adapter_file.encode` takes them.
        format: the format that it was read from.
        notes: one line for each thing that the file does not say.
    """

    header: AdapterHeader
    tensors: dict[str, Tensor]
    format: str
    notes: tuple[str, ...] = ()

    def adapter(self, model: LlamaConfig) -> Adapter:
        """The adapter for a base of this shape.

        Raises:
            ValueError: its shape is another.
        """
        loaded = Fingerprint("the model", shape_of(model), ())
        difference = self.header.base.difference(loaded)
        if difference:
            raise ValueError(f"adapter must be for a base of the model's shape, got {difference}")
        return adapter_from_tensors(self.header, self.tensors, model)


@dataclass
class Pieces:
    """What a reader found.

    Attributes:
        prompts: (L, P, C) of `layers`, or None.
        gates: (L, H) or (L, 1), or None.
        layers: ascending.
        tuned: stacked tensors by our names.
        scale_side: of the scales among them.
        lora_prompts: whether prompts pass through the LoRA among them.
        activation: the format's convention for gates.
        visual: of the projector that is among the tensors of `projector`, or None.
        projector: its parameters by our names.
        notes: what was assumed.
    """

    prompts: Tensor | None = None
    gates: Tensor | None = None
    layers: tuple[int, ...] = ()
    tuned: dict[str, Tensor] = field(default_factory=dict)
    scale_side: str | None = None
    lora_prompts: bool = False
    activation: str = "tanh"
    visual: VisualConfig | None = None
    projector: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def assemble(
    source: Source, name: str, pieces: Pieces, options: ReadOptions, n_layers: int | None
) -> StoredAdapter:
    """Bring what a reader found into this package's form.

    Args:
        source: where it came from; nothing may be left in it.
        name: of the format.
        pieces: what was found.
        options: what the caller knows.
        n_layers: of the base, where the file tells it.

    Raises:
        ValueError: a tensor is left, or the numbers do not fit each other or the base.
    """
    source.finish()
    notes, path = list(pieces.notes), source.path
    shape = _known_shape(source, n_layers)
    tuning = _tuning_of(pieces)
    if pieces.prompts is None and not pieces.tuned:
        raise ValueError(f"{path} holds neither prompts nor biases, scales, norms or LoRA")
    scope = "head" if pieces.gates is None or pieces.gates.shape[1] > 1 else "layer"
    if scope == "layer" and shape.get("n_heads") == 1:
        scope = "head"
    needed = _needed(tuning, pieces.prompts is not None, scope, options.gate_scope)
    shape = complete_shape(shape, needed, path, options, notes)
    tensors = dict(pieces.tuned)
    config = AdapterConfig(gate_activation=options.gate_activation or pieces.activation)
    if pieces.prompts is not None and pieces.gates is not None:
        gates, scope = _scoped(pieces.gates, scope, options.gate_scope, shape, path)
        tensors |= {"prompts": pieces.prompts, "gates": gates}
        config = AdapterConfig(
            prompt_length=pieces.prompts.shape[1],
            n_layers=len(pieces.layers),
            gate_activation=config.gate_activation,
            gate_scope=scope,
        )
        how = "as told" if options.gate_activation else f"{name}'s convention"
        notes.insert(0, f"gates: {config.gate_activation} ({how}), one per {scope}")
    for tuned_name, wanted in tuning.shapes(shape).items():
        got = tuple(tensors[tuned_name].shape)
        if got != wanted:
            raise ValueError(f"{path}: {tuned_name} must have shape {wanted}, got {got}")
    base = options.fingerprint or Fingerprint("unknown", shape, ())
    found = ("prompts", "gates") if pieces.prompts is not None else ()
    if pieces.visual is not None:
        found = (*found, "projector")
        tensors |= {f"projector.{part}": value for part, value in pieces.projector.items()}
    header = AdapterHeader(
        groups=(*found, *tuning.groups),
        layers=pieces.layers,
        config=config,
        base=base,
        scale_side=tuning.scale_side,
        linears=tuning.linears,
        origin=name,
        visual=pieces.visual,
        lora=tuning.lora,
    )
    if pieces.layers and pieces.layers[-1] >= base.shape["n_layers"]:
        raise ValueError(
            f"{path} adapts layer {pieces.layers[-1]} of a base of {base.shape['n_layers']} layers"
        )
    return StoredAdapter(header, tensors, name, tuple(notes))


def _tuning_of(pieces: Pieces) -> Tuning:
    """The groups of what a reader found, and of which maps."""
    groups = {tuned_group(name) for name in pieces.tuned}

    def linears(*groups: str) -> tuple[str, ...]:
        ends = {n.rpartition("_")[2] for n in pieces.tuned if tuned_group(n) in groups}
        return tuple(linear for linear in LINEARS if linear in ends)

    lora = None
    if "lora" in groups:
        first = next(value for name, value in pieces.tuned.items() if name.startswith("lora_a_"))
        lora = Lora(first.shape[-2], linears("lora"), pieces.lora_prompts)
    return Tuning(
        tuple(group for group in GROUPS if group in groups),
        linears("bias", "scale"),
        pieces.scale_side if "scale" in groups else None,
        lora,
    )


def _known_shape(source: Source, n_layers: int | None) -> dict[str, int]:
    sizes = source.sizes
    shape = {name: sizes[name] for name in SHAPE_FIELDS if name in sizes}
    if n_layers is not None:
        shape["n_layers"] = n_layers
    if "query_width" in sizes and "n_heads" in shape:
        shape["head_dim"] = sizes["query_width"] // shape["n_heads"]
    if "key_width" in sizes and shape.get("head_dim"):
        shape["kv_heads"] = sizes["key_width"] // shape["head_dim"]
    return shape


class _Asked(dict[str, int]):
    """Remembers what it was asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = 1
        return 1


def _needed(tuning: Tuning, prompts: bool, scope: str, wanted: str | None) -> list[str]:
    """Numbers of the base's shape that the tensors' shapes follow from."""
    asked = _Asked(n_layers=1)
    tuning.shapes(asked)
    if prompts and "head" in (wanted or scope, scope):
        asked["n_heads"] = 1
    return [name for name in SHAPE_FIELDS if name in asked]


def fitting_presets(shape: Mapping[str, int]) -> list[str]:
    """Names of the published bases that agree with all known numbers of a shape."""
    return [
        name
        for name, preset in PRESETS.items()
        if all(shape_of(preset)[field] == value for field, value in shape.items())
    ]


def complete_shape(
    shape: dict[str, int],
    needed: Iterable[str],
    path: Path,
    options: ReadOptions,
    notes: list[str],
) -> dict[str, int]:
    """The shape with the base's numbers, or with those that all published bases agree on.

    Raises:
        ValueError: the base has another shape, or what is needed cannot be told.
    """
    if options.base is not None:
        whole = shape_of(options.base)
        for name, value in shape.items():
            if whole[name] != value:
                raise ValueError(
                    f"{path} is for a base of {name} {value}, but the base given has {whole[name]}"
                )
        return whole
    missing = [name for name in needed if name not in shape]
    if not missing:
        return shape
    fitting = [shape_of(PRESETS[name]) for name in fitting_presets(shape)]
    for name in missing:
        values = {other[name] for other in fitting}
        if len(values) != 1:
            raise ValueError(
                f"{path} does not tell its base's {name}: name the base, with --base or base="
            )
        shape[name] = values.pop()
    notes.append(
        "base: "
        + ", ".join(f"{name} {shape[name]}" for name in missing)
        + " assumed, as in every published LLaMA of this shape"
    )
    return shape


def _scoped(
    gates: Tensor, scope: str, wanted: str | None, shape: Mapping[str, int], path: Path
) -> tuple[Tensor, str]:
    """Gates in the wanted scope, where no number is lost."""
    if wanted in (None, scope):
        return gates, scope
    if wanted == "head":
        return gates.expand(-1, shape["n_heads"]).contiguous(), "head"
    if not torch.equal(gates, gates[:, :1].expand_as(gates)):
        raise ValueError(f"{path} has gates that differ from head to head: gate_scope must be head")
    return gates[:, :1].contiguous(), "layer"
