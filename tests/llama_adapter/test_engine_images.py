"""Requests with pictures share an engine with others, and each gets what the model alone gives."""

import random
from typing import Any

import pytest
import torch

from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.adapter_bank import AdapterBank, BankFull
from llama_adapter.config import AdapterConfig, LlamaConfig, VisualConfig
from llama_adapter.engine import Engine
from llama_adapter.generation import generate
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

WIDTH = 11
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)
LATE = VisualConfig(WIDTH, (7,))
EARLY = VisualConfig(WIDTH, (7,), fusion="early", tokens=3, layers=2)


def random_adapter(
    config: LlamaConfig, seed: int, visual: VisualConfig | None, rows: int = 3
) -> Adapter:
    """Gates are random, some above 1, those of pictures too."""
    g = torch.Generator().manual_seed(seed)
    adapter = Adapter(AdapterConfig(rows, n_layers=2), config, generator=g, visual=visual)
    with torch.no_grad():
        for gates in (adapter.gates, adapter.visual_gates):
            if gates is not None:
                gates.normal_(std=1.5, generator=g)
    return adapter.requires_grad_(False)


def images(count: int) -> torch.Tensor:
    return 2 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def alone(
    model: Llama, tokenizer: Tokenizer, text: str, prompts: Prompts | None
) -> tuple[int, ...]:
    """Greedy tokens by the model alone: the whole text anew for every token, no cache."""
    tokens = tokenizer.encode(text, bos=True)
    start = len(tokens)
    while len(tokens) - start < GREEDY.max_new_tokens:
        logits = model(torch.tensor([tokens]), prompts)[0, -1, : tokenizer.vocab_size]
        first, second = logits.topk(2).values
        assert first - second > 1e-4, "a tie: choose another seed"
        token = int(logits.argmax())
        if token in tokenizer.end_ids:
            break
        tokens.append(token)
    return tuple(tokens[start:])


def test_pictures_texts_and_named_adapters_in_one_batch(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    """Two adapters that take pictures, late and early, one that takes none, and the base."""
    adapters = {
        "instruct": random_adapter(tiny_config, 1, LATE),
        "caption": random_adapter(tiny_config, 2, EARLY, rows=2),
        "text": random_adapter(tiny_config, 3, None),
    }
    bank = AdapterBank(tiny_model, capacity=7, prompt_length=3, visual_layers=2, visual_tokens=3)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    seen = images(3)
    asked: list[tuple[str, str | None, int | None]] = [
        ("green light", "instruct", 0),
        ("green light", "instruct", 1),
        ("green light", "instruct", None),
        ("window of stone", "caption", 0),
        ("window of stone", "caption", 2),
        ("window of stone", "caption", None),
        ("green light", "text", None),
        ("green light", None, None),
        ("the quiet river, and in the morning", "instruct", 2),
    ]
    # of 7 rows 3 are the adapters', so that at most 4 pictures run together
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=1024, prefill_chunk=7)
    tickets = {
        engine.submit(text, GREEDY, adapter=name, image=None if n is None else seen[n]): (
            text,
            name,
            n,
        )
        for text, name, n in asked
    }
    done = {p.row: p.completion for p in engine.run() if p.completion is not None}
    found = set()
    for ticket, (text, name, n) in tickets.items():
        prompts = None
        if name is not None:
            own = adapters[name]
            tokens = None if n is None else own.visual_tokens(seen[n][None])
            prompts = tiny_model.project(own, tokens)
        assert done[ticket].tokens == alone(tiny_model, tiny_tokenizer, text, prompts)
        found.add((text, done[ticket].tokens))
    # pictures and adapters matter
    assert len(found) == len(asked)
    # all rows but the adapters' own are free again
    for n in range(4):
        bank.see(bank.acquire("instruct"), seen[n % 3])
    with pytest.raises(BankFull, match="a free row for an image, got 7 of 7 in use"):
        bank.see(bank.acquire("instruct"), seen[0])


@pytest.mark.parametrize("visual", [LATE, EARLY], ids=["late", "early"])
def test_one_adapters_prompts_with_some_pictures(
    visual: VisualConfig, tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    adapter = random_adapter(tiny_config, 4, visual)
    features, present = images(4), torch.tensor([True, False, True, True])
    prompts = tiny_model.project(adapter, adapter.visual_tokens(features, present))
    texts = ["green light", "green light", "green light", "a paper window"]
    got = generate(tiny_model, tiny_tokenizer, texts, GREEDY, prompts=prompts, max_batch=3)
    for row, text in enumerate(texts):
        tokens = adapter.visual_tokens(features[row : row + 1]) if present[row] else None
        expected = alone(tiny_model, tiny_tokenizer, text, tiny_model.project(adapter, tokens))
        assert got[row].tokens == expected
    assert len({one.tokens for one in got}) == 4


def test_a_replaced_adapter_keeps_its_pictures(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    """A request that waits sees its picture with the adapter that it asked for."""
    old, new = (random_adapter(tiny_config, seed, LATE) for seed in (6, 7))
    bank = AdapterBank(tiny_model, capacity=4, prompt_length=3)
    bank.load("a", old)
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, max_batch=1, pool_tokens=256)
    (image,) = images(1)
    tickets = [engine.submit("green light", GREEDY, adapter="a", image=image) for _ in range(2)]
    bank.load("a", new)
    tickets.append(engine.submit("green light", GREEDY, adapter="a", image=image))
    done = {p.row: p.completion for p in engine.run() if p.completion is not None}
    first, second, third = (done[ticket].tokens for ticket in tickets)
    assert first == second != third
    for tokens, adapter in ((first, old), (third, new)):
        prompts = tiny_model.project(adapter, adapter.visual_tokens(image[None]))
        assert tokens == alone(tiny_model, tiny_tokenizer, "green light", prompts)


def test_a_callers_memory_may_be_used_again(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=3, prompt_length=3)
    adapter = random_adapter(tiny_config, 1, LATE)
    bank.load("a", adapter)
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank)
    first, second = images(2)
    buffer = first.clone()
    ticket = engine.submit("green light", GREEDY, adapter="a", image=buffer)
    buffer.copy_(second)
    (done,) = [one.completion for one in engine.run() if one.completion is not None]
    prompts = tiny_model.project(adapter, adapter.visual_tokens(first[None]))
    assert done.tokens == alone(tiny_model, tiny_tokenizer, "green light", prompts)
    assert ticket is not None


