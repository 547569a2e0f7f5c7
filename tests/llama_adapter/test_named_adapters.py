"""Does the example switch adapters as it says, pictures included?"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from examples.named_adapters import Assistant
from llama_adapter.answering import ModelOptions
from llama_adapter.checkpoints import load_base
from llama_adapter.data.template import prompt_text
from llama_adapter.model import Llama
from llama_adapter.multimodal.experts import CAPTION_INSTRUCTION
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter
from tests.llama_adapter.conftest import save_base

EARLY = {"fusion": "early", "tokens": 3, "layers": 2}
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)


@pytest.mark.parametrize("shapes", [({}, {}), ({}, EARLY), (EARLY, EARLY)])
def test_a_caption_becomes_the_input_of_an_answer(
    shapes: tuple[dict[str, Any], dict[str, Any]],
    tiny_model: Llama,
    tiny_tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    base, clip = (
        save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer_path, 512),
        save_clip(tmp_path / "c"),
    )
    files = {
        name: save_image_adapter(tmp_path / f"{name}.safetensors", base, clip, seed, **shape)
        for seed, (name, shape) in enumerate(zip(("instruct", "caption"), shapes, strict=True), 3)
    }
    assistant = Assistant(load_base(base), files, clip)
    image = picture(tmp_path / "a.png")
    said, answer = assistant.answer("green light", image, length=6)
    # each adapter by itself, its pictures projected by the model alone
    alone = {
        name: ModelOptions(base, path, device="cpu").load(VisionOptions(vision_model=clip))
        for name, path in files.items()
    }
    (caption,) = alone["caption"].answers(
        [prompt_text(CAPTION_INSTRUCTION)], GREEDY, images=[image]
    )
    assert said == f"caption: {caption.strip()}"
    (wanted,) = alone["instruct"].answers(
        [prompt_text("green light", said)], GREEDY, images=[image]
    )
    assert answer == wanted.strip()
    # both at once, and without the picture
    text = prompt_text("stone")
    asked = [("instruct", text, image), ("caption", text, image), ("instruct", text, None)]
    expected = [
        alone[name].answers([text], GREEDY, images=[path])[0].strip() for name, text, path in asked
    ]
    assert assistant.ask(*asked, length=6) == expected
    assert len(set(expected)) == 3
