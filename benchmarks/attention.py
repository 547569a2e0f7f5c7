"""Attention with a prompt against all that computes it today: `python -m benchmarks.attention`.

On a GPU in bfloat16 over lengths and head widths; on a processor with one thread in float32. Every
provider must be right before it is timed, what we lose is printed like what we win, and the same
command again continues. `--quick` only tries the machinery out, in seconds.
"""

import argparse
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
from benchmarks import baselines, command, harness
from benchmarks.attention_report import figures, report
from benchmarks.baselines import BASELINES, Call, Problem, Provider, formula_results, wider
from benchmarks.harness import Candidate, Expected, Protocol, ResultFile, Work
from benchmarks.reporting import cells_of
from benchmarks.roofline import DTYPES, MODES, Shape

# the papers' prompt, and LLaMA-7B's model width at any head width
PROMPT, WIDTH, TOKENS = 10, 4096, 16384
# shapes that are compiled together, and then measured
PORTION = 4
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PROTOCOLS = {"cuda": Protocol(), "cpu": Protocol(rounds=15, warmup=2)}
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
# ours that launch Triton kernels
COMPILED = ("fused", "hybrid", "fused_plain")


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
        title = f"{shape.describe()} {mode}"
        command.measure_cell(cell, title, candidates, device, protocol, results)


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
    """Compile what has no result yet."""
    jobs = [
        (shape, provider.name, device)
        for shape in wanted
        for provider in providers
        if (provider.compiled or provider.name in COMPILED) and provider.supports(shape, device)
        if any(provider.name not in results.of(cell_of(shape, mode)) for mode in MODES)
    ]
    command.compile_ahead(compile_one, jobs)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    protocol = command.QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    results = command.open_results("attention", options, SOURCES, protocol)
    providers = [one for one in PROVIDERS if not (options.quick and one.compiled)]
    wanted = shapes(device.type, command.extent_of(options))
    for portion in command.in_time(wanted, results, PORTION):
        if device.type == "cuda":
            compile_ahead(portion, providers, device, results)
        for shape in portion:
            measure_shape(shape, providers, device, protocol, results)
    cells = cells_of(results.rows.values())
    text, verdicts = report(cells, results.environment, trial=options.quick)
    command.publish(results, text, {"verdicts": verdicts}, figures(cells))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("attention", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
