"""The language part of benchmarks.hosts: its world, files, host, tables and verdicts."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoTokenizer, RobertaForMaskedLM

from benchmarks import hosts_text, hosts_text_host, hosts_text_tasks
from benchmarks.ablation_claims import NOT, PARTLY, REPRODUCED, Spread
from benchmarks.hosts_plan import Run
from benchmarks.hosts_text import ENTRIES, QUICK, TABLES, TITLES, WORLD
from benchmarks.hosts_text_claims import Table, claims
from benchmarks.hosts_text_tasks import Sizes, load_task, write_data
from benchmarks.hosts_text_world import (
    ASKED,
    KINDS,
    NAMES,
    SPLITS,
    Event,
    Phrase,
    Sentence,
    World,
    question,
)
from llama_adapter.hosts.methods import METHODS

TINY = replace(QUICK, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts_text, "QUICK", TINY)
        facts = WORLD.make(path, True)
    assert facts["host"]["documents"] == 3 * hosts_text_host.BATCH
    return path


def spans(tags: list[str]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for place, tag in enumerate(tags):
        if tag.startswith("B-"):
            found.append((tag[2:], place, place + 1))
        elif tag.startswith("I-"):
            kind, start, end = found[-1]
            assert (kind, end) == (tag[2:], place)
            found[-1] = (kind, start, place + 1)
    return found


def roles(sentence: Sentence, verb: int) -> dict[str, str]:
    return {
        role: " ".join(sentence.words[start:end])
        for role, start, end in spans(sentence.frames[verb])
    }


def events_of(world: World) -> list[Event]:
    """One or two events with different predicates."""
    events = [world.event() for _ in range(world.rng.choice((1, 2)))]
    return events if len({event.predicate for event in events}) == len(events) else events[:1]


def test_roles_are_those_of_the_event_in_every_form_of_a_sentence() -> None:
    world, forms = World(random.Random(3)), Counter[str]()
    for _ in range(300):
        events = events_of(world)
        said = world.sentence(*events)
        agent = " ".join(events[0].agent.words)
        whole: dict[str, str] = {}
        assert len(said.frames) == len(events)
        for verb in said.frames:
            found = roles(said, verb)
            (event,) = [event for event in events if event.predicate == said.words[verb]]
            passive = said.words[verb - 1] == "was"
            assert found["V"] == event.predicate
            assert found["A1"] == " ".join(event.patient.words)
            assert found["A0"] == (f"by {agent}" if passive else agent)
            whole |= found
            forms["passive" if passive else "active"] += 1
        assert ("AM-LOC" in whole) == (events[0].place is not None)
        assert whole.get("AM-TMP", "") == (f"on {events[0].day}" if events[0].day else "")
        forms["relative"] += "who" in said.words
    assert min(forms.values()) > 20


def test_entities_are_the_names_without_their_cues() -> None:
    world = World(random.Random(4))
    for _ in range(200):
        event = world.event()
        said = world.sentence(event)
        named = [phrase for phrase in (event.agent, event.patient, event.place) if phrase]
        wanted = sorted((phrase.kind, phrase.name) for phrase in named if phrase.kind)
        found = [
            (kind, " ".join(said.words[start:end])) for kind, start, end in spans(said.entities)
        ]
        assert sorted(found) == wanted
        assert event.patient.kind == KINDS[event.predicate]


def test_no_split_of_names_shares_one_with_another_even_across_types() -> None:
    names = {
        split: {name for some in World(random.Random(0), split).names.values() for name in some}
        for split in SPLITS
    }
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert set().union(*names.values()) == {name for some in NAMES.values() for name in some}
    counts = Counter(name for some in NAMES.values() for name in some)
    assert sorted(Counter(counts.values()).items()) == [(1, 48), (2, 24)]
    assert {*NAMES["PER"]} & {*NAMES["LOC"]}
    assert not {*NAMES["PER"]} & {*NAMES["ORG"]}


def test_cues_stand_before_as_many_names_as_asked() -> None:
    for cued in (0.0, 0.7, 1.0):
        world = World(random.Random(1), cued=cued)
        share = sum(world.phrase("PER").start > 0 for _ in range(400)) / 400
        assert share == pytest.approx(cued, abs=0.08)


def test_questions_ask_for_what_the_event_has() -> None:
    anna, boat = Phrase(("Mr", "Anna"), "PER", 1), Phrase(("the", "boat"), "")
    event = Event(anna, "sold", boat, Phrase(("Jena",), "LOC"))
    assert [question(event, asked) for asked in ASKED] == [
        ("who sold the boat ?", "Anna"),
        ("what was sold by Mr Anna ?", "the boat"),
        ("where was the boat sold ?", "Jena"),
        ("when was the boat sold ?", ""),
    ]
    assert question(replace(event, patient=anna), "patient")[0] == "who was sold by Mr Anna ?"


@pytest.mark.parametrize("version_2", [False, True])
def test_squad_asks_what_its_text_answers_once_or_not_at_all(version_2: bool) -> None:
    content = hosts_text_tasks.squad("test", 200, version_2)
    possible = []
    for paragraph in content["data"][0]["paragraphs"]:
        context = paragraph["context"]
        for item in paragraph["qas"]:
            assert item.keys() - {"is_impossible"} == {"id", "question", "answers"}
            for answer in item["answers"]:
                start = answer["answer_start"]
                assert context[start : start + len(answer["text"])] == answer["text"]
            verb = next(word for word in item["question"].split() if word in KINDS)
            told = verb in context.split()
            if not item["answers"] and told:
                assert item["question"].split()[0] in ("where", "when")
            assert told or not item["answers"]
            possible.append(bool(item["answers"]))
            assert item.get("is_impossible", False) == (not item["answers"])
    assert len(possible) == 200
    assert sum(possible) / 200 == pytest.approx(0.5 if version_2 else 1.0, abs=0.1)
    assert content["version"] == ("v2.0" if version_2 else "1.1")


def test_every_data_set_is_read_back_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "host")
    for data in TITLES:
        task = load_task(folder, data, tokenizer)
        for split in ("validation", "test"):
            assert len(getattr(task, split)) == QUICK.sizes[data].of(split)
        # a window a question: no text is longer than one
        assert len(task.train) == QUICK.sizes[data].train
    path = folder / "conll05" / "test.txt"
    whole = path.read_text()
    path.write_text("9 broken ||| O O\n" + whole)
    with pytest.raises(ValueError, match=r"test\.txt.*line 1"):
        load_task(folder, "conll05", tokenizer)
    path.write_text(whole)


def test_conll03s_test_has_other_names_than_its_training(tmp_path: Path) -> None:
    write_data(tmp_path, "conll03", Sizes(200, 20, 200))
    found = {}
    for split in ("train", "test"):
        lines = (tmp_path / "conll03" / f"{split}.txt").read_text().split("\n")
        first = [line.split()[0] for line in lines if line.split()[-1:] and " B-" in line]
        found[split] = {*first}
    assert len(found["train"]) > 15 < len(found["test"])
    assert not found["train"] & found["test"]


def test_a_document_belongs_together_and_quotes_only_the_answer() -> None:
    world, forms = World(random.Random(0)), Counter[str]()
    for _ in range(300):
        first, second = hosts_text_host.document(world)
        if "?" not in first:
            forms["told"] += 1
            continue
        answer = first.split("?")[1].strip()
        if answer:
            assert answer in second
            assert '"' not in second
            forms["answered"] += 1
        elif '"' in second:
            forms["quoted"] += 1
            assert len(second.split('"')) == 3
    assert min(forms[form] for form in ("told", "answered", "quoted")) > 30


def test_masking_leaves_special_tokens_and_a_share_of_the_rest(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "host")
    torch.manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (400, 50))
    ids[:, 0], ids[:, 40:] = tokenizer.bos_token_id, tokenizer.pad_token_id
    shown, chosen = hosts_text_host.masked(ids, tokenizer)
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert not chosen[ids < 5].any()
    assert chosen[:, 1:40].float().mean().item() == pytest.approx(0.2, abs=0.02)
    by_mask = (shown[chosen] == tokenizer.mask_token_id).float().mean().item()
    kept = (shown[chosen] == ids[chosen]).float().mean().item()
    assert by_mask == pytest.approx(hosts_text_host.BY_MASK, abs=0.02)
    assert kept == pytest.approx(0.08, abs=0.02)


def test_batches_give_every_document_once_an_epoch_with_its_like() -> None:
    lengths = [random.Random(i).randint(8, 60) for i in range(1500)]
    places = hosts_text_host.batches(lengths, random.Random(1))
    epoch = [next(places) for _ in range(47)]
    assert sorted(i for batch in epoch for i in batch) == [*range(1500)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch]
    assert sum(spread) / len(spread) < 8


def test_pretraining_repeats_learns_and_is_read_by_transformers(
    tmp_path: Path, folder: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    facts = hosts_text_host.pretrain(tmp_path, 3)
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    both = [RobertaForMaskedLM.from_pretrained(path) for path in (tmp_path, folder / "host")]
    for a, b in zip(*(model.state_dict().values() for model in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert facts["parameters"] == sum(p.numel() for p in both[0].parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = ["Florence", "visited", "the", "port", "of", "Verona", "on", "Friday", "."]
    assert len(tokenizer(words, is_split_into_words=True)["input_ids"]) == len(words) + 2


def test_every_entry_is_a_method_for_roberta_and_every_run_is_listed_once() -> None:
    assert all("roberta" in METHODS[entry.name].hosts for entry in ENTRIES.values())
    wanted = {Run("text", data, method) for data in TITLES for method in ENTRIES}
    listed = WORLD.runs(False)
    assert len(listed) == len(wanted)
    assert {*listed} == wanted
    assert {data for table in TABLES for data in table.data} == {*TITLES}
    for name in WORLD.code:
        assert (Path(hosts_text.__file__).parent / name).is_file()


@pytest.mark.parametrize(("data", "method"), [("squad2", "zero_kv"), ("conll05", "linear")])
def test_a_run_repeats_and_counts_what_it_trains(folder: Path, data: str, method: str) -> None:
    rows = [WORLD.measure(folder, True, Run("text", data, method)) for _ in range(2)]
    assert rows[0]["scores"] == rows[1]["scores"]
    assert rows[0]["losses"] == rows[1]["losses"]
    own = rows[0]["parameters"] - rows[0]["head_parameters"]
    layers, heads, width = 4, 4, 64
    prompts = hosts_text.PROMPTS
    assert own == (layers * (2 * prompts * width + heads) if method == "zero_kv" else 0)


def made_up(f1: float, data: str) -> dict[str, Any]:
    scores = [{"exact": f1 - 4, "f1": f1 + seed} for seed in range(3)]
    predictions = [{"text": "" if place % 2 else "Anna"} for place in range(8)]
    return {
        "scores": scores,
        "predictions": predictions if data.startswith("squad") else [["O"]] * 8,
        "lr": 0.005,
        "parameters": 1300,
        "head_parameters": 130,
        "train_seconds": [1.0, 2.0, 3.0],
    }


def test_sections_show_every_method_and_examples_every_answer(folder: Path) -> None:
    f1 = {method: 30.0 + 5 * place for place, method in enumerate(ENTRIES)}
    rows = {run: made_up(f1[run.method], run.data) for run in WORLD.runs(True)}
    found = WORLD.sections(rows, {}, True)
    assert [len(section.table) for section in found] == [len(ENTRIES)] * 2
    for section in found:
        assert all(len(line) == len(section.header) for line in section.table)
        assert len(section.figures) == 1
        assert "1,170" in section.text()
    full = found[0].table[0]
    assert full[:5] == ["full", "1,170", "130 / 130", "26.0", "31.0 (30.0 to 32.0)"]
    lines, pictures = WORLD.examples(folder, True, rows)
    assert len(lines) == 4 + QUICK.sizes["squad2"].test
    assert not pictures
    text = "\n".join(
        WORLD.describe(
            {
                "host": {"parameters": 1, "documents": 2, "loss": 3.0},
                "pretraining_processor_seconds": 4.0,
            },
            True,
        )
    )
    assert all(title in text for title in TITLES.values())


def table_of(**means: float) -> Table:
    """Two data sets, a point to either side of the mean; seeds differ by half a point."""
    found = {
        method: {
            data: Spread(value + shift, value + shift - 0.5, value + shift + 0.5)
            for data, shift in (("A", -1.0), ("B", 1.0))
        }
        for method, value in means.items()
    }
    spreads = {name: Spread(value, value - 0.5, value + 0.5) for name, value in means.items()}
    return Table("Table 8", found, spreads, dict.fromkeys(means, "0"))


@pytest.mark.parametrize(
    ("means", "wanted"),
    [
        ((70, 10, 40, 60, 68), [REPRODUCED, REPRODUCED, REPRODUCED, REPRODUCED]),
        ((90, 30, 60, 61.8, 62), [PARTLY, PARTLY, PARTLY, REPRODUCED]),
        ((90, 50, 66, 64, 55), [NOT, NOT, NOT, PARTLY]),
    ],
)
def test_verdicts_follow_the_numbers(means: tuple[float, ...], wanted: list[str]) -> None:
    names = ("full", "linear", "prompt_tuning", "p_tuning_v2", "zero_kv")
    found = claims(table_of(**dict(zip(names, means, strict=True))))
    assert [claim.verdict for claim in found] == wanted


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for turn in ("a", "b"):
        for data in TITLES:
            write_data(tmp_path / turn, data, Sizes(6, 3, 3))
    for path in (tmp_path / "a").rglob("*.*"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
    content = json.loads((tmp_path / "a" / "squad" / "train.json").read_text())
    assert sum(len(p["qas"]) for p in content["data"][0]["paragraphs"]) == 6
