"""A bank gives each request its adapter, and never writes a row that somebody uses."""

import re
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.adapter_bank import AdapterBank, BankFull, RowBank, UnknownAdapter
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.model import Llama


def random_adapter(config: LlamaConfig, seed: int, rows: int = 5, layers: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(AdapterConfig(rows, n_layers=layers), config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    return adapter.requires_grad_(False)


@torch.no_grad()
def logits_with(model: Llama, bank: AdapterBank, *rows: int) -> torch.Tensor:
    tokens = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    index = torch.tensor(rows, dtype=torch.int32)
    prompts = Prompts(bank.prompts.layers, index, bank.prompts.prompt_lengths)
    return model(tokens.expand(len(rows), -1), prompts)


def test_rows_are_their_adapters(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    """Of unequal lengths and layers, in one batch with the base model."""
    shapes = {"short": (1, 4), "long": (7, 1), "middle": (5, 3)}
    bank = AdapterBank(tiny_model, capacity=4, prompt_length=7)
    adapters = {
        name: random_adapter(tiny_config, n, *shape)
        for n, (name, shape) in enumerate(shapes.items())
    }
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    assert bank.names == list(shapes)
    rows = [bank.acquire(name) for name in shapes]
    got = logits_with(tiny_model, bank, *rows, -1)
    tokens = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    for row, adapter in zip(got, adapters.values(), strict=False):
        with torch.no_grad():
            alone = tiny_model(tokens, tiny_model.project(adapter))[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(got[3], tiny_model(tokens)[0], rtol=0, atol=1e-5)
    assert not torch.equal(got[0], got[3])


def test_a_replaced_adapter_serves_who_began_with_it(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=2, prompt_length=5)
    bank.load("a", random_adapter(tiny_config, 1))
    old = bank.acquire("a")
    before = logits_with(tiny_model, bank, old)
    bank.load("a", random_adapter(tiny_config, 2))
    new = bank.acquire("a")
    assert new != old
    assert torch.equal(logits_with(tiny_model, bank, old), before)
    assert not torch.equal(logits_with(tiny_model, bank, new), before)
    full = re.escape("the bank must have a free row for adapter 'b', got 2 of 2 in use")
    with pytest.raises(ValueError, match=full):
        bank.load("b", random_adapter(tiny_config, 3))
    bank.release(old)
    bank.load("b", random_adapter(tiny_config, 3, rows=2))
    assert bank.acquire("b") == old
    # nothing of the longer adapter that lay there is left in reach
    with torch.no_grad():
        tokens = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(1))
        alone = tiny_model(tokens, tiny_model.project(random_adapter(tiny_config, 3, rows=2)))
    torch.testing.assert_close(logits_with(tiny_model, bank, old), alone, rtol=0, atol=1e-5)


def test_an_unloaded_adapter_is_gone_for_new_requests_only(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=5)
    bank.load("a", random_adapter(tiny_config, 1))
    row = bank.acquire("a")
    before = logits_with(tiny_model, bank, row)
    bank.unload("a")
    unknown = re.escape("adapter must be one of the bank's (none is loaded), got 'a'")
    for call in (bank.acquire, bank.unload):
        with pytest.raises(UnknownAdapter, match=unknown):
            call("a")
    assert torch.equal(logits_with(tiny_model, bank, row), before)
    with pytest.raises(ValueError, match="got 1 of 1 in use"):
        bank.load("b", random_adapter(tiny_config, 2))
    bank.release(row)
    bank.load("b", random_adapter(tiny_config, 2))


def test_an_idle_adapter_is_replaced_where_it_lies(
    tiny_model: Llama, tiny_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank without a row to spare; a replacement that fails leaves the old one."""
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=5)
    bank.load("a", random_adapter(tiny_config, 1))
    before = logits_with(tiny_model, bank, 0)
    monkeypatch.setattr(tiny_model, "project", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.load("a", random_adapter(tiny_config, 2))
    monkeypatch.undo()
    assert torch.equal(logits_with(tiny_model, bank, bank.acquire("a")), before)
    with pytest.raises(BankFull, match="unload one, wait for its requests, or raise capacity"):
        bank.load("a", random_adapter(tiny_config, 2))
    bank.release(0)
    bank.load("a", random_adapter(tiny_config, 2))
    assert not torch.equal(logits_with(tiny_model, bank, bank.acquire("a")), before)
    with pytest.raises(ValueError, match="adapter 'b' must be an Adapter, as load_adapter reads"):
        bank.load("b", cast(Adapter, "adapter.safetensors"))


def test_thousands_of_adapters(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    """3,000 of them, and swaps without end in a bank with one row to spare."""
    bank = AdapterBank(tiny_model, capacity=3001, prompt_length=1, layers=[3])
    for n in range(3000):
        bank.load(n, random_adapter(tiny_config, n, rows=1, layers=1))
    for n in (0, 1234, 2999):
        bank.load(n, random_adapter(tiny_config, n + 5000, rows=1, layers=1))
        expected = tiny_model.project(random_adapter(tiny_config, n + 5000, rows=1, layers=1))
        row = bank.acquire(n)
        assert torch.equal(bank.prompts.layers[3].k[row], expected.layers[3].k)
        bank.release(row)
    assert len(set(bank.names)) == 3000


def test_what_does_not_fit_is_refused(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"capacity": 1, "prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"capacity": 1, "layers": [0, 4]}, "layers must be below 4, got [0, 4]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            AdapterBank(tiny_model, **arguments)
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=4, layers=[2, 3])
    with pytest.raises(ValueError, match="'a' must have a prompt length of at most 4, as the"):
        bank.load("a", random_adapter(tiny_config, 1, rows=5, layers=2))
    with pytest.raises(ValueError, match=r"'a' must adapt layers among \[2, 3\], got 1"):
        bank.load("a", random_adapter(tiny_config, 1, rows=3, layers=3))
    assert bank.names == []
    bank.load("a", random_adapter(tiny_config, 1, rows=4, layers=2))


def test_prompts_of_a_batch_are_a_bank(tiny_config: LlamaConfig) -> None:
    heads, inner = tiny_config.n_heads, (tiny_config.kv_heads, tiny_config.head_dim)
    k = torch.randn(3, 7, *inner)
    shared = RowBank(Prompts({1: LayerPrompt(k[0], k[0], torch.randn(heads))}), 3)
    assert [shared.acquire(n) for n in range(3)] == [0, 0, 0]
    assert shared.prompts.layers[1].k.shape == (1, 7, *inner)
    # one layer's prompt for all, another's one per sample
    mixed = RowBank(
        Prompts({
            1: LayerPrompt(k, k, torch.randn(3, heads)),
            2: LayerPrompt(k[0], k[0], torch.randn(heads)),
        }),
        3,
    )  # fmt: skip
    assert [mixed.acquire(n) for n in range(3)] == [0, 1, 2]
    assert mixed.prompts.layers[2].k.shape == (3, 7, *inner)
    assert mixed.prompts.layers[2].gate.shape == (3, heads)
    index = torch.tensor([4, -1, 0], dtype=torch.int32)
    bank = RowBank(Prompts({1: LayerPrompt(k, k, torch.randn(3, heads))}, index), 3)
    assert [bank.acquire(n) for n in range(3)] == [4, -1, 0]


def test_what_an_earlier_adapter_left_is_wiped(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    """In layers that the new one leaves alone, too: no number times 0 is not 0."""
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=3)
    for broken in (False, True):
        old = random_adapter(tiny_config, 1, rows=3, layers=4)
        if broken:
            with torch.no_grad():
                old.prompts.fill_(float("nan"))
        bank.load("old", old)
        bank.unload("old")
        new = random_adapter(tiny_config, 2, rows=2, layers=1)
        bank.load("new", new)
        tokens = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            alone = tiny_model(tokens, tiny_model.project(new))
        torch.testing.assert_close(logits_with(tiny_model, bank, 0), alone, rtol=0, atol=1e-5)
        bank.unload("new")


def test_a_load_that_fails_loses_no_row(
    tiny_model: Llama, tiny_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        bank = AdapterBank(tiny_model, capacity=1, prompt_length=5)
    for other in (replace(tiny_config, n_heads=1, n_kv_heads=1), replace(tiny_config, dim=96)):
        with pytest.raises(ValueError, match="adapter 'x' must be of a model of dim 48 and 6 hea"):
            bank.load("x", random_adapter(other, 1))
    monkeypatch.setattr(tiny_model, "project", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.load("x", random_adapter(tiny_config, 1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="name must not be None"):
        bank.load(None, random_adapter(tiny_config, 1))
    bank.load("x", random_adapter(tiny_config, 1))
    assert bank.names == ["x"]
