"""Tokens are drawn from the stated distribution, reproducibly, at every temperature."""

import math
import re
from typing import Any

import pytest
import torch

from llama_adapter.sampling import SamplingConfig, choose, row_draws, token_probabilities


def brute_force(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """The nucleus by its definition, one token at a time, in double precision."""
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    p = [weight / sum(weights) for weight in weights]
    kept = [0.0] * len(p)
    before = 0.0
    for token in sorted(range(len(p)), key=lambda t: (-p[t], t)):
        if before > top_p:
            break
        kept[token] = p[token]
        before += p[token]
    return [value / sum(kept) for value in kept]


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.75, 0.95])
def test_probabilities_equal_the_enumerated_nucleus(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(17, 23, generator=generator) * 2
    got = token_probabilities(logits, temperature, top_p)
    expected = torch.tensor([brute_force(row, temperature, top_p) for row in logits.tolist()])
    assert torch.equal(got > 0, expected > 0)
    assert (got - expected).abs().max() < 2e-6


def test_nucleus_keeps_the_token_that_crosses_top_p_and_drops_the_next() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    kept = token_probabilities(logits, 1.0, 0.6)[0]
    assert (kept > 0).tolist() == [True, False, True, False]
    assert torch.allclose(kept, torch.tensor([4 / 7, 0.0, 3 / 7, 0.0]), atol=1e-6)


def test_equal_logits_are_kept_in_order_of_their_ids() -> None:
    kept = token_probabilities(torch.zeros(1, 10), 1.0, 0.35)[0]
    assert (kept > 0).tolist() == [True] * 4 + [False] * 6
    # a token is kept while those before it reach top_p exactly
    kept = token_probabilities(torch.zeros(1, 4), 1.0, 0.5)[0]
    assert (kept > 0).tolist() == [True] * 3 + [False]


def test_top_p_one_is_the_softmax() -> None:
    logits = torch.randn(5, 31, generator=torch.Generator().manual_seed(5))
    got = token_probabilities(logits, 0.7, 1.0)
    assert (got - (logits / 0.7).softmax(-1)).abs().max() < 1e-6


def test_sampled_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0, -4.0, 0.9]])
    sampling = SamplingConfig(temperature=0.9, top_p=0.9, seed=21)
    count = 20000
    drawn = [row_draws(sampling.seed, row, 1)[0] for row in range(count)]
    tokens = choose(logits.expand(count, -1), [sampling] * count, drawn)
    frequency = torch.bincount(torch.tensor(tokens), minlength=6) / count
    p = token_probabilities(logits, 0.9, 0.9)[0]
    # four standard deviations of a binomial share; a token outside the nucleus never appears
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()
    assert frequency[4] == 0
    assert (p > 0).sum() == 4


def test_extreme_draws_choose_a_token_of_the_nucleus() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(8))
    sampling = SamplingConfig(temperature=1.0, top_p=0.75)
    p = token_probabilities(logits, 1.0, 0.75)[0]
    for draw in (0.0, 1 - 2**-24, 1.0):
        (token,) = choose(logits, [sampling], [draw])
        assert p[token] > 0
    nucleus = p.nonzero()[:, 0]
    assert choose(logits, [sampling], [0.0]) == [int(nucleus[0])]
    assert choose(logits, [sampling], [1 - 2**-24]) == [int(nucleus[-1])]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-30, 1e-6])
def test_tiny_temperatures_are_finite_and_choose_the_likeliest(temperature: float) -> None:
    logits = torch.randn(7, 29, generator=torch.Generator().manual_seed(4)) * 100
    best = logits.argmax(-1)
    sampling = SamplingConfig(temperature=temperature, top_p=0.99)
    assert choose(logits, [sampling] * 7, [0.999] * 7) == best.tolist()
    if temperature:
        p = token_probabilities(logits, temperature, 0.99)
        assert torch.equal(p, torch.nn.functional.one_hot(best, 29).float())


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = (torch.randn(3, 50, generator=torch.Generator().manual_seed(6)) * 4).bfloat16()
    got = token_probabilities(logits, 0.5, 0.8)
    assert got.dtype == torch.float32
    assert torch.equal(got, token_probabilities(logits.float(), 0.5, 0.8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_are_not_finite_are_marked(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[:, 2] = 30.0
    logits[1, 3] = bad
    assert choose(logits, [SamplingConfig(temperature=temperature)] * 3, [0.5] * 3) == [2, -1, 2]


def test_draws_depend_on_both_seeds_and_fewer_are_a_prefix() -> None:
    draws = row_draws(3, 5, 40)
    assert row_draws(3, 5, 40) == draws
    assert row_draws(3, 5, 7) == draws[:7]
    many = row_draws(3, 5, 5000)
    assert all(row_draws(3, 5, n) == many[:n] for n in (15, 16, 17, 64, 128, 1000, 4096))
    others = [row_draws(5, 3, 40), row_draws(3, 6, 40), row_draws(4, 5, 40), row_draws(35, 0, 40)]
    assert all(set(other).isdisjoint(draws) for other in others)
    assert 0 <= min(draws) < 0.2
    assert 0.8 < max(draws) < 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("temperature", -0.1, "temperature must be 0 or positive, got -0.1"),
        ("temperature", math.nan, "temperature must be 0 or positive, got nan"),
        ("temperature", math.inf, "temperature must be 0 or positive, got inf"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
        ("top_p", 1.01, "top_p must be above 0 and at most 1, got 1.01"),
        ("top_p", math.nan, "top_p must be above 0 and at most 1, got nan"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("stop", "###", "stop must be a tuple of non-empty strings, got '###'"),
        ("stop", ("a", ""), "stop must be a tuple of non-empty strings, got ('a', '')"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingConfig(**{field: value})


def test_defaults_are_the_papers() -> None:
    sampling = SamplingConfig()
    assert (sampling.temperature, sampling.top_p) == (0.1, 0.75)
