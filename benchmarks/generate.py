"""How fast does a whole model decode with an adapter? `python -m benchmarks.generate`.

Our engine with one adapter, none, or one of a bank per sequence, and quantised; transformers with
the same weights, plain and wrapped by PEFT, eager: compiled for a cache of fixed size they are left
out. On a GPU in bfloat16, on a processor with one thread in float32. The same command again
continues. `--quick` only tries the machinery out, in seconds.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import adapter_kernels
import llama_adapter
from benchmarks import (
    command,
    decode,
    generate_models,
    generate_problem,
    generate_truth,
    harness,
)
from benchmarks.decode_problem import READS, Memory, memory_of
from benchmarks.generate_models import BUNDLED, THEIRS, Models
from benchmarks.generate_problem import (
    DECODE,
    MODES,
    Problem,
    Provider,
    Setting,
    facts_of,
    our_work,
    problem,
    their_work,
)
from benchmarks.generate_report import figures, report
from benchmarks.generate_truth import Truths
from benchmarks.harness import FAILED, SKIPPED, Candidate, Protocol, ResultFile, Row, Work
from benchmarks.reporting import cells_of

# kinds of adapters of the processor's models; the others have all
PROCESSOR_KINDS = {BUNDLED: ("plain", "adapter", "bank_1000"), "110m": ("plain", "adapter")}
BATCHES = (1, 8, 32, 128)
# a turn is one pass of all steps: their sum is steady, and decoding elsewhere takes seconds
PROTOCOLS = {
    "cuda": Protocol(rounds=5, warmup=1, round_ms=0.0),
    "cpu": Protocol(rounds=15, warmup=1, round_ms=0.0),
}
QUICK_PROTOCOL = Protocol(rounds=5, warmup=1, round_ms=0.0)
PACKAGES = (*THEIRS, "torchao")
HERE, MODEL = Path(__file__).parent, Path(llama_adapter.__path__[0])
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__), HERE / "generate_theirs.py"]
SOURCES += [
    Path(module.__file__ or "")
    for module in (generate_models, generate_problem, generate_truth, harness)
]
# of the package, what decoding runs through
SOURCES += [
    MODEL / f"{name}.py"
    for name in (
        "adapter", "adapter_bank", "cache", "completion", "decoder", "engine", "layers", "model",
        "sampling",
    )
]  # fmt: skip
PROVIDERS = (
    Provider("ours", "adapter"),
    Provider("ours_plain", "plain"),
    Provider("ours_bank_32", "bank_32"),
    Provider("ours_bank_1000", "bank_1000"),
    Provider("ours_int8", "adapter", weights="int8", needs=("torchao",)),
    Provider("ours_int4", "adapter", weights="int4", needs=("torchao",), devices=("cuda",)),
    Provider("peft", "adapter", ours=False, needs=THEIRS),
    Provider("transformers", "plain", ours=False, needs=THEIRS),
)


def gpu_setting(model: str, batch: int) -> Setting:
    """A prompt of 512 tokens, 128 new ones, bfloat16."""
    return Setting(model, batch, 512, 128, "bfloat16")


def cpu_setting(model: str, batch: int) -> Setting:
    """A prompt of 64 tokens, 32 new ones, float32."""
    return Setting(model, batch, 64, 32, "float32")


def settings(device: str, extent: str) -> list[Setting]:
    """What is measured, the settings of a model side by side.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    if extent == "quick":
        return [Setting("toy", 2, 16, 6, "float32" if device == "cpu" else "bfloat16")]
    if device == "cpu":
        return [cpu_setting(*it) for it in ((BUNDLED, 1), (BUNDLED, 4), ("110m", 1))]
    core = [gpu_setting("llama-7b", batch) for batch in BATCHES]
    grouped = BATCHES if extent == "full" else (1, 32)
    return core + [gpu_setting("llama-3-8b", batch) for batch in grouped]


def claims(provider: Provider, setting: Setting, device: torch.device) -> bool:
    """Whether a provider is measured at a setting."""
    if device.type not in provider.devices:
        return False
    kinds = PROCESSOR_KINDS.get(setting.model)
    return kinds is None or provider.kind in kinds


