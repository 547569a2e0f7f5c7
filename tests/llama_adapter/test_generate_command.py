"""`generate` with pictures: an adapter sees each record's own, experts' words are told."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.cli import main
from llama_adapter.data.template import prompt_text
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter
from tests.llama_adapter.conftest import save_base

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)
SHORT = ("--device", "cpu", "--temperature", 0, "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def adapter(tiny_base: Path, clip: Path, tmp_path: Path) -> Path:
    return save_image_adapter(tmp_path / "adapter.safetensors", tiny_base, clip)


@pytest.fixture
def answerer(tiny_base: Path, adapter: Path, clip: Path, tmp_path: Path) -> Answerer:
    (tmp_path / "images").mkdir()
    for size in (25, 40):
        picture(tmp_path / "images" / f"{size}.png", size=(size, 33))
    vision = VisionOptions(vision_model=clip, images=tmp_path / "images")
    return ModelOptions(tiny_base, adapter, device="cpu").load(vision)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_an_image_beside_the_instruction(
    answerer: Answerer,
    tiny_base: Path,
    adapter: Path,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ("generate", "paper", "--base", tiny_base, "--adapter", adapter, *SHORT)
    images = [tmp_path / "images" / f"{size}.png" for size in (25, 40)]
    said = []
    for image in (None, *images):
        seen = () if image is None else ("--image", image, "--vision-model", clip)
        assert run(*own, *seen) == 0
        said.append(capsys.readouterr().out)
        (expected,) = answerer.answers([prompt_text("paper")], GREEDY, images=[image])
        assert said[-1] == f"{expected.lstrip()}\n"
    assert len(set(said)) == 3


def test_records_with_images_and_without(
    answerer: Answerer,
    tiny_base: Path,
    adapter: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # more than are projected together
    monkeypatch.setattr("llama_adapter.generate_command._TOGETHER", 3)
    names = ["25.png", None, "40.png", "25.png", None]
    records: list[dict[str, str | None]] = [
        {"instruction": word, **({"image": name} if name else {})}
        for word, name in zip(["paper", "paper", "paper", "stone", "light"], names, strict=True)
    ]
    data = tmp_path / "asked.json"
    data.write_text(json.dumps(records))
    words = ("--data", data, "--images", tmp_path / "images", "--vision-model", clip)
    own = ("generate", "--base", tiny_base, "--adapter", adapter, *SHORT, *words)
    assert run(*own, "--batch-size", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [prompt_text(str(record["instruction"])) for record in records]
    expected = answerer.answers(texts, GREEDY, images=names)
    assert [line["output"] for line in lines] == [text.lstrip() for text in expected]
    assert [line.get("image") for line in lines] == names
    assert len({line["output"] for line in lines[:3]}) == 3
    bad: list[tuple[str, str]] = [
        ("../adapter.safetensors", "record 3, counted from 0: image '../adapter.safetensors' must"),
        ("absent.png", f"record 3, counted from 0: image {tmp_path}/images/absent.png: no such"),
    ]
    for name, message in bad:
        records[3]["image"] = name
        data.write_text(json.dumps(records))
        assert run(*own) == 2
        assert message in capsys.readouterr().err
    data.write_text(json.dumps([{"instruction": "a", "image": 3}]))
    assert run(*own) == 2
    assert "record 0, counted from 0: image must be a path" in capsys.readouterr().err


def test_what_experts_say_is_the_input_and_is_told(
    answerer: Answerer,
    tiny_base: Path,
    adapter: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = SimpleNamespace(
        TesseractNotFoundError=OSError,
        get_languages=lambda config: ["eng"],
        image_to_string=lambda image, lang: f"{image.size[0]} wide\n\nopen",
    )
    monkeypatch.setitem(sys.modules, "pytesseract", reader)
    image = tmp_path / "images" / "40.png"
    own = ("generate", "--base", tiny_base, "--adapter", adapter, *SHORT, "--vision-model", clip)
    assert run(*own, "paper", "--input", "a", "--image", image, "--expert", "ocr") == 0
    shown = capsys.readouterr()
    said = "1. 40 wide 2. open"
    assert shown.err == f"ocr said: {said}\n"
    text = prompt_text("paper", f"a\nocr: {said}")
    (expected,) = answerer.answers([text], GREEDY, images=[image])
    assert shown.out == f"{expected.lstrip()}\n"
    data = tmp_path / "asked.jsonl"
    data.write_text('{"instruction": "paper", "image": "40.png"}\n{"instruction": "paper"}\n')
    words = ("--data", data, "--images", tmp_path / "images", "--expert", "ocr")
    assert run(*own, *words) == 0
    with_image, without = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert with_image["experts"] == {"ocr": said}
    assert "experts" not in without
    # a base that sees nothing is told all the same
    assert (
        run("generate", "paper", "--base", tiny_base, *SHORT, "--image", image, "--expert", "ocr")
        == 0
    )
    (expected,) = answerer.with_adapter(None).answers(
        [prompt_text("paper", f"ocr: {said}")], GREEDY
    )
    assert capsys.readouterr().out == f"{expected.lstrip()}\n"


def test_what_experts_say_is_cut_to_what_fits(
    tiny_model: Llama,
    tiny_tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The context has 256 tokens, of which the answer may have 6; one record has none to spare."""
    reader = SimpleNamespace(
        TesseractNotFoundError=OSError,
        get_languages=lambda config: ["eng"],
        image_to_string=lambda image, lang: "stone " * 160,
    )
    monkeypatch.setitem(sys.modules, "pytesseract", reader)
    model = Llama(replace(tiny_model.config, max_seq_len=256))
    model.load_state_dict(tiny_model.state_dict())
    base = save_base(tmp_path / "base", model, tiny_tokenizer_path)
    alone = ModelOptions(base, device="cpu").load()
    tokenizer = alone.base.tokenizer

    def count(text: str, input: str = "") -> int:
        return len(tokenizer.encode(prompt_text(text, input), bos=True))

    # a digit is a token
    full = "paper 7" + "7" * (250 - count("paper 7"))
    assert count(full) == 250
    data, image = tmp_path / "asked.jsonl", picture(tmp_path / "40.png")
    asked = ("paper", full, "light")
    rows = [{"instruction": text, "image": "40.png"} for text in asked]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = ("generate", "--expert", "ocr", "--base", base, *SHORT)
    assert run(*own, "--data", data, "--images", tmp_path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["instruction"] for line in lines] == [*asked]
    assert "experts" not in lines[1]
    whole = " ".join(["1.", *["stone"] * 160])
    for line in (lines[0], lines[2]):
        said = line["experts"]["ocr"]
        assert whole.startswith(said)
        told = f"ocr: {said}"
        assert count(line["instruction"], told) <= 250
        assert count(line["instruction"], f"{told} stone stone") > 250
        text = prompt_text(line["instruction"], told)
        (expected,) = alone.answers([text], GREEDY)
        assert line["output"] == expected.lstrip()
    assert run(*own, "paper", "--image", image) == 0
    assert capsys.readouterr().err == f"ocr said: {lines[0]['experts']['ocr']}\n"


