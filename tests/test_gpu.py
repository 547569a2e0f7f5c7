"""What only a GPU can show: the same numbers on CUDA as on the CPU. `make gpu` runs these."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_kernels import zero_init_attention
from llama_adapter import assets
from llama_adapter.checkpoints import load_base
from llama_adapter.config import AdapterConfig
from llama_adapter.data.template import prompt_text
from llama_adapter.generation import generate
from llama_adapter.hosts import adapt
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.sampling import SamplingConfig
from llama_adapter.training import finetune
from tests.llama_adapter.encoder_models import bert, padded, pixels, roberta, vit, words

pytestmark = pytest.mark.gpu


def test_attention_and_every_gradient_equal_the_cpu_result() -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 37, 6, 24), (2, 37, 2, 24), (2, 37, 2, 24), (7, 2, 24), (7, 2, 24), (6,)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    dout = torch.randn(shapes[0], generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = zero_init_attention(*leaves)
        assert isinstance(out, torch.Tensor)
        grads = torch.autograd.grad(out, leaves, dout.to(device))
        results.append([out.detach().cpu(), *(grad.cpu() for grad in grads)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


def test_bundled_model_answers_as_on_the_cpu() -> None:
    texts = [prompt_text("What is the first word?", "river stone"), prompt_text("Say hello.")]
    answers = []
    for device in ("cpu", "cuda"):
        base = load_base(assets.BASE, dtype=torch.float32, device=device)
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
        completions = generate(base.model, base.tokenizer, texts, sampling)
        answers.append([completion.tokens for completion in completions])
    assert answers[0] == answers[1]


def test_fine_tuning_takes_the_same_steps(tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        config = FinetuneConfig(
            data=assets.FOLLOW_TRAIN,
            output=tmp_path / device,
            device=device,
            dtype="float32",
            val_size=8,
            max_steps=4,
            warmup_epochs=0.0,
            adapter=AdapterConfig(),
        )
        rows: list[dict[str, float]] = []
        finetune(config, on_step=rows.append, progress=False)
        losses.append([row["loss"] for row in rows if "loss" in row])
    torch.testing.assert_close(
        torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("make", [vit, roberta, bert], ids=["vit", "roberta", "bert"])
def test_an_adapted_encoder_computes_as_on_the_cpu(make: Callable[[], Any]) -> None:
    """Bidirectional, with padding where there are words, forward and backward."""
    results = []
    for device in ("cpu", "cuda"):
        model = make()
        adapter = adapt(model, prompt_length=5, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            adapter.gates.normal_(std=1.5, generator=torch.Generator().manual_seed(8))
        model.to(device)
        if make is vit:
            logits = model(pixel_values=pixels().to(device)).logits
        else:
            mask = padded().to(device)
            logits = model(input_ids=words().to(device), attention_mask=mask).logits
            logits = logits * mask[..., None]
        grads = torch.autograd.grad(logits.square().sum(), list(adapter.parameters()))
        results.append([logits.detach().cpu(), *(grad.cpu() for grad in grads)])
    for cpu, cuda in zip(*results, strict=True):
        assert cpu.abs().max() > 1e-2
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
