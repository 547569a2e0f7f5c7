"""What an adapter file says about its tensors, and what it must not say.

The header is JSON. Files of prompts and gates have format version 1; version 2 adds which linear
maps have a bias or a scale, and where an adapter of another format came from; version 3 what images
an adapter takes, and LoRA; version 4 a host that is no LLaMA, and its head.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from llama_adapter.adapter import VISUAL, prompt_shape
from llama_adapter.checkpoints.fingerprint import Fingerprint, sample_count
from llama_adapter.config import (
    PROMPT_KINDS,
    SHAPE_FIELDS,
    AdapterConfig,
    HostConfig,
    VisualConfig,
)
from llama_adapter.projector import projector_shapes
from llama_adapter.tuning import GROUPS as TUNED
from llama_adapter.tuning import Lora, Tuning, tuned_group

FORMAT_VERSIONS = (1, 2, 3, 4)
# a base whose weights were rounded when the adapter was saved
QUANTIZED = "a quantised base"
# fields that a version added, and what those before it mean
ADDED: dict[int, dict[str, Any]] = {
    2: {"linears": (), "origin": None},
    3: {"visual": None, "lora": None},
    4: {"host": asdict(HostConfig())},
}


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter file says about its tensors.

    Attributes:
        groups: names of the groups of tensors that the file holds.
        layers: the adapted layers, ascending; none without prompts.
        prompt_kind: "hidden", rows of width C that the layer projects, or "kv", keys and values.
        scale_side: side of a linear map that a scale group multiplies; None without such a group.
        config: the adapter's configuration, among it the gate's activation and scope.
        base: the base model it was trained on.
        linears: the linear maps that bias and scale groups belong to.
        origin: where it is from, if that does not tell the base: the format it was converted from,
            or QUANTIZED; then `base` may know some of the shape and no weights. None otherwise.
        visual: what images it takes, which goes with the group "projector", and with early fusion
            "visual_gates"; None without one.
        lora: of the group "lora"; None without one.
        host: the model that it belongs to, with the head of the group "head".
    """

    groups: tuple[str, ...]
    layers: tuple[int, ...]
    config: AdapterConfig
    base: Fingerprint
    prompt_kind: str = "hidden"
    scale_side: str | None = None
    linears: tuple[str, ...] = ()
    origin: str | None = None
    visual: VisualConfig | None = None
    lora: Lora | None = None
    host: HostConfig = field(default_factory=HostConfig)

    @property
    def tuning(self) -> Tuning:
        """The groups of biases, scales, norms and LoRA."""
        groups = tuple(group for group in self.groups if group in TUNED)
        return Tuning(groups, self.linears, self.scale_side, self.lora)


def _prompt_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    one = prompt_shape(header.prompt_kind, header.config.prompt_length, header.base.shape)
    return {"prompts": (len(header.layers), *one)}


def _gate_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    heads = header.base.shape["n_heads"] if header.config.gate_scope == "head" else 1
    return {"gates": (len(header.layers), heads)}


def _visual_gate_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    assert header.visual is not None
    heads = header.base.shape["n_heads"] if header.config.gate_scope == "head" else 1
    return {"visual_gates": (header.visual.layers, heads)}


def _projector_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    assert header.visual is not None
    shapes = projector_shapes(header.visual, header.base.shape["dim"])
    return {f"projector.{name}": shape for name, shape in shapes.items()}


def _head_shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
    assert header.host.head is not None
    return {f"head.{name}": shape for name, shape in header.host.head.shapes.items()}


def _tuned_shapes(group: str) -> Callable[[AdapterHeader], dict[str, tuple[int, ...]]]:
    def shapes(header: AdapterHeader) -> dict[str, tuple[int, ...]]:
        found = header.tuning.shapes(header.base.shape)
        return {name: shape for name, shape in found.items() if tuned_group(name) == group}

    return shapes


