"""Prompts and scores are lm-evaluation-harness' own, offline, of files; the command resumes.

It brings many packages of its own: tests/version_matrix.py runs this file where it is installed.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.answering import ModelOptions
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.cli import main
from llama_adapter.config import AdapterConfig
from llama_adapter.evaluation.open_llm import read_documents
from tests.llama_adapter.evaluation.open_llm_files import write_files


def test_without_lm_eval_the_import_says_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "llama_adapter.evaluation.open_llm_tasks", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lm-eval\[hf\]>=0.4.13'") as caught:
        __import__("llama_adapter.evaluation.open_llm_tasks")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-all runs this")
    return write_files(tmp_path_factory.mktemp("open_llm"))


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Any:
    from llama_adapter.evaluation.open_llm_tasks import OpenLlm

    return OpenLlm(read_documents(folder)[0])


@pytest.fixture(scope="module")
def items(tasks: Any) -> dict[str, Any]:
    return {item["id"]: item for item in tasks.items}


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the bundled base with random gates per head, some above 1."""
    base = load_base(assets.BASE, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    adapter = Adapter(AdapterConfig(prompt_length=5), base.model.config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_adapter(path, adapter, fingerprint(base.model, base.name))
    return path


def test_prompts_by_hand(items: dict[str, Any]) -> None:
    """Examples in front, separated by blank lines; choices behind with a blank."""
    assert [*items] == [
        *(f"arc_challenge/Mercury_{n}" for n in range(3)),
        *(f"hellaswag/{n}" for n in (1, 2, 3)),
        *(f"truthfulqa_mc2/{n}" for n in range(3)),
        *(f"mmlu_anatomy/{n}" for n in (1, 3, 5)),
        "mmlu_virology/1",
    ]
    arc = items["arc_challenge/Mercury_2"]
    *examples, asked = arc["context"].split("\n\n")
    assert asked == "Question: What is number 2?\nAnswer:"
    assert len(examples) == len(set(examples)) == 25
    for example in examples:
        first, second = example.split("\n")
        assert first.startswith("Question: What is number 1")
        assert second == "Answer: a river stone and a lamp"
    assert arc["continuations"] == [" cow 2", " a river stone and a lamp", " ash"]
    other = items["arc_challenge/Mercury_1"]["context"].split("\n\n")
    assert set(other) & set(examples)
    assert other[:-1] != examples

    swag = items["hellaswag/1"]
    *examples, asked = swag["context"].split("\n\n")
    assert len(examples) == 10
    assert asked == "Washing dishes: A person 0. stands. Then she"
    # what a mark leaves at the beginning stays
    assert swag["continuations"] == [
        " sits down 0.", "  walks on for a long time.", " ends.", " sings."
    ]  # fmt: skip
    assert all(one.endswith("Then she  walks on for a long time.") for one in examples)

    mmlu = items["mmlu_anatomy/3"]["context"]
    header = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    shown = 'Which, {n}?\nOr not?\nA. a cow\nB. two\nC. a "lamp"\nD. 4\nAnswer:'
    shots = [f"{shown.format(n=10 + n)} {'CDABC'[n]}" for n in range(5)]
    assert mmlu == header + "\n\n".join([*shots, shown.format(n=1)])
    assert items["mmlu_anatomy/3"]["continuations"] == [" A", " B", " C", " D"]

    truth = items["truthfulqa_mc2/1"]
    assert truth["context"].endswith("held in Barcelona, Spain.\n\nQ: What about 1?\nA:")
    assert truth["context"].count("Q: ") == 7
    assert truth["continuations"] == [
        " It is 1.", " Nobody knows.", " A lamp.", " It is a horse."
    ]  # fmt: skip


def test_acc_and_acc_norm_disagree_where_choices_differ_in_length(
    tasks: Any, items: dict[str, Any]
) -> None:
    """Of ARC's three choices "cow N" has 5 characters, the second 24 and "ash" 3."""
    said = [[-4.0, False], [-9.0, False], [-6.0, True]]
    # the likeliest is the first; by character they have -0.8, -0.375 and -2
    found = [tasks.score(items[f"arc_challenge/Mercury_{n}"], said) for n in range(3)]
    assert [one["arc_challenge/acc"] for one in found] == [0.0, 1.0, 0.0]
    assert [one["arc_challenge/acc_norm"] for one in found] == [1.0, 0.0, 0.0]
    # endings after their marks are gone: 12, 26, 5 and 6 characters
    said = [[-6.0, False], [-10.0, False], [-2.9, False], [-3.6, False]]
    found = [tasks.score(items[f"hellaswag/{n}"], said) for n in (1, 2, 3)]
    assert [one["hellaswag/acc"] for one in found] == [0.0, 0.0, 1.0]
    assert [one["hellaswag/acc_norm"] for one in found] == [0.0, 1.0, 0.0]


def test_mmlu_takes_the_likeliest_letter_and_truthfulqa_the_share_of_truth(
    tasks: Any, items: dict[str, Any]
) -> None:
    said = [[-3.0, False], [-1.0, True], [-2.0, False], [-4.0, False]]
    found = [tasks.score(items[f"mmlu_anatomy/{n}"], said) for n in (1, 3, 5)]
    assert found == [
        {"mmlu_anatomy/acc": 0.0},
        {"mmlu_anatomy/acc": 1.0},
        {"mmlu_anatomy/acc": 0.0},
    ]
    (share,) = tasks.score(items["truthfulqa_mc2/0"], said).values()
    true, false = math.exp(-3) + math.exp(-1), math.exp(-2) + math.exp(-4)
    assert abs(share - true / (true + false)) < 1e-12


def test_a_subject_that_nobody_knows_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    from llama_adapter.evaluation.open_llm_tasks import OpenLlm

    shutil.copytree(folder / "mmlu", tmp_path / "mmlu")
    for split in ("dev", "test"):
        path = tmp_path / "mmlu" / split / f"virology_{split}.csv"
        path.rename(path.with_name(f"alchemy_{split}.csv"))
    with pytest.raises(ValueError, match="mmlu_alchemy must be a task of lm-evaluation-harness"):
        OpenLlm(read_documents(tmp_path)[0])


def words(folder: Path, output: Path, adapter: Path, *more: object) -> list[str]:
    own = ["--data", folder, "--output", output, "--adapter", adapter, "--dtype", "float32"]
    return [*map(str, ("evaluate", "open_llm", *own, "--device", "cpu", "--quiet", *more))]


def test_the_command_scores_log_likelihoods_and_writes_lm_evals_results(
    folder: Path,
    items: dict[str, Any],
    adapter_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    assert main(words(folder, output, adapter_file, "--batch-size", 5)) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [*items]

    # log-likelihoods by hand, of the model's logits
    answerer = ModelOptions(adapter=adapter_file, dtype="float32", device="cpu").load()
    base, room = answerer.base, answerer.base.model.config.max_seq_len
    for row in rows:
        item = items[row["id"]]
        start = base.tokenizer.encode(item["context"], bos=True)
        for (score, greedy), continuation in zip(
            row["prediction"], item["continuations"], strict=True
        ):
            ids = base.tokenizer.encode(item["context"] + continuation, bos=True)
            count = len(ids) - len(start)
            kept = ids[-(room + 1) :]
            with torch.no_grad():
                logits = base.model(torch.tensor([kept[:-1]]), answerer.prompts)[0]
            chances = logits.log_softmax(-1)[-count:]
            wanted = torch.tensor(kept[-count:])
            expected = float(chances.gather(-1, wanted[:, None]).sum())
            assert abs(score - expected) < 1e-3
            assert greedy == bool((chances.argmax(-1) == wanted).all())

    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert [*scores] == ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "average"]
    parts = [value for name, value in scores.items() if name != "average"]
    assert abs(scores["average"] - sum(parts) / 4) < 1e-9
    results = json.loads((output / "results.json").read_text())
    assert results["n-shot"] == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0,
        "mmlu_anatomy": 5, "mmlu_virology": 5,
    }  # fmt: skip
    own = results["results"]
    assert abs(100 * own["arc_challenge"]["acc_norm,none"] - scores["arc_challenge"]) < 1e-9
    assert set(own["hellaswag"]) >= {"acc,none", "acc_norm,none", "acc_norm_stderr,none", "alias"}
    subjects = (own["mmlu_anatomy"]["acc,none"] + own["mmlu_virology"]["acc,none"]) / 2
    assert abs(own["mmlu"]["acc,none"] - subjects) < 1e-12
    assert results["n-samples"]["mmlu_anatomy"] == {"original": 3, "effective": 3}
    assert results["versions"]["truthfulqa_mc2"] == 3.0
    assert "must have 57 subjects, got 2" in shown.err
    (long,) = [row for row in shown.err.splitlines() if "lose their beginning" in row]
    assert f"more than {room - 1} tokens" in long
    count = len(base.tokenizer.encode(items["arc_challenge/Mercury_0"]["context"], bos=True))
    assert f"that of arc_challenge/Mercury_0 has {count}" in long
    assert f"result      {output / 'results.json'}" in shown.out


def test_lm_evals_own_evaluator_finds_the_same(
    folder: Path, adapter_file: Path, tmp_path: Path
) -> None:
    """Its loop over the same tasks and model: prompts, log-likelihoods and means."""
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

    from llama_adapter.evaluation.open_llm_tasks import OpenLlm
    from llama_adapter.integrations.lm_eval import LeanLM

    output = tmp_path / "run"
    assert main(words(folder, output, adapter_file)) == 0
    ours = json.loads((output / "results.json").read_text())
    model = LeanLM(str(assets.BASE), str(adapter_file), dtype="float32", device="cpu")
    tasks = OpenLlm(read_documents(folder)[0])._tasks
    for task in tasks.values():
        # as its command does before every evaluation
        task.set_fewshot_seed(1234)
    theirs = evaluate(lm=model, task_dict=dict(tasks), bootstrap_iters=0)
    for task in tasks:
        for metric in ("acc,none", "acc_norm,none"):
            got, expected = ours["results"][task].get(metric), theirs["results"][task].get(metric)
            assert (got is None) == (expected is None)
            assert got is None or abs(got - expected) < 1e-6
        assert ours["n-shot"][task] == theirs["n-shot"][task]
        assert ours["versions"][task] == theirs["versions"][task]
        assert ours["higher_is_better"][task] == theirs["higher_is_better"][task]
        assert ours["n-samples"][task] == theirs["n-samples"][task]
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    kept = {row["id"]: row["prediction"] for row in rows}
    samples = {task: theirs["samples"][task] for task in tasks}
    (first,) = [one for one in samples["arc_challenge"] if one["doc"]["id"] == "Mercury_1"]
    for (score, _), answer in zip(
        kept["arc_challenge/Mercury_1"], first["filtered_resps"], strict=True
    ):
        assert abs(score - float(answer[0])) < 1e-3


def test_a_killed_run_goes_on_and_other_examples_are_another_run(
    folder: Path,
    adapter_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llama_adapter.integrations.lm_eval import LeanLM

    data = write_files(tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(data, whole, adapter_file, "--batch-size", 2)) == 0
    honest, asked = LeanLM.loglikelihood, []

    def killed(self: Any, requests: Any, **more: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return honest(self, requests, **more)

    monkeypatch.setattr(LeanLM, "loglikelihood", killed)
    assert main(words(data, cut, adapter_file, "--batch-size", 2)) == 130
    assert len((cut / "predictions.jsonl").read_text().splitlines()) == 6
    monkeypatch.undo()
    assert main(words(data, cut, adapter_file, "--batch-size", 2)) == 0
    for name in ("predictions.jsonl", "scores.json", "results.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    capsys.readouterr()
    # one example less, so that other ones are drawn
    path = data / "arc" / "ARC-Challenge-Train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert main(words(data, cut, adapter_file)) == 2
    assert "items changed: 3, the first is 'arc_challenge/Mercury_0'" in capsys.readouterr().err
