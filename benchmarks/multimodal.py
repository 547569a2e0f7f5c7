"""The papers' results on images in kind, on a CPU: `python -m benchmarks.multimodal`.

It writes the bundled task in ScienceQA's files, pre-trains a tiny LLaMA and a tiny CLIP beside it,
freezes both, and trains adapters: a table of runs. Each row is written as soon as it is measured,
and the same command again continues. What does not reproduce is printed as not reproduced.
"""

import argparse
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation_report import Section, picture
from benchmarks.multimodal_lab import (
    RECIPE,
    SCALES,
    VISUAL_LAYERS,
    VISUAL_TOKENS,
    Laboratory,
    answers,
    is_instruction,
    key_norm_ratio,
    laboratory,
    scores_of,
)
from benchmarks.multimodal_models import BASE_BATCH, BASE_SHAPE, CLIP_BATCH, CLIP_SHAPE
from benchmarks.multimodal_plan import FULL, QUICK, Plan, cells
from benchmarks.multimodal_report import (
    SECTIONS,
    examples_figure,
    large_picture,
    one_example,
)
from benchmarks.multimodal_runs import Run, measure, measure_in_process
from benchmarks.multimodal_task import PICTURED, QUOTA
from benchmarks.multimodal_workplace import Workplace
from benchmarks.run_table import Cell, Results, Row, execute, exit_with, section_of
from benchmarks.workers import command
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.evaluation.scienceqa import LETTERS, classes_of, prompt_of
from llama_adapter.options import Parser
from llama_adapter.run_folder import describe_environment

RESULTS = Path(__file__).parent / "results" / "cpu"
WORK = Path("runs") / "multimodal"
# of the recipe
_DECIDING = ("batch_size", "lr", "warmup_epochs", "weight_decay", "betas", "adapter")
TRIAL = ("", "This is the reduced form: it tries the machinery out, its verdicts mean nothing.")


def guessing(lab: Laboratory) -> dict[str, float]:
    """Accuracy in percent of a guess among each question's options, by column."""
    test = lab.items["test"]
    shares: dict[str, list[float]] = {}
    for item in test:
        kinds = [item["topic"], *(["pictured"] if item["topic"] in PICTURED else [])]
        for name in (*classes_of(item), *kinds):
            shares.setdefault(name, []).append(100 / len(item["choices"]))
    return {name: sum(values) / len(values) for name, values in shares.items()}


def facts_of(lab: Laboratory, made: Row) -> Row:
    """What the untouched base answers, what guessing gives, and what was made."""
    test = lab.items["test"]
    predictions = answers(lab, None, "multi", lab.examples(test, False))
    return {
        "base_scores": scores_of(test, predictions),
        "chance": guessing(lab),
        "base_instructions": scores_of(
            *zip(
                *(
                    (item, text)
                    for item, text in zip(test, predictions, strict=True)
                    if is_instruction(item)
                ),
                strict=True,
            )
        )["Avg"],
        "pretraining_processor_seconds": made,
        "key_norm_ratio": round(key_norm_ratio(lab), 2),
        "base_parameters": sum(p.numel() for p in lab.base.model.parameters()),
        "questions": {split: len(items) for split, items in lab.items.items()},
    }


def identity(lab: Laboratory, place: Workplace) -> Row:
    """What every row depends on besides its run."""
    recipe = json.loads(json.dumps(asdict(RECIPE), default=str))
    base = (place.base / "consolidated.00.pth").read_bytes()
    return {
        "task": hashlib.sha256(place.problems.read_bytes()).hexdigest(),
        "base": {"sha256": hashlib.sha256(base).hexdigest(), "shape": BASE_SHAPE},
        "encoder": {"digest": lab.pictures["multi"].encoder.digest, "shape": CLIP_SHAPE},
        "recipe": {name: recipe[name] for name in _DECIDING},
        "scales": SCALES,
        "early": {"tokens": VISUAL_TOKENS, "layers": VISUAL_LAYERS},
    }


