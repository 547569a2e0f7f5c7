"""The CLIP's world of `benchmarks.hosts`: base-to-novel on three data sets in CoOp's files."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import CLIPModel

from benchmarks.ablation_report import Section
from benchmarks.hosts_plan import Entry, Row, Run, World
from benchmarks.hosts_runs import measure_method
from benchmarks.hosts_vision_domains import CLASSES, DOMAINS, write_domain
from benchmarks.hosts_vision_models import (
    BATCH,
    LAYERS,
    TEXT_LAYERS,
    WIDTH,
    loaded,
    train_clip,
)
from benchmarks.hosts_vision_pictures import SIDE
from benchmarks.hosts_vision_report import SHOWN, examples_of_images
from benchmarks.hosts_vision_tables import clip_sections
from llama_adapter.host_training.fit import FitConfig
from llama_adapter.tasks.base_to_novel import BASE, NOVEL, BaseToNovelTask
from llama_adapter.tasks.few_shot import SHOTS
from llama_adapter.tasks.image_pixels import ImageCache

NAME = "clip"
PROMPTS = 8
# tokens of "a photo of a", which CoOp replaces
CONTEXT = 4
_VISUAL = {"prompt_length": PROMPTS, "encoders": ("visual",)}
ENTRIES = {
    "zero_init": Entry("zero-init, visual encoder", "zero_init", _VISUAL),
    "both": Entry("zero-init, both encoders", "zero_init",
                  {"prompt_length": PROMPTS, "encoders": ("visual", "text")}),
    "frozen": Entry("CLIP, zero-shot", "frozen"),
    "coop": Entry("CoOp", "coop", {"prompt_length": CONTEXT, "template_length": CONTEXT}),
    "vpt_deep": Entry("VPT deep", "vpt_deep", {"prompt_length": PROMPTS}),
    **{
        f"lora{rank}": Entry(f"LoRA, rank {rank}", "lora", {"rank": rank, "encoders": ("visual",)})
        for rank in (2, 4, 8, 16)
    },
    "flamingo": Entry("gated layers, as Flamingo", "flamingo", _VISUAL),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large this world is.

    Attributes:
        steps: of pre-training.
        data: names of DOMAINS.
        counts: pictures of each class, by split.
        shots: of each base class that a seed draws to train on.
        config: of a training.
        grid: learning rates.
        seeds: of the trainings.
    """

    steps: int
    data: tuple[str, ...]
    counts: dict[str, int]
    shots: int
    config: FitConfig
    grid: tuple[float, ...]
    seeds: tuple[int, ...]


FULL = Size(
    steps=1000,
    data=tuple(DOMAINS),
    counts={"train": 32, "val": 8, "test": 40},
    shots=SHOTS,
    config=FitConfig(epochs=10, batch_size=16, warmup_epochs=1.0, eval_every=10, keep="last"),
    grid=(1e-3, 1e-2, 1e-1),
    seeds=(0, 1, 2),
)
QUICK = Size(
    steps=10,
    data=("fence",),
    counts={"train": 4, "val": 2, "test": 3},
    shots=2,
    config=FitConfig(epochs=1, batch_size=10, keep="last"),
    grid=(1e-3, 1e-2),
    seeds=(0,),
)


def size_of(quick: bool) -> Size:
    """The full size, or the reduced one."""
    return QUICK if quick else FULL


def make(folder: Path, quick: bool) -> Row:
    """Write the data sets' files and pre-train the host."""
    size = size_of(quick)
    train_clip(folder / "host", size.steps)
    for number, name in enumerate(size.data):
        write_domain(folder / name, name, size.counts, number)
    return {"parameters": sum(p.numel() for p in pretrained(folder).parameters())}


@lru_cache(maxsize=1)
def pretrained(folder: Path) -> CLIPModel:
    """The host as it was pre-trained."""
    return loaded(CLIPModel.from_pretrained, folder / "host")


@lru_cache(maxsize=1)
def _cache(folder: Path, name: str) -> ImageCache:
    return ImageCache()


