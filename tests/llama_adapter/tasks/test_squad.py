"""SQuAD as a task: losses beside transformers' own, answers of pooled windows, scores, training."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama_adapter.hosts import adapt, unadapt
from llama_adapter.tasks.squad import SquadTask
from llama_adapter.tasks.squad_files import write_answers
from llama_adapter.tasks.text_batches import padded
from tests.llama_adapter.tasks.text_hosts import (
    TEXTS,
    bert_tokenizer,
    host,
    roberta_tokenizer,
    word_tokenizer,
)

CONTEXT = " ".join(TEXTS)
ANSWERS = {"Where is it?": "Paris", "Who designed the bridge?": "Ana Ruiz", "When?": "1889"}
MAKERS = [roberta_tokenizer, bert_tokenizer]


def written(path: Path, answers: dict[str, str | None], context: str = CONTEXT) -> Path:
    """A file of SQuAD; of version 2.0 where a question has no answer."""
    rows: list[dict[str, Any]] = []
    for number, (question, text) in enumerate(answers.items()):
        found = [] if text is None else [{"text": text, "answer_start": context.index(text)}]
        rows.append({"id": str(number), "question": question, "answers": found})
        if None in answers.values():
            rows[-1]["is_impossible"] = text is None
    data = [{"title": "t", "paragraphs": [{"context": context, "qas": rows}]}]
    path.write_text(json.dumps({"version": "x", "data": data}), "utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "dev-v1.1.json", {**ANSWERS})


@pytest.fixture
def file_2(tmp_path: Path) -> Path:
    return written(tmp_path / "dev-v2.0.json", {**ANSWERS, "Why?": None})


def loaded(path: Path, tokenizer: Any, **more: Any) -> SquadTask:
    settings = {"max_length": 48, "stride": 12} | more
    task, problems = SquadTask.load(path, path, tokenizer, **settings)
    assert not problems
    return task


@pytest.mark.parametrize("make", MAKERS)
def test_the_loss_is_transformers_own_where_nothing_is_filled_up(file: Path, make: Any) -> None:
    tokenizer = make()
    task = loaded(file, tokenizer)
    model = host(tokenizer)
    full = [one for one in task.train if len(one.inputs["input_ids"]) == 48]
    assert len(full) > 4
    theirs = model(
        **padded([one.inputs for one in full], tokenizer.pad_token_id, model),
        start_positions=torch.tensor([one.start for one in full]),
        end_positions=torch.tensor([one.end for one in full]),
    ).loss
    torch.testing.assert_close(task.loss(model, full), theirs)


@pytest.mark.parametrize("make", MAKERS)
def test_a_windows_loss_is_the_same_in_any_batch(file: Path, make: Any) -> None:
    tokenizer = make()
    task = loaded(file, tokenizer)
    model = host(tokenizer)
    assert len({len(one.inputs["input_ids"]) for one in task.train}) > 1
    single = [task.loss(model, [one]).item() for one in task.train]
    together = task.loss(model, task.train)
    together.backward()
    assert together.item() == pytest.approx(sum(single) / len(single), rel=1e-5)
    head = model.get_parameter("qa_outputs.weight").grad
    assert head is not None
    assert bool(head.isfinite().all())


def test_answers_of_pooled_windows(file: Path) -> None:
    """A host whose logits are fixed by token: the answer is the same from windows of any length."""
    tokenizer = word_tokenizer()
    words = [f"w{number}" for number in range(40)]
    written(file, {"w50 w51": "w21 w22"}, " ".join(words))

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            # token ids 5 to 64 are w0 to w59
            start = -0.01 * (input_ids - 26).abs() - 50.0 * (input_ids < 5)
            end = -0.01 * (input_ids - 27).abs() - 50.0 * (input_ids < 5)
            found = type("Output", (), {})()
            found.start_logits, found.end_logits = start.float(), end.float()
            return found

    for max_length, stride, batch in ((64, 8, 4), (14, 3, 1), (14, 3, 32), (9, 1, 5)):
        task = loaded(file, tokenizer, max_length=max_length, stride=stride, batch=batch)
        model = Known().train()
        found = task.predict(model, task.test)
        assert found == [{"text": "w21 w22"}]
        assert model.training
        assert task.score(task.test, found) == {"exact": 100.0, "f1": 100.0}


@pytest.mark.parametrize("make", MAKERS)
def test_predictions_do_not_depend_on_the_batch(file_2: Path, make: Any) -> None:
    tokenizer = make()
    model = host(tokenizer)
    tasks = [loaded(file_2, tokenizer, batch=size) for size in (1, 3, 64)]
    first, *others = [task.predict(model, task.test) for task in tasks]
    for found in others:
        assert [one["text"] for one in found] == [one["text"] for one in first]
        odds = [one["null_odds"] for one in found]
        assert odds == pytest.approx([one["null_odds"] for one in first], abs=1e-4)
    assert json.loads(json.dumps(first)) == first
    one_by_one = [tasks[1].predict(model, [item])[0]["text"] for item in tasks[1].test]
    assert one_by_one == [one["text"] for one in first]
    # texts are the paragraph's own
    assert all(one["span"] in CONTEXT for one in first)


def test_version_2_is_scored_as_such(file_2: Path, tmp_path: Path) -> None:
    task = loaded(file_2, bert_tokenizer())
    assert task.answering.version_2
    found = [
        {"text": "Paris", "null_odds": -2.0, "span": "Paris"},
        {"text": "", "null_odds": 1.0, "span": "Ana Ruiz"},
        {"text": "since", "null_odds": -1.0, "span": "since"},
        {"text": "", "null_odds": 3.0, "span": "bridge"},
    ]
    scores = task.score(task.test, found)
    assert scores == {
        "exact": 50.0,
        "f1": 50.0,
        "HasAns_exact": pytest.approx(100 / 3),
        "HasAns_f1": pytest.approx(100 / 3),
        "NoAns_exact": 100.0,
        "NoAns_f1": 100.0,
        # at odds of 1
        "best_exact": 75.0,
        "best_f1": 75.0,
    }
    write_answers(tmp_path, task.test, found)
    assert json.loads((tmp_path / "null_odds.json").read_bytes())["3"] == 3.0
    with pytest.raises(ValueError, match="predictions must be one for each of 4 items"):
        task.score(task.test, found[:3])


def test_what_a_task_is_made_of(file: Path, file_2: Path) -> None:
    tokenizer = bert_tokenizer()
    task, problems = SquadTask.load(file, file_2, tokenizer, validation=file_2)
    assert not problems
    assert (task.kind, task.labels, task.metric) == ("question-answering", ("start", "end"), "f1")
    assert (task.windowing.max_length, task.windowing.stride) == (384, 128)
    assert (task.answering.n_best, task.answering.max_answer) == (20, 30)
    assert task.answering.version_2
    assert task.validation == task.test
    assert len(task.train) == 3
    only, _ = SquadTask.load(None, file, tokenizer)
    assert (only.train, only.validation, only.answering.version_2) == ([], [], False)


def test_problems_of_all_files_are_reported_once(file: Path) -> None:
    content = json.loads(file.read_bytes())
    content["data"][0]["paragraphs"][0]["qas"][1]["answers"] = []
    file.write_text(json.dumps(content), "utf-8")
    task, problems = SquadTask.load(file, file, bert_tokenizer(), validation=file)
    reason = "answers is empty, which version 2.0 alone allows"
    assert [*map(str, problems)] == [f"{file}: data 0 paragraphs 0 qas 1: {reason}"]
    assert len(task.test) == 2


def test_training_learns_to_answer(tmp_path: Path) -> None:
    """The answer stands behind the word that is asked for, or nowhere."""
    rng = random.Random(11)
    paragraphs = []
    for number in range(80):
        words = rng.sample([f"w{place}" for place in range(12, 60)], 9)
        asked = rng.randrange(12)
        place = rng.randrange(1, 8)
        there = rng.random() < 0.7
        if there:
            words[place - 1] = f"w{asked}"
        context, text = " ".join(words), words[place]
        found = [{"text": text, "answer_start": context.index(text)}] if there else []
        row = {"id": str(number), "question": f"w{asked}", "answers": found}
        paragraphs.append({"context": context, "qas": [row | {"is_impossible": not there}]})
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}), "utf-8")
    tokenizer = word_tokenizer()
    task = loaded(path, tokenizer, max_length=16, stride=2)
    model = host(tokenizer)
    before = task.score(task.test, task.predict(model, task.test))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(250):
        optimizer.zero_grad()
        task.loss(model, rng.sample(task.train, 16)).backward()
        optimizer.step()
    after = task.score(task.test, task.predict(model, task.test))
    assert before["f1"] < 45
    assert after["f1"] > 85
    assert after["best_f1"] >= after["f1"]


@pytest.mark.parametrize("kind", ["hidden", "kv"])
def test_an_adapted_host_begins_where_it_was_and_learns(tmp_path: Path, kind: str) -> None:
    """Zero gates: the answers are the frozen host's; then only the adapter and the head change."""
    tokenizer = bert_tokenizer()
    file = written(tmp_path / "dev.json", {**ANSWERS, "Why?": None})
    task = loaded(file, tokenizer)
    model = host(tokenizer)
    frozen = task.predict(model, task.test)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = adapt(model, prompt_length=4, prompt_kind=kind)
    found = task.predict(model, task.test)
    assert [one["text"] for one in found] == [one["text"] for one in frozen]
    odds = [one["null_odds"] for one in found]
    assert odds == pytest.approx([one["null_odds"] for one in frozen], abs=1e-4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.loss(model, task.train)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert bool((adapter.gates.abs() > 0).all())
    unadapt(model)
    after = model.state_dict()
    assert base.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in base.items())