# group to the names and shapes of its tensors, all float32
GROUPS: dict[str, Callable[[AdapterHeader], dict[str, tuple[int, ...]]]] = {
    "prompts": _prompt_shapes,
    "gates": _gate_shapes,
    "projector": _projector_shapes,
    "visual_gates": _visual_gate_shapes,
    **{group: _tuned_shapes(group) for group in TUNED},
    "head": _head_shapes,
}


def expected_tensors(header: AdapterHeader, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a header speaks of.

    Raises:
        ValueError: they follow from a number of the base's shape that is not known.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for group in header.groups:
        try:
            expected |= GROUPS[group](header)
        except KeyError as error:
            raise ValueError(f"{where}: base shape must have {error.args[0]}") from None
    return expected


def to_json(header: AdapterHeader) -> dict[str, Any]:
    """The header as JSON holds it, in the oldest version that can say it."""
    values, version = asdict(header), FORMAT_VERSIONS[-1]
    while version > 1 and all(values[name] == x for name, x in ADDED[version].items()):
        values = {name: value for name, value in values.items() if name not in ADDED[version]}
        version -= 1
    return {"format_version": version, **values}


def from_json(content: Any, where: str) -> AdapterHeader:
    """The header that a file holds; the inverse of `to_json`.

    Raises:
        ValueError: it says what this version does not know.
    """
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in FORMAT_VERSIONS or isinstance(version, bool):
        known = ", ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(
            f"{where} has format version {version}, this package reads versions {known}"
        )
    values = {name: value for name, value in content.items() if name != "format_version"}
    for later in FORMAT_VERSIONS[version:]:
        surplus = sorted(values.keys() & ADDED[later].keys())
        if surplus:
            raise ValueError(f"{where}: header has unknown fields: {', '.join(surplus)}")
        added = ADDED[later].items()
        values |= {name: list(x) if isinstance(x, tuple) else x for name, x in added}
    _check_fields(AdapterHeader, values, f"{where}: header")
    config = _built(AdapterConfig, values["config"], where, "config")
    visual = _built(VisualConfig, values["visual"], where, "visual")
    lora = _built(Lora, values["lora"], where, "lora")
    base = _built(Fingerprint, values["base"], where, "base")
    host = _built(HostConfig, values["host"], where, "host")
    _check_base(base, values["origin"], where)
    header = AdapterHeader(
        groups=tuple(values["groups"]),
        layers=tuple(values["layers"]),
        config=config,
        base=base,
        prompt_kind=values["prompt_kind"],
        scale_side=values["scale_side"],
        linears=tuple(values["linears"]),
        origin=values["origin"],
        visual=visual,
        lora=lora,
        host=host,
    )
    _check_known("prompt_kind", header.prompt_kind, PROMPT_KINDS, where)
    for group in header.groups:
        _check_known("group", group, tuple(GROUPS), where)
    if header.groups != tuple(group for group in GROUPS if group in header.groups):
        raise ValueError(
            f"{where}: groups must be some of {tuple(GROUPS)} in this order, got {header.groups}"
        )
    images = () if visual is None else VISUAL if visual.fusion == "early" else VISUAL[:1]
    if tuple(group for group in header.groups if group in VISUAL) != images:
        raise ValueError(f"{where}: groups {header.groups} do not go with visual {visual}")
    if ("head" in header.groups) != (host.head is not None):
        raise ValueError(f"{where}: groups {header.groups} do not go with head {host.head}")
    _check_host(host, where)
    late = (1, config.prompt_length)
    if visual is not None and visual.fusion == "late" and visual.tokens not in late:
        raise ValueError(f"{where}: visual tokens must be one of {late}, got {visual.tokens}")
    if visual is not None and visual.layers > base.shape["n_layers"]:
        raise ValueError(
            f"{where}: visual layers must be at most {base.shape['n_layers']}, got {visual.layers}"
        )
    if not header.groups or ("prompts" in header.groups) != bool(header.layers):
        raise ValueError(
            f"{where}: groups {header.groups} do not go with {len(header.layers)} adapted layers"
        )
    try:
        _ = header.tuning
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    count = base.shape["n_layers"]
    ascending = sorted(set(header.layers)) == list(header.layers)
    if not ascending or not all(0 <= layer < count for layer in header.layers):
        raise ValueError(
            f"{where}: layers must be ascending indices below {count}, got {header.layers}"
        )
    return header


