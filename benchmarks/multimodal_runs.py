"""One run of the multi-modal benchmark: train an adapter on the bundled task, then score it.

Everything is the library's own: pictures' features through `Pictures`, steps through `Trainer`,
files and class columns through `evaluation.scienceqa`.
"""

import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.multimodal_lab import (
    RECIPE,
    VISUAL_LAYERS,
    VISUAL_TOKENS,
    Laboratory,
    answers,
    exact,
    is_instruction,
    laboratory,
    letters_of,
    logits_of,
    scores_of,
    with_pictures_of,
)
from llama_adapter.adapter import LANGUAGE, VISUAL, Adapter
from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.feed import EpochBatches, JointBatches
from llama_adapter.recipe import learning_rate
from llama_adapter.trainer import Trainer

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one run trains, completely: equal runs give equal numbers.

    Attributes:
        kind: "questions", on the task; "sequential", on instructions, then on captions; "joint", on
            both in turn.
        fusion: "text" leaves all pictures out, "late" and "early" are the adapter's.
        scales: of SCALES, which layers' features describe a picture.
        groups: "all" parameters learn from everything, "disjoint" groups each from its own kind.
        pictured: questions with a picture that are trained on, the first ones; -1 for all.
        steps: optimiser steps, of each stage.
        seed: of the order and all initial values.
    """

    kind: str
    fusion: str
    scales: str
    groups: str
    pictured: int
    steps: int
    seed: int


def make_trainer(lab: Laboratory, run: Run) -> Trainer:
    """An adapter at its initial values, and what trains it."""
    pictures = lab.pictures[run.scales]
    visual = None
    if run.fusion == "late":
        visual = pictures.visual_config()
    elif run.fusion == "early":
        visual = pictures.visual_config(fusion="early", tokens=VISUAL_TOKENS, layers=VISUAL_LAYERS)
    adapter = Adapter(
        RECIPE.adapter,
        lab.base.model.config,
        generator=torch.Generator().manual_seed(run.seed),
        visual=visual,
    )
    return trainer_of(lab, run, adapter)


def trainer_of(lab: Laboratory, run: Run, adapter: Adapter) -> Trainer:
    """A trainer of an adapter, with optimisers that know nothing yet."""
    return Trainer(
        lab.base.model,
        adapter,
        micro_batch_tokens=RECIPE.micro_batch_tokens,
        features=None if adapter.projector is None else lab.pictures[run.scales],
        weight_decay=RECIPE.weight_decay,
        betas=RECIPE.betas,
    )


def train(trainer: Trainer, run: Run, batches: Iterable[Batch]) -> list[float]:
    """Take as many steps as there are batches up to run.steps; returns the losses before each."""
    losses = []
    for step, batch in enumerate(batches):
        if step == run.steps:
            break
        losses.append(trainer.step(batch, learning_rate(RECIPE, step / run.steps))[0])
    return losses


def endless(examples: Sequence[Example], run: Run, groups: tuple[str, ...]) -> Iterable[Batch]:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from EpochBatches(examples, RECIPE.batch_size, run.seed, epoch, groups)
        epoch += 1


def endless_joint(
    examples: Sequence[Example], run: Run, groups: tuple[tuple[str, ...], tuple[str, ...]]
) -> Iterable[Batch]:
    """Batches of text and of pictures in turn, one epoch after the other."""
    seen = np.array([example.image is not None for example in examples])
    epoch = 0
    while True:
        yield from JointBatches(
            examples, seen, RECIPE.batch_size, run.seed, epoch, groups, "alternate"
        )
        epoch += 1


def questions_row(lab: Laboratory, run: Run) -> Row:
    """Train on the task, and score on its test, the pictures in their places and shuffled."""
    trainer = make_trainer(lab, run)
    kept, seen = [], 0
    for item in lab.items["train"]:
        seen += item["has_image"]
        if not item["has_image"] or run.pictured < 0 or seen <= run.pictured:
            kept.append(item)
    pictured = run.fusion != "text"
    batches = endless(lab.examples(kept, pictured), run, tuple(trainer.groups))
    losses = train(trainer, run, batches)
    test, adapter = lab.items["test"], trainer.adapter
    examples = lab.examples(test, pictured)
    predictions = answers(lab, adapter, run.scales, examples)
    row = {
        "scores": scores_of(test, predictions),
        "letters": letters_of(test, predictions),
        "losses": losses,
    }
    if pictured:
        shuffled = with_pictures_of(examples, run.seed)
        row["shuffled"] = scores_of(test, answers(lab, adapter, run.scales, shuffled))
    return row | {
        "trained_on": len(kept),
        "parameters": sum(p.numel() for p in adapter.parameters()),
        "projector": sum(p.numel() for name in VISUAL for p in trainer.groups.get(name, ())),
    }


def skills(lab: Laboratory, adapter: Adapter, scales: str) -> Row:
    """What an adapter of instructions and captions can do, in percent, on the test split.

    INST: questions put as only the task puts them. CAP: captions, exactly. VQA: questions on
    pictures, as only the base has read them of descriptions, which no run of captions trains.
    """
    test = lab.items["test"]
    told = [item for item in test if is_instruction(item)]
    seen = [item for item in test if item["topic"] == "see"]
    found = {"CAP": exact(lab, adapter, scales, lab.captions("test"))}
    for name, some in (("INST", told), ("VQA", seen)):
        predictions = answers(lab, adapter, scales, lab.examples(some))
        found[name] = scores_of(some, predictions)["Avg"]
    return found


def instructions(lab: Laboratory) -> list[Example]:
    """What the language group learns from: questions without pictures."""
    return lab.examples(item for item in lab.items["train"] if not item["has_image"])


def captions_row(lab: Laboratory, run: Run) -> Row:
    """Instructions and captions, one after the other or in turn."""
    trainer = make_trainer(lab, run)
    groups = tuple(trainer.groups)
    own = tuple(name for name in groups if name in LANGUAGE)
    visual = tuple(name for name in groups if name in VISUAL)
    disjoint = run.groups == "disjoint"
    told, seen = instructions(lab), lab.captions("train")
    if run.kind == "joint":
        both = (own, visual) if disjoint else (groups, groups)
        losses = train(trainer, run, endless_joint([*told, *seen], run, both))
        return {"after": skills(lab, trainer.adapter, run.scales), "losses": losses}
    losses = train(trainer, run, endless(told, run, own))
    before = skills(lab, trainer.adapter, run.scales)
    probe = lab.examples((i for i in lab.items["test"] if not i["has_image"]), False)
    logits = logits_of(lab, trainer.adapter, run.scales, probe)[0]
    trainer = trainer_of(lab, run, copy.deepcopy(trainer.adapter))
    losses += train(trainer, run, endless(seen, run, visual if disjoint else groups))
    moved = logits_of(lab, trainer.adapter, run.scales, probe)[0] - logits
    return {
        "before": before,
        "after": skills(lab, trainer.adapter, run.scales),
        "text_logits_moved": float(moved.abs().max()),
        "losses": losses,
    }


def measure(lab: Laboratory, run: Run) -> Row:
    """Train and score one run.

    Args:
        lab: what all runs share.
        run: what is trained.

    Returns:
        Plain data: of "questions" scores, shuffled (with pictures) and letters; else before and
        after, in percent. For all losses by step, and seconds by the clock and processor_seconds.
    """
    start, busy = time.perf_counter(), time.process_time()
    with torch.random.fork_rng([]):
        row = questions_row(lab, run) if run.kind == "questions" else captions_row(lab, run)
    losses = [round(loss, 4) if math.isfinite(loss) else None for loss in row["losses"]]
    return {
        **row,
        "losses": losses,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
    }


def measure_in_process(folder: Path, run: Run) -> tuple[Run, Row]:
    """`measure` for a worker process, which keeps its laboratory; returns the run with its row."""
    return run, measure(laboratory(folder), run)