def test_who_leaves_frees_its_pictures_row(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    """Cancelled while it waits, while its prompt is read and while it is answered."""
    bank = AdapterBank(tiny_model, capacity=2, prompt_length=3)
    bank.load("a", random_adapter(tiny_config, 1, LATE))
    (image,) = images(1)
    for steps in (0, 1, 3):
        engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=256, prefill_chunk=2)
        first, second = (
            engine.submit("green light", GREEDY, adapter="a", image=image) for _ in range(2)
        )
        for _ in range(steps):
            engine.step()
        # one row for two pictures: the second waits for the first
        assert engine.waiting == (1 if steps else 2)
        engine.cancel(first)
        done = {p.row: p.completion for p in engine.run() if p.completion is not None}
        prompts = tiny_model.project(
            random_adapter(tiny_config, 1, LATE),
            random_adapter(tiny_config, 1, LATE).visual_tokens(image[None]),
        )
        assert done[second].tokens == alone(tiny_model, tiny_tokenizer, "green light", prompts)
        own = bank.acquire("a")
        bank.release(bank.see(own, image))
        bank.release(own)
    bank.unload("a")
    bank.load("b", random_adapter(tiny_config, 2, None))
    bank.load("c", random_adapter(tiny_config, 3, None))


def test_what_cannot_be_seen_is_refused(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=2, prompt_length=3)
    bank.load("a", random_adapter(tiny_config, 1, LATE))
    bank.load("text", random_adapter(tiny_config, 2, None))
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=256)
    (image,) = images(1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": image}, "image must be None without an adapter"),
        ({"adapter": "text", "image": image}, "image must be None: the adapter takes no images"),
        ({"adapter": "a", "image": image[:5]}, r"features \(F,\) = \(11,\) of one, got \(5,\)"),
        ({"adapter": "a", "image": "a.png"}, r"features \(F,\) = \(11,\) of one, got 'a.png'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.submit("green light", GREEDY, **arguments)
    # without a row for it nobody would ever make one
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=256, max_waiting=3)
    ticket = engine.submit("green light", GREEDY, adapter="a", image=image)
    # who asks after it is not told of it
    other = engine.submit("green light", GREEDY, adapter="text")
    with pytest.raises(BankFull, match="a free row for an image, got none and no request"):
        engine.step()
    done = {p.row: p.completion for p in engine.run() if p.completion is not None}
    assert done[ticket].finish_reason == "error"
    assert done[other].finish_reason == "length"
    # nothing is held by what was refused
    bank.unload("a")
    bank.load("b", random_adapter(tiny_config, 3, LATE))
    early = random_adapter(tiny_config, 1, EARLY)
    bank.unload("b")
    with pytest.raises(ValueError, match="must fuse images late, or 20 tokens in at most 0 lay"):
        bank.load("early", early)
    for number in (-1, 5):
        with pytest.raises(ValueError, match=f"visual_layers must be from 0 to 4, got {number}"):
            AdapterBank(tiny_model, capacity=1, visual_layers=number)


def rounds(
    model: Llama, tokenizer: Tokenizer, config: LlamaConfig, *, graphs: bool
) -> list[tuple[int, ...]]:
    """Tokens of 30 requests, with pictures and without, that come while others run."""
    device = model.output_weight.device
    bank = AdapterBank(model, capacity=5, prompt_length=3, visual_layers=2, visual_tokens=3)
    for seed, (name, visual) in enumerate((("late", LATE), ("early", EARLY))):
        bank.load(name, random_adapter(config, seed, visual).to(device))
    engine = Engine(
        model, tokenizer, bank=bank, pool_tokens=1024, max_batch=5, prefill_chunk=9, graphs=graphs
    )
    engine.warmup()
    seen, rng = images(4), random.Random(1)
    pieces, tickets = [], []
    for _ in range(30):
        name = rng.choice(["late", "early", None])
        image = seen[rng.randrange(4)] if name and rng.random() < 0.6 else None
        text = " ".join(rng.choices(["green", "light", "river", "stone"], k=rng.choice([1, 5])))
        tickets.append(engine.submit(text, GREEDY, adapter=name, image=image))
        pieces += engine.step()
    pieces += engine.run()
    done = {piece.row: piece.completion for piece in pieces if piece.completion is not None}
    return [done[ticket].tokens for ticket in tickets]


def test_more_pictures_than_rows(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    found = rounds(tiny_model, tiny_tokenizer, tiny_config, graphs=False)
    assert len(found) == 30
    assert len(set(found)) > 15


@pytest.mark.gpu
def test_graphs_change_no_token_of_a_picture(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    model = tiny_model.to("cuda")
    eager, replayed = (
        rounds(model, tiny_tokenizer, tiny_config, graphs=graphs) for graphs in (False, True)
    )
    assert eager == replayed
