"""The part of `benchmarks.hosts` on language: Tables 8 and 10 in kind.

A small RoBERTa reads the world of `hosts_text_world`, is frozen, and every method trains it on
SQuAD 1.1 and 2.0, CoNLL03 and CoNLL05, written as files and read by `llama_adapter.tasks`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import (
    AutoTokenizer,
    RobertaForQuestionAnswering,
    RobertaForTokenClassification,
)
from transformers.utils import logging

from benchmarks.ablation_claims import Spread
from benchmarks.ablation_report import Section, markdown_table
from benchmarks.hosts_plan import Entry, Row, Run, World, mean_of, scores_of
from benchmarks.hosts_runs import measure_method
from benchmarks.hosts_text_claims import Table, claims
from benchmarks.hosts_text_host import SHAPE, pretrain
from benchmarks.hosts_text_tasks import Sizes, load_task, write_data
from llama_adapter.host_training.fit_config import FitConfig
from llama_adapter.tasks.task import Task

PROMPTS, STD = 16, 1.0
_PREFIX = {"prompt_length": PROMPTS, "prompt_std": STD}
ENTRIES = {
    "full": Entry("full", "full"),
    "linear": Entry("head alone", "linear"),
    "prompt_tuning": Entry("prompt tuning (PT)", "prompt_tuning", _PREFIX),
    "p_tuning_v2": Entry("P-tuning v2 (PT2)", "p_tuning_v2", {**_PREFIX, "prefix_dropout": 0.0}),
    "zero_kv": Entry("zero-init on PT2", "zero_init", {**_PREFIX, "prompt_kind": "kv"}),
    "zero_hidden": Entry("zero-init, hidden prompts", "zero_init", _PREFIX),
    "bias": Entry("bias", "bias"),
    "adapter": Entry("adapter", "adapter"),
    "lora": Entry("LoRA, rank 4", "lora", {"rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}),
}
TITLES = {"squad": "SQuAD 1.1", "squad2": "SQuAD 2.0", "conll03": "CoNLL03", "conll05": "CoNLL05"}
EXAMPLES = 8


@dataclass(frozen=True)
class Plan:
    """How large the part is.

    Attributes:
        steps: of pre-training.
        sizes, epochs: by data set.
        grid: of learning rates, for every method.
        seeds: of the method's and the head's initial values, and of the order.
    """

    steps: int
    sizes: Mapping[str, Sizes]
    epochs: Mapping[str, int]
    grid: tuple[float, ...]
    seeds: tuple[int, ...]


FULL = Plan(
    steps=3600,
    sizes={
        "squad": Sizes(600, 250, 400),
        "squad2": Sizes(1000, 250, 400),
        "conll03": Sizes(24, 100, 300),
        "conll05": Sizes(160, 100, 300),
    },
    epochs={"squad": 8, "squad2": 5, "conll03": 60, "conll05": 20},
    grid=(0.001, 0.005, 0.025, 0.1),
    seeds=(0, 1, 2),
)
QUICK = Plan(
    steps=40,
    sizes=dict.fromkeys(TITLES, Sizes(16, 8, 8)),
    epochs=dict.fromkeys(TITLES, 1),
    grid=(0.005,),
    seeds=(0,),
)
BATCH, WARMUP, CLIP, VALIDATIONS = 16, 0.1, 1.0, 4


def plan_of(quick: bool) -> Plan:
    """The plan."""
    return QUICK if quick else FULL


def config_of(plan: Plan, data: str) -> FitConfig:
    """What all trainings on a data set have in common."""
    epochs = plan.epochs[data]
    return FitConfig(
        epochs=epochs,
        batch_size=BATCH,
        schedule="linear",
        warmup_epochs=WARMUP * epochs,
        clip=CLIP,
        eval_every=max(1, epochs // VALIDATIONS),
    )


def make(folder: Path, quick: bool) -> Row:
    """Write the data sets, pre-train the host, and return what the report says of both."""
    plan = plan_of(quick)
    for data, sizes in plan.sizes.items():
        write_data(folder, data, sizes)
    busy = time.process_time()
    logging.disable_progress_bar()
    host = pretrain(folder / "host", plan.steps)
    return {"host": host, "pretraining_processor_seconds": round(time.process_time() - busy, 1)}


def runs(quick: bool) -> list[Run]:
    """Every method on every data set, those of the first claims first."""
    first = ("full", "linear", "p_tuning_v2", "zero_kv")
    ordered = [*first, *(name for name in ENTRIES if name not in first)]
    return [Run("text", data, method) for method in ordered for data in TITLES]


@cache
def _task(folder: Path, data: str) -> Task:
    return load_task(folder, data, AutoTokenizer.from_pretrained(folder / "host"))


def host_of(folder: Path, task: Task, seed: int) -> nn.Module:
    """The pre-trained host with a task's head, whose initial values are drawn."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if task.kind == "question-answering":
            return RobertaForQuestionAnswering.from_pretrained(folder / "host")
        return RobertaForTokenClassification.from_pretrained(
            folder / "host", num_labels=len(task.labels)
        )


