"""Does transformers' Trainer go on from checkpoints that hold an adapter alone?"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from llama_adapter.config import AdapterConfig
from llama_adapter.hosts import adapter_of
from llama_adapter.integrations.transformers import from_pretrained
from llama_adapter.integrations.transformers_trainer import AdapterCheckpoints, AdapterTrainer
from tests.llama_adapter.hf_models import host, padding, tokens

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model on disk, as transformers writes it."""
    host().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(folder: Path) -> Any:
    torch.manual_seed(7)
    return from_pretrained(folder, AdapterConfig(prompt_length=5, n_layers=3))


def rows() -> list[dict[str, Tensor]]:
    ids, mask = tokens(9), padding(9)
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": x, "attention_mask": m, "labels": y}
        for x, m, y in zip(ids, mask, labels, strict=True)
    ]


def trainer_of(
    model: Any, output: Path, kind: Any = AdapterTrainer, **options: Any
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=5,
        save_steps=2,
        **options,
    )
    return kind(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:2])


def losses_of(trainer: transformers.Trainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def test_a_run_that_was_stopped_takes_the_same_steps(folder: Path, tmp_path: Path) -> None:
    whole = trainer_of(adapted(folder), tmp_path / "run")
    whole.train()
    model = adapted(folder)
    again = trainer_of(model, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, got = losses_of(whole), losses_of(again)
    assert {step: got[step] for step in range(3, STEPS + 1)} == {
        step: expected[step] for step in range(3, STEPS + 1)
    }
    for one, other in zip(
        adapter_of(model).parameters(),  # pyright: ignore[reportOptionalMemberAccess]
        adapter_of(whole.model).parameters(),  # pyright: ignore[reportOptionalMemberAccess]
        strict=True,
    ):
        assert torch.equal(one, other)


def test_the_last_checkpoint_of_a_folder_is_found(folder: Path, tmp_path: Path) -> None:
    trainer_of(adapted(folder), tmp_path / "run").train()
    again = trainer_of(adapted(folder), tmp_path / "run", num_train_epochs=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS


def test_the_best_model_is_on_the_host_at_the_end(folder: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(
        adapted(folder), tmp_path / "run", metric_for_best_model="loss", **options,
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2", "a rising loss counts as the best here, to be another one"
    held, adapter = load_file(best / "adapter.safetensors"), adapter_of(trainer.model)
    assert adapter is not None
    last = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / "adapter.safetensors")
    assert torch.equal(adapter.gates.detach(), held["gates"])
    assert not torch.equal(last["gates"], held["gates"])


def test_the_mixin_goes_before_any_trainer(folder: Path, tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        """Someone's own."""

    kind = type("Both", (AdapterCheckpoints, Own), {})
    trainer_of(adapted(folder), tmp_path / "run", kind).train()
    again = trainer_of(adapted(folder), tmp_path / "again", kind)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert sorted(losses_of(again)) == list(range(1, STEPS + 1))


def test_whole_models_are_resumed_as_ever(tmp_path: Path) -> None:
    trainer_of(host(), tmp_path / "run").train()
    again = trainer_of(host(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.state.global_step == STEPS


def test_a_checkpoint_of_another_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer_of(adapted(folder), tmp_path / "run").train()
    other = from_pretrained(folder, AdapterConfig(prompt_length=4, n_layers=3))
    with pytest.raises(ValueError, match=r"must hold an adapter like the model's.*prompt_length=4"):
        trainer_of(other, tmp_path / "again").train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer_of(adapted(folder), tmp_path / "none").train(resume_from_checkpoint=str(tmp_path))
