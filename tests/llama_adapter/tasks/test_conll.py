"""Entities and roles as tasks: losses beside transformers' own, predictions, scores, reports."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama_adapter.hosts import adapt
from llama_adapter.tasks.conll import READERS, TaggingTask
from llama_adapter.tasks.conll_files import Sentence
from llama_adapter.tasks.spans import span_scores
from tests.llama_adapter.tasks.text_hosts import (
    bert_tokenizer,
    host,
    roberta_tokenizer,
    word_tokenizer,
)

TRAIN = """-DOCSTART- -X- O O

Ana NNP I-NP I-PER
Ruiz NNP I-NP I-PER
visits VBZ I-VP O
Paris NNP I-NP I-LOC

The DT I-NP O
tower NN I-NP O
of IN I-PP O
Bilbao NNP I-NP I-LOC
Paris NNP I-NP B-LOC
"""
ROLES = """1 Ana designed the tower ||| B-A0 B-V B-A1 I-A1
2 The tower stands in Paris ||| B-A1 I-A1 B-V B-AM-LOC I-AM-LOC
"""
MAKERS = [roberta_tokenizer, bert_tokenizer]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(TRAIN, "utf-8")
    (tmp_path / "roles.txt").write_text(ROLES, "utf-8")
    return tmp_path


def loaded(files: Path, tokenizer: Any, data: str = "conll03", **more: Any) -> TaggingTask:
    path = files / ("train.txt" if data == "conll03" else "roles.txt")
    task, problems = TaggingTask.load(path, path, tokenizer, data=data, **more)
    assert not problems
    return task


def test_labels_are_those_of_the_training_files(files: Path) -> None:
    task = loaded(files, bert_tokenizer())
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert (task.kind, task.metric, len(task.train), task.validation) == (
        "token-classification",
        "f1",
        2,
        [],
    )
    roles = loaded(files, bert_tokenizer(), "conll05")
    assert roles.labels == ("B-A0", "B-A1", "B-AM-LOC", "B-V", "I-A1", "I-AM-LOC", "O")


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("data", ["conll03", "conll12"])
def test_the_loss_is_transformers_own(files: Path, make: Any, data: str) -> None:
    """Labels made here from every word's tokens alone; -100 on all but the first of each."""
    tokenizer = make()
    task = loaded(files, tokenizer, data)
    model = host(tokenizer, labels=len(task.labels))
    rows, labels = [], []
    for one in task.train:
        ids, wanted = [tokenizer.cls_token_id], [-100]
        tail: list[str] = []
        if one.predicate is not None:
            tail = [tokenizer.sep_token, one.words[one.predicate]]
        for place, word in enumerate([*one.words, *tail]):
            own = tokenizer([word], is_split_into_words=True, add_special_tokens=False)
            label = task.labels.index(one.tags[place]) if place < len(one.words) else -100
            ids += own["input_ids"]
            wanted += [label] + [-100] * (len(own["input_ids"]) - 1)
        rows.append([*ids, tokenizer.sep_token_id])
        labels.append([*wanted, -100])
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
    theirs = model(input_ids=ids, attention_mask=mask, labels=wanted).loss
    ours = task.loss(model, task.train)
    torch.testing.assert_close(ours, theirs)
    model.zero_grad()
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_the_loss_counts_words_not_sentences(files: Path) -> None:
    tokenizer = bert_tokenizer()
    task = loaded(files, tokenizer)
    model = host(tokenizer, labels=4)
    single = [task.loss(model, [one]).item() for one in task.train]
    together = task.loss(model, task.train).item()
    assert together == pytest.approx((4 * single[0] + 5 * single[1]) / 9, rel=1e-5)


def test_a_batch_without_any_word_costs_nothing(files: Path) -> None:
    tokenizer = bert_tokenizer()
    task = loaded(files, tokenizer, max_length=3)
    model = host(tokenizer, labels=4)
    # Ana is three word pieces, of which none fits
    loss = task.loss(model, task.train[:1])
    loss.backward()
    assert loss.item() == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", MAKERS)
