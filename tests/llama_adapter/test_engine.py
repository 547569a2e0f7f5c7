"""Requests that share an engine get what each would get alone, whatever the others do."""

import random
import re
import resource
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from llama_adapter import engine as engine_module
from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.adapter_bank import AdapterBank
from llama_adapter.completion import Completion, Piece, Row
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.engine import Engine, EngineBusy
from llama_adapter.generation import generate
from llama_adapter.model import Llama, Step
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=9)
WORDS = ["green", "light", "river", "stone", "paper", "window", "answer", "morning", "question"]


def random_adapter(config: LlamaConfig, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(AdapterConfig(3, n_layers=2), config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    return adapter.requires_grad_(False)


def finished(engine: Engine, before: Sequence[Piece] = ()) -> dict[int, Completion]:
    """Run to the end; pieces of text must add up to the completions."""
    texts: dict[int, str] = {}
    done = {}
    for piece in (*before, *engine.run()):
        assert piece.row not in done, "a piece after the last one"
        texts[piece.row] = texts.get(piece.row, "") + piece.text
        if piece.completion is not None:
            done[piece.row] = piece.completion
    for ticket, completion in done.items():
        assert texts[ticket] == completion.text
    return done


def differs_at_a_tie(
    model: Llama, prompts: Prompts | None, prompt: list[int], solo: Completion, got: Completion
) -> bool:
    """Whether two completions differ, which they may where the solo run's best two are as one."""
    pairs = enumerate(zip(got.tokens, solo.tokens, strict=False))
    parted = next((i for i, (a, b) in pairs if a != b), None)
    if parted is None:
        assert got.tokens == solo.tokens[: len(got.tokens)]
        if got.finish_reason != "cancelled":
            assert got == solo
        return False
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *solo.tokens[:parted]]]), prompts)
    top = logits[0, -1].topk(2).values
    assert float(top[0] - top[1]) < 1e-4, "another token, and no tie"
    return True


def test_requests_with_settings_of_their_own(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=3, prompt_length=3)
    adapters = {name: random_adapter(tiny_config, n) for n, name in enumerate("ab")}
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=640, prefill_chunk=7)
    sampled = SamplingConfig(12, temperature=0.9, top_p=0.9, seed=3)
    asked: dict[int, tuple[str, SamplingConfig, Hashable, int]] = {}
    wanted: list[tuple[str, SamplingConfig, Hashable]] = [
        ("green light", GREEDY, "a"),
        ("the quiet river, and in the morning the first answer", sampled, "b"),
        ("a", replace(sampled, seed=4, temperature=0.3), None),
        ("green light", replace(GREEDY, stop=("e",)), None),
        ("window of stone", replace(sampled, top_p=0.2), "a"),
    ]
    pieces: list[Piece] = []
    for seed, (text, sampling, adapter) in enumerate(wanted):
        ticket = engine.submit(text, sampling, adapter=adapter, row_seed=seed)
        asked[ticket] = (text, sampling, adapter, seed)
        pieces += engine.step()
    done = finished(engine, pieces)
    # what ended while others were still being submitted
    assert len(done) == len(wanted)
    for ticket, (text, sampling, adapter, seed) in asked.items():
        prompts = None if adapter is None else tiny_model.project(adapters[str(adapter)])
        (solo,) = generate(
            tiny_model, tiny_tokenizer, [text], sampling, prompts=prompts, row_seeds=[seed]
        )
        prompt = tiny_tokenizer.encode(text, bos=True)
        differs_at_a_tie(tiny_model, prompts, prompt, solo, done[ticket])
    assert engine.pool.free == engine.pool.size
    assert (engine.waiting, engine.running) == (0, 0)


def test_a_full_pool_holds_the_queue_in_its_order(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    """A long request that does not fit is not overtaken by short ones behind it."""
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=192, max_batch=8)
    first = engine.submit("green", replace(GREEDY, max_new_tokens=100))
    long = engine.submit("light", replace(GREEDY, max_new_tokens=130))
    short = engine.submit("river", replace(GREEDY, max_new_tokens=2))
    engine.step()
    assert (engine.running, engine.waiting, engine.held_back) == (1, 2, 1)
    assert engine.pool.free == 1
    begun = []
    for piece in engine.run():
        if piece.row not in begun:
            begun.append(piece.row)
    assert begun.index(first) < begun.index(long) < begun.index(short)
    assert engine.pool.free == 3


