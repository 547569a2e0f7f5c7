"""Attention with a prompt against all that computes it today: `python -m benchmarks.attention`.

On a GPU in bfloat16 over lengths and head widths; on a processor with one thread in float32. Every
provider must be right before it is timed, what we lose is printed like what we win, and the same
command again continues. `--quick` only tries the machinery out, in seconds.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import adapter_kernels
from adapter_kernels import zero_init_attention
from benchmarks import baselines, harness
from benchmarks.attention_report import cells_of, figures, report
from benchmarks.baselines import BASELINES, Call, Problem, Provider, formula_results, wider
from benchmarks.harness import (
    Candidate,
    DeviceLost,
    Expected,
    Protocol,
    ResultFile,
    Work,
)
from benchmarks.roofline import DTYPES, MODES, Shape, gpu_of
from benchmarks.workers import WorkerLost, side_by_side
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.options import Parser

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs") / "attention-quick"
# the papers' prompt, and LLaMA-7B's model width at any head width
PROMPT, WIDTH, TOKENS = 10, 4096, 16384
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PROTOCOLS = {"cuda": Protocol(), "cpu": Protocol(rounds=15, warmup=2)}
QUICK_PROTOCOL = Protocol(rounds=5, warmup=1, round_ms=1.0)
SOURCES = [Path(adapter_kernels.__file__).parent]
SOURCES += [Path(__file__), *(Path(module.__file__ or "") for module in (baselines, harness))]


def gpu_shape(length: int, head_dim: int, causal: bool, grouped: bool) -> Shape:
    """16,384 tokens in sequences of a length, with G = H / 4 where grouped."""
    heads = WIDTH // head_dim
    kv_heads = heads // 4 if grouped else heads
    batch = TOKENS // length
    return Shape(batch, length, length, heads, kv_heads, head_dim, PROMPT, causal, "bfloat16")


def cpu_shape(head_dim: int, causal: bool, grouped: bool) -> Shape:
    """1,024 tokens and 8 heads, with G = 2 where grouped."""
    return Shape(1, 1024, 1024, 8, 2 if grouped else 8, head_dim, PROMPT, causal, "float32")


def shapes(device: str, extent: str) -> list[Shape]:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    both = (True, False)
    if extent == "quick":
        length, dtype = (64, "float32") if device == "cpu" else (256, "bfloat16")
        return [Shape(1, length, length, 2, 1, 16, PROMPT, True, dtype)]
    if device == "cpu":
        core = [cpu_shape(head_dim, True, False) for head_dim in (64, 128)]
        rest = [cpu_shape(*setting) for setting in product((64, 128), both, both)]
    else:
        # the shape of the targets first
        core = [gpu_shape(2048, 128, True, False)]
        core += [gpu_shape(length, 128, True, False) for length in LENGTHS if length != 2048]
        core += [gpu_shape(length, 128, True, True) for length in (2048, 8192)]
        core += [gpu_shape(length, 64, True, False) for length in (2048, 8192)]
        core += [gpu_shape(2048, head_dim, False, False) for head_dim in (128, 64)]
        rest = [gpu_shape(*setting) for setting in product(LENGTHS, (64, 128), both, both)]
    return core if extent == "core" else list(dict.fromkeys([*core, *rest]))


def _ours(backend: str | None) -> Callable[[Problem], Call]:
    def build(given: Problem) -> Call:
        call = partial(zero_init_attention, causal=given.shape.causal, backend=backend)
        return partial(call, *given.leaves.values())

    return build


def _ours_block(given: Problem) -> Tensor:
    """The projections around our attention, which takes the prompt along."""
    width = given.shape.head_dim
    x, prompt = given["x"], given["prompt"]
    q, k, v, prompt_k, prompt_v = (
        F.linear(source, given[weight]).unflatten(-1, (-1, width))
        for source, weight in (
            (x, "wq"), (x, "wk"), (x, "wv"), (prompt, "wk"), (prompt, "wv")
        )
    )  # fmt: skip
    gate = given["gate"].expand(given.shape.heads)
    out = zero_init_attention(q, k, v, prompt_k, prompt_v, gate, causal=given.shape.causal)
    return F.linear(out.flatten(-2), given["wo"])


_GPU: dict[str, Any] = {"devices": ("cuda",)}
OURS = (
    Provider("ours", "prompt", _ours(None)),
    Provider("fused", "prompt", _ours("triton"), **_GPU),
    Provider("hybrid", "prompt", _ours("hybrid")),
    Provider("reference", "prompt", _ours("reference")),
    Provider("ours_plain", "plain", _ours(None)),
    Provider("fused_plain", "plain", _ours("triton"), **_GPU),
    Provider("ours_block", "block", lambda given: partial(_ours_block, given)),
)
PROVIDERS = (*OURS, *BASELINES)
# ours that launch Triton kernels; a process that compiles holds some GB of the GPU
COMPILED, COMPILERS = ("fused", "hybrid", "fused_plain"), 8


def work(provider: Provider, given: Problem, mode: str) -> Work:
    """What is timed of a provider: inference, the backward pass alone, or a training step's both.

    Args:
        provider: of the problem's kind.
        given: the inputs.
        mode: one of MODES.

    Raises:
        ValueError, RuntimeError: the provider does not do this.
    """
    call = provider.build(given)

    def forward(_: None) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": call()}

    def backward(out: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(out, list(given.leaves.values()), given.dout)
        return {f"d{name}": x for name, x in zip(given.leaves, gradients, strict=True)}

    def both(_: None) -> dict[str, Tensor]:
        out = call()
        return {"out": out, **backward(out)}

    if mode == "backward":
        return Work(call, backward)
    return Work(lambda: None, forward if mode == "forward" else both)


def expected(given: Problem) -> dict[str, Expected]:
    """The truth of every result of a problem."""
    own = DTYPES[given.shape.dtype]
    return harness.expect(formula_results(given, wider(own)), formula_results(given, own))


def of_mode(results: dict[str, Expected], mode: str) -> dict[str, Expected]:
    """Those that a mode computes."""
    if mode == "both":
        return results
    return {name: one for name, one in results.items() if (name == "out") == (mode == "forward")}


def cell_of(shape: Shape, mode: str) -> dict[str, Any]:
    """The name of a cell in the results."""
    return {"shape": asdict(shape), "mode": mode}


def measure_shape(
    shape: Shape,
    providers: Sequence[Provider],
    device: torch.device,
    protocol: Protocol,
    results: ResultFile,
) -> None:
    """Measure what is missing of one shape, and keep it mode by mode.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    wanted = [provider for provider in providers if provider.supports(shape, device)]
    cells = [(mode, cell_of(shape, mode)) for mode in MODES]
    missing = {
        mode: [provider for provider in wanted if provider.name not in results.of(cell)]
        for mode, cell in cells
    }
    kinds = {provider.kind for each in missing.values() for provider in each}
    problems = {kind: baselines.problem(kind, shape, device) for kind in sorted(kinds)}
    truths = {kind: expected(given) for kind, given in problems.items()}
    # what is compiled for one shape would count against a limit at the next
    torch.compiler.reset()
    for mode, cell in cells:
        candidates = [
            Candidate(
                provider.name,
                partial(work, provider, problems[provider.kind], mode),
                of_mode(truths[provider.kind], mode),
            )
            for provider in missing[mode]
        ]
        if not candidates:
            continue
        try:
            rows = harness.measure(candidates, device, protocol)
        except DeviceLost as lost:
            results.add(cell, {lost.name: lost.row})
            results.write({})
            raise
        results.add(cell, rows)
        results.write({})
        shown = [
            f"{name} {row['ms'][0]:.3g}" if row["status"] == harness.TIMED
            else f"{name} {row['status']}"
            for name, row in rows.items()
        ]  # fmt: skip
        print(f"{shape.describe()} {mode}, ms: {', '.join(shown)}", flush=True)


