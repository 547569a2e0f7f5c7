"""One token's attention over a KV cache, prompt included: `python -m benchmarks.decode`.

Decoding reads the cache once and computes little, so every time is held against the read bandwidth
that the device reaches in the same rounds. On a GPU in bfloat16, each provider as a CUDA graph; on
a processor with one thread in float32. The same command again continues. `--quick` only tries the
machinery out, in seconds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from typing import Protocol as Typed

import torch
from torch import Tensor

import adapter_kernels
from adapter_kernels import zero_init_attention_decode
from benchmarks import baselines, command, decode_problem, harness
from benchmarks.baselines import Call, Provider
from benchmarks.decode_problem import (
    BANKS,
    OTHERS,
    READS,
    Memory,
    Problem,
    bytes_of,
    expected,
    memory_of,
    problem,
)
from benchmarks.decode_report import MODE, figures, read_bandwidth, report
from benchmarks.harness import Candidate, Expected, Protocol, ResultFile, Row, Work
from benchmarks.reporting import cells_of
from benchmarks.roofline import Shape

PROMPT = 10
# shapes that are compiled together, and then measured
PORTION = 4
BATCHES = (1, 8, 32, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
# of keys and values: there are two caches, contiguous and paged, and room for copies
MOST_CACHE = 16 * 2**30
# processes that compile side by side each hold a problem of their own
MOST_COMPILED_AHEAD = 2**30
# a turn on a processor is one pass: emptying the caches before it takes longer
PROTOCOLS = {"cuda": Protocol(), "cpu": Protocol(rounds=31, warmup=2, round_ms=0.0)}
# read for the bandwidth: the last cache of a large processor holds hundreds of MB
READ_BYTES = {"cuda": 4 * 2**30, "cpu": 2**30}
QUICK_READ_BYTES = 2**20
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__)]
SOURCES += [Path(module.__file__ or "") for module in (baselines, decode_problem, harness)]


def gpu_shape(batch: int, length: int, grouped: bool) -> Shape:
    """32 heads of 128, with G = 8 where grouped."""
    return Shape(batch, 1, length, 32, 8 if grouped else 32, 128, PROMPT, True, "bfloat16")


def cpu_shape(batch: int, length: int, grouped: bool) -> Shape:
    """8 heads of 64, with G = 2 where grouped."""
    return Shape(batch, 1, length, 8, 2 if grouped else 8, 64, PROMPT, True, "float32")


def shapes(device: str, extent: str) -> list[Shape]:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    if extent == "quick":
        length, dtype = (64, "float32") if device == "cpu" else (256, "bfloat16")
        return [Shape(2, 1, length, 4, 2, 16, PROMPT, True, dtype)]
    both = (False, True)
    if device == "cpu":
        core = [cpu_shape(*it) for it in ((4, 1024, False), (4, 1024, True), (1, 1024, False))]
        core += [cpu_shape(4, 256, False)]
        rest = [cpu_shape(*setting) for setting in product((1, 4), (256, 512, 1024), both)]
    else:
        # the targets' first: from B = 32
        own = ((32, 2048), (32, 8192), (128, 2048), (8, 2048), (8, 32768), (1, 2048), (1, 32768))
        core = [gpu_shape(*pair, False) for pair in own]
        own = ((32, 2048), (32, 8192), (128, 2048), (8, 8192), (1, 32768))
        core += [gpu_shape(*pair, True) for pair in own]
        rest = [gpu_shape(*setting) for setting in product(BATCHES, LENGTHS, both)]
        rest = [shape for shape in rest if 2 * shape.key_bytes <= MOST_CACHE]
    return core if extent == "core" else list(dict.fromkeys([*core, *rest]))


def _ours(kind: str, backend: str | None = None, paged: bool = False) -> Callable[[Problem], Call]:
    def build(given: Problem) -> Call:
        keys, values = (given.k_pages, given.v_pages) if paged else (given.k, given.v)
        *prompt, index = given.prompts[kind]
        return partial(
            zero_init_attention_decode,
            given.q,
            keys,
            values,
            *prompt,
            cache_lengths=given.lengths,
            page_table=given.page_table if paged else None,
            adapter_index=index,
            backend=backend,
        )

    return build


OURS = (
    Provider("ours", "prompt", _ours("prompt")),
    Provider("ours_paged", "prompt", _ours("prompt", paged=True)),
    Provider("ours_plain", "plain", _ours("plain")),
    *(Provider(f"ours_{kind}", kind, _ours(kind)) for kind in BANKS),
    Provider("hybrid", "prompt", _ours("prompt", "hybrid"), devices=("cpu",)),
    Provider("reference", "prompt", _ours("prompt", "reference")),
)
PROVIDERS = (*OURS, *OTHERS, *READS)
# ours that launch Triton kernels on a GPU
COMPILED = tuple(one.name for one in OURS if one.name not in ("hybrid", "reference"))


Out = TypeVar("Out")


class Given(Typed):
    """Inputs of any benchmark that is held against the bandwidth."""

    @property
    def memory(self) -> Memory:
        """What the bandwidth is measured on, on the device of the inputs."""
        ...


def captured(call: Callable[[], Out], pool: Any) -> Callable[[], Out]:
    """A call as a CUDA graph, as decoding runs: the host takes longer to launch it than it takes.

    What is returned holds the call: a graph does not keep the tensors that it reads alive.

    Args:
        call: what is captured, compiled and warm after two passes.
        pool: of memory, which graphs that never run at the same time may share.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()

    def replay(_: Callable[[], Out]) -> Out:
        graph.replay()
        return out

    return partial(replay, call)


