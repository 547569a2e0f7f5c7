"""Are the bundled base and its instruction sets what their README says, and reproducible?"""

from __future__ import annotations

import json
import re

import pytest
import torch

from examples.bundled_base import corpus, instructions, lexicon, tasks, train_base, train_tokenizer
from llama_adapter import assets
from llama_adapter.checkpoints import load_base
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer

SETS = sorted(instructions.SEED)
FILES = {
    ("follow", "train"): assets.FOLLOW_TRAIN,
    ("follow", "heldout"): assets.FOLLOW_HELDOUT,
    ("json", "train"): assets.JSON_TRAIN,
    ("json", "heldout"): assets.JSON_HELDOUT,
}


PHRASINGS = [
    (re.compile(re.escape(phrasing).replace(re.escape("{x}"), "(?P<x>.+)")), task.name, phrasing)
    for task in tasks.TASKS
    for phrasing in task.phrasings + task.unseen_phrasings
]


def _task_and_argument(record: dict[str, str]) -> tuple[str, str, str]:
    """(task, argument, phrasing) of a record, found from its text alone."""
    found = []
    for pattern, task, phrasing in PHRASINGS:
        match = pattern.fullmatch(record["instruction"])
        inline = "{x}" in phrasing
        if match and inline == (not record["input"]):
            found.append((task, match["x"] if inline else record["input"], phrasing))
    assert len(found) == 1, record
    return found[0]


@pytest.mark.parametrize("name", SETS)
def test_instruction_files_are_reproduced_byte_for_byte(name: str) -> None:
    for part, records in zip(("train", "heldout"), instructions.generate(name), strict=True):
        assert FILES[name, part].read_bytes() == instructions.as_text(records).encode()


@pytest.mark.parametrize("name", SETS)
def test_heldout_shares_no_task_and_argument_with_training(name: str) -> None:
    train, heldout = (json.loads(FILES[name, part].read_text()) for part in ("train", "heldout"))
    assert len(train) >= 2000
    assert len(heldout) >= 300
    seen = [_task_and_argument(record) for record in train]
    asked = [_task_and_argument(record) for record in heldout]
    assert not {pair[:2] for pair in seen} & {pair[:2] for pair in asked}
    assert len(set(seen)) == len(seen)
    new_phrasing = [entry[2] not in {pair[2] for pair in seen} for entry in asked]
    assert sum(new_phrasing) == len(asked) / 2
    assert {entry[0] for entry in asked} == {task.name for task in tasks.TASKS}


@pytest.mark.parametrize("name", SETS)
def test_every_output_is_the_task_solved(name: str) -> None:
    by_name = {task.name: task for task in tasks.TASKS}
    for part in ("train", "heldout"):
        for record in json.loads(FILES[name, part].read_text()):
            task, argument, _ = _task_and_argument(record)
            answer = record["output"]
            if name == "json":
                answer = json.loads(answer)["answer"]
            assert answer == by_name[task].solve(argument)


def test_tasks_solve_a_worked_example() -> None:
    answers = {task.name: task.solve("cat hat sun") for task in tasks.LIST_TASKS}
    assert answers == {
        "reverse": "sun hat cat",
        "first": "cat",
        "last": "sun",
        "twice": "cat cat hat hat sun sun",
        "count": "three",
        "remove_first": "hat sun",
        "swap_ends": "sun hat cat",
        "join": "cat and hat and sun",
    }


def test_corpus_never_answers_a_heldout_list() -> None:
    forbidden = corpus.heldout_prompts()
    lists = [pair for pair in forbidden if pair[1].count(" ") or ":" in pair[0]]
    assert len(lists) > 400
    prompts = {prompt_text(*pair) for pair in lists}
    questions = {"\n".join(filter(None, pair)) for pair in lists}
    documents = corpus.Corpus(train_base.SEED)
    for _ in range(3000):
        text = "".join(piece for piece, _ in documents.document())
        # a preface may stand before the template, and a plain document holds several questions
        end = text.find("### Response:") + len("### Response:")
        assert text[max(text.find("Below is"), 0) : end] not in prompts
        for question in text.replace(" Answer in JSON.", "").split("Q: ")[1:]:
            assert question.split("\nA:")[0] not in questions


def test_tokenizer_is_llamas_in_convention_and_reproducible() -> None:
    path = assets.BASE / "tokenizer.model"
    assert path.read_bytes() == train_tokenizer.train()
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 1200)
    prefix = tokenizer.encode("x:")
    for word in lexicon.all_words():
        assert len(tokenizer.encode(word)) == 1
        assert len(tokenizer.encode("x:" + word)) == len(prefix) + 1
    text = "Żółw says:\n\t3*x  ok, Привет!"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_weights_load_without_code_and_are_small() -> None:
    path = assets.BASE / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    assert weights["layers.5.attention.wk.weight"].shape == (48, 96)
    assert weights["output.weight"].shape == (1200, 96)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    files = [*assets.BASE.iterdir(), *assets.INSTRUCTIONS.iterdir()]
    assert sum(file.stat().st_size for file in files) < 4.5e6


def _exact(prefix: str, count: int, name: str = "follow") -> float:
    """Share of held-out records that the base answers exactly, decoding greedily.

    A greedy answer is exact if and only if every token of the expected one is the likeliest next.
    """
    base = load_base(assets.BASE, dtype=torch.float32)
    records = json.loads(FILES[name, "heldout"].read_text())[:count]
    right = 0
    for record in records:
        prompt = prefix + prompt_text(record["instruction"], record["input"])
        start = len(base.tokenizer.encode(prompt, bos=True))
        ids = base.tokenizer.encode(prompt + record["output"], bos=True, eos=True)
        with torch.no_grad():
            best = base.model(torch.tensor([ids[:-1]])).argmax(-1)[0].tolist()
        right += best[start - 1 :] == ids[start:]
    return right / count


def test_base_does_not_follow_instructions_by_itself() -> None:
    assert _exact("", 64) <= 0.25
    assert _exact("", 64, "json") <= 0.25


def test_base_has_the_skills_when_its_context_asks_for_them() -> None:
    assert _exact(corpus.PREFACES[0] + "\n\n", 64) >= 0.9


def test_training_script_is_repeatable() -> None:
    first, second = train_base.train(1), train_base.train(1)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
