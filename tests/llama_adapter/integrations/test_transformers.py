"""Do adapted models of transformers train, save, load and generate as any model of theirs?"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llama_adapter.config import AdapterConfig
from llama_adapter.hosts import adapt, adapter_of, unadapt
from llama_adapter.integrations.transformers import from_pretrained
from tests.llama_adapter.hf_models import KINDS, generated, host, padding, run, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model on disk, as transformers writes it."""
    host().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(model: Any, output: Path, **options: Any) -> list[float]:
    """Four steps of transformers' Trainer over padded rows; returns their losses."""
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=9,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=5,
        save_steps=4,
        **options,
    )
    ids, mask = tokens(9), padding(9)
    labels = ids.masked_fill(mask == 0, -100)
    rows: list[dict[str, Tensor]] = [
        {"input_ids": x, "attention_mask": m, "labels": y}
        for x, m, y in zip(ids, mask, labels, strict=True)
    ]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_and_writes_the_adapter_alone(kind: str, tmp_path: Path) -> None:
    host(kind).save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base", AdapterConfig(prompt_length=5, n_layers=3))
    frozen = {name: x.clone() for name, x in model.state_dict().items() if "adapter" not in name}
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], x) for name, x in frozen.items())
    checkpoint = tmp_path / "run" / "checkpoint-4"
    written = {path.name for path in checkpoint.glob("*.safetensors")}
    assert written == {"adapter.safetensors"}
    assert (checkpoint / "adapter.safetensors").stat().st_size < 20_000
    loaded = from_pretrained(tmp_path / "base", checkpoint)
    model.eval()
    adapter = adapter_of(model)
    assert adapter is not None
    assert adapter.gates.std() > 0
    with torch.no_grad():
        got, expected = (one(input_ids=tokens()).logits for one in (loaded, model))
    assert torch.equal(got, expected)
    answers = [generated(one, tokens(), padding()) for one in (loaded, model)]
    assert torch.equal(*answers)


def test_trainer_with_checkpointed_gradients_takes_the_same_steps(
    folder: Path, tmp_path: Path
) -> None:
    losses = []
    for options in ({}, {"gradient_checkpointing": True}):
        torch.manual_seed(7)
        model = from_pretrained(folder, AdapterConfig(prompt_length=5))
        losses.append(train(model, tmp_path / str(len(losses)), **options))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0, atol=1e-5)


def test_options_reach_transformers(folder: Path) -> None:
    model = from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    adapter = adapter_of(model)
    assert adapter is not None
    assert adapter.prompts.dtype == torch.float32
    assert (adapter.layers, tuple(adapter.prompts.shape)) == ((2, 3), (2, 10, 64))
    unadapt(model)
    assert model.config._attn_implementation == "eager"


def test_save_pretrained_is_the_hosts_again_without_the_adapter(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter.safetensors"]
    unadapt(model)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    state, base = model.state_dict(), host().state_dict()
    assert all(torch.equal(state[name], x) for name, x in base.items())
    assert "llama_adapter" not in (tmp_path / "whole" / "config.json").read_text()


def test_a_loaded_model_is_adapted_in_place() -> None:
    model = host("mistral window")
    adapter = adapt(model, layers=4, gate_scope="layer")
    assert adapter_of(model) is adapter
    assert tuple(adapter.gates.shape) == (4, 1)
    torch.nn.init.constant_(adapter.gates, 0.7)
    _, grads = run(model, tokens(), padding())
    assert all(grad.abs().max() > 1e-4 for grad in grads.values())


def test_without_transformers_the_remedy_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.10.1'") as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)
