"""How long would the paper's whole run take here? `python -m benchmarks.paper_run`.

Optimiser steps of the papers' batch, 64 records of Alpaca's lengths, fresh ones for every step, as
`finetune` takes them: 500 are timed on a GPU in bfloat16, LLaMA 7B with random weights, and the
5 epochs of 52,002 records are extrapolated from them. `--quick` only tries the machinery out, on a
toy.
"""

import argparse
import statistics
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

import adapter_kernels
import llama_adapter
from benchmarks import command, generate_models, harness, train_step_problem
from benchmarks.generate_models import CONFIGS, random_model
from benchmarks.harness import TIMED, Protocol, ResultFile, Row
from benchmarks.reporting import MET, MISSED, PENDING, heading, table
from benchmarks.roofline import DTYPES
from benchmarks.train_step_problem import Setting, alpaca_like
from llama_adapter.adapter import Adapter
from llama_adapter.config import AdapterConfig
from llama_adapter.data.examples import Batch
from llama_adapter.data.feed import ahead
from llama_adapter.trainer import Trainer
from llama_adapter.utilisation import GPUS, gpu_of, linear_flops

RECORDS, EPOCHS, BATCH = 52_002, 5, 64
# as the paper says: under one hour on 8 A100; and what is wanted of one H200
PAPERS_MINUTES, GOAL_MINUTES = 60, 30
# fewer steps say nothing
FEWEST = 5
PROTOCOL = Protocol(rounds=500, warmup=5, round_ms=0.0)
QUICK_PROTOCOL = Protocol(rounds=6, warmup=1, round_ms=0.0)
HERE, MODEL = Path(__file__).parent, Path(llama_adapter.__path__[0])
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__), MODEL / "data" / "packed.py"]
SOURCES += [MODEL / "data" / "feed.py"]
SOURCES += [MODEL / f"{name}.py" for name in ("adapter", "layers", "model", "packing", "trainer")]
SOURCES += [Path(one.__file__ or "") for one in (generate_models, harness, train_step_problem)]
LEGEND = (
    "One process, one GPU: forward, backward and AdamW's step of prompts and gates in float32 on a "
    "frozen base with random weights, which verify speed and not a loss. Records are packed, the "
    "template's beginnings computed once a pass. A step's time begins when the one before it ends, "
    "with the loss on the host; meanwhile a thread packed its records. Utilisation counts the FLOP "
    "of the linear maps."
)


def setting_of(options: argparse.Namespace) -> Setting:
    """What is run.

    Raises:
        ValueError: a processor is asked for 7B.
    """
    if options.quick:
        return Setting("toy", 5, 200, 1, "float32" if options.device == "cpu" else "bfloat16")
    if options.device == "cpu":
        raise ValueError("the paper's run is a GPU's; --quick tries the machinery out on a CPU")
    return Setting("llama-7b", BATCH, 10_000, 1, "bfloat16")


def timed_steps(
    setting: Setting, device: torch.device, protocol: Protocol, results: ResultFile
) -> Row:
    """Take the steps and time each, behind some that are not timed, until the time is up."""
    config = CONFIGS[setting.model]
    base = random_model(config, DTYPES[setting.dtype], device)
    adapter = Adapter(AdapterConfig(), config, generator=torch.Generator().manual_seed(1))
    _, starts = alpaca_like(1, config.vocab_size)
    trainer = Trainer(
        base, adapter.to(device), micro_batch_tokens=setting.micro_tokens, prefixes=starts
    )
    found: list[float] = []
    tokens = computed = rows = 0
    loss = 0.0
    drawn = [
        alpaca_like(setting.records, config.vocab_size, seed=step)[0]
        for step in range(protocol.warmup + protocol.rounds)
    ]
    batches = (Batch(tuple(examples), tuple(trainer.groups)) for examples in drawn)
    with closing(ahead(batches, trainer.prepare)) as feed:
        for step, examples in enumerate(drawn):
            started = time.perf_counter()
            work = next(feed)
            loss, _ = trainer.step(work, 1e-3)
            spent = time.perf_counter() - started
            if step < protocol.warmup:
                continue
            if len(found) >= FEWEST and command.time_is_up(results):
                break
            found.append(spent * 1e3)
            tokens += sum(len(example.tokens) for example in examples)
            sizes = work.computed
            computed, rows = computed + sizes[0], rows + sizes[1]
    low, *_, high = statistics.quantiles(found, n=5, method="inclusive")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "status": TIMED,
        "ms": [round(ms, 3) for ms in (statistics.median(found), low, high)],
        "steps": len(found),
        "each_ms": [round(ms, 1) for ms in found],
        "seconds": round(sum(found) / 1e3, 3),
        "tokens": tokens,
        "computed_tokens": computed,
        "flop": linear_flops(config, computed, rows, len(adapter.layers)),
        "peak_bytes": peak,
        "loss": loss,
    }


def report(setting: Setting, row: Row, environment: Row, trial: bool) -> str:
    """The run as Markdown: what was timed, and what follows for the paper's."""
    steps = -(-RECORDS // BATCH) * EPOCHS
    minutes = row["seconds"] / row["steps"] * steps / 60
    gpu = gpu_of(environment["device"])
    rate = row["flop"] / row["seconds"] / 1e12
    share = "-" if gpu is None else f"{rate / GPUS[gpu].tflops:.1%}"
    middle, low, high = row["ms"]
    lines = [
        ["timed steps", f"{row['steps']} of {setting.describe()}"],
        ["a step, ms (20 %, 80 %)", f"{middle:.1f} ({low:.1f}, {high:.1f})"],
        ["record tokens a second", f"{row['tokens'] / row['seconds']:.0f}"],
        ["computed tokens, of those", f"{row['computed_tokens'] / row['tokens']:.1%}"],
        ["TFLOP/s executed, of peak", f"{rate:.3g}, {share}"],
        ["peak memory, GB", f"{row['peak_bytes'] / 1e9:.2f}"],
    ]
    if not trial:
        lines += [
            ["the paper's run", f"{EPOCHS} epochs of {RECORDS:,} records, {steps:,} steps"],
            ["extrapolated, minutes", f"{minutes:.1f}: {steps / row['steps']:.2f} times the timed"],
            ["the paper's, minutes", f"under {PAPERS_MINUTES} on 8 A100"],
            ["the goal", f"{GOAL_MINUTES} minutes on one H200: {_verdict(minutes, gpu)}"],
        ]
    # one provider, and no turns
    head = [
        x for x in heading("The paper's run", environment, LEGEND, trial) if x[:8] != "Medians "
    ]
    return "\n".join([*head, "", *table(["", ""], lines), ""])


def _verdict(minutes: float, gpu: str | None) -> str:
    """What the extrapolated time says of the goal."""
    if gpu != "H200":
        return PENDING
    return MET if minutes <= GOAL_MINUTES else MISSED


def run(options: argparse.Namespace) -> None:
    """Time, then report."""
    device, setting = torch.device(options.device), setting_of(options)
    protocol = QUICK_PROTOCOL if options.quick else PROTOCOL
    results: ResultFile = command.open_results("paper_run", options, SOURCES, protocol)
    cell: Row = {"shape": asdict(setting), "mode": "run"}
    if "ours" not in results.of(cell):
        results.add(cell, {"ours": timed_steps(setting, device, protocol, results)})
    row = results.of(cell)["ours"]
    text = report(setting, row, results.environment, trial=options.quick)
    command.publish(results, text, {}, {})


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("paper_run", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
