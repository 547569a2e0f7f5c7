"""The ViT's world of `benchmarks.hosts`: six tasks in VTAB-1k's files, Tables 7 and 9 in kind."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from transformers import ViTForImageClassification, ViTModel

from benchmarks.ablation_report import Section
from benchmarks.hosts_plan import Entry, Row, Run, World
from benchmarks.hosts_runs import measure_method
from benchmarks.hosts_vision_models import (
    BATCH,
    LAYERS,
    PATCH,
    PREPARATION,
    WIDTH,
    loaded,
    train_vit,
)
from benchmarks.hosts_vision_pictures import SIDE, write_png
from benchmarks.hosts_vision_report import examples_of_images
from benchmarks.hosts_vision_tables import vit_sections
from benchmarks.hosts_vision_tasks import TASKS
from llama_adapter.host_training.fit import FitConfig
from llama_adapter.tasks.image_pixels import ImageCache
from llama_adapter.tasks.vtab import BOTH, TEST, TRAIN, VALIDATION, VtabTask

NAME = "vit"
PROMPTS = 8
ENTRIES = {
    "zero_init": Entry("zero-init attention", "zero_init", {"prompt_length": PROMPTS}),
    "linear": Entry("linear head", "linear"),
    "bias": Entry("bias", "bias"),
    "adapter": Entry("adapter", "adapter", {"reduction": 8}),
    "vpt_shallow": Entry("VPT shallow", "vpt_shallow", {"prompt_length": PROMPTS}),
    "vpt_deep": Entry("VPT deep", "vpt_deep", {"prompt_length": PROMPTS}),
    "side": Entry("side-tuning", "side"),
    "lora": Entry("LoRA, rank 4", "lora", {"rank": 4, "lora_alpha": 8}),
    "flamingo": Entry("gated layers, as Flamingo", "flamingo", {"prompt_length": PROMPTS}),
    "full": Entry("full", "full"),
}


@dataclass(frozen=True)
class Size:
    """How large this world is.

    Attributes:
        steps: of pre-training.
        tasks: names of TASKS.
        train, validation, test: images of each.
        config: of a training.
        grid: learning rates.
        seeds: of the trainings.
    """

    steps: int
    tasks: tuple[str, ...]
    train: int
    validation: int
    test: int
    config: FitConfig
    grid: tuple[float, ...]
    seeds: tuple[int, ...]


FULL = Size(
    steps=1000,
    tasks=tuple(TASKS),
    train=800,
    validation=200,
    test=600,
    config=FitConfig(
        epochs=8, batch_size=32, weight_decay=0.01, warmup_epochs=0.8, eval_every=8, keep="last"
    ),
    grid=(1e-3, 1e-2, 1e-1),
    seeds=(0, 1, 2),
)
QUICK = Size(
    steps=10,
    tasks=("textures", "scans", "count"),
    train=32,
    validation=16,
    test=60,
    config=FitConfig(epochs=1, batch_size=16, keep="last"),
    grid=(1e-3, 1e-2),
    seeds=(0,),
)


def size_of(quick: bool) -> Size:
    """The full size, or the reduced one."""
    return QUICK if quick else FULL


def make(folder: Path, quick: bool) -> Row:
    """Write the tasks' files and pre-train the host."""
    size = size_of(quick)
    host = train_vit(size.steps)
    host.save_pretrained(folder / "host")
    for number, name in enumerate(size.tasks):
        write_task(folder / "tasks" / name, name, size, number)
    return {"parameters": sum(p.numel() for p in host.parameters())}


def write_task(folder: Path, name: str, size: Size, seed: int) -> None:
    """Pictures and lists of a task as VTAB-1k has them."""
    counts = {TRAIN: size.train, VALIDATION: size.validation, TEST: size.test}
    generator = torch.Generator().manual_seed(1000 + seed)
    lines: dict[str, list[str]] = {}
    for part, count in counts.items():
        pictures, labels = TASKS[name].draw(count, generator)
        names = [f"images/{part.removesuffix('.txt')}/{i:04d}.png" for i in range(count)]
        write_png(pictures, [folder / one for one in names])
        both = zip(names, labels.tolist(), strict=True)
        lines[part] = [f"{one} {label}\n" for one, label in both]
    lines[BOTH] = lines[TRAIN] + lines[VALIDATION]
    for part, some in lines.items():
        (folder / part).write_text("".join(some), encoding="utf-8")
    text = json.dumps({"group": TASKS[name].group, "classes": TASKS[name].classes}, indent=1)
    (folder / "classes.json").write_text(text + "\n", encoding="utf-8")