def test_a_cancelled_request_frees_its_pages_and_keeps_what_it_has(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=3)
    bank.load("a", random_adapter(tiny_config, 1))
    engine = Engine(
        tiny_model, tiny_tokenizer, bank=bank, pool_tokens=192, max_batch=2, prefill_chunk=4
    )
    long = " ".join(WORDS)
    writing = engine.submit("green", GREEDY, adapter="a")
    for _ in range(4):
        engine.step()
    reading = engine.submit(long, GREEDY, adapter="a")
    waiting = engine.submit("light", GREEDY, adapter="a")
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    results = [engine.cancel(ticket) for ticket in (writing, reading, waiting)]
    assert [one.finish_reason for one in results if one] == ["cancelled"] * 3
    assert [len(one.tokens) for one in results if one][1:] == [0, 0]
    (solo,) = generate(
        tiny_model,
        tiny_tokenizer,
        ["green"],
        GREEDY,
        prompts=tiny_model.project(random_adapter(tiny_config, 1)),
    )
    assert results[0] is not None
    assert results[0].tokens == solo.tokens[: len(results[0].tokens)] != ()
    assert engine.pool.free == engine.pool.size
    assert engine.cancel(writing) is None
    assert list(engine.run()) == []
    # nobody uses the adapter's row any more
    bank.unload("a")
    bank.load("b", random_adapter(tiny_config, 2))


def test_one_broken_request_does_not_break_the_others(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=2, prompt_length=3)
    broken = random_adapter(tiny_config, 1)
    with torch.no_grad():
        broken.gates.fill_(float("nan"))
    broken.config = replace(broken.config, gate_activation="identity")
    bank.load("broken", broken)
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=256)
    bad = engine.submit("green", GREEDY, adapter="broken")
    good = engine.submit("light", GREEDY)
    done = finished(engine)
    assert (done[bad].finish_reason, done[bad].tokens) == ("error", ())
    assert [done[good]] == generate(tiny_model, tiny_tokenizer, ["light"], GREEDY)
    assert engine.pool.free == engine.pool.size


def test_what_cannot_be_served_is_refused_on_arrival(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=3)
    bank.load("a", random_adapter(tiny_config, 1))
    engine = Engine(
        tiny_model, tiny_tokenizer, bank=bank, pool_tokens=64, max_batch=1, max_waiting=2
    )
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("", {}, "text must hold at least one token besides BOS, got none"),
        ("green", {"adapter": "b"}, "adapter must be one of the bank's ('a'), got 'b'"),
        ("green", {"sampling": {"temperature": 0}}, "sampling must be a SamplingConfig, got dict"),
        (" light" * 159, {}, "text must have at most 159 tokens, one less than the context of 160"),
        (
            "green",
            {"sampling": replace(GREEDY, max_new_tokens=100)},
            "text must fit the pool of 1 pages of 64 tokens, got 5 tokens and up to 100 new ones, "
            "2 pages",
        ),
    ]
    for text, arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            engine.submit(text, **{"sampling": GREEDY} | arguments)
    assert (engine.waiting, engine.running) == (0, 0)
    # one that runs, and two that wait
    for _ in range(3):
        engine.submit("green", GREEDY, adapter="a")
    with pytest.raises(EngineBusy, match="at most 2 requests may wait, got one more"):
        engine.submit("green", GREEDY)
    with pytest.raises(ValueError, match="warmup must come before requests"):
        engine.warmup()
    without = Engine(tiny_model, tiny_tokenizer)
    with pytest.raises(ValueError, match="adapter must be None without a bank, got 'a'"):
        without.submit("green", GREEDY, adapter="a")
    numbers = ("pool_tokens", "max_batch", "max_tokens", "max_waiting", "prefill_chunk")
    for name in numbers:
        with pytest.raises(ValueError, match=f"^{name} must be an integer of at least 1, got 0$"):
            Engine(tiny_model, tiny_tokenizer, **{name: 0})
    small = Engine(tiny_model, tiny_tokenizer, max_tokens=12)
    (done,) = finished_of(small, "green", replace(GREEDY, max_new_tokens=50))
    assert done.finish_reason == "length"
    assert done.prompt_tokens + len(done.tokens) == 12


def finished_of(engine: Engine, text: str, sampling: SamplingConfig) -> list[Completion]:
    engine.submit(text, sampling)
    return list(finished(engine).values())


def test_warmup_leaves_nothing_behind(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=128, max_batch=3)
    before = finished_of(Engine(tiny_model, tiny_tokenizer), "green light", GREEDY)
    engine.warmup()
    assert engine.pool.free == engine.pool.size
    assert finished_of(engine, "green light", GREEDY) == before


@dataclass
class Asked:
    """What a request of the soak test was, to be run alone afterwards."""

    text: str
    sampling: SamplingConfig
    version: int | None
    seed: int
    completion: Completion | None = None