def describe(plan: Plan, lab: Laboratory, facts: Row) -> str:
    """What was measured on what, in a few lines."""
    shares = ", ".join(f"{5 * share} % {kind}" for kind, share in QUOTA.items())
    needed = 5 * sum(QUOTA[kind] for kind in PICTURED)
    made, adapter = facts["pretraining_processor_seconds"], RECIPE.adapter
    return "\n".join(
        [
            "# The papers' results on images in kind",
            "",
            f"Task: {facts['questions']['train']} questions to train on and "
            f"{facts['questions']['test']} of the test, in ScienceQA's files: {shares}. The "
            f"{needed} % see and recall (a fact of the thing shown) cannot be answered without "
            "their picture; told has a picture and a text that tells of it, read a text alone, "
            "fact neither. The test's pairs of shape and colour, and of thing and fact, are "
            "others than training's. Half of all questions are put in words that the base has "
            "not read. The prompt is ScienceQA's QCM; the answer is the right option and its "
            "letter (QCM-EA with the option for an explanation: a base this small does not find "
            "the way from a fact to the bare letter). Answers are decoded greedily and "
            "scored by `llama_adapter.evaluation.scienceqa`; one without a usable letter is wrong. "
            "All numbers are percent.",
            "",
            f"Base: {lab.base.model.config.describe()}, {facts['base_parameters']:,} parameters, "
            f"pre-trained on {BASE_BATCH * plan.sizes.base_steps:,} short texts of facts and of "
            f"questions ({made['base']:.0f} s of a processor), and frozen. Untouched it answers "
            f"{facts['base_scores']['Avg']:.1f} % of the test, and "
            f"{facts['base_instructions']:.1f} % of the questions on facts that are put in words "
            "new to it.",
            "",
            f"Encoder: CLIPVisionModelWithProjection, {CLIP_SHAPE['num_hidden_layers']} layers of "
            f"width {CLIP_SHAPE['hidden_size']}, pre-trained to tell captions of "
            f"{CLIP_BATCH * plan.sizes.encoder_steps:,} pictures of its own apart, as CLIP is "
            f"({made['encoder']:.0f} s): it sees no question and no answer, and no pair of shape "
            "and colour that the test has. Then it is frozen.",
            "",
            f"A run on the task takes {plan.steps} steps of {RECIPE.batch_size} questions, peak "
            f"learning rate {RECIPE.peak_lr:g}, {adapter.prompt_length} prompts in each of the "
            f"{adapter.n_layers} layers, drawn with the standard deviation {adapter.prompt_std:g}: "
            f"at first their keys are {facts['key_norm_ratio']:g} times as long as those of "
            "tokens. Early fusion has prompts in all layers too. Instructions and captions take "
            f"{plan.stage_steps} steps each.",
            "",
            f"Numbers are medians over {len(plan.seeds)} seeds (lowest to highest), of the "
            "adapter's initial values and the order of the questions; task, base and encoder are "
            "the same. Above and below mean that these ranges do not overlap.",
            *(TRIAL if plan == QUICK else ()),
            "",
            "",
        ]
    )


def notes(facts: Row) -> dict[str, str]:
    """What must be known to read an experiment's table."""
    return {
        "groups": "INST: questions on facts, without picture or text, put in words new to the "
        f"base ({facts['base_instructions']:.1f} % untouched). CAP: colour, shape, count and place "
        "in captions of the test's pictures, each behind the right words before it. VQA: "
        "questions of kind see, which no run here trains. A to D learn instructions (questions "
        "without pictures) by the language group first, then captions; E and F both in turn, in "
        "batches of one kind each.\n",
    }


def report(
    results: Results[Run], plan: Plan, lab: Laboratory, facts: Row, folder: Path
) -> tuple[dict[str, str], Row]:
    """Tables, figures and verdicts of every finished experiment.

    Returns:
        By experiment, the text as Markdown, and the verdicts as plain data.
    """
    texts: dict[str, str] = {}
    verdicts: Row = {}
    table = cells(plan)
    for name, make_section in SECTIONS.items():
        section = section_of(name, results, table, partial(make_section, facts=facts))
        if not isinstance(section, Section):
            texts[name] = section
            continue
        texts[name] = "\n".join([section.text(), notes(facts).get(name, "")])
        verdicts[name] = [asdict(claim) for claim in section.claims]
        for figure_name, figure in section.figures.items():
            write_atomically(folder / f"multimodal_{figure_name}.png", picture(figure))
    if "classes" in verdicts:
        texts["examples"] = examples(results, table, lab, folder)
    return texts, verdicts