def measure(folder: Path, quick: bool, run: Run) -> Row:
    """One method on one data set, as `hosts_runs.measure_method` returns it."""
    plan, task = plan_of(quick), _task(folder, run.data)
    return measure_method(
        lambda seed: host_of(folder, task, seed),
        lambda seed: task,
        ENTRIES[run.method],
        config_of(plan, run.data),
        plan.grid,
        plan.seeds,
    )


def describe(facts: Row, quick: bool) -> list[str]:
    """What was measured on what."""
    plan, host = plan_of(quick), facts["host"]
    sizes = "; ".join(
        f"{TITLES[data]} {some.train} to train on, {some.validation} to choose by, {some.test} in "
        f"the test, {plan.epochs[data]} epochs"
        for data, some in plan.sizes.items()
    )
    return [
        f"Host: transformers' RoBERTa, {SHAPE['num_hidden_layers']} layers of width "
        f"{SHAPE['hidden_size']}, {host['parameters']:,} parameters with its masked-word head, "
        f"pre-trained by masked words on {host['documents']:,} short texts of a made-up world "
        f"({facts['pretraining_processor_seconds']:.0f} s of a processor; loss {host['loss']:.2f} "
        "per masked word), with a byte-level BPE of them.",
        "",
        f"Data, in the real formats: {sizes}. SQuAD 1.1 asks who, what, where and when of one "
        "or two events, 2.0 of one; half of 2.0's questions (a third in training) have no answer "
        "in their text: place or day is not told, or the event is another. CoNLL03 tags persons, "
        "places, firms and works; the names of its test are others than training's, and half of "
        "all names have two types, between which the context decides. CoNLL05 tags the roles "
        "around a predicate, once for each predicate of a sentence. Cue words stand before 70 % "
        "of the names that the host has read, and before 30 % of those of the tasks.",
        "",
        f"Every method has {PROMPTS} prompts a layer where it has prompts (standard deviation "
        f"{STD:g}), in all layers, batches of {BATCH}, AdamW with linear decay, and the learning "
        f"rates {', '.join(f'{rate:g}' for rate in plan.grid)} to choose from on validation.",
    ]


@dataclass(frozen=True)
class Shown:
    """A table of the paper in kind.

    Attributes:
        name, title: "Table 8", and what the report calls it.
        data: its data sets.
        columns: scores of each by what the header calls them.
        paper: the paper's F1 on the data sets, by method.
    """

    name: str
    title: str
    data: tuple[str, ...]
    columns: Mapping[str, str]
    paper: Mapping[str, str]


TABLES = (
    Shown(
        "Table 8",
        "Span extraction (Table 8 in kind)",
        ("squad", "squad2"),
        {"EM": "exact", "F1": "f1"},
        {
            "full": "94.6 / 89.4",
            "prompt_tuning": "12.0 / 50.2",
            "p_tuning_v2": "94.2 / 84.7",
            "zero_kv": "94.6 / 87.2",
        },
    ),
    Shown(
        "Table 10",
        "Entities and roles (Table 10 in kind)",
        ("conll03", "conll05"),
        {"F1": "f1"},
        {
            "full": "92.6 / 90.2",
            "prompt_tuning": "86.1 / 76.8",
            "p_tuning_v2": "91.8 / 89.4",
            "zero_kv": "92.4 / 89.6",
        },
    ),
)


