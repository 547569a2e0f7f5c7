"""The command line on a tiny model: every command works, every bad request is one line and 2."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import decode, encode, save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.checkpoints.train_state import TrainState, save_train_state
from llama_adapter.cli import main
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

WORDS = ("green", "river", "stone", "paper", "window", "light", "seven", "answer")


@pytest.fixture
def base(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture
def adapter(tmp_path: Path, base: Path, tiny_adapter: Adapter) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tiny_adapter, fingerprint(load_base(base).model, "tiny"))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    records = [
        {"instruction": f"the first of {a} {b}", "input": "", "output": a}
        for a in WORDS
        for b in WORDS[:3]
    ]
    path.write_text(json.dumps(records))
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_finetune_then_generate_and_info(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    recipe = ("--epochs", 1, "--batch-size", 8, "--val-size", 2)
    assert run("finetune", "--base", base, "--data", data, "--output", out, *recipe) == 0
    shown = capsys.readouterr().out
    assert str(out / "adapter.safetensors") in shown
    assert str(out / "loss.png") in shown
    assert "trained     22 records, 2 held out, 3 steps, loss " in shown
    assert re.search(r"^speed       [\d,]+ record tokens/s, the median of a step$", shown, re.M)

    words = ("generate", "the first of green river", "--base", base, "--max-new-tokens", 6)
    assert run(*words, "--temperature", 0, "--adapter", out / "adapter.safetensors") == 0
    assert capsys.readouterr().out.endswith("\n")
    assert run("info", out / "adapter.safetensors") == 0
    shown = capsys.readouterr().out
    assert "tiny" in shown
    assert "layers" in shown


def test_config_file_repeats_a_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ("--epochs", 1, "--warmup-epochs", 0, "--max-steps", 2, "--prompt-length", 3)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("finetune", "--base", base, "--data", data, "--output", first, *recipe) == 0
    again = ("finetune", "--config", first / "config.json", "--output", second)
    assert run(*again) == 0
    one, two = (folder / "adapter.safetensors" for folder in (first, second))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_continues_from_its_folder_alone(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ("--epochs", 2, "--batch-size", 6, "--seed", 5, "--save-every", 2)
    words = ("finetune", "--base", base, "--data", data, *recipe)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(*words, "--output", whole) == 0
    assert run(*words, "--output", parted, "--max-steps", 3) == 0
    # the step limit is the run's own, and free to change
    assert run("finetune", "--output", parted, "--resume", "--max-steps", 100) == 0
    one, two = (folder / "adapter.safetensors" for folder in (whole, parted))
    assert one.read_bytes() == two.read_bytes()
    # and so is the folder that keeps its data as tokens
    cache = tmp_path / "cache"
    assert run("finetune", "--output", parted, "--resume", "--token-cache", cache) == 0
    assert [path.suffix for path in cache.iterdir() if path.name[0] != "."] == [".tokens"]
    # a run that had nothing left to do tells no speed
    assert "speed" not in capsys.readouterr().out.rpartition("trained ")[2]
    assert run("finetune", "--output", parted, "--resume", "--seed", 6) == 2
    assert "seed was 5, is now 6" in capsys.readouterr().err
    assert run("finetune", "--output", tmp_path / "absent", "--resume") == 2
    assert "absent holds no run (config.json is missing)" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes in one folder used to destroy each other's metrics and checkpoints."""
    out = tmp_path / "run"
    words = ("finetune", "--base", base, "--data", data, "--output", out, "--epochs", 1)
    assert run(*words, "--batch-size", 4) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print()"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdout.flush(); sys.stdin.read()", str(out / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert run("finetune", "--output", out, "--resume") == 2
    finally:
        holder.communicate()
    assert f"run folder {out} is in use by another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert run("finetune", "--output", out, "--resume") == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.5), ("seed", 9), ("batch_size", 2), ("n_layers", 1), ("gate_activation", "identity")],
)
def test_an_edited_configuration_is_not_resumed(
    name: str,
    value: object,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    words = ("finetune", "--base", base, "--data", data, "--output", out, "--max-steps", 2)
    assert run(*words, "--batch-size", 8) == 0
    config = json.loads((out / "config.json").read_text())
    (config["adapter"] if name in config["adapter"] else config)[name] = value
    (out / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run("finetune", "--output", out, "--resume", "--max-steps", 4) == 2
    assert f"{name} was " in capsys.readouterr().err


def test_a_handful_of_records_is_warned_of(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("finetune", "--base", base, "--data", data, "--val-size", 2, "--output")
    assert run(*words, tmp_path / "one") == 0
    said = "few optimiser steps to learn much, 5 (training records: 22, epochs: 5, batch_size: 64)"
    assert said in capsys.readouterr().err
    assert run(*words, tmp_path / "two", "--epochs", 10, "--batch-size", 4) == 0
    assert "warning" not in capsys.readouterr().err


def test_generate_streams_what_a_file_of_questions_collects(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.json"
    asked = [{"instruction": "paper window"}, {"instruction": "stone", "input": "seven birds"}]
    questions.write_text(json.dumps(asked))
    common = ("--base", base, "--adapter", adapter, "--temperature", 0, "--max-new-tokens", 8)
    assert run("generate", "--data", questions, *common) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == ["", "seven birds"]
    assert run("generate", "stone", "--input", "seven birds", *common) == 0
    assert capsys.readouterr().out == lines[1]["output"] + "\n"


def test_a_quantised_base_answers_with_its_adapter(
    base: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchao.quantization")
    common = ("--base", base, "--temperature", 0, "--max-new-tokens", 8, "--quantize", "int8")
    answers = []
    for words in (("--adapter", adapter), ()):
        assert run("generate", "stone", *words, *common) == 0
        shown = capsys.readouterr()
        # torchao has much to say at import, and none of it is for whoever asked
        assert shown.err == ""
        answers.append(shown.out)
    assert answers[0] != answers[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("stone\n/base\nstone\n"))
    assert run("chat", "--adapter", adapter, *common) == 0
    assert capsys.readouterr().out == "".join(answers)


def test_chat_answers_and_switches_the_adapter(
    base: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("--base", base, "--temperature", 0, "--max-new-tokens", 8)
    answers = []
    for words in (("--adapter", adapter), ()):
        assert run("generate", "stone", "--input", "seven", *words, *common) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    typed = "/input seven\nstone\n/base\n/input seven\nstone\n/help\n\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert run("chat", "--adapter", adapter, *common) == 0
    shown = capsys.readouterr().out
    # from a pipe: answers, and no prompt signs between them
    assert shown.startswith(answers[0])
    assert shown.index(answers[0]) < shown.rindex(answers[1])
    # commands' answers are not the model's
    assert "/quit" not in shown


def test_chat_ends_at_end_of_file(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter\n"))
    assert run("chat", "--base", base) == 0
    assert "no adapter is loaded" in capsys.readouterr().err


def test_generate_reads_the_lines_it_writes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"instruction": "stone"}\n\n{"instruction": "river", "input": "a"}\n')
    common = ("generate", "--base", base, "--temperature", 0, "--max-new-tokens", 2, "--data")
    assert run(*common, questions) == 0
    first = capsys.readouterr().out
    assert first.count("\n") == 2
    questions.write_text(first)
    assert run(*common, questions) == 0
    assert capsys.readouterr().out == first
    questions.write_text("not json\n")
    assert run(*common, questions) == 2
    assert "record 0, counted from 0, has no instruction" in capsys.readouterr().err


def test_the_bundled_base_brings_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ("finetune", "--data", assets.JSON_TRAIN, "--output", out, "--max-steps", 1)
    assert run(*words, "--epochs", 4) == 0
    assert f"recipe      the bundled model's, {assets.RECIPE}" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    recipe = json.loads(assets.RECIPE.read_text())
    assert config["lr"] == recipe["lr"]
    assert config["batch_size"] == recipe["batch_size"]
    assert config["epochs"] == 4
    assert run("info", out) == 0
    assert "adapter     " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run("--version")
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("llama-adapter ")


def test_chat_from_a_pipe_stops_at_what_it_cannot_answer(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("chat", "--base", base, "--temperature", 0, "--max-new-tokens", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("stone\nbad \udcff\nstone\n"))
    assert run(*common) == 2
    shown = capsys.readouterr()
    assert "text must be UTF-8" in shown.err
    assert "in the instruction 'bad \\udcff'" in shown.err
    assert shown.out.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", None)
    assert run(*common) == 2
    assert "standard input, which is closed" in capsys.readouterr().err


def test_info_of_a_base(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", base) == 0
    assert "dim 48, 4 layers, 6 heads (2 key/value), vocabulary 353" in capsys.readouterr().out


BAD = {
    "no command": ("", "the following arguments are required: command"),
    "unknown command": ("tune", "invalid choice: 'tune'"),
    "no data": ("finetune --output OUT", "--data is required"),
    "no output": ("finetune --data DATA", "--output is required"),
    "missing data": ("finetune --data absent.json --output OUT", "absent.json: no such file"),
    "token cache in a file": (
        "finetune --base BASE --data DATA --output OUT --token-cache config.json",
        "tokens cannot be cached in",
    ),
    "misspelt option": ("finetune --epoch 3", "unknown argument --epoch, did you mean --epochs?"),
    "bad value": (
        "finetune --data DATA --output OUT --epochs 0",
        "epochs must be at least 1, got 0",
    ),
    "bad choice": ("finetune --data DATA --output OUT --gate-scope x", "invalid choice: 'x'"),
    "missing base": ("finetune --data DATA --output OUT --base nowhere", "nowhere does not exist"),
    "too many layers": (
        "finetune --data DATA --output OUT --base BASE --n-layers 9",
        "n_layers must be at most the model's 4, got 9",
    ),
    "used folder": ("finetune --data DATA --output BASE", "is not empty"),
    "bad config": ("finetune --config DATA --output OUT", "expected a JSON object, got list"),
    "nothing to answer": ("generate --base BASE", "give either an instruction or --data"),
    "adapter is a folder": (
        "generate hi --base BASE --adapter EMPTY",
        "is a folder: name the adapter.safetensors of a run folder",
    ),
    "no adapter": ("generate hi --base BASE --adapter absent", "absent"),
    "adapter is a text": ("generate hi --base BASE --adapter DATA", "own.json"),
    "adapter is a checkpoint": (
        "generate hi --base BASE --adapter CHECKPOINT",
        "is a training checkpoint, for finetune --resume: the adapter of its run is",
    ),
    "wrong base": ("generate hi --adapter ADAPTER", "was trained on base"),
    "bad temperature": ("generate hi --base BASE --temperature=-1", "temperature must be"),
    "no thread": ("generate hi --base BASE --threads 0", "threads must be at least 1, got 0"),
    "bad top p": ("generate hi --base BASE --top-p 0", "top_p must be"),
    "bad device": ("generate hi --base BASE --device cuda", "device cuda is not available"),
    "questions no list": ("generate --base BASE --data CONFIG", "must hold a list of records"),
    "one question too long": (
        "generate --base BASE --data LONG",
        "record 1, counted from 0: the instruction's prompt must have",
    ),
    "nested beyond reason": ("generate --base BASE --data DEEP", "maximum recursion depth"),
    "config nested so": ("finetune --output OUT --config DEEP", "maximum recursion depth"),
    "held out is the data": (
        "finetune --base BASE --data DATA --output OUT --val-data DATA",
        "val_data must be another file than data",
    ),
    "four bits on a CPU": (
        "generate hi --base BASE --device cpu --quantize int4",
        'quantize "int4" needs an NVIDIA GPU of sm_80 or newer, got device cpu',
    ),
    "unknown format": ("generate hi --quantize int2", "invalid choice: 'int2'"),
    "training in four bits": (
        "finetune --base BASE --data DATA --output OUT --quantize int4",
        "invalid choice: 'int4'",
    ),
    "no device": ("generate hi --base BASE --device gpu", "device must be cpu or cuda, got 'gpu'"),
    "strange device": ("generate hi --base BASE --device meta", "device must be cpu or cuda"),
    "rate beyond float": ("finetune --data DATA --output OUT --lr 1e38", "lr must be from 0 to"),
    "huge seed": ("finetune --data DATA --output OUT --seed 99999999999999999999", "seed must be"),
    "data is a folder": ("finetune --data EMPTY --output OUT", "is no regular file"),
    "threads beyond any machine": (
        "finetune --data DATA --output OUT --threads 100000",
        "threads must be from 1 to 1024, got 100000",
    ),
    "endless prompt": (
        "finetune --data DATA --output OUT --prompt-length 10000000000000000000000",
        "prompt_length must be from 1 to 65536",
    ),
    "prompts beyond float": (
        "finetune --data DATA --output OUT --prompt-std 1e38",
        "prompt_std must be above 0 and at most 1000000",
    ),
    "number beyond float": ("finetune --output OUT --config HUGE", "lr is too large for a number"),
    "empty device": ("generate hi --base BASE --device=", "device must be cpu or cuda, got ''"),
    "input beside data": (
        "generate --base BASE --data LONG --input x",
        "--input goes with an instruction",
    ),
    "adapter of NaN": ("info NANS", "gates must be finite, got NaN or infinity"),
    "no items": ("quickstart --items 0", "items must be at least 1, got 0"),
    "no text": ("generate SURROGATE --base BASE", "text must be UTF-8"),
    "info of nothing": ("info absent", "absent"),
    "info of a text": ("info DATA", "own.json"),
    "info of a folder": ("info EMPTY", "must be a folder in Meta's format"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line_and_exit_code_2(
    case: str,
    base: Path,
    adapter: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    names = {"BASE": base, "ADAPTER": adapter, "DATA": data, "OUT": "out", "EMPTY": "empty"}
    names["CONFIG"], names["LONG"], names["DEEP"] = "config.json", "long.json", "deep.json"
    names["CHECKPOINT"] = save_train_state(tmp_path / "empty", TrainState(1, {}, {}), 1)
    names["SURROGATE"] = "bad \udcff"
    asked = [{"instruction": "stone"}, {"instruction": "stone " * 200}]
    (tmp_path / "long.json").write_text(json.dumps(asked))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    names |= {"HUGE": "huge.json", "NANS": tmp_path / "nans.safetensors"}
    (tmp_path / "huge.json").write_text(f'{{"lr": {10**400}}}')
    content = adapter.read_bytes()
    with monkeypatch.context() as unchecked:
        unchecked.setattr("llama_adapter.checkpoints.adapter_file._check_tensors", lambda *_: None)
        header, tensors = decode(content, "it")
        tensors["gates"][0, 0] = float("nan")
        (tmp_path / "nans.safetensors").write_bytes(encode(header, tensors))
    words, message = BAD[case]
    try:
        code = run(*(names.get(word, word) for word in words.split()))
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    # a file's earlier questions have their answers by then
    assert shown.out == "" or case == "one question too long"


def test_byte_order_mark_is_read_over(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps([{"instruction": "stone"}]), encoding="utf-8-sig")
    words = ("generate", "--base", base, "--data", path, "--max-new-tokens", 1)
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out)["instruction"] == "stone"


def test_a_damaged_run_is_not_resumed(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ("finetune", "--base", base, "--data", data, "--output", out)
    recipe = ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4, "--max-steps")
    assert run(*words, *recipe, 3) == 0
    capsys.readouterr()
    assert run(*words, *recipe, 2, "--resume") == 2
    assert "it is at step 3, beyond max_steps = 2" in capsys.readouterr().err

    metrics, adapter = out / "metrics.jsonl", (out / "adapter.safetensors").read_bytes()
    lines = metrics.read_text().splitlines(keepends=True)
    for line in ("[1]", '{"step": "x"}', '{"step": null}', "[" * 200_000, ""):
        damaged = "".join(lines[:2]) + line + "\n" + "".join(lines[3:]) if line else ""
        metrics.write_text(damaged)
        assert run(*words, *recipe, 4, "--resume") == 2
        assert "metrics.jsonl is damaged" in capsys.readouterr().err
        assert metrics.read_text() == damaged
    metrics.write_text("".join(lines))
    shutil.rmtree(out / "checkpoints")
    assert run(*words, *recipe, 4, "--resume") == 2
    assert "it holds an adapter, but no usable checkpoint" in capsys.readouterr().err
    assert (out / "adapter.safetensors").read_bytes() == adapter


def test_interrupted_training_says_how_to_go_on(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_adapter.trainer.Trainer.step", stop)
    assert run("finetune", "--base", base, "--data", data, "--output", tmp_path / "run") == 130
    assert "--resume continues from step 0" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run("info", tmp_path / "absent", "--debug")


def test_closed_pipe_is_quiet(base: Path) -> None:
    code = "import sys; from llama_adapter.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "info", str(base)]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "_", *command],
        capture_output=True,
        text=True,
        # as users run it: buffered, so that the reader's absence shows at a flush
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_model_of_another_shape_is_refused(
    base: Path, adapter: Path, tiny_config: LlamaConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Llama(tiny_config)
    torch.save(model.state_dict(), base / "consolidated.00.pth")
    assert run("generate", "hi", "--base", base, "--adapter", adapter) == 2
    assert "was trained on base" in capsys.readouterr().err