def test_predictions_do_not_depend_on_the_batch(files: Path, make: Any) -> None:
    tokenizer = make()
    task = loaded(files, tokenizer, batch=1)
    model = host(tokenizer, labels=4).train()
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.eval()
    modes = [module.training for module in model.modules()]
    one_by_one = task.predict(model, task.test)
    assert [module.training for module in model.modules()] == modes
    together = loaded(files, tokenizer, batch=8).predict(model, task.test)
    assert one_by_one == together
    assert [len(tags) for tags in one_by_one] == [4, 5]
    for item, tags in zip(task.test, one_by_one, strict=True):
        row = task.tagged.tokenised(item)
        inputs = {name: torch.tensor([values]) for name, values in row.inputs.items()}
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[0]
        places = [token for token in row.first_tokens if token is not None]
        assert tags == [task.labels[int(logits[token].argmax())] for token in places]


def test_words_that_fall_off_are_o_and_counted(files: Path) -> None:
    tokenizer = word_tokenizer()
    task = loaded(files, tokenizer, max_length=5)
    assert task.words_without_token(task.test) == 3
    model = host(tokenizer, labels=4)
    model.get_parameter("classifier.bias").data[1] = 1e6
    tags = task.predict(model, task.test)
    assert tags == [["B-PER", "B-PER", "B-PER", "O"], ["B-PER", "B-PER", "B-PER", "O", "O"]]
    assert task.score(task.test, tags)["words without token"] == pytest.approx(100 * 3 / 9)


def test_scores_are_those_of_spans(files: Path) -> None:
    task = loaded(files, bert_tokenizer())
    found = [["B-PER", "O", "O", "B-LOC"], ["O", "O", "O", "I-LOC", "I-LOC"]]
    scores = task.score(task.test, found)
    wanted = [one.tags for one in task.test]
    assert scores == span_scores(wanted, found) | {"words without token": 0.0}
    assert scores["f1"] == pytest.approx(100 * 2 / 7)
    strict = loaded(files, bert_tokenizer(), strict=True).score(task.test, found)
    assert strict == span_scores(wanted, found, strict=True) | {"words without token": 0.0}
    assert strict["f1"] == pytest.approx(100 * 2 / 6)
    with pytest.raises(ValueError, match="predictions must be one for each of 2 items"):
        task.score(task.test, found[:1])


def test_roles_are_also_scored_without_the_predicate(files: Path) -> None:
    task = loaded(files, bert_tokenizer(), "conll05")
    found = [["B-A0", "O", "B-A1", "I-A1"], ["O", "O", "B-V", "O", "O"]]
    scores = task.score(task.test, found)
    assert scores["f1"] == pytest.approx(100 * 2 * 3 / (3 + 6))
    assert scores["f1 without V"] == pytest.approx(100 * 2 * 2 / (2 + 4))


def test_files_are_also_scored_one_by_one(files: Path) -> None:
    """CoNLL05 is tested on two corpora."""
    other = files / "brown.txt"
    other.write_text("0 Stands the tower ||| B-V B-A1 I-A1\n", "utf-8")
    paths = [files / "roles.txt", other]
    task, _ = TaggingTask.load(paths[0], paths, bert_tokenizer(), data="conll05")
    found = [[*task.test[0].tags], ["O"] * 5, ["O", "B-A1", "I-A1"]]
    scores = task.score(task.test, found)
    assert scores["roles.txt f1"] == pytest.approx(100 * 2 * 3 / (3 + 6))
    assert scores["brown.txt f1"] == pytest.approx(100 * 2 / 3)
    assert "roles.txt f1" not in task.score(task.test[:2], found[:2])


def test_a_tag_that_training_never_had_is_reported_and_missed(files: Path) -> None:
    dev = files / "dev.txt"
    dev.write_text("Ana X X I-MISC\nRuiz X X I-MISC\n\nParis X X I-LOC\n", "utf-8")
    tokenizer = bert_tokenizer()
    task, problems = TaggingTask.load(files / "train.txt", dev, tokenizer, validation=dev)
    reason = "is none of the labels, so it is always missed"
    assert [*map(str, problems)] == [
        f"{dev}: sentence at 1: tag B-MISC {reason}",
        f"{dev}: sentence at 1: tag I-MISC {reason}",
    ]
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert task.validation == task.test
    model = host(tokenizer, labels=4)
    scores = task.score(task.test, task.predict(model, task.test))
    assert scores["MISC f1"] == 0
    assert task.loss(model, task.test).item() == pytest.approx(
        task.loss(model, task.test[1:]).item(), rel=1e-5
    )


