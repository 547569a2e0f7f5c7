"""The multi-modal benchmark: runs train what they say, answers are greedy, verdicts are honest."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import multimodal, multimodal_lab
from benchmarks.ablation_claims import NOT, PARTLY, REPRODUCED, Spread
from benchmarks.multimodal_claims import (
    Classes,
    Skills,
    class_claims,
    data_claims,
    fusion_claims,
    group_claims,
    scale_claims,
)
from benchmarks.multimodal_lab import (
    Laboratory,
    answers,
    is_instruction,
    laboratory,
    letters_of,
    scores_of,
    with_pictures_of,
    words_right,
)
from benchmarks.multimodal_models import (
    CLIP_SHAPE,
    document,
    encode,
    image_processor,
    target,
    train_encoder,
)
from benchmarks.multimodal_plan import FULL, GROUPS, QUICK, Plan, cells
from benchmarks.multimodal_runs import Run, make_trainer, measure
from benchmarks.multimodal_task import PICTURED
from benchmarks.multimodal_workplace import Sizes, Workplace
from benchmarks.multimodal_world import COLOURS, SIDE, facts, pairs
from llama_adapter.adapter import LANGUAGE, VISUAL
from llama_adapter.evaluation import scienceqa

ROOT = Path(__file__).parents[2]
TINY = Plan(
    sizes=Sizes(train=60, test=20, base_steps=2, encoder_steps=2),
    seeds=(0,),
    steps=2,
    stage_steps=2,
    pictured=(10,),
)
UNTIMED = {"seconds": 0, "processor_seconds": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("work")
    Workplace(path).make(TINY.sizes, lambda _: None)
    return path


@pytest.fixture
def lab(folder: Path) -> Iterator[Laboratory]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield laboratory(folder)
    torch.set_num_threads(threads)


def run_of(kind: str = "questions", fusion: str = "late", groups: str = "all", **more: Any) -> Run:
    return replace(Run(kind, fusion, "multi", groups, -1, 2, 1), **more)


def opened(lab: Laboratory, run: Run) -> Any:
    """An adapter whose gates are random, some above 1 before tanh."""
    adapter = make_trainer(lab, run).adapter
    generator = torch.Generator().manual_seed(4)
    for gates in (adapter.gates, adapter.visual_gates):
        if gates is not None:
            torch.nn.init.normal_(gates, std=1.0, generator=generator)
    return adapter.requires_grad_(False)


def spread(*values: float) -> Spread:
    return Spread.of(values)


@pytest.mark.parametrize("fusion", ["text", "late", "early"])
def test_answers_are_those_of_decoding_each_question_alone(lab: Laboratory, fusion: str) -> None:
    adapter, test = opened(lab, run_of(fusion=fusion)), lab.items["test"]
    written = answers(lab, adapter, "multi", lab.examples(test, fusion != "text"))
    tokenizer, model = lab.base.tokenizer, lab.base.model
    for item, text in list(zip(test, written, strict=True))[:6]:
        visual = None
        if fusion != "text":
            visual = adapter.visual_tokens(*lab.pictures["multi"]([item["image"]]))
        prompts = model.project(adapter, visual)
        ids = tokenizer.encode(scienceqa.prompt_of(item), bos=True)
        start = len(ids)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids]), prompts)[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_id:
                    break
        assert text == tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_id])


def test_words_of_captions_count_each_by_itself(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = lab.captions("test")
    tokenizer = lab.base.tokenizer
    targets = torch.tensor([label for one in captions for label in one.labels if label != -100])
    colours = torch.tensor([tokenizer.encode(colour)[0] for colour in COLOURS])
    # everything right but the colours, one word of four
    wrong = torch.where(torch.isin(targets, colours), tokenizer.eos_id, targets)
    logits = torch.nn.functional.one_hot(wrong, tokenizer.vocab_size).float()
    monkeypatch.setattr(multimodal_lab, "logits_of", lambda *_: (logits, targets, ()))
    assert words_right(lab, None, "multi", captions) == 75.0
    assert len(captions) == sum(item["has_image"] for item in lab.items["test"])


def test_scores_count_by_class_and_by_kind_and_no_letter_is_wrong(lab: Laboratory) -> None:
    test = lab.items["test"]
    right = [target(item) for item in test]
    assert {value for value in scores_of(test, right).values() if value >= 0} == {100.0}
    assert letters_of(test, right) == "".join("ABCD"[item["answer"]] for item in test)
    blind = ["no idea" if item["topic"] in PICTURED else target(item) for item in test]
    found = scores_of(test, blind)
    assert (found["pictured"], found["see"], found["fact"], found["NO"]) == (0, 0, 100, 100)
    assert found["Avg"] == 60.0
    assert letters_of(test, blind).count("?") == 8


def test_shuffled_pictures_are_the_same_ones_elsewhere(lab: Laboratory) -> None:
    examples = lab.examples(lab.items["train"])
    shuffled = with_pictures_of(examples, 0)
    assert [one.image is None for one in examples] == [one.image is None for one in shuffled]
    assert sorted(str(one.image) for one in examples) == sorted(str(one.image) for one in shuffled)
    moved = sum(a.image != b.image for a, b in zip(examples, shuffled, strict=True))
    assert moved > 0.8 * sum(one.image is not None for one in examples)
    assert [one.tokens for one in examples] == [one.tokens for one in shuffled]


def test_a_run_repeats_bitwise_and_reports_what_it_trained(lab: Laboratory) -> None:
    run = run_of(pictured=10)
    rows = [measure(lab, run) for _ in range(2)]
    assert {**rows[0], **UNTIMED} == {**rows[1], **UNTIMED}
    assert len(rows[0]["losses"]) == 2
    assert len(rows[0]["letters"]) == TINY.sizes.test
    assert rows[0]["trained_on"] == 30 + 10
    text = measure(lab, run_of(fusion="text"))
    assert "shuffled" not in text
    assert text["projector"] == 0
    assert rows[0]["parameters"] - text["parameters"] == rows[0]["projector"] > 0


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_the_visual_group_alone_leaves_every_answer_without_picture_as_it_was(
    lab: Laboratory, fusion: str
) -> None:
    row = measure(lab, run_of("sequential", fusion, "disjoint", steps=3))
    assert row["text_logits_moved"] == 0.0
    assert row["before"]["INST"] == row["after"]["INST"]
    moved = measure(lab, run_of("sequential", fusion, "all", steps=3))
    assert moved["text_logits_moved"] > 0
    assert len(row["losses"]) == 6


def test_joint_batches_train_each_its_own_groups(lab: Laboratory) -> None:
    trainer = make_trainer(lab, run_of("joint", "early"))
    assert {*trainer.groups} == {"prompts", "gates", "projector", "visual_gates"}
    assert {*trainer.groups} <= {*LANGUAGE, *VISUAL}
    for groups in ("all", "disjoint"):
        row = measure(lab, run_of("joint", "early", groups, steps=4))
        assert len(row["losses"]) == 4
        assert set(row["after"]) == {"INST", "CAP", "VQA"}
        assert "before" not in row


def test_instructions_are_facts_put_anew(lab: Laboratory) -> None:
    some = [item for item in lab.items["train"] if is_instruction(item)]
    assert 0 < len(some) < sum(item["topic"] == "fact" for item in lab.items["train"])
    assert not any("made of" in item["question"] or "called" in item["question"] for item in some)


def test_the_models_read_and_see_nothing_that_only_the_test_combines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import random

    from benchmarks import multimodal_models

    rng, world, held = random.Random(2), facts(0), pairs("test")
    texts = [
        "".join(document(rng, world, shares))
        for shares in (multimodal_models.PRACTICE, multimodal_models.READING)
        for _ in range(500)
    ]
    assert any("Shown: " in text for text in texts)
    assert not any(f"{colour} {shape}," in text for shape, colour in held for text in texts)
    seen: list[Any] = []
    real = multimodal_models.draw
    monkeypatch.setattr(
        multimodal_models, "draw", lambda scene, rng: seen.append(scene) or real(scene, rng)
    )
    train_encoder(1)
    assert len(seen) == multimodal_models.CLIP_BATCH
    assert not {(scene.shape, scene.colour) for scene in seen} & {*held}


def test_the_encoder_is_transformers_clip_and_frozen(folder: Path, lab: Laboratory) -> None:
    pictures = lab.pictures["multi"]
    assert pictures.encoder.width == 3 * CLIP_SHAPE["hidden_size"]
    assert lab.pictures["last"].encoder.width == CLIP_SHAPE["hidden_size"]
    assert (folder / "encoder" / "config.json").is_file()
    assert image_processor().to_dict()["do_resize"] is False
    assert CLIP_SHAPE["image_size"] == SIDE
    features, present = pictures([None, lab.items["train"][0]["image"]])
    assert present[0].item() is False
    assert features.isfinite().all()


def test_a_workplace_is_made_once(folder: Path) -> None:
    said: list[str] = []
    Workplace(folder).make(TINY.sizes, said.append)
    assert said == []
    marker = folder / "made.json"
    held = json.loads(marker.read_text())
    marker.write_text(json.dumps({**held, "identity": {}}))
    other = folder / "of somebody else"
    other.write_text("kept")
    Workplace(folder).make(TINY.sizes, said.append)
    assert said == ["making the task", "making the base", "making the encoder"]
    assert other.read_text() == "kept"
    laboratory.cache_clear()


def test_labels_are_on_the_answer_alone(lab: Laboratory) -> None:
    for item, example in zip(lab.items["test"], lab.examples(lab.items["test"]), strict=True):
        kept = [label for label in example.labels if label != -100]
        assert lab.base.tokenizer.decode(kept) == target(item).strip()
        assert kept[-1] == lab.base.tokenizer.eos_id
    with pytest.raises(ValueError, match="must end where a token ends"):
        encode(lab.base.tokenizer, "The ans", "wer is A")


def test_every_cell_of_an_experiment_has_its_own_run_and_seeds_come_in_order() -> None:
    table = cells(FULL)
    seeds = [cell.run.seed for cell in table]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}
    for name in multimodal.SECTIONS:
        runs = [cell.run for cell in table if cell.experiment == name]
        assert len(set(runs)) == len(runs) > 0
    assert {c.setting[0] for c in table if c.experiment == "groups"} == {*GROUPS}
    assert {c.experiment for c in cells(QUICK)} == {*multimodal.SECTIONS}
    full = (FULL.sizes.train // 2,)
    late = {cell.run for cell in table if cell.setting in (("late",), ("multi",), full)}
    assert len(late) == len(FULL.seeds)


def test_the_command_writes_tables_figures_and_verdicts_and_continues(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(multimodal, "QUICK", TINY)
    command = ["--quick", "--output", str(tmp_path), "--work", str(folder)]
    measured: list[Run] = []

    def interrupted(lab: Laboratory, run: Run) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(run)
        return measure(lab, run)

    monkeypatch.setattr(multimodal, "measure", interrupted)
    assert multimodal.main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(multimodal, "measure", measure)
    assert multimodal.main(command) == 0
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "multimodal.json").read_text())
    assert held["runs_planned"] == len(held["rows"]) == 11
    assert f"{len(held['rows']) - 2} of {len(held['rows'])} runs to go" in printed
    assert set(held["verdicts"]) == {*multimodal.SECTIONS}
    for claims in held["verdicts"].values():
        for claim in claims:
            assert claim["verdict"] in (REPRODUCED, PARTLY, NOT)
            assert f"- **{claim['verdict']}**: {claim['paper']}" in printed
    assert "its verdicts mean nothing" in printed
    for name in ("classes", "data", "groups", "examples", "example"):
        assert (tmp_path / f"multimodal_{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "multimodal.md").read_text()
    assert "Processor time of all of it" in text
    assert math.isclose(held["facts"]["chance"]["Avg"], 36, abs_tol=10)


def test_the_reduced_form_needs_no_folder_and_writes_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multimodal, "QUICK", TINY)
    monkeypatch.chdir(tmp_path)
    assert multimodal.main(["--quick"]) == 0
    laboratory.cache_clear()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    results = tmp_path / "runs" / "multimodal" / "quick" / "results"
    assert (results / "multimodal.md").is_file()


def test_results_of_another_base_are_not_continued(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(multimodal, "QUICK", TINY)
    old = {"task": "0", "base": {}}
    file = tmp_path / "multimodal.json"
    file.write_text(json.dumps({"environments": [], "rows": [], "identity": old}))
    command = ["--quick", "--output", str(tmp_path), "--work", str(folder)]
    assert multimodal.main(command) == 2
    assert "was measured with another task and base" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_command_with_two_processes_takes_under_three_minutes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.multimodal", "--quick", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "out" / "multimodal.json").read_text())
    assert len(held["rows"]) == held["runs_planned"]
    spent = sum(held["facts"]["pretraining_processor_seconds"].values())
    assert held["processor_seconds"] + spent < 180


def classes(**values: tuple[float, ...]) -> Classes:
    usual = dict.fromkeys(("Avg", "IMG", "NO", "pictured"), (50.0, 51.0))
    return Classes({name: Spread.of(found) for name, found in (usual | values).items()})


def verdicts(claims: Any) -> list[str]:
    return [claim.verdict for claim in claims]


def test_verdicts_on_classes() -> None:
    text = classes(pictured=(36, 38), Avg=(60, 61), IMG=(44, 46), NO=(90, 92))
    multi = classes(pictured=(80, 85), Avg=(85, 86), IMG=(84, 86), NO=(90, 91))
    mixed = classes(pictured=(35, 38))
    assert verdicts(class_claims(text, multi, mixed, 36.0)) == [REPRODUCED] * 4
    # more than half of the gain is elsewhere; shuffled pictures help a little; no chance level
    multi = classes(pictured=(80, 85), Avg=(62, 63), IMG=(50, 52), NO=(97, 97))
    half = classes(pictured=(50, 55))
    assert verdicts(class_claims(text, multi, half, 20.0)) == [PARTLY, NOT, PARTLY, PARTLY]
    lost = classes(pictured=(30, 36), Avg=(60, 61), IMG=(84, 86), NO=(80, 81))
    assert verdicts(class_claims(text, lost, half, 20.0)) == [NOT, PARTLY, NOT, NOT]


@pytest.mark.parametrize(
    ("better", "expected"), [((60, 61), REPRODUCED), ((51, 53), PARTLY), ((40, 49), NOT)]
)
def test_verdict_on_scales(better: tuple[float, float], expected: str) -> None:
    (claim,) = scale_claims(classes(IMG=better), classes(IMG=(50, 52)))
    assert claim.verdict == expected


@pytest.mark.parametrize(
    ("early", "expected"), [((49, 51), REPRODUCED), ((47, 49), PARTLY), ((40, 42), NOT)]
)
def test_verdict_on_fusion(early: tuple[float, float], expected: str) -> None:
    (claim,) = fusion_claims(classes(IMG=(50, 52)), classes(IMG=early))
    assert claim.verdict == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(30, 40), (50, 60), (55, 70)], REPRODUCED),
        ([(30, 40), (80, 90), (55, 70)], PARTLY),
        ([(30, 60), (50, 60), (55, 70)], NOT),
    ],
)
def test_verdict_on_more_data(found: list[tuple[float, float]], expected: str) -> None:
    (claim,) = data_claims({100 * n: Spread.of(values) for n, values in enumerate(found)})
    assert claim.verdict == expected


def test_verdicts_on_groups() -> None:
    kept = Skills(
        inst=spread(90, 91),
        cap=spread(95, 99),
        vqa=spread(60, 62),
        inst_before=spread(90, 91),
        vqa_before=spread(40, 45),
        moved=spread(0.0, 0.0),
    )
    ruined = replace(kept, inst=spread(40, 60), moved=spread(3.0, 4.0))
    found = dict.fromkeys(GROUPS, kept) | {"late all": ruined, "joint all": ruined}
    assert verdicts(group_claims(found, 80.0)) == [REPRODUCED] * 5
    slight = replace(kept, inst=spread(80, 89))
    dull = replace(kept, cap=spread(10, 20), vqa=spread(43, 46))
    found |= {"late all": slight, "early disjoint": dull, "joint all": kept}
    assert verdicts(group_claims(found, 89.0)) == [PARTLY, PARTLY, PARTLY, PARTLY, NOT]
    moved = replace(kept, moved=spread(0.0, 1e-6), vqa=spread(30, 40))
    found |= {"late all": kept, "early disjoint": moved, "joint all": slight}
    assert verdicts(group_claims(found, 91.0)) == [NOT, NOT, NOT, NOT, REPRODUCED]
