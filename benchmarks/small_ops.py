"""rms_norm, apply_rotary, write_cache, swiglu, backward: `python -m benchmarks.small_ops`.

They compute little, so every time is held against the read bandwidth that the device reaches in the
same rounds, and against what a model runs instead. linear_cross_entropy, alone and with the
gradient of x, computes much: it is held against its matrix products alone. On a GPU in bfloat16,
each provider as a CUDA graph; on a processor with one thread in float32. The same command again
continues. `--quick` only tries the machinery out. The targets, 80 % of the bandwidth or 90 % of the
products' speed, and no slower than torch.compile from 2,048 tokens on, are this project's own.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

import adapter_kernels
from benchmarks import (
    baselines,
    command,
    decode,
    decode_problem,
    harness,
    small_ops_formulas,
    small_ops_problem,
)
from benchmarks.baselines import Provider
from benchmarks.decode_problem import Memory, memory_of
from benchmarks.decode_report import read_bandwidth
from benchmarks.harness import Protocol, ResultFile, Row
from benchmarks.reporting import cells_of
from benchmarks.small_ops_problem import (
    LOSSES,
    MODES,
    OF_HIDDEN,
    ROWS,
    SmallShape,
    bytes_of,
    expected,
    problem,
    providers_of,
)
from benchmarks.small_ops_report import figures, report

Cell = tuple[str, SmallShape]
# cells that are compiled together, then measured: about those of one number of tokens
PORTION = 17
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__)]
SOURCES += [
    Path(module.__file__ or "")
    for module in (
        baselines, decode, decode_problem, harness, small_ops_formulas, small_ops_problem
    )
]  # fmt: skip


def _cells(
    tokens: Sequence[int],
    widths: Sequence[int],
    hidden: Sequence[int],
    heads: int,
    groups: Sequence[int],
    head_dim: int,
    head: Sequence[tuple[int, int]],
    dtype: str,
) -> list[Cell]:
    """Every number of tokens, then every mode with its widths, numbers of heads, or C and V."""
    found = []
    for count, mode in product(tokens, MODES):
        if mode in LOSSES:
            found += [(mode, SmallShape(count, c, dtype, vocabulary=v)) for c, v in head]
        elif mode in ROWS:
            own = hidden if mode in OF_HIDDEN else widths
            found += [(mode, SmallShape(count, width, dtype)) for width in own]
        else:
            found += [(mode, SmallShape(count, head_dim, dtype, heads, g)) for g in groups]
    return found


def cells(device: str, extent: str) -> list[Cell]:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    if extent == "quick":
        dtype = "float32" if device == "cpu" else "bfloat16"
        return _cells((5,), (64,), (96,), 4, (2,), 16, ((64, 211),), dtype)
    if device == "cpu":
        tokens, llama = (1, 32, 512), ((512, 32000),)
        core = _cells(tokens, (1024,), (2816,), 8, (2,), 64, llama, "float32")
        rest = _cells(tokens, (1024, 4096), (2816, 11008), 8, (2, 8), 64, llama, "float32")
    else:
        # the targets' first: from 2,048 tokens on
        llama, groups = ((4096, 32000),), (8, 32)
        core = _cells((2048, 16384, 1, 32), (4096,), (11008,), 32, groups, 128, llama, "bfloat16")
        tokens = (2048, 16384, 1, 8, 32, 512, 4096)
        widths = (4096, 5120, 8192), (11008, 14336)
        rest = [
            *_cells(tokens, *widths, 32, groups, 128, llama, "bfloat16"),
            # LLaMA 3's vocabulary; of more tokens the truth in float64 would fill a GPU
            *_cells((2048, 32), (), (), 32, groups, 64, ((4096, 128256),), "bfloat16"),
        ]
    return core if extent == "core" else list(dict.fromkeys([*core, *rest]))


def cell_of(mode: str, shape: SmallShape) -> Row:
    """The name of a cell in the results."""
    return {"shape": asdict(shape), "mode": mode}


def missing_of(
    mode: str, shape: SmallShape, device: torch.device, results: ResultFile, quick: bool
) -> list[Provider]:
    """The providers of a device that have no result in a cell; in a quick run none that compile."""
    held = results.of(cell_of(mode, shape))
    return [
        one
        for one in providers_of(mode)
        if device.type in one.devices and one.name not in held and not (quick and one.compiled)
    ]


def measure_cell(
    mode: str,
    shape: SmallShape,
    missing: Sequence[Provider],
    memory: Memory,
    protocol: Protocol,
    results: ResultFile,
) -> None:
    """Measure what is missing of one cell, and keep it.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    if not missing:
        return
    given = problem(mode, shape, memory.words.device, memory)
    with torch.no_grad():
        known = {
            kind: (expected(given, kind), bytes_of(given, kind))
            for kind in {provider.kind for provider in missing}
        }
    decode.measure_missing(
        cell_of(mode, shape),
        f"{mode} {shape.describe()}",
        given,
        {provider: known[provider.kind] for provider in missing},
        protocol,
        results,
    )


def compile_one(job: tuple[str, SmallShape, str, torch.device]) -> None:
    """One pass of a provider, for what its compilers leave on disk; failures show when measured."""
    mode, shape, name, device = job
    provider = next(one for one in providers_of(mode) if one.name == name)
    try:
        given = problem(mode, shape, device, memory_of(decode.QUICK_READ_BYTES, device))
        with torch.no_grad():
            provider.build(given)()
    except harness.FAILURES as error:
        print(f"{name} {mode} {shape.describe()}: {harness.one_line(error)}", file=sys.stderr)


def compile_ahead(
    wanted: Sequence[Cell], device: torch.device, results: ResultFile, quick: bool
) -> None:
    """Compile what has no result yet, in processes side by side."""
    jobs = [
        (mode, shape, provider.name, device)
        for mode, shape in wanted
        for provider in missing_of(mode, shape, device, results, quick)
        if provider.compiled or provider.name == "ours"
    ]
    command.compile_ahead(compile_one, jobs)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device, quick = torch.device(options.device), options.quick
    protocol = command.QUICK_PROTOCOL if quick else decode.PROTOCOLS[device.type]
    results = command.open_results("small_ops", options, SOURCES, protocol)
    wanted = cells(device.type, command.extent_of(options))
    size = decode.QUICK_READ_BYTES if quick else decode.READ_BYTES[device.type]
    memory = memory_of(size, device)
    for portion in command.in_time(wanted, results, PORTION):
        if device.type == "cuda":
            compile_ahead(portion, device, results, quick)
        for mode, shape in portion:
            missing = missing_of(mode, shape, device, results, quick)
            measure_cell(mode, shape, missing, memory, protocol, results)
    found = cells_of(results.rows.values(), SmallShape)
    text, verdicts = report(found, results.environment, trial=quick)
    more = {"read_bandwidth": read_bandwidth(found), "verdicts": verdicts}
    command.publish(results, text, more, figures(found))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("small_ops", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