@lru_cache(maxsize=8)
def task_at(folder: Path, quick: bool, name: str, seed: int) -> BaseToNovelTask:
    """A data set from its files, with the shots that a seed draws."""
    task, problems = BaseToNovelTask.load(
        folder / name / f"split_zhou_{name}.json",
        folder / name / "images",
        folder / "host",
        shots=size_of(quick).shots,
        seed=seed,
        augment=False,
        cache=_cache(folder, name),
    )
    if problems:
        raise ValueError(str(problems[0]))
    return task


def runs(quick: bool) -> list[Run]:
    """Every method on every data set."""
    return [Run(NAME, data, method) for data in size_of(quick).data for method in ENTRIES]


def measure(folder: Path, quick: bool, run: Run) -> Row:
    """One method on one data set: trained on a few pictures of each base class."""
    size = size_of(quick)
    return measure_method(
        lambda seed: copy.deepcopy(pretrained(folder)),
        lambda seed: task_at(folder, quick, run.data, seed),
        ENTRIES[run.method],
        size.config,
        size.grid,
        size.seeds,
        kept=shown(task_at(folder, quick, run.data, size.seeds[0])),
    )


def shown(task: BaseToNovelTask) -> list[int]:
    """Places of the first test pictures of base classes, and behind them of novel ones."""
    halves = (
        [i for i, one in enumerate(task.test) if one.novel == novel] for novel in (False, True)
    )
    return [place for places in halves for place in places[:SHOWN]]


def describe(facts: Row, quick: bool) -> list[str]:
    """Data, host and recipe."""
    size = size_of(quick)
    kinds = "; ".join(f"{name} has {DOMAINS[name].words}" for name in size.data)
    return [
        f"Host: CLIPModel of transformers, {LAYERS} layers of width {WIDTH} for pictures and "
        f"{TEXT_LAYERS} for texts, {facts['parameters']:,} parameters, pre-trained to tell which "
        f"caption belongs to which of {BATCH * size.steps:,} pictures of {SIDE} x {SIDE} pixels. "
        'A caption is "a photo of a red striped circle.", and may leave texture or colour out.',
        "",
        f"Data sets, in CoOp's split files: {kinds}. Each has {CLASSES} classes, the first half "
        f"base; a training sees {size.shots} pictures of each base class, drawn by the seed, and "
        "base pictures are told among base classes' texts, novel ones among novel classes'.",
        "",
        f"Each training takes {size.config.epochs} epochs in batches of {size.config.batch_size}, "
        "AdamW, with a cosine; the learning rate of every method is chosen from "
        f"{', '.join(f'{rate:g}' for rate in size.grid)} on validation pictures of base classes, "
        f"with the first of {len(size.seeds)} seeds. HM is the harmonic mean of base and novel; "
        "the average's is the mean of the data sets'. Prompts: "
        f"{PROMPTS} per layer, in all layers; CoOp's context has {CONTEXT} tokens.",
    ]


def sections(rows: Mapping[Run, Row], facts: Row, quick: bool) -> list[Section]:
    """Table 11."""
    return clip_sections(rows, ENTRIES, list(size_of(quick).data))


def examples(
    folder: Path, quick: bool, rows: Mapping[Run, Row]
) -> tuple[list[str], dict[str, bytes]]:
    """Test pictures of base and of novel classes, with what CLIP and zero-init say."""
    size, parts = size_of(quick), []
    who = {"CLIP": "frozen", "zero-init": "zero_init"}
    for name in size.data:
        task = task_at(folder, quick, name, size.seeds[0])
        given = {
            label: dict(zip(shown(task), rows[Run(NAME, name, method)]["predictions"], strict=True))
            for label, method in who.items()
        }
        for half in (BASE, NOVEL):
            places = [i for i in shown(task) if task.test[i].novel == (half == NOVEL)]
            names = task.names[half]
            items = [(Path(task.test[i].path), names[task.test[i].label]) for i in places]
            answers = {label: [names[own[i]] for i in places] for label, own in given.items()}
            parts.append((f"{name} ({half})", items, answers))
    return examples_of_images("clip_examples", parts)


WORLD = World(
    name=NAME,
    title="CLIP: base to novel classes on three data sets (Table 11)",
    code=(
        "hosts_vision_clip.py",
        "hosts_vision_domains.py",
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