@lru_cache(maxsize=1)
def task_at(folder: Path, name: str) -> VtabTask:
    """A task from its files, whose images are kept."""
    task, problems = VtabTask.load(
        folder / "tasks" / name,
        names=TASKS[name].classes,
        preparation=PREPARATION,
        cache=ImageCache(),
    )
    if problems:
        raise ValueError(str(problems[0]))
    return task


@lru_cache(maxsize=1)
def pretrained(folder: Path) -> ViTModel:
    """The host as it was pre-trained."""
    return loaded(partial(ViTModel.from_pretrained, add_pooling_layer=False), folder / "host")


def host_at(folder: Path, classes: int, seed: int) -> ViTForImageClassification:
    """The pre-trained host with a new head."""
    host = pretrained(folder)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = copy.deepcopy(host.config)
        config.num_labels = classes
        model = ViTForImageClassification(config)
    model.vit.load_state_dict(host.state_dict())
    return model


def runs(quick: bool) -> list[Run]:
    """Every method on every task."""
    return [Run(NAME, task, method) for task in size_of(quick).tasks for method in ENTRIES]


def measure(folder: Path, quick: bool, run: Run) -> Row:
    """One method on one task: chosen on 800 and 200 images, trained on all 1000."""
    size, task = size_of(quick), task_at(folder, run.data)
    return measure_method(
        lambda seed: host_at(folder, len(task.labels), seed),
        lambda seed: task,
        ENTRIES[run.method],
        size.config,
        size.grid,
        size.seeds,
        VtabTask.final,
    )


def describe(facts: Row, quick: bool) -> list[str]:
    """Data, host and recipe."""
    size = size_of(quick)
    return [
        f"Host: ViTModel of transformers, {LAYERS} layers of width {WIDTH}, patches of {PATCH} "
        f"pixels, {facts['parameters']:,} parameters, pre-trained to tell shape, texture and "
        f"colour of {BATCH * size.steps:,} pictures of {SIDE} x {SIDE} pixels apart.",
        "",
        f"Tasks, {size.train} and {size.validation} pictures to choose by, both to train on, and "
        f"{size.test} to test, in VTAB-1k's lists: natural are new textures and "
        "hues; specialised the known shapes in grey and noisy scans, and the known textures in "
        "false colours; structured how many things there are, and where one is.",
        "",
        f"Each training takes {size.config.epochs} epochs in batches of {size.config.batch_size}, "
        "AdamW, with a cosine; the learning rate of every method is chosen from "
        f"{', '.join(f'{rate:g}' for rate in size.grid)} on the validation pictures, with the "
        f"first of {len(size.seeds)} seeds. Prompts: {PROMPTS} per layer, in all layers.",
    ]


def sections(rows: Mapping[Run, Row], facts: Row, quick: bool) -> list[Section]:
    """Tables 7 and 9."""
    return vit_sections(rows, ENTRIES, {name: TASKS[name].group for name in size_of(quick).tasks})


def examples(
    folder: Path, quick: bool, rows: Mapping[Run, Row]
) -> tuple[list[str], dict[str, bytes]]:
    """The first test pictures of every task, with what a linear head and zero-init say."""
    found, shown = [], {"linear head": "linear", "zero-init": "zero_init"}
    for name in size_of(quick).tasks:
        task = task_at(folder, name)
        answers = {
            label: [task.labels[i] for i in rows[Run(NAME, name, method)]["predictions"]]
            for label, method in shown.items()
        }
        items = [(Path(one.path), task.labels[one.label]) for one in task.test]
        found.append((f"{name} ({TASKS[name].group})", items, answers))
    return examples_of_images("vit_examples", found)


WORLD = World(
    name=NAME,
    title="ViT: six tasks in VTAB-1k's three groups (Tables 7 and 9)",
    code=(
        "hosts_vision_vit.py",
        "hosts_vision_models.py",
        "hosts_vision_pictures.py",
        "hosts_vision_tasks.py",
    ),
    make=make,
    runs=runs,
    measure=measure,
    describe=describe,
    sections=sections,
    examples=examples,
)
