"""The option chosen is the one that the model alone finds likeliest, its picture before it."""

import base64
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.cli import main
from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.choosing import likeliest, losses
from llama_adapter.model import Llama
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter
from tests.llama_adapter.conftest import save_base
from tests.llama_adapter.evaluation.benchmark_cases import CASES


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def base(tiny_model: Llama, tiny_tokenizer_path: Path, tmp_path: Path) -> Path:
    return save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer_path, 512)


@pytest.fixture
def adapter(base: Path, clip: Path, tmp_path: Path) -> Path:
    return save_image_adapter(tmp_path / "adapter.safetensors", base, clip)


@pytest.fixture
def answerer(base: Path, adapter: Path, clip: Path) -> Answerer:
    return ModelOptions(base, adapter, device="cpu").load(VisionOptions(vision_model=clip))


@torch.no_grad()
def alone(answerer: Answerer, text: str, output: str, image: Path | None) -> float:
    """Mean of -log p over the output's tokens and EOS, in float64 of one forward pass."""
    model, tokenizer, adapter = answerer.base.model, answerer.base.tokenizer, answerer.adapter
    assert adapter is not None
    seen = None if image is None else adapter.visual_tokens(answerer.pictures([image])[0])
    tokens = tokenizer.encode(text + output, bos=True, eos=True)
    start = len(tokenizer.encode(text, bos=True))
    logits = model(torch.tensor([tokens]), model.project(adapter, seen))[0].double()
    chances = logits.softmax(-1)
    found = [-math.log(float(chances[n - 1, tokens[n]])) for n in range(start, len(tokens))]
    return sum(found) / len(found)


def test_losses_are_those_of_each_alone(answerer: Answerer, tmp_path: Path) -> None:
    one, two = (picture(tmp_path / f"{size}.png", size=(size, 33)) for size in (25, 40))
    texts = ["green light", "green light", "green light", "the quiet river of"]
    outputs, images = [" stone", " stone", " a paper window", " birds"], [one, two, None, one]
    got = losses(answerer, texts, outputs, images)
    expected = [alone(answerer, *row) for row in zip(texts, outputs, images, strict=True)]
    assert got == pytest.approx(expected, rel=1e-4)
    options = [{"A": " stone", "B": " paper", "C": " river"}, {"A": " light", "B": " a window"}]
    chosen = likeliest(answerer, texts[2:], options, images[2:], batch_size=2)
    for name, text, own, image in zip(chosen, texts[2:], options, images[2:], strict=True):
        found = {key: alone(answerer, text, output, image) for key, output in own.items()}
        assert name == min(found, key=lambda key: found[key])
    with pytest.raises(ValueError, match=r"texts\[1\] and its output must have at most 513 tok"):
        losses(answerer, ["a", "stone " * 600], ["b", "c"], [None, None])


@pytest.mark.parametrize("name", ["mmbench", "scienceqa"])
def test_evaluate_chooses(
    name: str, answerer: Answerer, base: Path, adapter: Path, clip: Path, tmp_path: Path
) -> None:
    case, output = CASES[name](tmp_path / "data"), tmp_path / "run"
    model = ("--base", base, "--adapter", adapter, "--vision-model", clip, "--device", "cpu")
    words = ("evaluate", name, *case.words, "--output", output, *model, "--quiet", "--choose")
    assert main([str(word) for word in words]) == 0
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len(case.texts)
    for row in rows:
        text = case.texts[row["id"]]
        if name == "mmbench":
            shown = [line.split(". ", 1) for line in text.splitlines() if line[1:3] == ". "]
            options = dict(shown)
        else:
            options = {f"The answer is {letter}.": f" The answer is {letter}." for letter in "ABC"}
        image = case.images.get(row["id"])
        found = {key: alone(answerer, text, output, image) for key, output in options.items()}
        assert row["prediction"] == min(found, key=lambda key: found[key])


def test_an_option_is_measured_by_its_tokens(
    answerer: Answerer, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option of more characters has fewer tokens, and the other alone does not fit."""
    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image"]
    few, many = ("window " * 12).strip(), "\u2603" * 60
    assert len(few) > len(many)
    image = base64.b64encode(picture(tmp_path / "a.png").read_bytes()).decode()
    rows = [columns]
    # one option is in the prompt too
    for n, (a, b) in enumerate(((few, many), (many, few))):
        kinds = ["leaf", "logic_reasoning", image if n == 0 else "5"]
        rows.append([str(5 + n * 10**6), "Which?", "", a, b, "", "", "AB"[n], *kinds])
    text = prompt_text(
        f"Question: Which?\nOptions:\nA. {few}\nB. {many}\n"
        "Please select the correct answer from the options above. \n"
    )
    tokenizer = answerer.base.tokenizer
    assert len(tokenizer.encode(text + few, bos=True)) < 512
    assert len(tokenizer.encode(text + many, bos=True)) > 513
    rows += [["6", "Who?", "", "me", "you", "", "", "A", "leaf", "logic_reasoning", "5"]]
    rows += [["1000006", "Who?", "", "you", "me", "", "", "B", "leaf", "logic_reasoning", "5"]]
    data, output = tmp_path / "dev.tsv", tmp_path / "run"
    data.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    words = ("evaluate", "mmbench", "--data", data, "--output", output, "--base", base)
    assert main([str(word) for word in (*words, "--device", "cpu", "--quiet", "--choose")]) == 0
    assert "item '5': its prompt must have at most 511 tokens, got " in capsys.readouterr().err
    lines = (output / "predictions.jsonl").read_text().splitlines()
    found = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    assert (found["5"], found["1000005"]) == ("", "")
    assert found["6"] in "AB"
