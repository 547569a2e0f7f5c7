"""What the commands of the benchmarks of single operations share: options, exit codes, files.

Each is `python -m benchmarks.NAME [--quick | --full] [--device D] [--minutes M] [--fresh]
[--output FOLDER]`: it compiles ahead, measures cell by cell what its result file lacks, and writes
NAME.json, NAME.md and figures. The same command again continues.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapter_kernels import load_native
from benchmarks import harness
from benchmarks.harness import Candidate, DeviceLost, Protocol, ResultFile, Row
from benchmarks.workers import WorkerLost, command, side_by_side
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.options import Parser
from llama_adapter.utilisation import gpu_of

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs")
QUICK_PROTOCOL = Protocol(rounds=5, warmup=1, round_ms=1.0)
# a process that compiles holds some GB of the GPU
COMPILERS = 8

Cell = TypeVar("Cell")


def folder_of(device: torch.device) -> Path:
    """Where a device's results belong."""
    if device.type == "cpu":
        return RESULTS / "cpu"
    name = torch.cuda.get_device_name(device)
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", (gpu_of(name) or name).lower())


def _parser(name: str, description: str | None) -> Parser:
    parser = Parser(
        prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a reduced form, in seconds")
    extent.add_argument("--full", action="store_true", help="every shape, not the core ones alone")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what computes; a GPU where there is one",
    )
    parser.add_argument(
        "--minutes", type=_minutes, help="begin nothing new after so long, and report what there is"
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help="folder (default: the device's results)")
    return parser


def _minutes(text: str) -> float:
    """A time above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return minutes


def installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    return find_spec(package) is not None


def extent_of(options: argparse.Namespace) -> str:
    """Which shapes are asked for: "quick", "core" or "full"."""
    return "quick" if options.quick else "full" if options.full else "core"


def open_results(
    name: str,
    options: argparse.Namespace,
    sources: Sequence[Path],
    protocol: Protocol,
    packages: Sequence[str] = (),
) -> ResultFile:
    """The result file to continue, in its folder.

    Args:
        name: of the benchmark.
        options: of its command.
        sources: see `harness.describe`.
        protocol: how long is measured, part of the environment.
        packages: what takes part beside those of every environment.

    Raises:
        ValueError: the file holds something else.
    """
    device = torch.device(options.device)
    quick = QUICK_RESULTS / f"{name}-quick"
    folder = options.output or (quick if options.quick else folder_of(device))
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**harness.describe(device, sources), "protocol": asdict(protocol)}
    for package in packages:
        environment["packages"][package] = version(package) if installed(package) else None
    results = ResultFile(folder / f"{name}.json", name, environment, options.fresh)
    if options.minutes is not None:
        results.deadline = time.monotonic() + 60 * options.minutes
    if results.dropped:
        print(f"{results.dropped} rows of other code or another machine are measured again")
    return results


def time_is_up(results: ResultFile) -> bool:
    """Whether nothing new may begin."""
    return time.monotonic() > results.deadline


def in_time(wanted: Sequence[Cell], results: ResultFile, portion: int = 1) -> Iterator[list[Cell]]:
    """What is wanted, some at a time, until the time for it is up."""
    for start in range(0, len(wanted), portion):
        if time_is_up(results):
            print("the time is up; the same command continues", file=sys.stderr)
            return
        yield list(wanted[start : start + portion])


def compile_ahead(compile_one: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Compile in processes side by side, for what is left on disk: timing takes less than that."""
    if not jobs:
        return
    processes = min(COMPILERS, len(jobs), os.cpu_count() or 1)
    try:
        list(side_by_side(compile_one, jobs, processes))
    except WorkerLost as lost:
        print(f"{lost}; what is missing is compiled while measuring", file=sys.stderr)


def measure_cell(
    cell: Row,
    title: str,
    candidates: Sequence[Candidate],
    device: torch.device,
    protocol: Protocol,
    results: ResultFile,
    facts: Mapping[str, Row] | None = None,
) -> None:
    """Measure one cell, keep its rows and say so.

    Args:
        cell: its name in the results.
        title: its name in words.
        candidates: what the results lack of it; where that is nothing, or the time is up, nothing
            happens.
        device: of their tensors.
        protocol: how long.
        results: where the rows go, and are written.
        facts: by candidate, what its row holds besides.

    Raises:
        DeviceLost: a candidate broke the GPU's context; its row is kept, the rest is missing.
    """
    if not candidates or time_is_up(results):
        return
    try:
        rows = harness.measure(candidates, device, protocol)
    except DeviceLost as lost:
        results.add(cell, {lost.name: lost.row})
        results.write({})
        raise
    results.add(cell, {name: {**row, **(facts or {}).get(name, {})} for name, row in rows.items()})
    results.write({})
    shown = [
        f"{name} {row['ms'][0]:.3g}" if row["status"] == harness.TIMED
        else f"{name} {row['status']}"
        for name, row in rows.items()
    ]  # fmt: skip
    print(f"{title}, ms: {', '.join(shown)}", flush=True)


def publish(results: ResultFile, text: str, more: Row, figures: Mapping[str, bytes]) -> None:
    """Write the report beside the results, and print it.

    Args:
        results: all of them.
        text: the report as Markdown.
        more: what the result file says besides its rows.
        figures: PNG by name.
    """
    results.write(more)
    folder, name = results.path.parent, results.benchmark
    write_atomically(folder / f"{name}.md", text.encode())
    for figure, picture in figures.items():
        write_atomically(folder / f"{name}_{figure}.png", picture)
    print(f"\n{text}\nwritten to {folder}")


def carry_out(
    name: str,
    description: str | None,
    run: Callable[[argparse.Namespace], None],
    arguments: list[str] | None,
) -> int:
    """Parse a benchmark's options and run it with one thread, a CPU's own operations compiled.

    Args:
        name: of the benchmark.
        description: what its help says first.
        run: the benchmark itself.
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    options = _parser(name, description).parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{name}: error: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    if options.device == "cpu":
        load_native()

    def measured() -> None:
        try:
            run(options)
        except DeviceLost as error:
            raise ValueError(f"{error}; the same command continues") from error

    return command(name, measured)