def _check_host(host: HostConfig, where: str) -> None:
    if not host.kind.isidentifier():
        raise ValueError(f"{where}: host kind must be a name as clip_text, got {host.kind!r}")
    head, lean = host.head, HostConfig()
    if host.kind == lean.kind and host != lean:
        raise ValueError(
            f"{where}: host must have no head and no shifted positions for a {host.kind}, got "
            f"{host}"
        )
    if head is None:
        return
    for name in head.shapes:
        if not all(part.isidentifier() or part.isdecimal() for part in name.split(".")):
            raise ValueError(f"{where}: head shapes must be by dotted names, got {name!r}")
    outputs = [shape[0] for shape in head.shapes.values() if shape][-1:]
    if outputs != [len(head.labels)]:
        raise ValueError(
            f"{where}: head must have a label for each of its {outputs} outputs, got {head.labels}"
        )


def _check_base(base: Fingerprint, origin: str | None, where: str) -> None:
    partial = origin is not None and not base.samples and base.shape.keys() <= set(SHAPE_FIELDS)
    if partial and "n_layers" not in base.shape:
        raise ValueError(f"{where}: base shape must have n_layers")
    if not partial and sorted(base.shape) != sorted(SHAPE_FIELDS):
        raise ValueError(
            f"{where}: base shape must have {', '.join(SHAPE_FIELDS)}, got {', '.join(base.shape)}"
        )
    for name, size in base.shape.items():
        if size < 1:
            raise ValueError(f"{where}: base: {name} must be at least 1, got {size}")
    expected = 0 if partial else sample_count(base.shape["n_layers"])
    if len(base.samples) != expected:
        raise ValueError(
            f"{where}: base must have {expected} sampled weights, got {len(base.samples)}"
        )


def _check_fields(kind: type, values: dict[str, Any], where: str) -> None:
    specs = {spec.name: spec.type for spec in fields(kind)}
    for problem, names in (
        ("unknown", values.keys() - specs.keys()),
        ("missing", specs.keys() - values.keys()),
    ):
        if names:
            raise ValueError(f"{where} has {problem} fields: {', '.join(sorted(names))}")
    for name, annotation in specs.items():
        if not _fits(values[name], annotation):
            wanted = annotation.__name__ if isinstance(annotation, type) else annotation
            raise ValueError(f"{where}: {name} must be {wanted}, got {values[name]!r}")


def _built(kind: type, values: Any, where: str, what: str) -> Any:
    """A dataclass of the values that JSON holds, with those inside it; None where there is none.

    Raises:
        ValueError: a field is missing, surplus or of another type, or the class refuses a value.
    """
    if values is None:
        return None
    _check_fields(kind, values, f"{where}: {what}")
    made: dict[str, Any] = {}
    for spec in fields(kind):
        value = values[spec.name]
        for one in (spec.type, *get_args(spec.type)):
            if isinstance(one, type) and is_dataclass(one) and value is not None:
                value = _built(one, value, where, spec.name)
        made[spec.name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except ValueError as error:
        raise ValueError(f"{where}: {what}: {error}") from None


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value can stand for a dataclass field of this annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if origin is UnionType:
        return any(_fits(value, one) for one in arguments)
    if is_dataclass(annotation):
        return isinstance(value, dict)
    # JSON writes 1.0 as a float, but an int is as good
    kinds = (int | float) if annotation is float else annotation
    return isinstance(value, kinds) and isinstance(value, bool) == (annotation is bool)


def _check_known(what: str, value: Any, known: tuple[Any, ...], where: str) -> None:
    if value not in known:
        raise ValueError(f"{where} has {what} {value!r}, this version knows {known}")