def test_a_task_that_is_only_answered(files: Path) -> None:
    labels = ["O", "B-LOC", "B-PER", "I-PER"]
    path = files / "train.txt"
    task, _ = TaggingTask.load(None, path, bert_tokenizer(), labels=labels)
    assert (task.labels, task.train) == (tuple(labels), [])
    with pytest.raises(ValueError, match="labels must be given where train is None"):
        TaggingTask.load(None, path, bert_tokenizer())
    with pytest.raises(ValueError, match=r"data must be one of conll03, .* got 'conll99'"):
        TaggingTask.load(path, path, bert_tokenizer(), data="conll99")
    with pytest.raises(ValueError, match="separator must be given"):
        loaded(files, word_tokenizer(sep_token=None), "conll05")
    with pytest.raises(ValueError, match="model must have an output for each of 4 labels, got 3"):
        task.predict(host(bert_tokenizer(), labels=3), task.test)


def test_every_data_set_is_read_by_its_name(files: Path) -> None:
    entities = [{"type": "Loc", "start": 0, "end": 1}]
    rows = [{"tokens": ["Paris"], "entities": entities, "relations": []}]
    (files / "conll04.json").write_text(json.dumps(rows), "utf-8")
    names = {"conll03": "train.txt", "conll04": "conll04.json"}
    for name, read in READERS.items():
        sentences, problems = read(files / names.get(name, "roles.txt"))
        assert sentences
        assert not problems


@pytest.mark.parametrize("make", MAKERS)
def test_an_adapted_host_begins_where_it_was_and_learns(files: Path, make: Any) -> None:
    """Zero gates: the host's own loss and tags; then the adapter and the head learn the words."""
    tokenizer = make()
    task = loaded(files, tokenizer)
    model = host(tokenizer, labels=4)
    loss, tags = task.loss(model, task.train).item(), task.predict(model, task.test)
    adapter = adapt(model, prompt_length=4)
    assert task.loss(model, task.train).item() == pytest.approx(loss, rel=1e-5)
    assert task.predict(model, task.test) == tags
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        optimizer.step()
    assert task.score(task.test, task.predict(model, task.test))["f1"] == 100


def trained(task: TaggingTask, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, rng.sample(task.train, 16)).backward()
        optimizer.step()


def test_training_learns_roles_that_depend_on_the_predicate(tmp_path: Path) -> None:
    """The same words are tagged otherwise for each predicate, which only their end tells."""
    rng = random.Random(10)
    lines = []
    for _ in range(60):
        words = [f"w{rng.randrange(10)}" for _ in range(5)]
        words[1], words[3] = "w10", "w11"
        for verb in (1, 3):
            tags = ["O"] * 5
            tags[verb - 1 : verb + 1] = ["B-A0", "B-V"]
            lines.append(f"{verb} {' '.join(words)} ||| {' '.join(tags)}")
    path = tmp_path / "roles.txt"
    path.write_text("\n".join(lines), "utf-8")
    tokenizer = word_tokenizer(words=12)
    task, _ = TaggingTask.load(path, path, tokenizer, data="conll12")
    model = host(tokenizer, labels=len(task.labels))
    before = task.score(task.test, task.predict(model, task.test))["f1"]
    trained(task, model, 250)
    after = task.score(task.test, task.predict(model, task.test))["f1"]
    # without the predicate, half of the spans at best
    assert before < 50
    assert after > 95


def test_sentences_are_items_of_any_source(files: Path) -> None:
    """An item that no file held is answered too."""
    tokenizer = bert_tokenizer()
    task = loaded(files, tokenizer)
    item = Sentence(("the", "tower"), ("O", "O"), "made here", 0)
    [tags] = task.predict(host(tokenizer, labels=4), [item])
    assert len(tags) == 2