@pytest.mark.slow
def test_soak(tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig) -> None:
    """2,000 requests with adapters that are swapped under them, cancellations and a full pool."""
    rng = random.Random(0)
    bank = AdapterBank(tiny_model, capacity=12, prompt_length=3, layers=[2, 3])
    engine = Engine(
        tiny_model, tiny_tokenizer, bank=bank, pool_tokens=1024, max_batch=24, prefill_chunk=64
    )
    version, current, swaps = 0, {}, 0
    for name in "abcd":
        bank.load(name, random_adapter(tiny_config, version))
        current[name] = version
        version += 1
    asked: dict[int, Asked] = {}
    cancelled, submitted, resident = 0, 0, 0
    while submitted < 2000 or engine.waiting or engine.running:
        for _ in range(rng.randint(0, 6) if submitted < 2000 else 0):
            text = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 9, 30])))
            warm = rng.random() < 0.3
            sampling = SamplingConfig(
                rng.choice([1, 4, 12, 60]),
                temperature=0.8 if warm else 0.0,
                seed=rng.randint(0, 5),
                stop=("e",) if rng.random() < 0.1 else (),
            )
            name = rng.choice(["a", "b", "c", "d", None])
            ticket = engine.submit(text, sampling, adapter=name, row_seed=submitted)
            asked[ticket] = Asked(
                text, sampling, None if name is None else current[name], submitted
            )
            submitted += 1
        if rng.random() < 0.2:
            name = rng.choice("abcd")
            try:
                bank.load(name, random_adapter(tiny_config, version))
            except ValueError:
                # every row is in use: swapped later
                continue
            finally:
                step(engine, asked)
            current[name], version, swaps = version, version + 1, swaps + 1
            continue
        if rng.random() < 0.1 and asked:
            ticket = rng.choice(list(asked))
            completion = engine.cancel(ticket)
            if completion is not None:
                asked[ticket].completion, cancelled = completion, cancelled + 1
        step(engine, asked)
        if submitted < 700:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
    ties, compared = 0, 0
    projected = {n: tiny_model.project(random_adapter(tiny_config, n)) for n in range(version)}
    for one in asked.values():
        assert one.completion is not None
        prompts = None if one.version is None else projected[one.version]
        (solo,) = generate(
            tiny_model, tiny_tokenizer, [one.text], one.sampling,
            prompts=prompts, row_seeds=[one.seed],
        )  # fmt: skip
        prompt = tiny_tokenizer.encode(one.text, bos=True)
        ties += differs_at_a_tie(tiny_model, prompts, prompt, solo, one.completion)
        compared += 1
    print(f"{swaps} swaps, {cancelled} cancelled, {engine.held_back} steps held back, {ties} ties")
    completed = sum(one.completion.finish_reason != "cancelled" for one in asked.values())
    assert (compared, completed) == (submitted, submitted - cancelled)
    assert submitted >= 2000
    assert swaps >= 100
    assert cancelled >= 50
    assert engine.held_back >= 20
    assert ties <= 5
    assert engine.pool.free == engine.pool.size
    assert grown < 20, f"{grown} MB more than after 700 requests"
    for name in "abcd":
        bank.unload(name)
    for n in range(12):
        bank.load(n, random_adapter(tiny_config, n))


def step(engine: Engine, asked: dict[int, Asked]) -> None:
    """One step; whole answers go to their requests, and the books must balance."""
    for piece in engine.step():
        if piece.completion is not None:
            assert asked[piece.row].completion is None
            asked[piece.row].completion = piece.completion
    held = engine.pool.size - engine.pool.free
    assert (held == 0) == (engine.running == 0)


@pytest.mark.gpu
def test_graphs_change_no_token(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    """The same requests, eager and replayed, while an adapter is replaced between two steps."""
    model, results = tiny_model.to("cuda"), []
    for graphs in (False, True):
        # requests keep the adapters that they began with: at most all that are ever loaded
        bank = AdapterBank(model, capacity=7, prompt_length=3)
        bank.load("a", random_adapter(tiny_config, 1).to("cuda"))
        engine = Engine(
            model, tiny_tokenizer, bank=bank, pool_tokens=2048, max_batch=5, graphs=graphs
        )
        engine.warmup()
        rng, pieces = random.Random(1), []
        for n in range(40):
            text = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 9])))
            sampling = SamplingConfig(rng.choice([1, 9, 30]), temperature=rng.choice([0.0, 0.8]))
            engine.submit(text, sampling, adapter=rng.choice(["a", None]), row_seed=n)
            pieces += engine.step()
            if n % 7 == 0:
                bank.load("a", random_adapter(tiny_config, n).to("cuda"))
        results.append(finished(engine, pieces))
    assert results[0] == results[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["text", "model", "sampling"])
