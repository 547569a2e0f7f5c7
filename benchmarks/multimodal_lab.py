"""What the runs of the multi-modal benchmark share: task, frozen models, recipe, and scores."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.multimodal_models import caption_prompt, encode, target
from benchmarks.multimodal_task import PICTURED
from benchmarks.multimodal_workplace import Workplace
from benchmarks.multimodal_world import PHRASINGS, Scene
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.config import AdapterConfig
from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.packed import pack
from llama_adapter.evaluation import scienceqa
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.multimodal.clip import ClipFeatures
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.vision import Scales

# the layers whose features describe a picture
SCALES = {"multi": (2, 4, 6), "last": (6,)}
# of early fusion
VISUAL_TOKENS, VISUAL_LAYERS = 4, 1
SCORE_BATCH = 100
# of an answer: the option, its letter, and some to spare
MOST_TOKENS = 8
RECIPE = FinetuneConfig(
    Path("unused"),
    Path("unused"),
    epochs=1,
    warmup_epochs=0.1,
    batch_size=32,
    micro_batch_tokens=1 << 20,
    lr=0.02,
    adapter=AdapterConfig(prompt_length=16, n_layers=6, prompt_std=3.0),
)


@dataclass(frozen=True)
class Laboratory:
    """What all runs share: the frozen models and the task.

    Attributes:
        base: the language model.
        pictures: by name of SCALES, the frozen encoder's features.
        items: of each split, as ScienceQA's loader gives them.
        scenes: what a picture shows, by question.
    """

    base: Base
    pictures: dict[str, Pictures]
    items: dict[str, list[Item]]
    scenes: dict[str, Scene]

    def examples(self, items: Iterable[Item], pictured: bool = True) -> list[Example]:
        """Questions as examples, with their pictures or without."""
        return [
            replace(
                encode(
                    self.base.tokenizer,
                    scienceqa.prompt_of(item),
                    target(item),
                    index,
                ),
                image=item["image"] if pictured else None,
            )
            for index, item in enumerate(items)
        ]

    def captions(self, split: str) -> list[Example]:
        """Pictures of a split, and their captions."""
        return [
            replace(
                encode(
                    self.base.tokenizer,
                    caption_prompt(""),
                    f" {self.scenes[item['id']].caption}",
                    index,
                ),
                image=item["image"],
            )
            for index, item in enumerate(self.items[split])
            if item["has_image"]
        ]


@lru_cache(maxsize=1)
def laboratory(folder: Path) -> Laboratory:
    """Load what `Workplace.make` has made in a folder."""
    place = Workplace(folder)
    items = {
        split: scienceqa.load(place.problems, place.splits, split, place.images)[0]
        for split in ("train", "test")
    }
    scenes = json.loads((place.task / "scenes.json").read_text(encoding="utf-8"))
    pictures = {
        name: Pictures(
            ClipFeatures.load(place.encoder, Scales(layers)),
            place.features,
            scales=Scales(layers),
        )
        for name, layers in SCALES.items()
    }
    return Laboratory(
        load_base(place.base, dtype=torch.float32),
        pictures,
        items,
        {name: Scene(**scene) for name, scene in scenes.items()},
    )


def is_instruction(item: Item) -> bool:
    """Whether a question has neither picture nor text and is put as only the task puts it."""
    return item["topic"] == "fact" and put_anew(item)


def put_anew(item: Item) -> bool:
    """Whether a question is put in words that the base has not read."""
    return any(item["question"].startswith(new.split("{")[0]) for _, new in PHRASINGS.values())


@torch.no_grad()
def logits_of(
    lab: Laboratory, adapter: Adapter | None, scales: str, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Logits (n, V) before each label, the labels (n,), and how many each example has."""
    found, targets, counts = [], [], []
    for start in range(0, len(examples), SCORE_BATCH):
        some = examples[start : start + SCORE_BATCH]
        visual = visual_of(lab, adapter, scales, some)
        some = [replace(one, image=None) for one in some]
        model, batch = lab.base.model, pack(some)
        prompts = None if adapter is None else model.project(adapter, visual)
        hidden = model.hidden_packed(batch.tokens, batch.packing, prompts)
        found.append(model.logits(hidden[batch.rows]))
        targets.append(batch.targets)
        counts += batch.counts
    return torch.cat(found), torch.cat(targets), tuple(counts)


