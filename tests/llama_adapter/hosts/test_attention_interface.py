"""Does our function compute what transformers' does, for every mask that comes to it?"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from llama_adapter.adapter import LayerPrompt
from llama_adapter.hosts import adapt, attention
from llama_adapter.hosts.attention import KEYWORD, NAME, attend, mask, register
from tests.llama_adapter.hf_models import generated, host, padding, tokens


class Caller(nn.Module):
    """What an attention module tells the function about itself."""

    def __init__(self, groups: int, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(heads: int = 6, groups: int = 2, width: int = 16) -> LayerPrompt:
    k, v = random(5, groups, width, seed=2), random(5, groups, width, seed=3)
    return LayerPrompt(k, v, random(heads, seed=4) * 1.5)


def literal(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, added: LayerPrompt | None, scale: float
) -> Tensor:
    """Equations 5 to 8, head by head, on (B, H, T, D); rows that see nothing give zero."""
    out = torch.zeros_like(q)
    repeats = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        keys, values = k[:, h // repeats], v[:, h // repeats]
        scores = (q[:, h] @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        out[:, h] = scores.softmax(-1).nan_to_num() @ values
        if added is not None:
            scores = q[:, h] @ added.k[:, h // repeats].T * scale
            out[:, h] += added.gate[h] * (scores.softmax(-1) @ added.v[:, h // repeats])
    return out.transpose(1, 2)


def diagonal(tokens: int, keys: int) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)


# name to tokens, keys and what is seen beside the diagonal
def cases() -> dict[str, tuple[int, int, Tensor | None]]:
    left, right = padding(3, 9).bool(), padding(3, 9, left=False).bool()
    hole = left.clone()
    hole[2, 3] = False
    window = diagonal(9, 9) & ~diagonal(9, 9).tril(-4)
    return {
        "causal": (9, 9, None),
        "one token": (1, 9, None),
        "left padding": (9, 9, left[:, None].expand(3, 9, 9)),
        "right padding": (9, 9, right[:, None].expand(3, 9, 9)),
        "a hole": (9, 9, hole[:, None].expand(3, 9, 9)),
        "padding, one token": (1, 9, left[:, None]),
        "padding, a chunk": (4, 9, left[:, None].expand(3, 4, 9)),
        "sliding window": (9, 9, window.expand(3, 9, 9)),
    }


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", cases())
def test_every_mask_gives_the_literal_formula(name: str, prompted: bool) -> None:
    count, keys, extra = cases()[name]
    q, k, v = random(3, 6, count, 16), random(3, 2, keys, 16, seed=5), random(3, 2, keys, 16)
    seen = diagonal(count, keys).expand(3, count, keys)
    given: Tensor | None = None
    if extra is not None:
        seen = seen & extra
        given = seen[:, None]
        if "window" not in name:
            made = mask(
                batch_size=3,
                q_length=count,
                kv_length=keys,
                q_offset=keys - count,
                mask_function=causal_mask_function,
                attention_mask=extra[:, -1],
            )
            assert made is not None
            assert torch.equal(made, given)
            assert hasattr(made, attention._BOUNDS) == (name != "a hole")
            given = made
    options: dict[str, Any] = {KEYWORD: prompt()} if prompted else {}
    expected = literal(q, k, v, seen, prompt() if prompted else None, 0.3)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            out, weights = attend(Caller(3), q, k, v, given, scaling=0.3, **options)
        assert weights is None
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_bounds_go_with_our_diagonal_only() -> None:
    given = {"batch_size": 3, "q_length": 4, "kv_length": 9, "attention_mask": padding(3, 9).bool()}
    causal, window = causal_mask_function, sliding_window_causal_mask_function(3)
    for function, offset, expected in ((causal, 5, True), (causal, 2, False), (window, 5, False)):
        made = mask(**given, q_offset=offset, mask_function=function)
        assert hasattr(made, attention._BOUNDS) == expected


def test_a_mask_that_was_written_to_is_read_anew() -> None:
    q, k, v = random(3, 6, 9, 16), random(3, 2, 9, 16, seed=5), random(3, 2, 9, 16, seed=6)
    given = {"batch_size": 3, "q_length": 9, "kv_length": 9, "mask_function": causal_mask_function}
    made = mask(**given, attention_mask=padding(3, 9).bool())
    assert made is not None
    made[:, :, 2:, 1] = False
    out, _ = attend(Caller(3), q, k, v, made, **{KEYWORD: prompt()})
    expected = literal(q, k, v, made[:, 0], prompt(), 16**-0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_probabilities_are_not_to_be_had_and_a_warning_says_so() -> None:
    model = host()
    adapt(model)
    with pytest.warns(UserWarning, match="does not give output_attentions"):
        assert not model(input_ids=tokens(), output_attentions=True).attentions


def test_a_row_of_padding_alone_gives_the_prompt_alone() -> None:
    found = attention._bounds(torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 0]]).bool())
    assert found is not None
    assert [x.tolist() for x in found] == [[0, 1, 0], [0, 3, 2]]


def test_bidirectional_attention_has_no_diagonal() -> None:
    q, k, v = (random(2, 4, 7, 8, seed=n) for n in range(3))
    seen = torch.ones(2, 7, 7, dtype=torch.bool)
    for caller, override in ((Caller(1, is_causal=False), None), (Caller(1), False)):
        out, _ = attend(caller, q, k, v, None, is_causal=override, **{KEYWORD: prompt(4, 4, 8)})
        expected = literal(q, k, v, seen, prompt(4, 4, 8), 8**-0.5)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_widths_that_no_kernel_takes_go_to_transformers() -> None:
    q, k, v = (random(2, 4, 7, 12, seed=n) for n in range(3))
    out, _ = attend(Caller(1), q, k, v, None)
    expected = literal(q, k, v, diagonal(7, 7).expand(2, 7, 7), None, 12**-0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_registered_under_a_name_without_a_meaning() -> None:
    register()
    register()
    assert "flash" not in NAME
    assert "/" not in NAME
    assert AttentionInterface()[NAME] is attend
    assert AttentionMaskInterface()[NAME] is mask


@pytest.mark.parametrize("kind", ["llama", "mistral", "mistral window", "qwen2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_prompts_models_compute_what_they_did(kind: str, implementation: str) -> None:
    model, ids = host(kind, attn_implementation=implementation), tokens()
    register()
    for given in (None, padding(), padding(left=False)):
        shown = torch.ones_like(ids) if given is None else given
        with torch.no_grad():
            model.set_attn_implementation(implementation)
            theirs = model(input_ids=ids, attention_mask=given).logits
            expected = generated(model, ids, given)
            model.set_attn_implementation(NAME)
            ours = model(input_ids=ids, attention_mask=given).logits
        seen = shown[..., None].bool()
        torch.testing.assert_close(ours * seen, theirs * seen, rtol=0, atol=1e-5)
        if given is None or given[0, 0] == 0:
            assert torch.equal(generated(model, ids, given), expected)


def test_without_transformers_the_remedy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.10.1'") as caught:
        register()
    assert "\n" not in str(caught.value)