def rows_of(table: Shown, found: Mapping[Run, Row]) -> dict[str, list[Row]]:
    """The rows of a table's data sets, by method."""
    return {method: [found[Run("text", data, method)] for data in table.data] for method in ENTRIES}


def section(table: Shown, found: Mapping[Run, Row]) -> Section:
    """A table in kind, with a figure and the verdicts on the paper's claims."""
    by = rows_of(table, found)
    header = ["method", "trained", "and head"]
    header += [f"{TITLES[data]} {label}" for data in table.data for label in table.columns]
    header += ["mean F1", "paper's F1", "learning rates", "seconds a training"]
    lines = []
    for method, entry in ENTRIES.items():
        rows = by[method]
        heads = [row["head_parameters"] for row in rows]
        own = rows[0]["parameters"] - heads[0]
        cells = [
            scores_of(row, score).show(".1f") for row in rows for score in table.columns.values()
        ]
        mean, paper = mean_of(rows, "f1").show(".1f"), table.paper.get(method, "")
        rates = " / ".join(f"{row['lr']:g}" for row in rows)
        seconds = median(second for row in rows for second in row["train_seconds"])
        ends = [mean, paper, rates, f"{seconds:.1f}"]
        shown = " / ".join(f"{count:,}" for count in heads)
        lines.append([entry.label, f"{own:,}", shown, *cells, *ends])
    scores = {
        method: {
            TITLES[data]: scores_of(row, "f1") for data, row in zip(table.data, rows, strict=True)
        }
        for method, rows in by.items()
    }
    means = {method: mean_of(rows, "f1") for method, rows in by.items()}
    verdicts = claims(Table(table.name, scores, means, table.paper))
    name = f"text_{table.name.lower().replace(' ', '_')}"
    return Section(table.title, header, lines, verdicts, {name: _figure(table, scores)})


def _figure(table: Shown, scores: Mapping[str, Mapping[str, Spread]]) -> Figure:
    """F1 by method, a panel a data set: medians, and lines over the seeds."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(table.data), sharey=True)
    labels = [entry.label for entry in ENTRIES.values()][::-1]
    for axes, data in zip(panels, table.data, strict=True):
        for place, method in enumerate([*ENTRIES][::-1]):
            found = scores[method][TITLES[data]]
            colour = "#1f6fb4" if method.startswith("zero") else "#777777"
            axes.plot([found.low, found.high], [place, place], color=colour)
            axes.plot([found.median], [place], "o", color=colour)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("F1, %")
        axes.set_title(TITLES[data])
        axes.grid(axis="x", alpha=0.3)
    return figure


def sections(found: Mapping[Run, Row], facts: Row, quick: bool) -> list[Section]:
    """Tables 8 and 10 in kind, with the verdicts on them."""
    return [section(table, found) for table in TABLES]


def examples(
    folder: Path, quick: bool, found: Mapping[Run, Row]
) -> tuple[list[str], dict[str, bytes]]:
    """Some of SQuAD 2.0's test questions, with what the methods of the first seed answer."""
    methods = ("linear", "p_tuning_v2", "zero_kv", "full")
    answers = {
        method: [answer["text"] for answer in found[Run("text", "squad2", method)]["predictions"]]
        for method in methods
    }
    header = ["text", "question", "right", *(ENTRIES[method].label for method in methods)]
    lines = []
    for place, item in enumerate(_task(folder, "squad2").test[:EXAMPLES]):
        right = item.answers[0] if item.answers else ""
        given = [right, *(answers[method][place] for method in methods)]
        lines.append([item.context, item.question, *(text or "(none)" for text in given)])
    told = "The first questions of SQuAD 2.0's test, and the answers of the first seed:"
    return [told, "", *markdown_table(header, lines)], {}


WORLD = World(
    name="text",
    title="Language: RoBERTa (section 4.4 and appendix B.2)",
    code=("hosts_text.py", "hosts_text_world.py", "hosts_text_host.py", "hosts_text_tasks.py"),
    make=make,
    runs=runs,
    measure=measure,
    describe=describe,
    sections=sections,
    examples=examples,
)
