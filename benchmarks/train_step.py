"""How fast is a step of fine-tuning, lever by lever? `python -m benchmarks.train_step`.

From the official recipe's padding to what `finetune` runs, each with loss and gradients checked,
beside PEFT's adaption prompts and LoRA under transformers, and litgpt's adapter where litgpt is
installed. On a GPU in bfloat16, on a processor with one thread in float32. The same command again
continues. `--quick` only tries the machinery out, in seconds.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import adapter_kernels
import llama_adapter
from benchmarks import command, generate_models, harness
from benchmarks.generate_models import THEIRS
from benchmarks.harness import FAILED, SKIPPED, Candidate, Protocol, ResultFile, Row, Work
from benchmarks.reporting import cells_of
from benchmarks.train_step_problem import OTHERS, OURS, Problem, Setting, absent
from benchmarks.train_step_report import MODE, figures, report

# a turn is one pass of a whole batch
PROTOCOLS = {
    "cuda": Protocol(rounds=5, warmup=1, round_ms=0.0),
    "cpu": Protocol(rounds=5, warmup=1, round_ms=0.0),
}
QUICK_PROTOCOL = Protocol(rounds=5, warmup=1, round_ms=0.0)
HERE, MODEL = Path(__file__).parent, Path(llama_adapter.__path__[0])
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__), HERE / "train_step_problem.py"]
SOURCES += [HERE / "train_step_litgpt.py", HERE / "generate_theirs.py"]
SOURCES += [MODEL / "data" / "packed.py"]
SOURCES += [MODEL / f"{name}.py" for name in ("adapter", "layers", "model", "packing")]
SOURCES += [Path(module.__file__ or "") for module in (generate_models, harness)]


def settings(device: str, extent: str) -> list[Setting]:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        extent: "quick", "core" or "full", which holds what core does.
    """
    if extent == "quick":
        rows = [("toy", 5, 200, 2, "float32" if device == "cpu" else "bfloat16")]
    elif device == "cpu":
        rows = [("25m", 16, 2048, 4, "float32")]
        rows += [("110m", 16, 2048, 4, "float32")] * (extent == "full")
    else:
        # the papers' batch, in one pass where there is no padding
        whole = (64, 10_000, 16, "bfloat16")
        rows = [("llama-7b", *whole), ("llama-3-8b", *whole)]
        rows += [("llama-7b", 64, 2900, 4, "bfloat16")] * (extent == "full")
    return [Setting(*row) for row in rows]


def measure_setting(
    setting: Setting, device: torch.device, protocol: Protocol, results: ResultFile
) -> None:
    """Measure what is missing of one setting, whose models are made if anything is.

    Raises:
        DeviceLost: a provider broke the GPU's context; its row is kept, the rest is missing.
    """
    cell: Row = {"shape": asdict(setting), "mode": MODE}
    missing = [name for name in (*OURS, *OTHERS) if name not in results.of(cell)]
    if not missing:
        return
    # PEFT's step is the truth of all
    lacking = {name: absent() or absent(name) for name in missing}
    rows = {
        name: {"status": SKIPPED, "reason": f"{package} is not installed"}
        for name, package in lacking.items()
        if package is not None
    }
    results.add(cell, rows)
    missing = [name for name in missing if name not in rows]
    if not missing:
        return
    given = Problem(setting, device)
    try:
        expected = given.expected()
    except harness.FAILURES as error:
        row = {"status": FAILED, "reason": harness.one_line(error)}
        results.add(cell, dict.fromkeys(missing, row))
        return
    candidates = []
    for name in missing:
        call = given.call(name)
        work = Work(lambda: None, lambda _, call=call: call())
        wanted = expected if given.comparable(name) else {}
        candidates.append(Candidate(name, lambda work=work: work, wanted, observed=False))
    facts = {name: given.facts(name) for name in missing}
    title = f"{MODE} {setting.describe()}"
    command.measure_cell(cell, title, candidates, device, protocol, results, facts)


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    protocol = QUICK_PROTOCOL if options.quick else PROTOCOLS[device.type]
    packages = (*THEIRS, "litgpt")
    results = command.open_results("train_step", options, SOURCES, protocol, packages)
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
    return command.carry_out("train_step", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
