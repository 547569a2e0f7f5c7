"""`chat` remembers the turns of a conversation, looks at images, and says what it cannot do."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.cli import main
from llama_adapter.data.chat import SEPARATOR, Turn, chat_text
from llama_adapter.data.template import prompt_text
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter
from tests.llama_adapter.conftest import save_base

SAMPLING = SamplingConfig(temperature=0.0, max_new_tokens=5)


@pytest.fixture
def base(tiny_model: Llama, tiny_tokenizer_path: Path, tmp_path: Path) -> Path:
    """The tiny model with a context that a conversation fits in."""
    return save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer_path, 1024)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


@pytest.fixture
def adapter(base: Path, clip: Path, tmp_path: Path) -> Path:
    return save_image_adapter(tmp_path / "adapter.safetensors", base, clip)


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *words: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    own = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "5")
    return main(["chat", *map(str, words), *own])


def answered(answerer: Answerer, text: str, image: Path | None = None, stop: str = "") -> str:
    sampling = replace(SAMPLING, stop=(stop,)) if stop else SAMPLING
    return answerer.answers([text], sampling, images=[image])[0].strip()


def test_a_conversation_is_answered_in_the_light_of_its_turns(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = ModelOptions(base=base, device="cpu").load()
    turns: list[Turn] = []
    for question in ("stone", "river", "stone"):
        text = chat_text([*turns, Turn(question, None)])
        turns.append(Turn(question, answered(answerer, text, stop=SEPARATOR)))
    first, second, third = (turn.answer for turn in turns)
    assert first != third, "the turns before must matter"
    lines = "stone\nriver\n/input a text\nstone\n/new\nstone\n/help\n"
    assert chat(monkeypatch, lines, "--base", base, "--conversation") == 0
    out, err = capsys.readouterr()
    assert out.split("\n") == [first, second, third, first, ""]
    assert "/input is for instructions that stand alone" in err
    assert "/new          forget the turns" in err


def test_instructions_are_about_an_image_until_there_is_another(
    base: Path,
    adapter: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [picture(tmp_path / f"{size}.png", size=(size, 33)) for size in (25, 40)]
    vision = VisionOptions(vision_model=clip)
    answerer = ModelOptions(base=base, adapter=adapter, device="cpu").load(vision)
    text = prompt_text("stone")
    wanted = [answered(answerer, text, image) for image in (images[0], images[0], images[1], None)]
    assert len(set(wanted)) == 3, "images must matter"
    lines = f"/image {images[0]}\nstone\nstone\n/image {images[1]}\nstone\n/image\nstone\n"
    words = ("--base", base, "--adapter", adapter, "--vision-model", clip)
    assert chat(monkeypatch, lines, *words) == 0
    assert capsys.readouterr().out.split("\n") == [*wanted, ""]
    for lines, message in (
        (f"/image {tmp_path / 'absent.png'}\nstone\n", "absent.png: no such file"),
        (f"/image {images[0]}\n/base\nstone\n", "the base alone takes none"),
    ):
        assert chat(monkeypatch, lines, *words) == 2
        assert message in capsys.readouterr().err


def test_a_turn_that_fails_is_not_remembered(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    long = " ".join(["stone"] * 1100)
    lines = iter([long, "stone", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys, "stdin", Terminal())
    own = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "5")
    assert main(["chat", "--base", str(base), "--conversation", *own]) == 0
    out = capsys.readouterr().out
    assert "must have at most 1023 tokens" in out
    answerer = ModelOptions(base=base, device="cpu").load()
    expected = answered(answerer, chat_text([Turn("stone", None)]), stop=SEPARATOR)
    assert out.rstrip().endswith(expected)