def compile_one(job: tuple[Shape, str, torch.device]) -> None:
    """One pass of a provider, for what its compilers leave on disk; failures show when measured."""
    shape, name, device = job
    provider = next(one for one in PROVIDERS if one.name == name)
    try:
        given = baselines.problem(provider.kind, shape, device)
        for mode in MODES:
            tried = work(provider, given, mode)
            tried.run(tried.before())
    except harness.FAILURES as error:
        print(f"{name} {shape.describe()}: {harness.one_line(error)}", file=sys.stderr)


def compile_ahead(
    wanted: Sequence[Shape],
    providers: Sequence[Provider],
    device: torch.device,
    results: ResultFile,
) -> None:
    """Compile what has no result yet, in processes side by side: timing takes less than that."""
    jobs = [
        (shape, provider.name, device)
        for shape in wanted
        for provider in providers
        if (provider.compiled or provider.name in COMPILED) and provider.supports(shape, device)
        if any(provider.name not in results.of(cell_of(shape, mode)) for mode in MODES)
    ]
    if not jobs:
        return
    processes = min(COMPILERS, len(jobs), os.cpu_count() or 1)
    try:
        list(side_by_side(compile_one, jobs, processes))
    except WorkerLost as lost:
        print(f"{lost}; what is missing is compiled while measuring", file=sys.stderr)


def folder_of(device: torch.device) -> Path:
    """Where a device's results belong."""
    if device.type == "cpu":
        return RESULTS / "cpu"
    name = torch.cuda.get_device_name(device)
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", (gpu_of(name) or name).lower())


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    extent = "quick" if options.quick else "full" if options.full else "core"
    folder = options.output or (QUICK_RESULTS if options.quick else folder_of(device))
    folder.mkdir(parents=True, exist_ok=True)
    environment = harness.describe(device, SOURCES)
    protocol = QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    environment["protocol"] = asdict(protocol)
    results = ResultFile(folder / "attention.json", "attention", environment, options.fresh)
    if results.dropped:
        print(f"{results.dropped} rows of other code or another machine are measured again")
    providers = [one for one in PROVIDERS if not (options.quick and one.compiled)]
    wanted = shapes(device.type, extent)
    if device.type == "cuda":
        compile_ahead(wanted, providers, device, results)
    for shape in wanted:
        measure_shape(shape, providers, device, protocol, results)
    cells = cells_of(results.rows.values())
    text, verdicts = report(cells, environment, trial=options.quick)
    results.write({"verdicts": verdicts})
    write_atomically(folder / "attention.md", text.encode())
    for name, picture in figures(cells).items():
        write_atomically(folder / f"attention_{name}.png", picture)
    print(f"\n{text}\nwritten to {folder}")


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.attention", description=__doc__, allow_abbrev=False)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a reduced form, in seconds")
    extent.add_argument("--full", action="store_true", help="every shape, not the core ones alone")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what computes; a GPU where there is one",
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help="folder (default: the device's results)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    options = _parser().parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("attention: error: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    except DeviceLost as error:
        print(f"attention: error: {error}; the same command continues", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"attention: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