def test_an_exception_in_a_step_costs_at_most_its_own_request(
    where: str,
    error: type[BaseException],
    tiny_model: Llama,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once a finished request went on writing into pages that had become others'."""
    texts = ["green", "light river", "window of stone", "the quiet river in the morning"]
    expected = generate(tiny_model, tiny_tokenizer, texts, GREEDY)
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=256, max_batch=3, prefill_chunk=8)
    tickets = [engine.submit(text, GREEDY) for text in texts]
    calls = 0

    def failing(honest: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 4 == 3:
                raise error
            return honest(*args, **kwargs)

        return wrapper

    owner, name = {
        "text": (Row, "add"),
        "model": (tiny_model, "run"),
        "sampling": (engine_module, "choose"),
    }[where]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    done: dict[int, Completion] = {}
    for _ in range(100):
        with suppress(error):
            for piece in engine.step():
                if piece.completion is not None:
                    done[piece.row] = piece.completion
        held = sum(len(one.pages) for one in (*engine._reading, *engine._writing))
        assert engine.pool.free == engine.pool.size - held
        if not engine.waiting and not engine.running:
            break
    done |= {p.row: p.completion for p in engine.step() if p.completion is not None}
    assert sorted(done) == tickets
    failed = [one for one in done.values() if one.finish_reason == "error"]
    assert bool(failed) == (where == "text")
    for ticket, alone in zip(tickets, expected, strict=True):
        got = done[ticket]
        if got.finish_reason == "error":
            assert got.tokens == alone.tokens[: len(got.tokens)]
        else:
            assert got == alone
    assert engine.pool.free == engine.pool.size


def test_what_a_listener_left_is_told_to_the_next(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    texts = ["green", "light river", "window"]
    expected = generate(tiny_model, tiny_tokenizer, texts, GREEDY)
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=512)
    for text in texts:
        engine.submit(text, GREEDY)
    pieces = []
    for _ in range(200):
        for piece in engine.run():
            pieces.append(piece)
            break
    for ticket, alone in enumerate(expected):
        assert "".join(piece.text for piece in pieces if piece.row == ticket) == alone.text
        assert [p.completion for p in pieces if p.row == ticket and p.completion] == [alone]


def test_a_cancelled_request_says_nothing_more(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=512)
    first, second = engine.submit("green", GREEDY), engine.submit("light", GREEDY)
    told = []
    for piece in engine.run():
        if piece.row == first and not told:
            assert engine.cancel(second) is not None
        told.append(piece.row)
    assert second not in told[1:]


def test_pages_are_those_of_the_longest_answer(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    """The last token of an answer is never cached: 64 tokens fit a page, with one more two."""
    prompt = len(tiny_tokenizer.encode("green", bos=True))
    for new, pages in ((65 - prompt, 1), (66 - prompt, 2)):
        engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=512)
        engine.submit("green", replace(GREEDY, max_new_tokens=new))
        engine.step()
        assert engine.pool.size - engine.pool.free == pages


def test_prompts_are_read_in_chunks_in_their_order_and_hold_nobody_up(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=1024, prefill_chunk=10)
    engine.submit("green", replace(GREEDY, max_new_tokens=60))
    engine.step()
    long = [engine.submit(" ".join(WORDS), GREEDY) for _ in range(3)]
    sizes: list[int] = []
    run = tiny_model.run

    def counted(tokens: torch.Tensor, step: Step) -> torch.Tensor:
        assert step.span is not None
        if step.span.cu_seqlens_q is not None:
            sizes.append(tokens.numel())
        return run(tokens, step)

    monkeypatch.setattr(tiny_model, "run", counted)
    begun: list[int] = []
    while len(begun) < 3:
        before = len(engine._writing[0].row.tokens)
        for piece in engine.step():
            if piece.row in long and piece.row not in begun:
                begun.append(piece.row)
        # whoever writes gets a token in every step
        assert len(engine._writing[0].row.tokens) == before + 1
    assert begun == long
    total = 3 * len(tiny_tokenizer.encode(" ".join(WORDS), bos=True))
    assert sum(sizes) == total
    assert set(sizes[:-1]) == {10}


def test_a_finished_request_frees_its_adapters_row(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=3)
    engine = Engine(tiny_model, tiny_tokenizer, bank=bank, pool_tokens=256)
    for n in range(3):
        bank.load(n, random_adapter(tiny_config, n))
        engine.submit("green", GREEDY, adapter=n)
        finished(engine)
        bank.unload(n)


def test_a_bank_of_another_model_is_refused(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    others = (
        Llama(replace(tiny_config, n_kv_heads=1)),
        Llama(replace(tiny_config, n_layers=5)),
        Llama(tiny_config).half(),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"^bank must be of this model, dim 48, 4 layers"):
            Engine(tiny_model, tiny_tokenizer, bank=AdapterBank(other, capacity=1))


def test_a_warmup_that_fails_holds_no_pages(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, pool_tokens=512)
    monkeypatch.setattr(engine.decoder, "warmup", lambda: None)
    monkeypatch.setattr(engine, "_run_packed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.warmup()
    assert engine.pool.free == engine.pool.size
