"""Completions do not depend on the batch, the cache, the chunks or the stream they come through."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.cache import PAGE_SIZE
from llama_adapter.completion import REPLACEMENT, Completion, Piece
from llama_adapter.config import LlamaConfig
from llama_adapter.generation import generate, stream
from llama_adapter.model import Llama, Step
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

# lengths on both sides of 16 tokens, above which another attention function is taken
TEXTS = [
    "green light",
    "Below is an instruction that describes a task, paired with an input.",
    "a",
    "the quiet river, and in the morning the first answer to the second question 😀 7",
    "window of stone, third in reverse order\n### Response:",
]
NEW_TOKENS = 13
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)
SAMPLED = SamplingConfig(NEW_TOKENS, temperature=0.9, top_p=0.9, seed=31)


class ScriptedModel(Llama):
    """Continues known prompts with given tokens, and keeps its history in the caller's cache.

    It sees a row only through the cache, as the real model does, so a row that is moved, dropped
    or mixed up with another is noticed.
    """

    def __init__(self, config: LlamaConfig, script: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__(config)
        self.script = script
        self.batches: list[int] = []

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """The next token's id, in place of hidden states, behind each sequence's newest token."""
        assert step.pool is not None
        assert step.span is not None
        span = step.span
        self.batches.append(len(span.cache_lengths))
        flat = tokens.flatten()
        for slot, token in zip(span.slots.flatten().tolist(), flat.tolist(), strict=True):
            if slot >= 0:
                step.pool.k[0, slot // PAGE_SIZE, slot % PAGE_SIZE, 0, 0] = token
        store = step.pool.k[0, :, :, 0, 0]
        cu = span.cu_seqlens_q
        ends = range(1, len(tokens) + 1) if cu is None else cu[1:].tolist()
        next_token = torch.zeros(len(flat))
        for end, length, pages in zip(
            ends, span.cache_lengths.tolist(), span.page_table.long(), strict=True
        ):
            if length:
                seen = store[pages].flatten()[:length]
                next_token[end - 1] = self._after(tuple(map(int, seen.tolist())))
        return next_token.view(tokens.shape)

    def _after(self, seen: tuple[int, ...]) -> int:
        for prompt, continuation in self.script.items():
            if seen[: len(prompt)] == prompt:
                expected = continuation[: len(seen) - len(prompt)]
                assert list(seen[len(prompt) :]) == expected
                return continuation[len(expected)]
        return 0

    def logits(self, hidden: Tensor, prompts: Prompts | None = None) -> Tensor:
        """One-hot logits of the ids; a negative id gives NaN."""
        ids = hidden.long()
        logits = F.one_hot(ids.clamp(min=0), self.config.vocab_size).float() * 50
        return torch.where(ids[..., None] < 0, torch.nan, logits)


def scripted(config: LlamaConfig, tokenizer: Tokenizer, script: dict[str, list[int]]) -> Llama:
    prompts = {tuple(tokenizer.encode(text, bos=True)): ids for text, ids in script.items()}
    return ScriptedModel(config, prompts)


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that continue a prompt with exactly `text`, then EOS."""
    anchor = tokenizer.encode(".")
    tokens = tokenizer.encode("." + text)
    assert tokens[: len(anchor)] == anchor
    return [*tokens[len(anchor) :], tokenizer.eos_id]


def pieces_of(pieces: list[Piece], row: int = 0) -> list[str]:
    return [piece.text for piece in pieces if piece.row == row and piece.text]


def assert_same(
    got: Completion, expected: Completion, model: Llama, prompts: Prompts | None, prompt: list[int]
) -> None:
    """Equal, or parted at a greedy tie: matrix products round differently by their batch size."""
    pairs = enumerate(zip(got.tokens, expected.tokens, strict=False))
    parted = next((i for i, (a, b) in pairs if a != b), None)
    if parted is None:
        assert got == expected
        return
    tokens = torch.tensor([[*prompt, *expected.tokens[:parted]]])
    top = model(tokens, prompts)[0, -1].topk(2).values
    assert float(top[0] - top[1]) < 1e-4