def examples(
    results: Results[Run], table: Sequence[Cell[Run]], lab: Laboratory, folder: Path
) -> str:
    """Questions that a person can look at, of the first seed: figures, and a text."""
    runs = {c.setting[0]: c.run for c in reversed(table) if c.experiment == "classes"}
    test = lab.items["test"]
    given = {
        name: results.rows[runs[key]]["letters"]
        for name, key in (("text-only", "text"), ("multi-modal", "late"))
    }
    write_atomically(folder / "multimodal_examples.png", picture(examples_figure(test, given)))
    item = test[index := one_example(test, given)]
    write_atomically(folder / "multimodal_example.png", large_picture(item))
    lines = [f"    {line}" for line in prompt_of(item).split("\n")]
    return "\n".join(
        [
            "## Examples",
            "",
            "The first questions of each kind in the test, chosen by place "
            "(`multimodal_examples.png`):",
            "",
            "![questions, pictures and answers](multimodal_examples.png)",
            "",
            "One of them, the first on a fact of what is shown that the multi-modal adapter "
            "answers rightly:",
            "",
            "![a picture](multimodal_example.png)",
            "",
            *lines,
            "",
            f"Right: {LETTERS[item['answer']]}. "
            + " ".join(f"{name}: {letters[index]}." for name, letters in given.items()),
            "",
        ]
    )


def _environment() -> Row:
    found: dict[str, Any] = describe_environment(torch.device("cpu"))
    names = ("transformers", "pillow", "matplotlib")
    found["packages"] |= {name: importlib.metadata.version(name) for name in names}
    return found


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.multimodal", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a reduced form, in a minute")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help=f"folder (default: {RESULTS.name}'s results)")
    parser.add_argument(
        "--work", type=Path, help="folder of the task and the frozen models, made where absent"
    )
    return parser


def outcome(row: Row) -> str:
    """A run's result in a few words."""
    if "scores" in row:
        found = row["scores"]
        return f"Avg {found['Avg']:5.1f} IMG {found['IMG']:5.1f} NO {found['NO']:5.1f}"
    return " ".join(f"{name} {value:5.1f}" for name, value in row["after"].items())


def run_plan(plan: Plan, options: argparse.Namespace, folder: Path, work: Path) -> None:
    """Make the task and the models, measure what is missing of a plan, then report."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    place = Workplace(work)
    made = place.make(plan.sizes, partial(print, flush=True))
    lab = laboratory(work)
    facts = facts_of(lab, made)
    table = cells(plan)
    results = Results(
        folder / "multimodal.json", Run, identity(lab, place), _environment(), options.fresh
    )
    said = {"facts": facts, "plan": asdict(plan)}
    wanted = dict.fromkeys(cell.run for cell in table)
    runs = [run for run in wanted if run not in results.rows]
    heading = describe(plan, lab, facts)
    print(f"{heading}{len(runs)} of {len(wanted)} runs to go\n", flush=True)
    here, away = partial(measure, lab), partial(measure_in_process, work)
    with closing(execute(runs, here, away, options.jobs)) as measured:
        for done, (run, row) in enumerate(measured, 1):
            results.add(run, row)
            results.write(table, said, {})
            print(
                f"{done:3d}/{len(runs)} {time.perf_counter() - start:5.0f} s  {outcome(row)}  "
                f"{run.kind} {run.fusion} {run.scales} {run.groups} pictured={run.pictured} "
                f"seed={run.seed}",
                flush=True,
            )
    texts, verdicts = report(results, plan, lab, facts, folder)
    results.write(table, said, verdicts)
    spent = sum(results.rows[run]["processor_seconds"] for run in wanted) + sum(made.values())
    end = f"\nProcessor time of all of it: {spent / 60:.1f} minutes, with one thread a process.\n"
    text = heading + "\n".join(texts.values()) + end
    write_atomically(folder / "multimodal.md", text.encode())
    print("", *texts.values(), end, f"written to {folder}", sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    options = _parser().parse(arguments)
    plan = QUICK if options.quick else FULL
    work = options.work or WORK / ("quick" if options.quick else "full")
    folder = options.output or (work / "results" if options.quick else RESULTS)
    return command("multimodal", partial(run_plan, plan, options, folder, work))


if __name__ == "__main__":
    exit_with(main)
