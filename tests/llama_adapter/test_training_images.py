"""A run on pictures learns what they alone tell, says what is wrong before it begins, resumes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")

from llama_adapter.adapter import VISUAL
from llama_adapter.checkpoints import Base
from llama_adapter.checkpoints.adapter_file import read_adapter
from llama_adapter.checkpoints.train_state import load_latest
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data.examples import Batch
from llama_adapter.data.feed import ORDERS
from llama_adapter.model import Llama
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.options import build, read_config
from llama_adapter.recipe import FinetuneConfig, FusionOptions
from llama_adapter.run_folder import Row
from llama_adapter.trainer import Prepared, Trainer
from llama_adapter.training import finetune
from llama_adapter.tuning import TuningOptions
from llama_adapter.vision import ScaleOptions, VisionOptions
from tests.llama_adapter.clip_models import save_clip
from tests.llama_adapter.test_resume import VOCABULARY, WordTokenizer
from tests.llama_adapter.test_world import close, held_out, losses, run

pytestmark = pytest.mark.filterwarnings("ignore:.*few optimiser steps to learn much")

COLOURS = {
    "stone": (200, 30, 20), "river": (20, 40, 220), "green": (10, 230, 40), "light": (0, 0, 0)
}  # fmt: skip
# groups beside prompts and gates
V2 = ("bias", "scale", "norm")
VARYING = ("time", "tokens_per_second", "tflops")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of pictures of one colour each, named by the word that is right for it."""
    folder = tmp_path / "pictures"
    (folder / "of").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 24), colour).save(folder / "of" / f"{name}.png")
    return folder


@pytest.fixture
def base() -> Base:
    config = LlamaConfig(
        dim=48, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=VOCABULARY, multiple_of=8
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = Llama(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        torch.nn.init.normal_(model.tok_embeddings.weight)
    return Base(model.requires_grad_(False).eval(), WordTokenizer(), "small")


def asked(name: str) -> dict[str, Any]:
    """The one question, whose answer only the picture tells."""
    return {"instruction": "a?", "output": f" {name}", "image": f"of/{name}.png"}


def mixed(count: int = 19) -> list[Any]:
    """Instructions and conversations, with pictures and without."""
    found: list[Any] = []
    for number in range(count):
        name = list(COLOURS)[number % 4]
        item = asked(name) | {"instruction": f"is it {number} ?"}
        if number % 3 == 0:
            said = ["<image>\nsee?", f"{name} it is", f"and {number} ?", "light"]
            turns = [{"from": ("human", "gpt")[i % 2], "value": said[i]} for i in range(4)]
            item = {"image": item["image"], "conversations": turns}
        elif number % 3 == 1:
            del item["image"]
        found.append(item)
    return found


@pytest.fixture
def config(tmp_path: Path, images: Path, clip: Path) -> Callable[..., FinetuneConfig]:
    """A short run over records, with changes by keyword."""

    def make(items: Sequence[Any], output: str = "run", **changes: Any) -> FinetuneConfig:
        data = tmp_path / "data.json"
        data.write_text(json.dumps(items))
        usual: dict[str, Any] = {
            "data": data,
            "output": tmp_path / output,
            "epochs": 3,
            "warmup_epochs": 1.0,
            "batch_size": 4,
            "micro_batch_tokens": 150,
            "lr": 0.02,
            "val_size": 3,
            "save_every": 2,
            "threads": 1,
            "adapter": AdapterConfig(prompt_length=3),
            "vision": VisionOptions(clip, images, tmp_path / "features"),
            "scales": ScaleOptions((2, 4), "mean", vision_normalise=True),
            "projector": FusionOptions(projector_hidden=(7,)),
        }
        return FinetuneConfig(**usual | changes)

    return make


def lines(output: Path) -> list[Row]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in VARYING} for row in rows]