@torch.no_grad()
def answers(
    lab: Laboratory, adapter: Adapter | None, scales: str, examples: Sequence[Example]
) -> list[str]:
    """What greedy decoding writes behind the prompts of examples, up to MOST_TOKENS tokens."""
    model, tokenizer, found = lab.base.model, lab.base.tokenizer, []
    for start in range(0, len(examples), SCORE_BATCH):
        some = examples[start : start + SCORE_BATCH]
        visual = visual_of(lab, adapter, scales, some)
        prompts = None if adapter is None else model.project(adapter, visual)
        asked = [one.labels.count(IGNORE_INDEX) for one in some]
        written: list[list[int]] = [[] for _ in some]
        for _ in range(MOST_TOKENS):
            ids = [(*one.tokens[:n], *w) for one, n, w in zip(some, asked, written, strict=True)]
            batch = pack([Example(0, one, one) for one in ids])
            hidden = model.hidden_packed(batch.tokens, batch.packing, prompts)
            last = model.logits(hidden[batch.packing.cu_seqlens[1:].long() - 1]).argmax(-1)
            for one, token in zip(written, last.tolist(), strict=True):
                one.append(token)
            if all(tokenizer.eos_id in one for one in written):
                break
        found += [tokenizer.decode(_until(one, tokenizer.eos_id)) for one in written]
    return found


def _until(ids: Sequence[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return list(ids[: ids.index(end)] if end in ids else ids)


def visual_of(
    lab: Laboratory, adapter: Adapter | None, scales: str, examples: Sequence[Example]
) -> Tensor | None:
    """What `Llama.project` takes of the pictures of examples."""
    if adapter is None or adapter.projector is None:
        return None
    return adapter.visual_tokens(*lab.pictures[scales]([one.image for one in examples]))


@torch.no_grad()
def key_norm_ratio(lab: Laboratory) -> float:
    """How long prompts' first keys are, over tokens': root mean squares over all layers."""
    model, batch = lab.base.model, pack(lab.examples(lab.items["train"][:SCORE_BATCH], False))
    found: list[Tensor] = []
    hooks = [
        layer.get_submodule("attention.wk").register_forward_hook(
            lambda _module, _inputs, out: found.append(out.square().mean())
        )
        for layer in model.layers
    ]
    model.hidden_packed(batch.tokens, batch.packing)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    prompts = model.project(Adapter(RECIPE.adapter, model.config, generator=generator))
    own = torch.stack([prompt.k.square().mean() for prompt in prompts.layers.values()])
    return float((own.mean() / torch.stack(found).mean()).sqrt())


def with_pictures_of(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples with their pictures shuffled among those that have one."""
    images = [one.image for one in examples if one.image is not None]
    random.Random(f"shuffle {seed}").shuffle(images)
    left = iter(images)
    return [one if one.image is None else replace(one, image=next(left)) for one in examples]


def scores_of(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """Percent right by class column, by kind of question, and of those that need the picture.

    An answer without a usable letter is wrong: luck is no skill.
    """
    rows = [
        scienceqa.score(item, text, fallback="wrong")
        for item, text in zip(items, predictions, strict=True)
    ]
    by_kind: dict[str, list[float]] = {}
    for item, row in zip(items, rows, strict=True):
        kinds = [item["topic"], *(["pictured"] if item["topic"] in PICTURED else [])]
        for kind in kinds:
            by_kind.setdefault(kind, []).append(100 * row["Avg"])
    return scienceqa.aggregate(rows) | {k: sum(v) / len(v) for k, v in by_kind.items()}


def letters_of(items: Sequence[Item], predictions: Sequence[str]) -> str:
    """The option that each prediction names, "?" where it names none."""
    indices = [
        scienceqa.extracted(text, len(item["choices"]))
        for item, text in zip(items, predictions, strict=True)
    ]
    return "".join("?" if index is None else scienceqa.LETTERS[index] for index in indices)


def exact(lab: Laboratory, adapter: Adapter | None, scales: str, some: Sequence[Example]) -> float:
    """Percent of examples of which greedy decoding writes every token."""
    logits, targets, counts = logits_of(lab, adapter, scales, some)
    hits = (logits.argmax(-1) == targets).split(counts)
    return 100 * sum(bool(hit.all()) for hit in hits) / len(counts)
