"""Do biases, scales and norms travel with the prompts, and leave the model itself as it is?"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.adapter_bank import AdapterBank, RowBank
from llama_adapter.cache import KVCache
from llama_adapter.checkpoints.quantize import quantize
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.engine import Engine
from llama_adapter.generation import generate
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.tuned_modules import copy_norms
from llama_adapter.tuning import GROUPS, LINEARS, Lora, Tuning
from tests.llama_adapter.plain_llama import PlainLlama, precise

EVERYTHING = Tuning(GROUPS, LINEARS, "output", Lora(3, LINEARS))


def tuned_adapter(
    config: LlamaConfig, tuning: Tuning = EVERYTHING, layers: tuple[int, ...] = (2, 3)
) -> Adapter:
    """Random prompts, gates, biases, scales and norms."""
    generator = torch.Generator().manual_seed(17)
    adapter = Adapter(
        AdapterConfig(prompt_length=5), config, layers=layers, generator=generator, tuning=tuning
    )
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
        for name, parameter in adapter.tuned_parameters().items():
            if name.startswith("bias_"):
                parameter.normal_(std=0.3, generator=generator)
            elif name.startswith("lora_"):
                parameter.normal_(std=0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return adapter


def tokens_of(count: int = 21) -> Tensor:
    return torch.randint(3, 300, (2, count), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_model_itself_is_untouched(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    modules = list(tiny_model.modules())
    expected = tiny_model(tokens_of())
    prompts = tiny_model.project(tuned_adapter(tiny_config))
    assert not torch.equal(tiny_model(tokens_of(), prompts), expected)
    assert torch.equal(tiny_model(tokens_of()), expected)
    assert list(tiny_model.modules()) == modules
    assert all(torch.equal(before[n], value) for n, value in tiny_model.state_dict().items())
    assert prompts.tuned is not None
    own = {parameter.data_ptr() for parameter in tiny_model.parameters()}
    assert prompts.tuned.layers[0].attention.wq.weight.data_ptr() in own


@pytest.mark.parametrize("side", ["input", "output"])
@torch.no_grad()
def test_what_changes_nothing_gives_the_base_bitwise(
    side: str, tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    tuning = replace(EVERYTHING, scale_side=side)
    adapter = Adapter(AdapterConfig(), tiny_config, layers=(), tuning=tuning)
    expected = tiny_model(tokens_of())
    assert not torch.equal(tiny_model(tokens_of(), tiny_model.project(adapter)), expected)
    copy_norms(tiny_model, adapter.tuned_parameters())
    assert set(adapter.groups()) == set(GROUPS)
    prompts = tiny_model.project(adapter)
    assert prompts.layers == {}
    assert torch.equal(tiny_model(tokens_of(), prompts), expected)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
@torch.no_grad()
def test_the_model_computes_the_formula(
    side: str, prompts: bool, tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    """y = s * ((W + B A) x + b) or (W + B A) (s * x) + b; LoRA of prompts' keys where asked for."""
    tuning = replace(EVERYTHING, scale_side=side, lora=Lora(3, LINEARS, prompts))
    adapter = tuned_adapter(tiny_config, tuning)
    tokens = tokens_of()
    plain = PlainLlama(tiny_model, adapter, precise(adapter))
    expected = torch.stack([plain.logits(row) for row in tokens])
    got = tiny_model(tokens, tiny_model.project(adapter)).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    other = replace(tuning, lora=Lora(3, LINEARS, not prompts))
    adapter.tuning = other
    assert (tiny_model(tokens, tiny_model.project(adapter)) - got).abs().max() > 0.01


