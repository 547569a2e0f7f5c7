"""Is a base recognised in every dtype and layout, and every other base told from it?"""

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.fingerprint import (
    RELATIVE_TOLERANCE,
    Fingerprint,
    fingerprint,
    sample_count,
    sampled_tensors,
)
from llama_adapter.config import PRESETS, LlamaConfig
from llama_adapter.model import Llama


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_the_same_base(dtype: torch.dtype, tiny_model: Llama) -> None:
    original = fingerprint(tiny_model, "original")
    cast = fingerprint(tiny_model.to(dtype), "cast")
    assert original.difference(cast) is None
    assert cast.difference(original) is None


def test_half_precision_dtypes_are_the_same_base(tiny_config: LlamaConfig) -> None:
    """Weights of the usual scale, where float16 is coarsest near zero."""
    model = Llama(tiny_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.logspace(-4, 0, parameter.numel()).view_as(parameter))
    half = fingerprint(model.half(), "half")
    assert min(abs(sample) for sample in half.samples) < 1e-5
    assert half.difference(fingerprint(model.bfloat16(), "bf16")) is None


def halves(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


@torch.no_grad()
def test_row_order_of_queries_and_keys_does_not_matter(tiny_model: Llama) -> None:
    before = fingerprint(tiny_model, "meta")
    for layer in tiny_model.layers:
        attention = layer.attention
        attention.wq.weight.copy_(halves(attention.wq.weight, attention.n_heads))
        attention.wk.weight.copy_(halves(attention.wk.weight, attention.kv_heads))
    assert fingerprint(tiny_model, "hugging face") == Fingerprint(
        "hugging face", before.shape, before.samples
    )


@torch.no_grad()
def test_other_weights_of_one_shape_are_another_base(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    original = fingerprint(tiny_model, "original")
    other = fingerprint(Llama(tiny_config), "other")
    difference = original.difference(other)
    assert difference is not None
    assert "sampled weights differ" in difference
    differing = int(difference.split("but ")[1].split(" of")[0])
    assert differing > 0.9 * len(original.samples)


def test_every_tensor_counts(tiny_model: Llama) -> None:
    """A base with another output, or with LoRA merged into one projection, is another base."""
    original = fingerprint(tiny_model, "original")
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in tiny_model.named_parameters()]
    assert set(names) == set(sampled_tensors(tiny_model.config.n_layers))
    for name, parameter in tiny_model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            # a full fine-tuning moves weights by a few percent
            noise = torch.randn(parameter.shape, generator=generator)
            shift = 1.1 if name.endswith(("wq.weight", "wk.weight")) else 1.0
            parameter.mul_(shift + 3 * RELATIVE_TOLERANCE * noise)
        assert original.difference(fingerprint(tiny_model, "tuned")) is not None, name
        with torch.no_grad():
            parameter.copy_(before)
    assert original.difference(fingerprint(tiny_model, "back")) is None


@torch.no_grad()
def test_another_shape_is_said_in_its_names(tiny_model: Llama) -> None:
    other = Llama(LlamaConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=353))
    difference = fingerprint(tiny_model, "a").difference(fingerprint(other, "b"))
    assert difference == "dim 48 and 32, n_heads 6 and 4, hidden_dim 128 and 256"


def test_the_name_is_not_compared(tiny_model: Llama) -> None:
    assert fingerprint(tiny_model, "a").difference(fingerprint(tiny_model, "b")) is None


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tiny_model: Llama) -> None:
    tiny_model.layers[3].ffn_norm.weight.fill_(value)
    message = r"base 'broken' has weights that are not finite in layers\.3\.ffn_norm\.weight"
    with pytest.raises(ValueError, match=message):
        fingerprint(tiny_model, "broken")


@pytest.mark.parametrize(("layers", "samples"), [(1, 132), (6, 312), (32, 1248)])
def test_some_hundred_weights_are_sampled(layers: int, samples: int) -> None:
    assert sample_count(layers) == samples


def test_positions_never_change() -> None:
    """Files hold the weights at these positions: another choice would disown every adapter."""
    config = LlamaConfig(dim=8, n_layers=1, n_heads=1, vocab_size=125)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    samples = fingerprint(model, "counting").samples
    # multiples of the golden ratio's fraction 0.618..., of 1000 weights and of 8
    expected = [int((i * 0.6180339887498949) % 1 * 1000) for i in range(1, 33)]
    assert list(samples[:32]) == expected
    assert expected[:4] == [618, 236, 854, 472]
    assert list(samples[32:36]) == [4, 1, 6, 3]


def test_the_largest_preset_has_every_sampled_tensor() -> None:
    with torch.device("meta"):
        model = Llama(PRESETS["llama-3.1-405b"])
    assert set(sampled_tensors(126)) == set(dict(model.named_parameters()))