@pytest.fixture(params=["base", "shared", "bank", "per sample"])
def row_prompts(
    request: pytest.FixtureRequest, tiny_model: Llama, tiny_config: LlamaConfig
) -> tuple[Prompts | None, list[Prompts | None]]:
    """Prompts for all TEXTS in one batch, and for each of them alone."""
    n = len(TEXTS)
    if request.param == "base":
        return None, [None] * n
    generator = torch.Generator().manual_seed(17)
    lead = {"shared": (), "bank": (3,), "per sample": (n,)}[request.param]
    kv = (tiny_config.kv_heads, tiny_config.head_dim)
    layers = {}
    for layer in (1, 3):
        k = torch.randn(*lead, 7, *kv, generator=generator)
        v = torch.randn(*lead, 7, *kv, generator=generator)
        layers[layer] = LayerPrompt(
            k, v, torch.randn(*lead, tiny_config.n_heads, generator=generator) * 1.5
        )
    if request.param == "shared":
        return Prompts(layers), [Prompts(layers)] * n
    if request.param == "bank":
        index = torch.tensor([2, 0, -1, 1, 0], dtype=torch.int32)
        lengths = torch.tensor([7, 3, 5], dtype=torch.int32)
        alone = [Prompts(layers, index[i : i + 1], lengths) for i in range(n)]
        return Prompts(layers, index, lengths), list(alone)
    single = [
        Prompts({x: LayerPrompt(p.k[i : i + 1], p.v[i : i + 1], p.gate[i : i + 1])
                 for x, p in layers.items()})
        for i in range(n)
    ]  # fmt: skip
    return Prompts(layers), list(single)


RowPrompts = tuple[Prompts | None, list[Prompts | None]]


def test_greedy_equals_argmax_of_full_forwards_without_cache(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_adapter: Adapter
) -> None:
    prompts = tiny_model.project(tiny_adapter.requires_grad_(False))
    for text in TEXTS:
        (got,) = generate(tiny_model, tiny_tokenizer, [text], GREEDY, prompts=prompts)
        tokens = tiny_tokenizer.encode(text, bos=True)
        assert got.prompt_tokens == len(tokens)
        for token in got.tokens:
            logits = tiny_model(torch.tensor([tokens]), prompts)[0, -1]
            assert float(logits.max() - logits[token]) < 1e-4
            tokens.append(token)
        if got.finish_reason == "eos":
            logits = tiny_model(torch.tensor([tokens]), prompts)[0, -1]
            assert int(logits.argmax()) == tiny_tokenizer.eos_id
        else:
            assert len(got.tokens) == GREEDY.max_new_tokens