def work(provider: Provider, given: Given, pool: Any) -> Work:
    """What is timed of a provider, behind cold caches: a model reads its weights in between.

    Args:
        provider: what it builds returns one result, "out", or several by name.
        given: the inputs.
        pool: of the graphs' memory, None on a processor.

    Raises:
        ValueError, RuntimeError: the provider does not do this.
    """
    call = provider.build(given)
    words = given.memory.words
    if words.is_cuda:
        with torch.no_grad():
            call = captured(call, pool)

    def before() -> None:
        # a GPU's caches are emptied by the harness
        if not words.is_cuda:
            words.sum()

    def run(_: None) -> dict[str, Tensor]:
        with torch.no_grad():
            found = call()
        return {"out": found} if isinstance(found, Tensor) else found

    return Work(before, run)


def cell_of(shape: Shape) -> dict[str, Any]:
    """The name of a cell in the results."""
    return {"shape": asdict(shape), "mode": MODE}


def missing_of(
    shape: Shape, providers: Sequence[Provider], device: torch.device, results: ResultFile
) -> list[Provider]:
    """The providers that claim a shape and have no result there."""
    held = results.of(cell_of(shape))
    return [one for one in providers if one.supports(shape, device) and one.name not in held]


def measure_missing(
    cell: Row,
    title: str,
    given: Given,
    missing: Mapping[Provider, tuple[Mapping[str, Expected], int]],
    protocol: Protocol,
    results: ResultFile,
) -> None:
    """Measure what is missing of one cell, and keep it.

    Args:
        cell: its name in the results.
        title: its name in words.
        given: the inputs.
        missing: by provider the truth of its results, and the bytes that it must move.
        protocol: how long.
        results: where the rows go.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    device = given.memory.words.device
    # what is compiled for one shape would count against a limit at the next
    torch.compiler.reset()
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    candidates = [
        Candidate(provider.name, partial(work, provider, given, pool), truth)
        for provider, (truth, _) in missing.items()
    ]
    facts = {provider.name: {"bytes": size} for provider, (_, size) in missing.items()}
    command.measure_cell(cell, title, candidates, device, protocol, results, facts)


def measure_shape(
    shape: Shape,
    providers: Sequence[Provider],
    device: torch.device,
    memory: Memory,
    protocol: Protocol,
    results: ResultFile,
) -> None:
    """Measure what is missing of one shape, and keep it.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    missing = missing_of(shape, providers, device, results)
    if not missing:
        return
    given = problem(shape, device, memory)
    kinds = {provider.kind for provider in missing}
    known = {kind: (expected(given, kind), bytes_of(given, kind)) for kind in kinds}
    measure_missing(
        cell_of(shape),
        shape.describe(),
        given,
        {provider: known[provider.kind] for provider in missing},
        protocol,
        results,
    )


def compile_one(job: tuple[Shape, str, torch.device]) -> None:
    """One pass of a provider, for what its compilers leave on disk; failures show when measured."""
    shape, name, device = job
    provider = next(one for one in PROVIDERS if one.name == name)
    try:
        with torch.no_grad():
            provider.build(problem(shape, device, memory_of(QUICK_READ_BYTES, device)))()
    except harness.FAILURES as error:
        print(f"{name} {shape.describe()}: {harness.one_line(error)}", file=sys.stderr)


def compile_ahead(
    wanted: Sequence[Shape],
    providers: Sequence[Provider],
    device: torch.device,
    results: ResultFile,
) -> None:
    """Compile what has no result yet and is small enough for many at a time."""
    jobs = [
        (shape, provider.name, device)
        for shape in wanted
        if 2 * shape.key_bytes <= MOST_COMPILED_AHEAD
        for provider in missing_of(shape, providers, device, results)
        if provider.compiled or provider.name in COMPILED
    ]
    command.compile_ahead(compile_one, jobs)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    protocol = command.QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    results = command.open_results("decode", options, SOURCES, protocol)
    providers = [one for one in PROVIDERS if not (options.quick and one.compiled)]
    wanted = shapes(device.type, command.extent_of(options))
    memory = memory_of(QUICK_READ_BYTES if options.quick else READ_BYTES[device.type], device)
    for portion in command.in_time(wanted, results, PORTION):
        if device.type == "cuda":
            compile_ahead(portion, providers, device, results)
        for shape in portion:
            measure_shape(shape, providers, device, memory, protocol, results)
    cells = cells_of(results.rows.values())
    text, verdicts = report(cells, results.environment, trial=options.quick)
    more = {"read_bandwidth": read_bandwidth(cells), "verdicts": verdicts}
    command.publish(results, text, more, figures(cells))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("decode", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