def cell_of(setting: Setting, mode: str) -> dict[str, Any]:
    """The name of a cell in the results."""
    return {"shape": asdict(setting), "mode": mode}


def missing_of(
    setting: Setting, mode: str, device: torch.device, results: ResultFile
) -> list[Provider]:
    """The providers that claim a cell and have no result there; of the reads, see `reads_of`."""
    held = results.of(cell_of(setting, mode))
    return [one for one in PROVIDERS if claims(one, setting, device) and one.name not in held]


def reads_of(setting: Setting, mode: str, results: ResultFile) -> list[str]:
    """The reads that a cell lacks: decoding is held against the read bandwidth, prompts are not."""
    held = results.of(cell_of(setting, mode))
    return [one.name for one in READS if mode == DECODE and one.name not in held]


def _read(given: Problem, name: str) -> Candidate:
    """The read bandwidth's probe as one more candidate."""
    provider = next(one for one in READS if one.name == name)

    def make() -> Work:
        call = provider.build(given)
        return Work(lambda: None, lambda _: {"out": call()})

    return Candidate(name, make, given.memory.sums[name])


def _candidate(
    given: Problem, truths: Truths, provider: Provider, mode: str
) -> tuple[Candidate, Row] | Row:
    """What is timed of a provider, with the facts of its row; or a row that says why nothing is."""
    absent = [package for package in provider.needs if not command.installed(package)]
    if absent:
        return {"status": SKIPPED, "reason": f"{absent[0]} is not installed"}
    try:
        expected, facts = truths.expected(provider, mode), facts_of(given, provider, mode)
    except harness.FAILURES as error:
        return {"status": FAILED, "reason": harness.one_line(error)}
    work = our_work if provider.ours else their_work
    make = partial(work, given, provider, mode)
    return Candidate(provider.name, make, expected, observed=False), facts


def measure_cell(
    given: Problem, truths: Truths, mode: str, protocol: Protocol, results: ResultFile
) -> None:
    """Measure what is missing of one cell, and keep it.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    setting, device = given.setting, given.models.device
    candidates, facts, none = [], {}, {}
    for provider in missing_of(setting, mode, device, results):
        found = _candidate(given, truths, provider, mode)
        if isinstance(found, tuple):
            candidates.append(found[0])
            facts[provider.name] = found[1]
        else:
            none[provider.name] = found
    for name in reads_of(setting, mode, results):
        candidates.append(_read(given, name))
        facts[name] = {"steps": 1, "tokens": 0, "bytes": given.memory.words.nbytes}
    cell = cell_of(setting, mode)
    results.add(cell, none)
    title = f"{mode} {setting.describe()}"
    command.measure_cell(cell, title, candidates, device, protocol, results, facts)


def measure_model(
    wanted: Sequence[Setting],
    device: torch.device,
    memory: Memory,
    protocol: Protocol,
    results: ResultFile,
) -> None:
    """Measure what is missing of the settings of one model, which is made if anything is.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    models = None
    for (setting,) in command.in_time(wanted, results):
        modes = [
            mode
            for mode in MODES
            if missing_of(setting, mode, device, results) or reads_of(setting, mode, results)
        ]
        if not modes:
            continue
        # what the last setting or model held is in cycles, and a GPU's memory is short
        gc.collect()
        models = models or Models(setting.model, setting.dtype, device)
        given = problem(setting, models, memory)
        truths = Truths(given)
        for mode in modes:
            measure_cell(given, truths, mode, protocol, results)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    protocol = QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    results = command.open_results("generate", options, SOURCES, protocol, PACKAGES)
    size = decode.QUICK_READ_BYTES if options.quick else decode.READ_BYTES[device.type]
    memory = memory_of(size, device)
    wanted = settings(device.type, command.extent_of(options))
    for _, own in groupby(wanted, lambda setting: setting.model):
        measure_model(list(own), device, memory, protocol, results)
    cells = cells_of(results.rows.values(), Setting)
    text, more = report(cells, results.environment, trial=options.quick)
    command.publish(results, text, more, figures(cells))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("generate", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
