"""What does one line buy a user of PEFT? `python -m benchmarks.dropin`.

The same adaption-prompt model before and after `llama_adapter.integrations.peft.patch`, and without
an adapter: the attention block of one layer, a training step, and generated tokens. On a GPU in
bfloat16, on a processor with one thread in float32. The same command again continues. `--quick`
only tries the machinery out, in seconds.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import adapter_kernels
import llama_adapter
from benchmarks import command, generate_models, harness
from benchmarks.dropin_report import Setting, figures, report
from benchmarks.generate_models import THEIRS
from benchmarks.harness import FAILED, SKIPPED, Candidate, Expected, Protocol, ResultFile, Row, Work
from benchmarks.reporting import cells_of

MODES = ("block", "block_training", "step", "tokens")
PROVIDERS = ("patched", "peft", "transformers")
PROTOCOLS = {
    "cuda": Protocol(rounds=9, warmup=2, round_ms=20.0),
    "cpu": Protocol(rounds=9, warmup=1, round_ms=20.0),
}
QUICK_PROTOCOL = Protocol(rounds=5, warmup=1, round_ms=0.0)
HERE, MODEL = Path(__file__).parent, Path(llama_adapter.__path__[0])
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__), HERE / "dropin_problem.py"]
SOURCES += [HERE / "generate_theirs.py", MODEL / "hosts", MODEL / "integrations" / "peft.py"]
SOURCES += [Path(module.__file__ or "") for module in (generate_models, harness)]


def settings(device: str, extent: str) -> list[Setting]:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    if extent == "quick":
        rows = [("toy", 2, 16, 4, "float32" if device == "cpu" else "bfloat16")]
    elif device == "cpu":
        rows = [("25m", 2, 256, 24, "float32"), ("110m", 1, 256, 8, "float32")]
    else:
        rows = [("llama-7b", 4, 512, 32, "bfloat16")]
        if extent == "full":
            rows += [("llama-7b", 1, 2048, 32, "bfloat16"), ("llama-3-8b", 4, 512, 32, "bfloat16")]
    return [Setting(*row) for row in rows]


def missing_of(cell: Row, results: ResultFile) -> list[str]:
    """The providers that have no result in a cell."""
    held = results.of(cell)
    return [name for name in PROVIDERS if name not in held]


def _candidate(
    given: Any, name: str, mode: str, expected: Mapping[str, Expected], tokens: int
) -> tuple[Candidate, Row]:
    def make() -> Work:
        call = given.call(name, mode)
        return Work(lambda: None, lambda _: call())

    wanted = {} if name == "transformers" else expected
    return Candidate(name, make, wanted, observed=False), {"tokens": tokens}


def measure_setting(
    setting: Setting, device: torch.device, protocol: Protocol, results: ResultFile
) -> None:
    """Measure what is missing of one setting, whose models are made if anything is.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    cells = {mode: {"shape": asdict(setting), "mode": mode} for mode in MODES}
    lacking = {mode: missing_of(cell, results) for mode, cell in cells.items()}
    if not any(lacking.values()):
        return
    absent = [package for package in THEIRS if find_spec(package) is None]
    if absent:
        row = {"status": SKIPPED, "reason": f"{absent[0]} is not installed"}
        for mode, cell in cells.items():
            results.add(cell, dict.fromkeys(lacking[mode], row))
        return
    from benchmarks.dropin_problem import Problem

    given = Problem(setting, device)
    for mode, cell in cells.items():
        if not lacking[mode]:
            continue
        try:
            expected = given.expected(mode)
        except harness.FAILURES as error:
            row = {"status": FAILED, "reason": harness.one_line(error)}
            results.add(cell, dict.fromkeys(lacking[mode], row))
            continue
        found = [
            _candidate(given, name, mode, expected, given.tokens_of(mode)) for name in lacking[mode]
        ]
        facts = {candidate.name: row for candidate, row in found}
        title = f"{mode} {setting.describe()}"
        candidates = [candidate for candidate, _ in found]
        command.measure_cell(cell, title, candidates, device, protocol, results, facts)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    protocol = QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    results = command.open_results("dropin", options, SOURCES, protocol, THEIRS)
    for (setting,) in command.in_time(settings(device.type, command.extent_of(options)), results):
        measure_setting(setting, device, protocol, results)
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
    return command.carry_out("dropin", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