def test_what_only_pictures_tell_is_learnt_from_them(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    more: dict[str, Any] = {"epochs": 110, "warmup_epochs": 10.0, "lr": 0.3, "val_size": 0}
    more["adapter"] = AdapterConfig(n_layers=4)
    items = [asked(name) for name in COLOURS]
    own = config(items, projector=FusionOptions(projector_hidden=(32,)), **more)
    state = torch.get_rng_state()
    result = finetune(own, base=base)
    assert torch.equal(torch.get_rng_state(), state)
    blind = [{k: v for k, v in item.items() if k != "image"} for item in items]
    text = finetune(config(blind, "text", vision=VisionOptions(), **more), base=base)
    # one word of four and the end of the text: ln(4) / 2 is the least
    assert text.losses[-1] > 0.69
    assert result.losses[-1] < 0.3 * text.losses[-1]

    # the same pictures under each other's names
    pictures = Pictures.load(own.vision, own.scales.scales)
    names = [item["image"] for item in items]
    swapped = dict(zip(names, names[1:] + names[:1], strict=True))

    def validated(renamed: dict[str, str]) -> float:
        def features(given: Sequence[str | None]) -> tuple[Tensor, Tensor]:
            return pictures([None if one is None else renamed.get(one, one) for one in given])

        made = Trainer(base.model, result.adapter, micro_batch_tokens=150, features=features)
        return made.validate(result.dataset.train)

    assert validated({}) < 0.3 * text.losses[-1]
    assert validated(swapped) > 1.5 * text.losses[-1]


def test_a_run_remembers_the_encoder_and_its_options(
    base: Base, config: Callable[..., FinetuneConfig], clip: Path
) -> None:
    own = config(mixed(), max_steps=3)
    result = finetune(own, base=base)
    header, tensors = read_adapter(result.adapter_path)
    pictures = Pictures.load(own.vision, own.scales.scales)
    assert header.visual == pictures.visual_config(hidden=(7,))
    assert header.visual.encoder == pictures.encoder.digest
    assert header.visual.features == pictures.encoder.width == 48
    assert tensors["projector.maps.0.weight"].shape == (7, 48)
    assert float(tensors["projector.maps.0.bias"].abs().max()) > 0
    held = json.loads((own.output / "config.json").read_text())
    assert held["vision"]["vision_model"] == str(clip)
    assert held["scales"]["vision_layers"] == [2, 4]
    # as --resume and --config read it
    again = build(FinetuneConfig, read_config(own.output / "config.json", FinetuneConfig))
    assert again == own
    state = load_latest(own.output / "checkpoints")
    assert state is not None
    assert state.values["digests"][str(clip)] == pictures.encoder.digest


KINDS = ("text", "images")


@pytest.mark.parametrize("joint", ["off", "alternate", "concat"])
def test_a_stopped_run_resumes_bitwise(
    joint: str, base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    whole, own = (config(mixed(), name, joint=joint) for name in ("whole", "run"))
    expected = finetune(whole, base=base)
    steps = len(expected.losses)
    assert steps == 3 * {"off": 4, "alternate": 6, "concat": 4}[joint]
    curves = expected.folder.training_losses()
    assert list(curves) == (["training"] if joint == "off" else [f"training, {x}" for x in KINDS])
    points = sorted(point for curve in curves.values() for point in curve)
    assert points == [*enumerate(expected.losses, 1)]
    assert all(curves.values())
    for stop in (1, 2, 5, steps):
        # the features come from their files, or from the encoder again
        for path in (own.output.parent / "features").rglob("*.features"):
            path.unlink()
        result = finetune(replace(own, max_steps=stop), base=base, resume=True)
    finetune(own, base=base, resume=True)
    taken = [[row for row in lines(one.output) if "loss" in row] for one in (own, whole)]
    assert taken[0] == taken[1]
    assert [row["step"] for row in taken[0]] == list(range(1, steps + 1))
    files = [(one.output / "adapter.safetensors").read_bytes() for one in (own, whole)]
    assert files[0] == files[1]
    assert result.val_losses[steps] == expected.val_losses[steps]


def test_another_encoder_or_picture_is_told_when_a_run_resumes(
    base: Base, config: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    folder = save_clip(tmp_path / "encoder")
    own = config(mixed(), vision=VisionOptions(folder, tmp_path / "pictures", tmp_path / "f"))
    finetune(replace(own, max_steps=2), base=base)
    changes: list[dict[str, Any]] = [
        {"scales": ScaleOptions((2, 3), "mean", vision_normalise=True)},
        {"projector": FusionOptions(projector_hidden=(5,))},
        {"joint": "concat"},
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"cannot resume .*: \S+ was .*, is now"):
            finetune(replace(own, **change), base=base, resume=True)
    # where its features are kept does not matter
    moved = replace(own, vision=replace(own.vision, feature_cache=tmp_path / "g"), max_steps=3)
    finetune(moved, base=base, resume=True)
    stone, river = (tmp_path / "pictures" / "of" / f"{name}.png" for name in ("stone", "river"))
    before = stone.read_bytes()
    stone.write_bytes(river.read_bytes())
    with pytest.raises(ValueError, match=r"the content of .*pictures has changed since the run"):
        finetune(own, base=base, resume=True)
    stone.write_bytes(before)
    save_clip(folder, seed=4)
    with pytest.raises(ValueError, match=f"the content of {folder} has changed since the run beg"):
        finetune(own, base=base, resume=True)


def test_pictures_that_cannot_be_used_are_listed_before_the_first_step(
    base: Base, config: Callable[..., FinetuneConfig], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "broken.png").write_bytes((images / "of" / "stone.png").read_bytes()[:40])
    items = mixed()
    for index, name in ((2, "none.png"), (5, "broken.png"), (8, "../data.json")):
        items[index] = asked("stone") | {"instruction": f"{index} ?", "image": name}
    own = config(items)
    with pytest.warns(UserWarning, match="3 of 19 records cannot be used"):
        result = finetune(own, base=base)
    text = (own.output / "skipped.jsonl").read_text()
    skipped = [json.loads(line) for line in text.splitlines()]
    assert [line["record"] for line in skipped] == [2, 5, 8]
    for line, said in zip(
        skipped, ("none.png: no such file", "broken.png: no image that", "must lie in"), strict=True
    ):
        assert said in line["reason"]
    used = [*result.dataset.train, *result.dataset.held_out]
    assert sorted(example.index for example in used) == sorted({*range(19)} - {2, 5, 8})
    monkeypatch.setattr(Trainer, "step", pytest.fail)
    with pytest.raises(ValueError, match="3 of 19 records cannot be used"):
        finetune(config(items, "strict", strict=True), base=base)


def test_pictures_and_their_options_go_together(
    base: Base, config: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    message = r"data\.json: record 0, counted from 0, has an image: give --images, .* and --vision-"
    with pytest.raises(ValueError, match=message):
        finetune(config(mixed(), vision=VisionOptions()), base=base)
    plain = [{"instruction": f"a {n}", "output": " b"} for n in range(9)]
    with pytest.raises(ValueError, match="none of the 6 records to train on has an image: leave"):
        finetune(config(plain), base=base)
    elsewhere = [*plain, *(one | {"instruction": f"b {n}"} for n, one in enumerate(plain[:3]))]
    for one in elsewhere[9:]:
        one["image"] = "elsewhere.png"
    with pytest.raises(ValueError, match=r"image that can be used \(.*elsewhere\.png: no such"):
        finetune(config(elsewhere), base=base)
    with pytest.raises(ValueError, match="must be given for fusion = early"):
        config(plain, vision=VisionOptions(), projector=FusionOptions("early"))
    pictured = [asked(name) | {"instruction": f"a {n}"} for n in range(2) for name in COLOURS]
    with pytest.raises(ValueError, match="needs records with images and without, got 5 with one"):
        finetune(config(pictured, joint="concat"), base=base)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("joint", "more"),
    [
        *((order, {}) for order in ORDERS),
        # as in LLaMA-Adapter V2
        ("concat", {"projector": FusionOptions("early", 3, 2), "tuning": TuningOptions(V2)}),
    ],
)
def test_joint_training_steps_each_kinds_own_groups(
    joint: str,
    more: dict[str, Any],
    base: Base,
    config: Callable[..., FinetuneConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other kind's tensors, moments and step counts keep every bit."""
    step, kinds = Trainer.step, []

    def held(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {"text": {}, "pictures": {}}
        for name, value in trainer.tensors().items():
            if not name.startswith("random"):
                kind = "pictures" if name.split(".")[1] in VISUAL else "text"
                found[kind][name] = value.clone()
        return found

    def watched(self: Trainer, work: Prepared, lr: float) -> tuple[float, float]:
        batch: Batch = work.batch
        (pictured,) = {example.image is not None for example in batch.examples}
        before, taken = held(self), step(self, work, lr)
        after = held(self)
        own, other = ("pictures", "text") if pictured else ("text", "pictures")
        kinds.append(own)
        assert before[other].keys() == after[other].keys()
        for name, value in after[other].items():
            assert torch.equal(value, before[other][name]), name
        # the learning rate of the first step is 0; and gates of 0 hide prompts and images
        if len(kinds) > 6:
            for name, value in after[own].items():
                assert not torch.equal(value, before[own][name]), name
        return taken

    monkeypatch.setattr(Trainer, "step", watched)
    own = config(mixed(), joint=joint, epochs=4, weight_decay=0.5, **more)
    result = finetune(own, base=base)
    pictured = int(result.dataset.with_image.sum())
    text = len(result.dataset.train) - pictured
    batches = [-(-count // 4) for count in (text, pictured)]
    if joint == "alternate":
        assert kinds == ["pictures", "text"] * (len(kinds) // 2)
        assert len(kinds) == 4 * 2 * max(batches)
    else:
        assert (kinds.count("text"), kinds.count("pictures")) == (4 * batches[0], 4 * batches[1])
    numbers = [row["images"] for row in lines(own.output) if "loss" in row]
    assert [number > 0 for number in numbers] == [kind == "pictures" for kind in kinds]
    state = load_latest(own.output / "checkpoints")
    assert state is not None
    counts: dict[str, set[int]] = {"text": set(), "pictures": set()}
    for name, value in state.tensors.items():
        if name.endswith(".step"):
            counts["pictures" if name.split(".")[1] in VISUAL else "text"].add(int(value))
    assert counts == {kind: {kinds.count(kind)} for kind in counts}
    groups = {name.split(".")[1] for name in state.tensors if name.endswith(".step")}
    assert groups == set(result.adapter.groups())


@pytest.mark.slow
def test_two_processes_take_one_process_steps(
    tmp_path: Path, images: Path, clip: Path, config: Callable[..., FinetuneConfig]
) -> None:
    """From the command line, with the bundled base."""
    data = config(mixed(25)).data
    words = ["--images", str(images), "--vision-model", str(clip), "--vision-layers", "2", "4"]
    words += ["--vision-normalise", "--feature-cache", str(tmp_path / "features")]
    for number in (1, 2):
        run(data, tmp_path / str(number), *words, processes=number)
    # sharded, each layer's prompts are projected when it runs
    run(data, tmp_path / "sharded", *words, "--shard", "--joint", "concat")
    run(data, tmp_path / "whole", *words, "--joint", "concat", processes=1)
    for one, other in (("1", "2"), ("whole", "sharded")):
        folders = tmp_path / one, tmp_path / other
        first, second = (list(losses(folder).values()) for folder in folders)
        assert len(first) >= 9
        assert close(first, second)
        assert close(held_out(folders[0]), held_out(folders[1]))
