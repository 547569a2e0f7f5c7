"""The papers' ablations in kind, on the bundled base: `python -m benchmarks.ablations`.

Four experiments (inserted layers; zero-init against random init; longer training; LoRA and full
fine-tuning) are a table of runs. Each row is written as soon as it is measured, and the same
command again continues. What does not reproduce is printed as not reproduced.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation_plan import FULL, QUICK, Plan, cells
from benchmarks.ablation_report import SECTIONS, Section, picture
from benchmarks.ablation_runs import (
    LORA,
    Laboratory,
    Row,
    Run,
    attention_input_rms,
    laboratory,
    measure,
    measure_in_process,
    score,
)
from benchmarks.run_table import Cell, Results, execute, exit_with, section_of
from benchmarks.workers import command
from llama_adapter import assets
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.options import Parser
from llama_adapter.run_folder import describe_environment

RESULTS = Path(__file__).parent / "results" / "cpu"
QUICK_RESULTS = Path("runs") / "ablations-quick"
TRIAL = ("", "This is the reduced form: it tries the machinery out, its verdicts mean nothing.")


def base_facts(lab: Laboratory) -> Row:
    """What the untouched base does on the held-out records, and the unit of the sigmas."""
    loss, right = score(lab.base.model, None, lab.data.held_out)
    by_layer = attention_input_rms(lab)
    return {
        "held_out_loss": loss,
        "accuracy": sum(right) / len(right),
        "rms": math.sqrt(sum(value**2 for value in by_layer) / len(by_layer)),
        "rms_by_layer": [round(value, 4) for value in by_layer],
        "parameters": sum(p.numel() for p in lab.base.model.parameters()),
    }


def identity(lab: Laboratory, base: Path) -> Row:
    """What every row depends on besides its run."""
    recipe = {
        name: value
        for name, value in asdict(lab.recipe).items()
        if name not in ("data", "output", "base", "device", "threads", "max_steps")
    }
    digest = hashlib.sha256((base / "consolidated.00.pth").read_bytes()).hexdigest()
    return {
        "base": {"sha256": digest, "shape": lab.base.model.config.describe()},
        "data": {Path(file).name: sha for file, sha in lab.data.digests.items()},
        "held_out": len(lab.data.held_out),
        "recipe": json.loads(json.dumps(recipe, default=str)),
    }


def report(
    results: Results[Run], table: Sequence[Cell[Run]], base: Row, folder: Path
) -> tuple[dict[str, str], Row]:
    """Tables, figures and verdicts of every finished experiment.

    Args:
        results: the rows.
        table: all cells.
        base: facts of the untouched base.
        folder: where the figures go.

    Returns:
        By experiment, the text as Markdown, and the verdicts as plain data.
    """
    texts: dict[str, str] = {}
    verdicts: Row = {}
    for name, make_section in SECTIONS.items():
        section = section_of(name, results, table, partial(make_section, base=base))
        if not isinstance(section, Section):
            texts[name] = section
            continue
        failed = [
            f"- {cell.setting}, seed {cell.run.seed}, broke off: {row['failure']}"
            for cell in table
            if cell.experiment == name and (row := results.rows[cell.run]).get("failure")
        ]
        texts[name] = "\n".join([section.text(), *failed])
        verdicts[name] = [asdict(claim) for claim in section.claims]
        for figure_name, figure in section.figures.items():
            write_atomically(folder / f"ablations_{figure_name}.png", picture(figure))
    return texts, verdicts


def describe(plan: Plan, lab: Laboratory, facts: Row) -> str:
    """What was measured on what, in a few lines."""
    recipe, config = lab.recipe, lab.base.model.config
    steps = plan.epochs * math.ceil(plan.records / recipe.batch_size)
    return "\n".join(
        [
            "# The papers' ablations in kind",
            "",
            f"Base: {config.describe()}, {facts['parameters']:,} parameters; "
            f"untouched it answers {facts['accuracy']:.1%} of {len(lab.data.held_out)} held-out "
            f"instructions exactly, at {facts['held_out_loss']:.3f} nats per token.",
            f"RMS of the normed attention input: {facts['rms']:.3f} (by layer: "
            f"{', '.join(f'{value:.2f}' for value in facts['rms_by_layer'])}); sigma is the "
            "prompts' initial standard deviation in units of it.",
            f"Unless said otherwise a run takes {steps} steps of {recipe.batch_size} records "
            f"({plan.records} records drawn by the seed, {plan.epochs} epochs), the bundled "
            f"recipe's learning rate {recipe.peak_lr:g} and prompt scale "
            f"{recipe.adapter.prompt_std:g}, and adapts "
            f"{len(recipe.adapter.layers_of(config.n_layers))} layers. "
            f"LoRA: PEFT, rank {LORA['r']}, alpha {LORA['lora_alpha']}, on "
            f"{' and '.join(LORA['target_modules'])} as Alpaca-LoRA. Where several learning rates "
            "were tried, the one with the best median accuracy is compared.",
            f"Numbers are medians over {len(plan.seeds)} seeds (lowest to highest). Above and "
            "below mean that these ranges do not overlap.",
            *(TRIAL if plan.seeds == QUICK.seeds else ()),
            "",
            "",
        ]
    )


def _environment() -> Row:
    found: dict[str, Any] = describe_environment(torch.device("cpu"))
    found["packages"] |= {name: importlib.metadata.version(name) for name in ("peft", "matplotlib")}
    return found


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.ablations", description=__doc__, allow_abbrev=False)
    parser.add_argument("--experiment", choices=list(SECTIONS), help="run one of them only")
    parser.add_argument("--quick", action="store_true", help="a reduced form, in under a minute")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help=f"folder (default: {RESULTS.name}'s results)")
    parser.add_argument(
        "--base", type=Path, default=assets.BASE, help="base model; the bundled one"
    )
    return parser


def run_plan(plan: Plan, options: argparse.Namespace, folder: Path) -> None:
    """Measure what is missing of a plan, then report."""
    folder.mkdir(parents=True, exist_ok=True)
    lab = laboratory(options.base, plan.held_out)
    facts = base_facts(lab)
    table = cells(plan, lab.recipe, lab.base.model.config.n_layers, facts["rms"])
    results = Results(
        folder / "ablations.json", Run, identity(lab, options.base), _environment(), options.fresh
    )
    said = {"untouched_base": facts, "plan": asdict(plan), "lora": LORA}
    chosen = [options.experiment] if options.experiment else list(SECTIONS)
    wanted = dict.fromkeys(cell.run for cell in table if cell.experiment in chosen)
    runs = [run for run in wanted if run not in results.rows]
    heading = describe(plan, lab, facts)
    print(f"{heading}{len(runs)} of {len(wanted)} runs to go\n", flush=True)
    start = time.perf_counter()
    here = partial(measure, lab)
    away = partial(measure_in_process, options.base, plan.held_out)
    with closing(execute(runs, here, away, options.jobs)) as measured:
        for done, (run, row) in enumerate(measured, 1):
            results.add(run, row)
            results.write(table, said, {})
            outcome = f"{row['accuracy']:6.1%}" if "accuracy" in row else "timed "
            print(
                f"{done:3d}/{len(runs)} {time.perf_counter() - start:5.0f} s  {outcome}  "
                f"{run.method} L={run.n_layers} std={run.prompt_std:g} lr={run.lr:g} "
                f"records={run.records} epochs={run.epochs} seed={run.seed}",
                flush=True,
            )
    texts, verdicts = report(results, table, facts, folder)
    results.write(table, said, verdicts)
    write_atomically(folder / "ablations.md", (heading + "\n".join(texts.values())).encode())
    print("", *(texts[name] for name in chosen), f"written to {folder}", sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the ablations.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    options = _parser().parse(arguments)
    plan = QUICK if options.quick else FULL
    folder = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    return command("ablations", partial(run_plan, plan, options, folder))


if __name__ == "__main__":
    exit_with(main)
