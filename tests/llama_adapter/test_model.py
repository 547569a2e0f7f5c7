"""Does the lean LLaMA compute what transformers' does, and with prompts what the papers' say?

The comparison models have the published presets' constants and small widths. Rotary embedding pairs
neighbouring channels here and halves of a head in transformers: the rows of wq and wk are permuted.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.cache import KVCache
from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig, RopeScaling
from llama_adapter.model import Llama
from tests.llama_adapter.hf_models import on_transformers

VOCABULARY = 211


def small(preset: str, **changes: int | float | RopeScaling | None) -> LlamaConfig:
    """A preset with its constants and three narrow layers."""
    shape: dict[str, int | float | RopeScaling | None] = {
        "dim": 96,
        "n_layers": 3,
        "n_heads": 6,
        "vocab_size": VOCABULARY,
        "multiple_of": 32,
    }
    return replace(PRESETS[preset], **(shape | changes))


# a context of 32 tokens puts most of the sequences below beyond it
GENERATIONS = {
    "1": small("llama-7b"),
    "2": small("llama-2-70b", n_kv_heads=3),
    "3": small("llama-3-8b", n_kv_heads=2),
    "3.1": small("llama-3.1-8b", n_kv_heads=1, rope_scaling=RopeScaling(8.0, original_context=32)),
    "3.2": small("llama-3.2-1b", n_kv_heads=2, rope_scaling=RopeScaling(32.0, original_context=32)),
    "wide heads": small("llama-3-8b", n_kv_heads=2, attention_head_dim=40),
}


def random_model(config: LlamaConfig) -> Llama:
    """Random weights that make logits of a few units and norms that differ from one."""
    model = Llama(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model.requires_grad_(False).eval()


def random_tokens(batch: int, count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, count), generator=generator)


def random_adapter(config: LlamaConfig, settings: AdapterConfig) -> Adapter:
    """Prompts N(0, 1) and gates that reach beyond one."""
    generator = torch.Generator().manual_seed(7)
    adapter = Adapter(settings, config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    assert adapter.gates.abs().max() > 1
    return adapter


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 where the logits span several units."""
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_logits_equal_transformers(generation: str) -> None:
    model = random_model(GENERATIONS[generation])
    tokens = random_tokens(2, 67)
    theirs = on_transformers(model, attn_implementation="eager")
    assert_same_logits(model(tokens), theirs(tokens).logits)


# PEFT cannot run a head width other than dim / heads
@pytest.mark.parametrize("generation", ["1", "2", "3", "3.1", "3.2"])
@torch.no_grad()
def test_prompted_logits_equal_peft(generation: str) -> None:
    model = random_model(GENERATIONS[generation])
    settings = AdapterConfig(
        prompt_length=7, n_layers=2, gate_scope="layer", gate_activation="identity"
    )
    adapter = random_adapter(model.config, settings)
    peft = get_peft_model(
        on_transformers(model, attn_implementation="eager"),
        AdaptionPromptConfig(
            adapter_layers=2, adapter_len=7, target_modules="self_attn", task_type="CAUSAL_LM"
        ),
    ).eval()
    for row, layer in enumerate(adapter.layers):
        theirs = peft.base_model.model.model.layers[layer].self_attn
        theirs.adaption_prompt.copy_(adapter.prompts[row][None])
        theirs.adaption_gate.copy_(adapter.gates[row])
    tokens = random_tokens(2, 67)
    prompted = model(tokens, model.project(adapter))
    assert (prompted - model(tokens)).abs().max() > 0.1
    assert_same_logits(prompted, peft(tokens).logits)


