"""Answers are those of the adapter with each text's own picture, and experts stand beside them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from llama_adapter.answering import Answerer, Captioner, ExpertOptions, ModelOptions
from llama_adapter.completion import Row
from llama_adapter.data.template import prompt_text
from llama_adapter.multimodal.experts import CAPTION_INSTRUCTION, context_of
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tuning import Tuning
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / f"{size}.png", size=(size, 33)) for size in (25, 40)]


@pytest.fixture
def vision(clip: Path, tmp_path: Path) -> VisionOptions:
    return VisionOptions(vision_model=clip, images=tmp_path, feature_cache=clip.parent / "kept")


@torch.no_grad()
def alone(answerer: Answerer, text: str, image: Path | None, count: int = 6) -> str:
    """Greedy by the model alone, the whole text anew for every token."""
    model, tokenizer, adapter = answerer.base.model, answerer.base.tokenizer, answerer.adapter
    prompts = None
    if adapter is not None:
        seen = None if image is None else adapter.visual_tokens(answerer.pictures([image])[0])
        prompts = model.project(adapter, seen)
    settings = replace(GREEDY, max_new_tokens=count)
    row = Row(0, 0, text, tokenizer, settings, model.config.max_seq_len)
    while True:
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        logits = model(tokens, prompts)[0, -1, : tokenizer.vocab_size]
        piece = row.add(int(logits.argmax()))
        if piece.completion is not None:
            return piece.completion.text


EARLY = {"fusion": "early", "tokens": 3, "layers": 2}
TUNING = Tuning(("bias", "scale", "norm"), ("wq", "w2", "output"), "output")


@pytest.mark.parametrize(
    "shape",
    [{}, {"tokens": 4}, EARLY, {**EARLY, "tuning": TUNING}],
    ids=["late", "a token a row", "early", "V2"],
)
def test_every_text_has_its_own_image(
    shape: dict[str, Any],
    tiny_base: Path,
    clip: Path,
    vision: VisionOptions,
    images: list[Path],
    tmp_path: Path,
) -> None:
    path = save_image_adapter(tmp_path / "a.safetensors", tiny_base, clip, **shape)
    answerer = ModelOptions(tiny_base, path, device="cpu").load(vision)
    assert answerer.sees
    texts = ["green light", "green light", "green light", "a window of stone"]
    seen = [images[0], None, images[1].name, images[0]]
    got = answerer.answers(texts, GREEDY, images=seen)
    paths = [images[0], None, images[1], images[0]]
    assert got == [alone(answerer, *one) for one in zip(texts, paths, strict=True)]
    assert len(set(got)) == 4
    assert answerer.answers(texts[:1], GREEDY) == [got[1]]
    # named adapters of one base
    assert Answerer(answerer.base).answers(texts[:1], GREEDY) == [
        alone(Answerer(answerer.base), texts[0], None)
    ]


def test_an_adapters_caption_is_what_another_is_told(
    tiny_base: Path, clip: Path, vision: VisionOptions, images: list[Path], tmp_path: Path
) -> None:
    """Two adapters of one base, switched while it runs (LLaMA-Adapter V2, section 4.4)."""
    paths = [
        save_image_adapter(tmp_path / f"{seed}.safetensors", tiny_base, clip, seed)
        for seed in (3, 4)
    ]
    instruct = ModelOptions(tiny_base, paths[0], device="cpu").load(vision)
    options = ExpertOptions(("caption",), caption_adapter=paths[1])
    experts = options.experts(instruct)
    said = context_of(images[0], experts)
    caption = alone(
        instruct.with_adapter(paths[1]), prompt_text(CAPTION_INSTRUCTION), images[0], 64
    ).strip()
    assert caption
    assert said.said == {"caption": caption}
    assert said.text == f"caption: {caption}"
    text = prompt_text("paper", said.text)
    # the caption is as long as the tiny model's context lets it be
    short = prompt_text("paper", said.text[:20])
    assert text.startswith(short[:60])
    got = instruct.answers([short], GREEDY, images=[images[0]])
    assert got == [alone(instruct, short, images[0])]
    with pytest.raises(ValueError, match="captioner must have an adapter that takes images"):
        Captioner(Answerer(instruct.base))


def test_what_cannot_be_seen_is_named(
    tiny_base: Path, clip: Path, vision: VisionOptions, images: list[Path], tmp_path: Path
) -> None:
    path = save_image_adapter(tmp_path / "a.safetensors", tiny_base, clip)
    answerer = ModelOptions(tiny_base, path, device="cpu").load(replace(vision, vision_model=None))
    with pytest.raises(ValueError, match="images need --vision-model"):
        answerer.prompts_for([images[0]])
    answerer = answerer.with_adapter(None)
    with pytest.raises(ValueError, match="image must be left out: the base alone takes none"):
        answerer.prompts_for([None, images[0]])
    assert answerer.prompts_for([None]) is None
    for given, message in (
        ({"expert": ("web",)}, "expert must be one of ocr, caption, got 'web'"),
        ({"expert": ("caption",)}, "--expert caption and --caption-adapter go together"),
        ({"caption_adapter": path}, "--expert caption and --caption-adapter go together"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ExpertOptions(**given)
