"""The commands `convert` and `info` on adapters: from any format to any, and what a file is."""

import argparse
from pathlib import Path

from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_assembly import (
    ReadOptions,
    fitting_presets,
)
from llama_adapter.checkpoints.adapter_formats import (
    WRITERS,
    adapter_path,
    read_any_adapter,
    write_adapter_as,
)
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llama-adapter convert`."""
    parser.add_argument("source", type=Path, help="adapter file or folder, of any format")
    parser.add_argument("target", type=Path, help="file to create; a folder for peft, accessory")
    parser.add_argument("--to", required=True, choices=tuple(WRITERS), help="format to write")
    parser.add_argument(
        "--gate-activation",
        choices=("tanh", "identity"),
        help="what the source's gates go through; default: its format's convention",
    )
    parser.add_argument(
        "--gate-scope", choices=("head", "layer"), help="default: what the gates' shapes say"
    )
    parser.add_argument(
        "--prompt-length", type=int, help="rows per layer of an official file (default: 10)"
    )
    parser.add_argument(
        "--leave-out",
        nargs="*",
        default=(),
        choices=("new_gate", "visual"),
        help="drop second gates, which this package cannot run, or what sees images",
    )
    parser.add_argument(
        "--base",
        help=f"the adapter's base: a folder, or the name of a shape ({', '.join(PRESETS)})",
    )


def convert(options: argparse.Namespace) -> int:
    """Read one format, write another, and print what was assumed."""
    if options.prompt_length is not None and options.prompt_length < 1:
        raise ValueError(f"--prompt-length must be at least 1, got {options.prompt_length}")
    base, identity = PRESETS.get(options.base), None
    if base is None and options.base is not None:
        loaded = load_base(options.base)
        base, identity = loaded.model.config, fingerprint(loaded.model, loaded.name)
    told = ReadOptions(
        options.gate_activation,
        options.gate_scope,
        options.prompt_length,
        options.leave_out,
        base,
        identity,
    )
    stored = read_any_adapter(options.source, told)
    said = write_adapter_as(options.target, stored, options.to)
    print(f"read        {options.source}: {stored.format}")
    for note in stored.notes:
        print(f"            {note}")
    print(f"wrote       {options.target}: {options.to}")
    for note in said:
        print(f"            {note}")
    return 0


def describe_adapter(path: Path) -> list[str]:
    """What an adapter is, a line for each property.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; see `read_any_adapter`.
    """
    # an answer about a file says what it holds besides
    stored = read_any_adapter(path, ReadOptions(leave_out=("new_gate",)))
    header, tensors = stored.header, stored.tensors
    converted = header.origin not in (None, stored.format)
    path = adapter_path(path) or path
    files = [path] if path.is_file() else [one for one in path.iterdir() if one.is_file()]
    size = sum(file.stat().st_size for file in files)
    count = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        f"adapter     {path} ({count:,} parameters, {size:,} bytes)",
        f"format      {stored.format}" + (f", from {header.origin}" if converted else ""),
        f"base        {header.base.describe()}",
        f"groups      {', '.join(header.groups)}",
    ]
    if header.layers:
        config, gates = header.config, tensors["gates"]
        values = gates.tanh() if config.gate_activation == "tanh" else gates
        lines += [
            f"layers      {len(header.layers)}: {', '.join(map(str, header.layers))}",
            f"prompts     {config.prompt_length} per layer, {header.prompt_kind}",
            f"gates       one per {config.gate_scope}, {config.gate_activation}, "
            f"multipliers from {values.min():.3f} to {values.max():.3f}",
        ]
    if (host := header.host).kind != "llama":
        shifted = ", positions behind the prompts" if host.shift_positions else ""
        lines.append(f"host        {host.kind}{shifted}")
    if (head := host.head) is not None:
        lines.append(f"head        {head.name}: {', '.join(head.labels)}")
    if (visual := header.visual) is not None:
        made = f" of {visual.encoder}" if visual.encoder else ""
        hidden = ", ".join(map(str, visual.hidden)) or "none"
        shape = f"projector's hidden widths {hidden}"
        if (queries := visual.resampler) is not None:
            shape = (
                f"{visual.tokens} queries of {visual.features // queries.inputs} tokens, through "
                f"{queries.blocks} blocks of width {queries.width}"
            )
        lines.append(f"images      {visual.features} features{made}; {shape}")
        if (scales := visual.scales) is not None:
            steps = [name for name in ("post_norm", "project", "normalise") if vars(scales)[name]]
            layers = " ".join(map(str, scales.layers))
            lines.append(f"scales      {', '.join([f'{scales.pool} of layers {layers}', *steps])}")
        if visual.fusion == "early":
            gates = tensors["visual_gates"]
            values = gates.tanh() if header.config.gate_activation == "tanh" else gates
            lines.append(
                f"fusion      early: {visual.tokens} tokens in the first {visual.layers} layers, "
                f"multipliers from {values.min():.3f} to {values.max():.3f}"
            )
    if header.linears:
        side = "" if header.scale_side is None else f"; scale on the {header.scale_side} side"
        lines.append(f"linear maps {', '.join(header.linears)}{side}")
    if (lora := header.lora) is not None:
        reach = "prompts and tokens" if lora.prompts else "tokens alone"
        lines.append(f"lora        rank {lora.rank} of {', '.join(lora.linears)}, for {reach}")
    if header.host.kind == "llama":
        fitting = ", ".join(fitting_presets(header.base.shape)) or "no published LLaMA"
        lines.append(f"fits        {fitting} (by shape)")
    return [*lines, *(f"note        {note}" for note in stored.notes)]