def test_images_that_the_reader_of_text_cannot_read(
    answerer: Answerer,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(image: object, lang: str) -> str:
        raise RuntimeError(1, "Image too large: (1, 40000)\nError during processing.")

    reader = SimpleNamespace(
        TesseractNotFoundError=OSError,
        get_languages=lambda config: ["eng"],
        image_to_string=refuse,
    )
    monkeypatch.setitem(sys.modules, "pytesseract", reader)
    images = tmp_path / "images"
    (images / "torn.png").write_bytes((images / "40.png").read_bytes()[:-400])
    data = tmp_path / "asked.jsonl"
    own = ("generate", "--expert", "ocr", "--base", tiny_base, *SHORT)
    for name, message in (
        ("40.png", "40.png: no image that tesseract can read ("),
        ("torn.png", "torn.png: no image that can be read ("),
    ):
        rows = [{"instruction": "paper"}, {"instruction": "paper", "image": name}]
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        for words, where in (
            (("paper", "--image", images / name), ""),
            (("--data", data, "--images", images), "record 1, counted from 0: "),
        ):
            assert run(*own, *words) == 2
            shown = capsys.readouterr()
            assert f"{where}{images / message}" in shown.err
            assert shown.err.count("\n") == 1


def test_requests_that_cannot_be_carried_out(
    answerer: Answerer,
    tiny_base: Path,
    adapter: Path,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_clip(tmp_path / "other", seed=4)
    image, text = tmp_path / "images" / "25.png", tmp_path / "asked.json"
    text.write_text('[{"instruction": "a", "image": "25.png"}]')
    base = ("--base", tiny_base, "--device", "cpu")
    capsys.readouterr()
    cases = [
        (("a", "--image", image), "image must be left out: the base alone takes none"),
        (("a", "--adapter", adapter, "--image", image), "images need --vision-model"),
        (
            ("a", "--adapter", adapter, "--image", image, "--vision-model", other),
            "must be the encoder that the adapter was trained with",
        ),
        (
            ("a", "--adapter", adapter, "--image", tmp_path / "no.png", "--vision-model", clip),
            "no.png: no such file",
        ),
        (
            ("a", "--adapter", adapter, "--image", text, "--vision-model", clip),
            "asked.json: no image that can be read",
        ),
        (("--data", text, "--image", image), "--image goes with an instruction"),
        (("--data", text), "record 0, counted from 0: image must be left out"),
        (("a", "--expert", "ocr"), "--expert goes with --image"),
        (("a", "--image", image, "--expert", "web"), "expert must be one of ocr, caption"),
    ]
    for words, message in cases:
        assert run("generate", *words, *base) == 2, words
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""