def test_adapter_changes_what_is_generated(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_adapter: Adapter
) -> None:
    prompts = tiny_model.project(tiny_adapter)
    with_adapter = generate(tiny_model, tiny_tokenizer, TEXTS, GREEDY, prompts=prompts)
    without = generate(tiny_model, tiny_tokenizer, TEXTS, GREEDY)
    assert all(a.tokens != b.tokens for a, b in zip(with_adapter, without, strict=True))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_equals_one_by_one(
    tiny_model: Llama,
    tiny_tokenizer: Tokenizer,
    row_prompts: RowPrompts,
    sampling: SamplingConfig,
) -> None:
    together, alone = row_prompts
    batch = generate(tiny_model, tiny_tokenizer, TEXTS, sampling, prompts=together)
    for row, (text, prompts) in enumerate(zip(TEXTS, alone, strict=True)):
        (single,) = generate(
            tiny_model, tiny_tokenizer, [text], sampling, prompts=prompts, row_seeds=[row]
        )
        assert_same(batch[row], single, tiny_model, prompts, tiny_tokenizer.encode(text, bos=True))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_that_end_early_leave_the_others_alone(
    tiny_model: Llama,
    tiny_tokenizer: Tokenizer,
    tiny_config: LlamaConfig,
    row_prompts: RowPrompts,
    sampling: SamplingConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows end at the context's end, each at another step, and the batch shrinks with them."""
    together, alone = row_prompts
    words = tiny_tokenizer.encode(" light" * 200)
    room = [1, 16, 2, 5, 12]
    texts = [tiny_tokenizer.decode(words[: tiny_config.max_seq_len - 1 - n]) for n in room]
    sampling = replace(sampling, max_new_tokens=40)
    sizes: list[int] = []
    run = tiny_model.run

    def counted(tokens: Tensor, step: Step) -> Tensor:
        assert step.span is not None
        sizes.append(len(step.span.cache_lengths))
        return run(tokens, step)

    monkeypatch.setattr(tiny_model, "run", counted)
    batch = generate(tiny_model, tiny_tokenizer, texts, sampling, prompts=together)
    assert sizes[0] == 5
    assert sizes[-1] < 5
    assert sizes == sorted(sizes, reverse=True)
    for row, (text, prompts) in enumerate(zip(texts, alone, strict=True)):
        (single,) = generate(
            tiny_model, tiny_tokenizer, [text], sampling, prompts=prompts, row_seeds=[row]
        )
        assert_same(batch[row], single, tiny_model, prompts, tiny_tokenizer.encode(text, bos=True))
        if single.finish_reason == "length":
            assert len(single.tokens) == room[row]


@pytest.mark.parametrize("chunk", [1, 3, 16, 17])
def test_prefill_chunks_change_nothing(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_adapter: Adapter, chunk: int
) -> None:
    prompts = tiny_model.project(tiny_adapter)
    whole = generate(tiny_model, tiny_tokenizer, TEXTS, SAMPLED, prompts=prompts)
    chunked = generate(
        tiny_model, tiny_tokenizer, TEXTS, SAMPLED, prompts=prompts, prefill_chunk=chunk
    )
    for row, text in enumerate(TEXTS):
        ids = tiny_tokenizer.encode(text, bos=True)
        assert_same(chunked[row], whole[row], tiny_model, prompts, ids)


def test_seeds_reproduce_and_differ(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    texts = [TEXTS[0]] * 4
    first = generate(tiny_model, tiny_tokenizer, texts, SAMPLED)
    assert generate(tiny_model, tiny_tokenizer, texts, SAMPLED) == first
    # rows of one text differ by their own seeds, and a seed of the caller's replaces the row's
    assert len({completion.tokens for completion in first}) == 4
    swapped = generate(tiny_model, tiny_tokenizer, texts, SAMPLED, row_seeds=[3, 2, 1, 0])
    assert [c.tokens for c in swapped] == [c.tokens for c in reversed(first)]
    other = replace(SAMPLED, seed=32)
    assert generate(tiny_model, tiny_tokenizer, texts, other) != first


def test_fewer_new_tokens_are_a_prefix(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    short = replace(SAMPLED, max_new_tokens=7)
    long_run = generate(tiny_model, tiny_tokenizer, TEXTS, SAMPLED)
    for a, b in zip(generate(tiny_model, tiny_tokenizer, TEXTS, short), long_run, strict=True):
        assert a.tokens == b.tokens[:7]
        assert b.text.startswith(a.text)


def test_tiny_temperature_is_greedy(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    cold = replace(GREEDY, temperature=1e-30)
    greedy = generate(tiny_model, tiny_tokenizer, TEXTS, GREEDY)
    assert generate(tiny_model, tiny_tokenizer, TEXTS, cold) == greedy


def test_half_precision_model_generates(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    model = tiny_model.bfloat16()
    completions = generate(model, tiny_tokenizer, TEXTS, SAMPLED)
    assert all(
        len(completion.tokens) == NEW_TOKENS or completion.finish_reason == "eos"
        for completion in completions
    )


def test_new_tokens_are_capped_by_the_context(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    words = tiny_tokenizer.encode(" light" * 200)
    text = tiny_tokenizer.decode(words[: tiny_config.max_seq_len - 6])
    prompt = len(tiny_tokenizer.encode(text, bos=True))
    script = {text: [40] * 200}
    model = scripted(tiny_config, tiny_tokenizer, script)
    (got,) = generate(model, tiny_tokenizer, [text], SamplingConfig(max_new_tokens=50))
    assert (got.finish_reason, got.prompt_tokens) == ("length", prompt)
    assert prompt + len(got.tokens) == tiny_config.max_seq_len


def test_eos_ends_a_row_and_is_not_part_of_it(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    script = {
        "first": continuation(tiny_tokenizer, " light river"),
        "second question": [tiny_tokenizer.eos_id],
        "third": continuation(tiny_tokenizer, "."),
    }
    model = scripted(tiny_config, tiny_tokenizer, script)
    got = generate(model, tiny_tokenizer, list(script), SamplingConfig())
    assert [c.text for c in got] == [" light river", "", "."]
    assert [c.finish_reason for c in got] == ["eos"] * 3
    assert [list(c.tokens) for c in got] == [ids[:-1] for ids in script.values()]


def test_finished_rows_are_dropped_from_the_batch(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    texts = [f"{'green ' * n}question" for n in range(8)]
    script = {text: [300 + n] * n + [2] for n, text in enumerate(texts)}
    model = scripted(tiny_config, tiny_tokenizer, script)
    got = generate(model, tiny_tokenizer, texts, GREEDY)
    assert [c.tokens for c in got] == [(300 + n,) * n for n in range(8)]
    # prefill, then a step per token of the longest row, in the next larger bucket
    assert model.batches == [8, 8, 8, 8, 4, 4, 2, 1]


def test_rows_beyond_the_batch_wait_for_a_place(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    texts = [f"{'green ' * n}question" for n in range(8)]
    script = {text: [300 + n] * n + [2] for n, text in enumerate(texts)}
    model = scripted(tiny_config, tiny_tokenizer, script)
    got = generate(model, tiny_tokenizer, texts, GREEDY, max_batch=3)
    assert [c.tokens for c in got] == [(300 + n,) * n for n in range(8)]
    assert max(model.batches) == 3
    # no step is run with a place free while somebody waits
    assert sum(model.batches) < 50


@pytest.mark.parametrize(
    ("written", "stop", "expected"),
    [
        # over several tokens and inside of words
        (" light river green", ("ver gr",), " light ri"),
        (" light\n\n### Response: a", ("\n###", "Response"), " light\n"),
        # the earliest of several, the longer one still open
        (" first second third", ("third", "second"), " first "),
        (" abcabd e", ("abd",), " abc"),
        (" aaab", ("aab",), " a"),
        # several that the same token completes
        (" light river", ("er", "ver"), " light ri"),
        # at the very beginning, and a beginning that comes to nothing
        ("river", ("river",), ""),
        (" light riv", ("river", "light!"), " light riv"),
        (" quiet 😀漢 green", ("漢",), " quiet 😀"),
    ],
)
def test_stop_strings_cut_the_text(
    tiny_tokenizer: Tokenizer,
    tiny_config: LlamaConfig,
    written: str,
    stop: tuple[str, ...],
    expected: str,
) -> None:
    script = {"question": continuation(tiny_tokenizer, written)}
    model = scripted(tiny_config, tiny_tokenizer, script)
    pieces = list(stream(model, tiny_tokenizer, ["question"], SamplingConfig(stop=stop)))
    done = pieces[-1].completion
    assert done is not None
    assert done.text == expected
    assert "".join(pieces_of(pieces)) == expected
    assert done.finish_reason == ("eos" if expected == written else "stop")
    # no token after the one that completed the stop string
    reached = tiny_tokenizer.decode([*tiny_tokenizer.encode("."), *done.tokens[:-1]])[1:]
    assert not any(text in reached for text in stop)


def test_streamed_text_is_held_back_only_while_a_stop_string_may_begin(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    tokens = [tiny_tokenizer.encode("." + c)[-1] for c in "aboutabove"]
    assert tiny_tokenizer.decode([*tiny_tokenizer.encode("."), *tokens]) == ".aboutabove"
    model = scripted(tiny_config, tiny_tokenizer, {"question": [*tokens, 2]})
    sampling = SamplingConfig(stop=("above",))
    pieces = list(stream(model, tiny_tokenizer, ["question"], sampling))
    assert pieces_of(pieces) == ["abou", "t"]
    prompt_tokens = len(tiny_tokenizer.encode("question", bos=True))
    assert pieces[-1].completion == Completion("about", tuple(tokens), "stop", prompt_tokens)


@pytest.mark.parametrize("text", ["😀", " 漢字 and 漢", "é😀\u200d🔥 light 한국어", "a\ufffdb"])
def test_characters_of_several_tokens_are_streamed_whole(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig, text: str
) -> None:
    ids = continuation(tiny_tokenizer, text)
    assert len(ids) - 1 > len(text.split())
    model = scripted(tiny_config, tiny_tokenizer, {"question": ids})
    pieces = list(stream(model, tiny_tokenizer, ["question"], SamplingConfig()))
    assert "".join(pieces_of(pieces)) == text
    if REPLACEMENT not in text:
        # no half of a character, and each one as soon as its last token is there
        assert REPLACEMENT not in "".join(pieces_of(pieces))
        assert len(pieces_of(pieces)) >= len(text.split())


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_unfinished_character_at_the_end_is_dropped(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig, kept: int
) -> None:
    before = continuation(tiny_tokenizer, " light")[:-1]
    ids = continuation(tiny_tokenizer, " light😀")
    assert len(ids) == len(before) + 4 + 1
    model = scripted(tiny_config, tiny_tokenizer, {"question": ids})
    sampling = SamplingConfig(max_new_tokens=len(before) + kept)
    pieces = list(stream(model, tiny_tokenizer, ["question"], sampling))
    done = pieces[-1].completion
    assert done is not None
    assert (done.text, done.finish_reason) == (" light", "length")
    assert "".join(pieces_of(pieces)) == " light"


def test_any_tokens_stream_as_they_decode(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    """Random ids, marks and broken bytes among them: the text continues the prompt's exactly."""
    rng = random.Random(5)
    script: dict[str, list[int]] = {}
    for row in range(60):
        # plain bytes are drawn as often as pieces, so that characters form and break
        pools = [range(3, 259), range(259, tiny_tokenizer.vocab_size), [0, 1]]
        ids = [rng.choice(rng.choices(pools, [6, 6, 1])[0]) for _ in range(rng.randint(1, 30))]
        script[f"{row} {TEXTS[row % 4]}{' ' * (row % 3)}"] = [*ids, tiny_tokenizer.eos_id]
    model = scripted(tiny_config, tiny_tokenizer, script)
    pieces = list(stream(model, tiny_tokenizer, list(script), SamplingConfig()))
    texts = {p.row: p.completion.text for p in pieces if p.completion is not None}
    for row, (prompt, ids) in enumerate(script.items()):
        assert "".join(pieces_of(pieces, row)) == texts[row]
        whole = tiny_tokenizer.decode([*tiny_tokenizer.encode(prompt), *ids[:-1]])
        lost = whole.removeprefix(prompt + texts[row])
        assert whole == prompt + texts[row] + lost
        assert set(lost) <= {REPLACEMENT}


def test_pieces_of_a_sampled_batch_concatenate_to_what_generate_returns(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, stop=("er", " th"), seed=4)
    completions = generate(tiny_model, tiny_tokenizer, TEXTS, sampling)
    pieces = list(stream(tiny_model, tiny_tokenizer, TEXTS, sampling))
    for row, completion in enumerate(completions):
        own = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in own) == completion.text
        assert [piece.completion for piece in own] == [None] * (len(own) - 1) + [completion]
    # the rows advance together
    order = [piece.row for piece in pieces]
    assert order != sorted(order)


def test_streaming_leaves_the_callers_gradient_mode_alone(
    tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    for _ in stream(tiny_model, tiny_tokenizer, TEXTS, GREEDY):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        weight = torch.ones(3, requires_grad=True)
        (grad,) = torch.autograd.grad((weight * weight).sum(), weight)
        assert torch.equal(grad, torch.full((3,), 2.0))


def test_rows_beyond_the_tokenizers_vocabulary_are_never_chosen(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    padded = tiny_tokenizer.vocab_size + 7
    config = LlamaConfig(dim=48, n_layers=1, n_heads=6, vocab_size=padded, max_seq_len=160)
    model = Llama(config)
    text = [*continuation(tiny_tokenizer, " light")]
    model.hidden = lambda tokens, *args, **kwargs: torch.zeros(*tokens.shape, 48)
    logits = torch.zeros(padded)
    logits[text[0]], logits[padded - 1] = 20.0, 90.0
    model.logits = lambda hidden, prompts=None: logits.expand(*hidden.shape[:-1], -1)
    (got,) = generate(model, tiny_tokenizer, ["question"], SamplingConfig(max_new_tokens=3))
    assert got.tokens == (text[0],) * 3


def test_no_texts_give_no_completions(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    assert generate(tiny_model, tiny_tokenizer, [], GREEDY) == []


def test_logits_that_are_not_finite_are_an_error(
    tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    good = continuation(tiny_tokenizer, " light river green birds follow")
    script = {"first": good, "second": [*good[:2], -1]}
    model = scripted(tiny_config, tiny_tokenizer, script)
    message = "logits must be finite, got NaN or infinity for texts[1] at new token 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(model, tiny_tokenizer, list(script), SamplingConfig())


def test_wrong_arguments_are_refused_before_anything_runs(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    bank = {0: LayerPrompt(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8), torch.zeros(2, 6))}
    # BOS and the blank of a text's beginning are tokens too
    too_long = " light" * 158
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("one text", {}, "texts must be a list of strings, got one string"),
        (["a", ""], {}, "texts[1] must hold at least one token besides BOS, got none"),
        (
            ["a", too_long],
            {},
            "texts[1] must have at most 159 tokens, one less than the context of 160, got 160",
        ),
        (["a"], {"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        (["a"], {"max_batch": 0}, "max_batch must be at least 1, got 0"),
        (["a"], {"row_seeds": [1, 2]}, "row_seeds must have 1 entries, got 2"),
        (
            ["a", "b", "c"],
            {"prompts": Prompts(bank, torch.zeros(2, dtype=torch.int32))},
            "adapter_index must have shape (B,) = (3,), got (2,)",
        ),
        (["a"], {"prompts": Prompts(bank)}, "prompts of layer 0 must be for B = 1 texts, got 2"),
    ]
    for texts, arguments, message in cases:
        # not even an iterator: the error comes at the call
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            stream(tiny_model, tiny_tokenizer, texts, GREEDY, **arguments)
    small = Llama(LlamaConfig(dim=8, n_layers=1, n_heads=1, vocab_size=300))
    message = "tokenizer must have at most the model's 300 tokens, got 353"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(small, tiny_tokenizer, ["a"], GREEDY)


def test_longest_prompt_that_leaves_room_gives_one_token(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, tiny_config: LlamaConfig
) -> None:
    words = tiny_tokenizer.encode(" light" * 200)
    text = tiny_tokenizer.decode(words[: tiny_config.max_seq_len - 2])
    assert len(tiny_tokenizer.encode(text, bos=True)) == tiny_config.max_seq_len - 1
    (got,) = generate(tiny_model, tiny_tokenizer, [text], GREEDY)
    assert len(got.tokens) == (1 if got.finish_reason == "length" else 0)