def literal_logits(model: Llama, tokens: Tensor, adapter: Adapter) -> Tensor:
    """The papers' equations head by head for one sequence (T,), in float64."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    ratio = config.n_heads // config.kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return x / scale * weights[f"{name}.weight"]

    def head(x: Tensor, index: int) -> Tensor:
        return x[:, index * config.head_dim : (index + 1) * config.head_dim]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.arange(0, config.head_dim, 2).double()
        angle = torch.outer(
            torch.arange(len(x)).double(), config.rope_theta ** (-pairs / config.head_dim)
        )
        turned = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(1)

    x = weights["tok_embeddings.weight"][tokens]
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for layer in range(config.n_layers):
        at = f"layers.{layer}"
        names = ("wq", "wk", "wv", "wo")
        wq, wk, wv, wo = (weights[f"{at}.attention.{name}.weight"] for name in names)
        normed = norm(x, f"{at}.attention_norm")
        heads = []
        for h in range(config.n_heads):
            g = h // ratio
            q = rotate(head(normed @ wq.T, h)) / math.sqrt(config.head_dim)
            scores = q @ rotate(head(normed @ wk.T, g)).T
            scores[later] = -math.inf
            out = scores.softmax(-1) @ head(normed @ wv.T, g)
            if layer in adapter.layers:
                row = adapter.layers.index(layer)
                prompt = adapter.prompts[row].detach().double()
                gate = adapter.gates[row, h].detach().double().tanh()
                chances = (q @ head(prompt @ wk.T, g).T).softmax(-1)
                out = out + gate * (chances @ head(prompt @ wv.T, g))
            heads.append(out)
        x = x + torch.cat(heads, 1) @ wo.T
        normed = norm(x, f"{at}.ffn_norm")
        w1, w2, w3 = (weights[f"{at}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        x = x + (torch.nn.functional.silu(normed @ w1.T) * (normed @ w3.T)) @ w2.T
    output = weights.get("output.weight", weights["tok_embeddings.weight"])
    return norm(x, "norm") @ output.T


@pytest.mark.parametrize("generation", ["1", "2", "3", "wide heads"])
@torch.no_grad()
def test_per_head_gates_equal_the_formula(generation: str) -> None:
    model = random_model(GENERATIONS[generation])
    adapter = random_adapter(model.config, AdapterConfig(prompt_length=7, n_layers=2))
    tokens = random_tokens(2, 29)
    expected = torch.stack([literal_logits(model, row, adapter) for row in tokens])
    assert_same_logits(model(tokens, model.project(adapter)), expected.float())


@torch.no_grad()
def test_tied_embeddings_are_one_tensor() -> None:
    model = random_model(GENERATIONS["3.2"])
    assert model.output_weight is model.tok_embeddings.weight
    assert "output.weight" not in model.state_dict()
    hidden = model.hidden(random_tokens(1, 5))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.tok_embeddings.weight.T)


@torch.no_grad()
def test_forward_is_hidden_then_logits() -> None:
    model = random_model(GENERATIONS["2"])
    tokens = random_tokens(3, 11)
    hidden = model.hidden(tokens)
    assert hidden.shape == (3, 11, 96)
    assert torch.equal(model(tokens), model.logits(hidden))


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = random_model(GENERATIONS["3"])
    prompts = model.project(random_adapter(model.config, AdapterConfig(prompt_length=3)))
    tokens = random_tokens(1, 23)
    changed = torch.cat((tokens[:, :17], random_tokens(1, 6, seed=4)), 1)
    torch.testing.assert_close(
        model(tokens, prompts)[:, :17], model(changed, prompts)[:, :17], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, cache: model(random_tokens(1, 5)[0]), r"tokens must have shape \(B, T\)"),
        (
            lambda model, cache: model(random_tokens(2, 5), new_lengths=[5, 4]),
            "new_lengths must be None without a cache",
        ),
        (
            lambda model, cache: model(random_tokens(3, 5), cache=cache),
            "tokens must have 2 rows, one per cached sequence, got 3",
        ),
        (
            lambda model, cache: model(random_tokens(2, 5), cache=cache, new_lengths=[5]),
            r"new_lengths must be 2 numbers from 0 to 5, got \[5\]",
        ),
        (
            lambda model, cache: model(random_tokens(2, 5), cache=cache, new_lengths=[6, 1]),
            r"new_lengths must be 2 numbers from 0 to 5, got \[6, 1\]",
        ),
        (
            lambda model, cache: model(random_tokens(2, 65), cache=cache),
            "cache capacity must be at least 65 tokens for 65 more, got 64",
        ),
    ],
)
def test_wrong_arguments_are_refused(
    call: Callable[[Llama, KVCache], Tensor], message: str
) -> None:
    model = random_model(GENERATIONS["2"])
    cache = KVCache(model.config, 2, 64)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(model, cache)
    assert cache.lengths.tolist() == [0, 0]