@pytest.mark.parametrize("side", ["input", "output"])
def test_gradients_reach_every_parameter(
    side: str, tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter = tuned_adapter(tiny_config, replace(EVERYTHING, scale_side=side))
    tiny_model(tokens_of(), tiny_model.project(adapter)).square().mean().backward()
    grouped = [p for group in adapter.groups().values() for p in group]
    assert {id(p) for p in grouped} == {id(p) for p in adapter.parameters()}
    for name, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_tied_projection_to_logits_is_tuned_as_well(tiny_config: LlamaConfig) -> None:
    model = Llama(replace(tiny_config, tied_embeddings=True)).requires_grad_(False)
    adapter = tuned_adapter(tiny_config)
    prompts = model.project(adapter)
    hidden = model.hidden(tokens_of(), prompts)
    plain = hidden @ model.tok_embeddings.weight.T
    added = hidden @ adapter.lora_a_output.T @ adapter.lora_b_output.T
    expected = (plain + added + adapter.bias_output) * adapter.scale_output
    torch.testing.assert_close(model.logits(hidden, prompts), expected, rtol=0, atol=1e-5)
    assert torch.equal(model(tokens_of(), prompts), model.logits(hidden, prompts))


@torch.no_grad()
def test_decoding_equals_the_whole_forward(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    prompts = tiny_model.project(tuned_adapter(tiny_config))
    tokens = tokens_of()
    expected = tiny_model(tokens, prompts)
    cache = KVCache(tiny_config, 2, 64)
    parts = [tiny_model(part, prompts, cache=cache) for part in tokens.split([17, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [(), (2, 3)])
@torch.no_grad()
def test_generation_runs_through_the_tuned_layers(
    layers: tuple[int, ...],
    tiny_model: Llama,
    tiny_config: LlamaConfig,
    tiny_tokenizer: Tokenizer,
) -> None:
    prompts = tiny_model.project(tuned_adapter(tiny_config, layers=layers))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=9)
    texts = ["Under a green light", "seven birds"]
    found = generate(tiny_model, tiny_tokenizer, texts, sampling, prompts=prompts)
    assert len({tuple(answer.tokens) for answer in found}) > 0
    for text, answer in zip(texts, found, strict=True):
        tokens = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode(text)]
        for token in answer.tokens:
            logits = tiny_model(torch.tensor([tokens]), prompts)[0, -1]
            assert token == int(logits[: tiny_tokenizer.vocab_size].argmax())
            tokens.append(token)


@torch.no_grad()
def test_a_half_precision_base_runs_them(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    adapter = tuned_adapter(tiny_config)
    expected = tiny_model(tokens_of(), tiny_model.project(adapter))
    tiny_model.bfloat16()
    got = tiny_model(tokens_of(), tiny_model.project(adapter))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.1 * expected.std()


@torch.no_grad()
def test_a_quantised_base_runs_them(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    adapter = tuned_adapter(tiny_config)
    expected = tiny_model(tokens_of(), tiny_model.project(adapter))
    quantize(tiny_model, "int8")
    got = tiny_model(tokens_of(), tiny_model.project(adapter))
    assert not torch.equal(got, expected)
    assert (got - expected).abs().mean() < 0.1 * expected.std()


def test_banks_of_many_adapters_refuse_them_by_name(
    tiny_model: Llama, tiny_config: LlamaConfig, tiny_tokenizer: Tokenizer
) -> None:
    adapter = tuned_adapter(tiny_config)
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=5)
    with pytest.raises(ValueError, match="'a' must have prompts and gates alone, got bias, scale"):
        bank.load("a", adapter)
    assert bank.names == []
    with torch.no_grad():
        prompts = tiny_model.project(adapter)
    index = torch.zeros(2, dtype=torch.int32)
    banked = {n: LayerPrompt(p.k[None], p.v[None], p.gate[None]) for n, p in prompts.layers.items()}
    with pytest.raises(ValueError, match="adapter_index must be None with an adapter's bias"):
        RowBank(Prompts(banked, index, None, prompts.tuned), 2)
    engine = Engine(tiny_model, tiny_tokenizer, bank=RowBank(prompts, 1), pool_tokens=512)
    with pytest.raises(
        ValueError, match="adapter must be named: the bank's biases, scales and norms"
    ):
        engine.submit("seven birds", SamplingConfig())
