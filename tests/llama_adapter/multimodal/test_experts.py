"""Experts are asked in order, what they say is told, and tesseract reads real pictures."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from llama_adapter.data.template import prompt_text
from llama_adapter.multimodal.experts import Context, Expert, Ocr, context_of, shortened

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="tesseract is not installed"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two lines of black text on white."""
    path = tmp_path / "sign.png"
    drawn = Image.new("RGB", (640, 240), "white")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(64)
    pen.text((30, 30), "GREEN HARBOUR", "black", font)
    pen.text((30, 130), "OPEN 24 HOURS", "black", font)
    drawn.save(path)
    return path


def test_what_experts_say_becomes_the_input(image: Path) -> None:
    asked: list[tuple[str, Path]] = []

    def say(text: str | None) -> Expert:
        def expert(path: Path) -> str | None:
            asked.append((str(text), path))
            return text

        return expert

    experts = {"Caption": say(" a sign "), "Text": say(None), "Web": say("b" * 9)}
    experts["Objects"] = say("")
    context = context_of(image, experts, most=5)
    assert context == Context({"Caption": "a sig", "Web": "bbbbb"}, "Caption: a sig\nWeb: bbbbb")
    assert [path for _, path in asked] == [image] * 4
    assert "### Input:\nCaption: a sig\nWeb: bbbbb\n" in prompt_text("What is it?", context.text)
    # braces of what is said are no places of the template
    curly = context_of(image, {"A {text}": say("{name}")}, template="<{name}|{text}>")
    assert curly.text == "<A {text}|{name}>"


def test_a_context_is_shortened(image: Path) -> None:
    context = context_of(image, {"Caption": lambda _: "a sign", "Web": lambda _: "b"})
    assert shortened(context, 2) == Context({"Caption": "a", "Web": "b"}, "Caption: a\nWeb: b")
    assert shortened(context, 9) == context
    assert shortened(context, 0) == Context({}, "")


def test_when_nobody_says_anything_there_is_no_input(image: Path) -> None:
    for experts in ({}, {"Caption": lambda _: "  \n"}):
        context = context_of(image, experts)
        assert context == Context({}, "")
        assert prompt_text("What?", context.text) == prompt_text("What?")


def test_faults_are_named(image: Path, tmp_path: Path) -> None:
    def fail(_: Path) -> str:
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection"):
        context_of(image, {"Web": fail})
    with pytest.raises(FileNotFoundError, match=r"absent\.png: no such file"):
        context_of(tmp_path / "absent.png", {})
    with pytest.raises(ValueError, match=r"template must contain \{text\}, got '\{name\}'"):
        context_of(image, {}, template="{name}")
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        context_of(image, {}, most=0)


@needs_tesseract
def test_tesseract_reads_a_picture(image: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytesseract")
    read = Ocr()
    assert read(image) == "1. GREEN HARBOUR 2. OPEN 24 HOURS"
    grey = tmp_path / "grey.png"
    Image.open(image).convert("LA").save(grey)
    assert read(grey) == read(image)
    empty = tmp_path / "empty.png"
    Image.new("RGB", (200, 100), "white").save(empty)
    assert read(empty) is None
    context = context_of(image, {"Text in the image": read})
    assert context.text == "Text in the image: 1. GREEN HARBOUR 2. OPEN 24 HOURS"
    with pytest.raises(RuntimeError, match=r"language must be one of .*eng.*, got 'xyz': apt inst"):
        Ocr("xyz")


@needs_tesseract
def test_images_that_cannot_be_read_are_named(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytesseract")
    read = Ocr()
    thin, text, torn = tmp_path / "thin.png", tmp_path / "text.png", tmp_path / "torn.png"
    Image.new("RGB", (1, 40000), "white").save(thin)
    text.write_text("no picture")
    torn.write_bytes(image.read_bytes()[:-200])
    for path, what in ((thin, "tesseract can read"), (text, "can be read"), (torn, "can be read")):
        with pytest.raises(ValueError, match=rf"{path.name}: no image that {what} \(") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"sign\.png: no image that can be read \(Image size"):
        read(image)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pytesseract", None)
        with pytest.raises(RuntimeError, match=r"needs pytesseract .*pip install .*\[ocr\]"):
            Ocr()
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(RuntimeError, match="needs the program tesseract: apt install"):
        Ocr()
