"""Is P-tuning v2 one softmax over the prefix and the tokens?"""

import math
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from llama_adapter.hosts.methods import MethodOptions, attach
from tests.llama_adapter.encoder_models import bert, clip, pixels, roberta, vit, words
from tests.llama_adapter.method_hosts import attached, padded_words


def literal(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Concatenated keys and values, (B, T, C) each; seen is (B, T, T), True for visible keys."""
    k, v = (
        torch.cat([p.expand(len(q), -1, -1), x], 1) for p, x in zip(prefix, (k, v), strict=True)
    )
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    always = torch.ones(*seen.shape[:2], prefix.shape[1], dtype=torch.bool)
    hidden = ~torch.cat([always, seen], -1)[:, None]
    out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def captured(attention: Any, run: Any) -> tuple[Tensor, Tensor]:
    """What an attention takes and gives while something runs."""
    found = []

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"], out[0]))

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return found[0]


def test_a_vits_attention_is_the_literal_formula() -> None:
    model = vit()
    made = attached(model, "p_tuning_v2", layers=2)
    prefix = made.parameters()["llama_adapter_visual.prefix"].detach()
    assert prefix.shape == (2, 2, 4, 48)
    for row, index in enumerate((1, 2)):
        attention = model.vit.layers[index].attention
        x, got = captured(attention, lambda: model(pixel_values=pixels()))
        q, k, v = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
        seen = torch.ones(3, 26, 26, dtype=torch.bool)
        wanted = attention.o_proj(literal(q, k, v, prefix[row], 3, seen))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_padding_hides_tokens_and_no_prefix(kind: str) -> None:
    model = roberta() if kind == "roberta" else bert()
    given = padded_words(1 if kind == "roberta" else 0)
    made = attached(model, "p_tuning_v2")
    prefix = made.parameters()["llama_adapter_text.prefix"].detach()
    attention = getattr(model, kind).encoder.layer[1].attention.self
    x, got = captured(attention, lambda: model(**given))
    q, k, v = (getattr(attention, name)(x) for name in ("query", "key", "value"))
    seen = given["attention_mask"].bool()[:, None, :].expand(3, 13, 13)
    wanted = literal(q, k, v, prefix[1], 3, seen)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["causal", "causal with a mask"])
def test_clips_text_stays_causal(given: bool) -> None:
    model, ids = clip(), words()
    made = attached(model, "p_tuning_v2", encoders=("text",))
    prefix = made.parameters()["llama_adapter_text.prefix"].detach()
    attention = model.text_model.encoder.layers[2].self_attn
    mask = padded_words(0)["attention_mask"] if given else None
    seen = torch.ones(3, 13, 13, dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & mask.bool()[:, None, :]
    run = partial(model.get_text_features, input_ids=ids, attention_mask=mask)
    x, got = captured(attention, run)
    q, k, v = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
    wanted = attention.out_proj(literal(q, k, v, prefix[2], 2, seen))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_with_shifted_positions_it_is_pefts_prefix(kind: str) -> None:
    model = roberta() if kind == "roberta" else bert()
    body, given = getattr(model, kind), padded_words(1 if kind == "roberta" else 0)
    with torch.no_grad():
        found = {}
        for shift in (False, True):
            made = attached(body, "p_tuning_v2", shift_positions=shift)
            found[shift] = body(**given).last_hidden_state
            prefix = made.parameters()["llama_adapter_text.prefix"].clone()
            made.detach()
        config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
        theirs = peft.get_peft_model(body, config).eval()
        table = theirs.prompt_encoder["default"].embedding.weight
        # (K, layers * 2 * C) there
        table.copy_(prefix.permute(2, 0, 1, 3).flatten(1))
        wanted = theirs(**given)[0]
    shown = given["attention_mask"].bool()
    torch.testing.assert_close(found[True][shown], wanted[shown], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[False][shown], wanted[shown], atol=0.01)


def test_dropout_is_of_training_alone() -> None:
    model = vit()
    attach(model, "p_tuning_v2", MethodOptions(prefix_dropout=0.5))
    with torch.no_grad():
        calm = [model(pixel_values=pixels()).logits for _ in range(2)]
        model.train()
        wild = [model(pixel_values=pixels()).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.allclose(*wild, atol=1e-3)


def test_every_sequence_has_a_dropout_of_its_own() -> None:
    """As in P-tuning v2's code, which drops from a prefix that is repeated for the batch."""
    model = vit()
    attach(model, "p_tuning_v2", MethodOptions(prefix_dropout=0.5))
    twice = pixels()[:1].expand(2, -1, -1, -1)
    with torch.no_grad():
        calm = model(pixel_values=twice).logits
        wild = model.train()(pixel_values=twice).logits
    torch.testing.assert_close(calm[0], calm[1])
    assert not torch.allclose(wild[0], wild[1], atol=1e-3)


def test_the_host_keeps_its_configuration() -> None:
    model = vit()
    shared = model.config
    used = shared._attn_implementation
    made = attached(model, "p_tuning_v2")
    assert shared._attn_implementation == used
    assert model.vit.config is not shared
    made.detach()
    assert all(x.config is shared for x in model.modules() if "config" in x.__dict__)
