"""Hosts get a head for their task; folders that are none are refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llama_adapter.host_training.host_config import TASKS, HostRunConfig
from llama_adapter.host_training.loading import digest_of, load_host, load_task, method_options
from llama_adapter.hosts.methods import attach
from llama_adapter.options import build
from llama_adapter.tasks.base_to_novel import BaseToNovelTask
from tests.llama_adapter.host_runs import options_of, write_squad


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def config_of(task: str, made: Path, **more: Any) -> HostRunConfig:
    return build(HostRunConfig, {**options_of(task, made), "output": Path("run"), **more})


@pytest.mark.parametrize("task", list(TASKS))
def test_weights_are_the_folders_and_the_head_the_seeds(task: str, made: Path) -> None:
    config = config_of(task, made)
    found, problems = load_task(config.task_options, config.model)
    assert problems == []
    model = load_host(config, found)
    assert not model.training
    held = load_file(config.model / "model.safetensors")
    own = model.state_dict()
    same = [
        name for name, value in own.items() if any(torch.equal(value, x) for x in held.values())
    ]
    head = sorted(set(own) - set(same))
    assert all(name.startswith(("classifier", "qa_outputs")) for name in head)
    if head:
        assert own[head[-1]].shape[0] == len(found.labels)
        again = load_host(config, found).state_dict()
        assert all(torch.equal(again[name], own[name]) for name in head)
        other = replace(config, fit=replace(config.fit, seed=5))
        assert not torch.equal(load_host(other, found).state_dict()[head[-1]], own[head[-1]])


def test_dropout_is_the_runs(made: Path) -> None:
    config = config_of("squad", made, hidden_dropout=0.35)
    found, _ = load_task(config.task_options, config.model)
    assert load_host(config, found).config.hidden_dropout_prob == 0.35


def test_labels_of_a_run_come_before_those_of_the_data(made: Path) -> None:
    config = config_of("conll03", made)
    labels = ("O", "B-LOC", "B-PER", "B-ORG")
    found, _ = load_task(config.task_options, config.model, labels=labels)
    assert found.labels == labels
    assert found.train == []
    assert load_host(config, found).config.num_labels == 4


def test_a_folder_that_is_no_such_host_is_refused(made: Path, tmp_path: Path) -> None:
    config = config_of("vtab", made)
    found, _ = load_task(config.task_options, config.model)
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a config.json in it"):
        load_host(replace(config, model=tmp_path), found)
    roberta = options_of("squad", made)["model"]
    with pytest.raises(ValueError, match=r"model must be a vit, got a roberta in"):
        load_host(replace(config, model=roberta), found)
    lacking = tmp_path / "lacking"
    shutil.copytree(config.model, lacking)
    weights = load_file(lacking / "model.safetensors")
    gone = next(name for name in weights if "layer.1" in name)
    save_file({n: x for n, x in weights.items() if n != gone}, lacking / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold all weights of a vit, it lacks .*layers?.1"):
        load_host(replace(config, model=lacking), found)
    (lacking / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model .*lacking cannot be read: "):
        load_host(replace(config, model=lacking), found)
    before = (lacking / "config.json").read_text()
    for number in ("0", '"3"', "[]"):
        wrong = before.replace('"num_attention_heads": 3', f'"num_attention_heads": {number}')
        (lacking / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"model .*lacking cannot be read: "):
            load_host(replace(config, model=lacking), found)
    for text in ("{", "[" * 100_000):
        (lacking / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json does not tell a model_type"):
            load_host(replace(config, model=lacking), found)


@pytest.mark.parametrize("device", ["foo", "meta", "mps"])
def test_a_device_that_is_none_is_named(device: str, made: Path) -> None:
    config = replace(config_of("vtab", made), device=device)
    found, _ = load_task(config.task_options, config.model)
    with pytest.raises(ValueError, match=f"device must be cpu or cuda, got '{device}'"):
        load_host(config, found)


@pytest.mark.parametrize("task", ["vtab", "base_to_novel", "squad", "conll05"])
def test_the_digest_is_of_the_content(task: str, made: Path) -> None:
    config = config_of(task, made)

    def digest() -> str:
        found, _ = load_task(config.task_options, config.model)
        return digest_of(config.task_options, found, config.model)

    first = digest()
    assert digest() == first
    data = config.task_options.data
    if task == "squad":
        before, path = data.read_bytes(), data
        write_squad(data, 13)
    else:
        path = data
        if task == "vtab":
            path = data / "images" / "val200" / "3.png"
        elif task == "base_to_novel":
            path = data.parent / "val" / "0-0.png"
        before = path.read_bytes()
        path.write_bytes(before.replace(b"Ana", b"Eva") if task == "conll05" else before + b"\0")
    try:
        assert digest() != first
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("vtab", "preprocessor_config.json"),
        ("base_to_novel", "preprocessor_config.json"),
        ("base_to_novel", "tokenizer_config.json"),
        ("conll03", "tokenizer.json"),
    ],
)
def test_the_digest_is_of_how_a_host_reads(
    task: str, name: str, made: Path, tmp_path: Path
) -> None:
    config = config_of(task, made)
    model = tmp_path / "model"
    shutil.copytree(config.model, model)

    def digest() -> str:
        return digest_of(config.task_options, load_task(config.task_options, model)[0], model)

    first = digest()
    # the weights have a fingerprint of their own
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert digest() == first
    before = (model / name).read_text()
    (model / name).write_text(before.replace("0.5", "0.4").replace("0.48", "0.47") + " ")
    assert digest() != first


def test_version_2_is_seen_from_its_files(made: Path, tmp_path: Path) -> None:
    config = config_of("squad", made)
    dev = write_squad(tmp_path / "dev.json", 6, version_2=True)
    options = replace(config.task_options, test_data=(dev,))
    found, _ = load_task(options, config.model)
    assert json.loads(dev.read_text())["version"] == "v2.0"
    scores = found.score(found.test, [{"text": "", "null_odds": 1.0, "span": "x"}] * 6)
    assert "NoAns_exact" in scores


@pytest.mark.parametrize("template", ["{}", "{} rock.", "a photo of {}.", "a wide photo of a {}."])
def test_coops_context_replaces_what_stands_before_the_name(template: str, made: Path) -> None:
    """With the template's own words for a context, every text is what it was."""
    config = config_of("base_to_novel", made, method="coop", template=template, prompt_length=1)
    task, _ = load_task(config.task_options, config.model)
    assert isinstance(task, BaseToNovelTask)
    model, texts = load_host(config, task), task.texts["novel"]
    ids = AutoTokenizer.from_pretrained(config.model)(texts.texts[0])["input_ids"]
    options = method_options(config, task)
    before = len(template.partition("{}")[0].replace(" ", ""))
    # a letter is a token there
    assert options.template_length == before
    with torch.no_grad():
        theirs = texts(model)
        if before:
            own = tuple(ids[1 : 1 + before])
            options = replace(options, prompt_length=before, context_ids=own)
        attach(model, "coop", options)
        found = texts(model)
    if before:
        torch.testing.assert_close(found, theirs)
    # the names are still there
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_a_length_that_is_given_stays(made: Path) -> None:
    config = config_of("base_to_novel", made, method="coop", template_length=2)
    task, _ = load_task(config.task_options, config.model)
    assert method_options(config, task) == config.method_options
    other = config_of("squad", made)
    squad, _ = load_task(other.task_options, other.model)
    assert method_options(other, squad) == other.method_options
