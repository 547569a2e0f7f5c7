"""Exact match counts what the model really answers, in any batch, with or without an adapter."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.data.records import Record
from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.exact_match import (
    GREEDY,
    accuracy,
    evaluate_instructions,
    exact_match,
    instruction_items,
)
from llama_adapter.generation import generate
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

QUESTIONS = [
    ("Write seven birds.", ""),
    ("Write in reverse order.", "green light"),
    ("Answer.", ""),
    ("Is the river quiet?", "a river"),
    ("Write the third.", "first second third of the light in the morning"),
    ("Stone!", ""),
    ("Window?", "paper"),
]
SHORT = replace(GREEDY, max_new_tokens=6)


def answered(model: Llama, tokenizer: Tokenizer, prompts: Prompts | None = None) -> list[Record]:
    """Records whose output is the model's own answer, at indices with gaps."""
    texts = [prompt_text(*question) for question in QUESTIONS]
    answers = [generate(model, tokenizer, [text], SHORT, prompts=prompts)[0].text for text in texts]
    pairs = enumerate(zip(QUESTIONS, answers, strict=True))
    return [Record(3 * i + 2, *question, answer) for i, (question, answer) in pairs]


@pytest.fixture
def long_model(tiny_model: Llama) -> Llama:
    """`tiny_model` with room for the template, which is some 200 of its tokens long."""
    tiny_model.config = replace(tiny_model.config, max_seq_len=512)
    return tiny_model


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("red", "red", True),
        (" red\n", "red", True),
        ("red", "\tred ", True),
        ("Red", "red", False),
        ("red blue", "red  blue", False),
        ("", " \n", True),
        ("red", "red.", False),
    ],
)
def test_blanks_at_the_ends_do_not_count(prediction: str, target: str, expected: bool) -> None:
    assert exact_match(prediction, target) is expected


def test_items_carry_index_prompt_and_target() -> None:
    record = Record(17, "Write.", "green light", "light")
    assert instruction_items([record]) == [
        {"id": "17", "prompt": prompt_text("Write.", "green light"), "target": "light"}
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_share_of_right_answers(
    long_model: Llama, tiny_tokenizer: Tokenizer, batch_size: int
) -> None:
    records = answered(long_model, tiny_tokenizer)
    for wrong in (0, 4):
        records[wrong] = replace(records[wrong], output=records[wrong].output + "!")
    records[1] = replace(records[1], output=f" {records[1].output}\n")
    got = evaluate_instructions(
        long_model, tiny_tokenizer, records, sampling=SHORT, batch_size=batch_size
    )
    assert got.scores == {"exact_match": 5 / 7}
    assert [scores["exact_match"] for scores in got.item_scores] == [0, 1, 1, 1, 0, 1, 1]
    assert got.predictions[2] == records[2].output


def test_adapter_is_used(
    long_model: Llama, tiny_tokenizer: Tokenizer, tiny_adapter: Adapter
) -> None:
    prompts = long_model.project(tiny_adapter)
    records = answered(long_model, tiny_tokenizer, prompts)
    adapted = evaluate_instructions(long_model, tiny_tokenizer, records, prompts, sampling=SHORT)
    base = evaluate_instructions(long_model, tiny_tokenizer, records, sampling=SHORT)
    assert (adapted.scores["exact_match"], base.scores["exact_match"]) == (1.0, 0.0)


def test_accuracy_is_the_greedy_score(
    long_model: Llama, tiny_tokenizer: Tokenizer, tiny_adapter: Adapter
) -> None:
    prompts = long_model.project(tiny_adapter)
    texts = [prompt_text(*question) for question in QUESTIONS]
    answers = generate(long_model, tiny_tokenizer, texts, GREEDY, prompts=prompts)
    records = [
        Record(i, *question, answer.text if i % 3 else "wrong")
        for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    assert accuracy(long_model, tiny_tokenizer, records, prompts) == 4 / 7


def test_sampled_answers_do_not_depend_on_the_batch(
    long_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=6, seed=9)
    records = [Record(i, *question, "x") for i, question in enumerate(QUESTIONS)]
    several = evaluate_instructions(
        long_model, tiny_tokenizer, records, sampling=sampling, batch_size=3
    )
    single = evaluate_instructions(
        long_model, tiny_tokenizer, records[::-1], sampling=sampling, batch_size=1
    )
    assert several.predictions == single.predictions[::-1]
    assert len(set(several.predictions)) > 1


def test_folder_keeps_the_run_and_its_settings(
    long_model: Llama, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = answered(long_model, tiny_tokenizer)
    settings = {"model": "tiny", "adapter": None}
    first = evaluate_instructions(
        long_model, tiny_tokenizer, records, sampling=SHORT, folder=tmp_path, settings=settings
    )
    saved = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert saved["scores"] == first.scores == {"exact_match": 1.0}
    assert saved["settings"]["temperature"] == 0
    # nothing is predicted again: a model that cannot run gives the same
    again = evaluate_instructions(
        Llama(long_model.config), tiny_tokenizer, records, sampling=SHORT, folder=tmp_path,
        settings=settings,
    )  # fmt: skip
    assert again == first
    message = 'adapter is null there and "other" now'
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_instructions(
            long_model, tiny_tokenizer, records, sampling=SHORT, folder=tmp_path,
            settings={"model": "tiny", "adapter": "other"},
        )  # fmt: skip


def test_folder_without_settings_is_refused(
    long_model: Llama, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    message = "settings must name the model and the adapter where a folder is given"
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate_instructions(
            long_model, tiny_tokenizer, [Record(0, "a", "", "b")], folder=tmp_path
        )
    assert list(tmp_path.iterdir()) == []
