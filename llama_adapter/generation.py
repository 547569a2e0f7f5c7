"""How a model answers: batches of prompts continued token by token, greedy or sampled.

One loop serves everything: `stream` yields each row's text as soon as it is decided, `generate`
collects what it yields. A row's tokens depend on its prompt and its seed, not on its batch. The
loop owns the key/value cache; prompts are projected once by the caller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.adapter import LayerPrompt, Prompts
from llama_adapter.cache import KVCache
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig, choose, row_draws
from llama_adapter.tokenizer import Tokenizer

# what a decoder shows in place of bytes that are no character, or not yet one
REPLACEMENT = "\ufffd"
# finished rows leave the cache once they are this share of it: the copy costs about one step
COMPACTION_SHARE = 0.25


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        text: continues the prompt's text exactly, a leading space included; ends before a stop
            string, and without the bytes of an unfinished last character.
        tokens: every generated id, those of a stop string included, EOS not.
        finish_reason: "eos", "stop" (a stop string) or "length" (max_new_tokens, or the context).
        prompt_tokens: tokens of the prompt, BOS included.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next decided text of one row; `completion` is given with the row's last piece only."""

    row: int
    text: str
    completion: Completion | None = None


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: SamplingConfig,
    *,
    prompts: Prompts | None = None,
    prefill_chunk: int | None = None,
    row_seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue every text; arguments and errors as `stream`.

    Returns:
        One completion per text, in the order of the texts.
    """
    pieces = stream(
        model,
        tokenizer,
        texts,
        sampling,
        prompts=prompts,
        prefill_chunk=prefill_chunk,
        row_seeds=row_seeds,
    )
    done = {piece.row: piece.completion for piece in pieces if piece.completion is not None}
    return [done[row] for row in range(len(texts))]


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: SamplingConfig,
    *,
    prompts: Prompts | None = None,
    prefill_chunk: int | None = None,
    row_seeds: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Continue every text, one token per row and step, and yield text as it is decided.

    A row's pieces concatenate to its completion's text exactly. What could become a stop string,
    or is part of a character, is held back until it is decided.

    Args:
        model: the base model.
        tokenizer: the model's.
        texts: full prompt texts, B of them, of any lengths; encoded with BOS.
        sampling: how tokens are chosen and when to stop.
        prompts: the adapter's projection, with `adapter_index` (B,) where it is a bank.
        prefill_chunk: prompt tokens per forward call; None takes the prompts whole.
        row_seeds: B integers that with `sampling.seed` seed each row; default 0 to B - 1.

    Returns:
        An iterator over the pieces of all rows, step by step.

    Raises:
        ValueError: an argument does not fit, a text is empty or leaves no room in the context
            (before anything is computed); the logits are not finite (while iterating).
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer must have at most the model's {model.config.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    seeds = range(len(texts)) if row_seeds is None else row_seeds
    if len(seeds) != len(texts):
        raise ValueError(f"row_seeds must have {len(texts)} entries, got {len(seeds)}")
    _check_prompts(prompts, len(texts))
    context = model.config.max_seq_len
    rows = [
        _Row(index, seed, text, tokenizer, sampling, context)
        for index, (text, seed) in enumerate(zip(texts, seeds, strict=True))
    ]
    return _pieces(model, tokenizer, sampling, rows, prompts, prefill_chunk)


class _Text:
    """One row's text so far: whole characters, held back where a stop string may begin."""

    def __init__(self, tokenizer: Tokenizer, before: int, stop: tuple[str, ...]) -> None:
        self._decode = tokenizer.decode
        self._stop = stop
        self._starts = [text[:n] for text in stop for n in range(1, len(text))]
        self._restart(before)
        self._given = 0
        self.text = ""
        self.stopped = False

    def _restart(self, token: int) -> None:
        # decoding starts at a token whose text is out already, because the first piece of a
        # decoded text loses its leading space
        self._window = [token]
        self._skip = len(self._decode([token]))

    def add(self, token: int) -> None:
        """Append one generated token."""
        self._window.append(token)
        text = self._decode(self._window)[self._skip :]
        if text and not text.endswith(REPLACEMENT):
            self._restart(token)
            self._extend(text)

    def end(self) -> None:
        """Decide everything: no token follows."""
        self._extend(self._decode(self._window)[self._skip :].rstrip(REPLACEMENT))

    def _extend(self, text: str) -> None:
        self.text += text
        # what was given out cannot be the beginning of a stop string
        found = [self.text.find(stop, self._given) for stop in self._stop]
        cut = min((at for at in found if at >= 0), default=None)
        if cut is not None:
            self.text = self.text[:cut]
            self.stopped = True

    def take(self, *, final: bool) -> str:
        """Text that is decided and was not taken before; all of it where `final`."""
        start = self._given
        held = 0 if final else self._held()
        self._given = len(self.text) - held
        return self.text[start : self._given]

    def _held(self) -> int:
        """Characters at the end that a stop string could begin with."""
        return max((len(start) for start in self._starts if self.text.endswith(start)), default=0)


class _Row:
    """One prompt and what has been generated for it."""

    def __init__(
        self,
        index: int,
        seed: int,
        text: str,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        context: int,
    ) -> None:
        self.index = index
        self.prompt = tokenizer.encode(text, bos=True)
        if len(self.prompt) < 2:
            raise ValueError(f"texts[{index}] must hold at least one token besides BOS, got none")
        if len(self.prompt) >= context:
            raise ValueError(
                f"texts[{index}] must have at most {context - 1} tokens, one less than the "
                f"model's context of {context}, got {len(self.prompt)}"
            )
        self.limit = min(sampling.max_new_tokens, context - len(self.prompt))
        self.tokens: list[int] = []
        self._eos = tokenizer.eos_id
        self._text = _Text(tokenizer, self.prompt[-1], sampling.stop)
        greedy = sampling.temperature == 0
        self._draws = [] if greedy else row_draws(sampling.seed, seed, self.limit)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's and the generated ones."""
        return len(self.prompt) + len(self.tokens)

    @property
    def draw(self) -> float:
        """The random number of the next token."""
        return self._draws[len(self.tokens)] if self._draws else 0.0

    def add(self, token: int) -> Piece:
        """Take the next token; the piece carries the completion where it ends the row."""
        reason = "eos" if token == self._eos else None
        if reason is None:
            self.tokens.append(token)
            self._text.add(token)
            if len(self.tokens) == self.limit:
                reason = "length"
        if reason is not None:
            self._text.end()
        if self._text.stopped:
            reason = "stop"
        piece = self._text.take(final=reason is not None)
        if reason is None:
            return Piece(self.index, piece)
        done = Completion(self._text.text, tuple(self.tokens), reason, len(self.prompt))
        return Piece(self.index, piece, done)


def _pieces(
    model: Llama,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    rows: list[_Row],
    prompts: Prompts | None,
    prefill_chunk: int | None,
) -> Iterator[Piece]:
    """The loop: choose a token for every live row, hand the text out, run the model once."""
    if not rows:
        return
    batch = _Batch(model, rows, prompts)
    logits = batch.prefill(prefill_chunk or max(len(row.prompt) for row in rows))
    while True:
        # rows of the embedding beyond the tokenizer's are padding
        logits = logits[:, : tokenizer.vocab_size]
        chosen = choose(logits, sampling, [row.draw for row in batch.rows])
        live = []
        for i, (row, token) in enumerate(zip(batch.rows, chosen, strict=True)):
            if token < 0:
                raise ValueError(
                    f"logits must be finite, got NaN or infinity for texts[{row.index}] "
                    f"at new token {len(row.tokens)}"
                )
            piece = row.add(token)
            if piece.completion is None:
                live.append(i)
            if piece.text or piece.completion is not None:
                yield piece
        if not live:
            return
        batch.keep(live)
        logits = batch.step()


class _Batch:
    """Live rows, and the cache in which each of them has a slot.

    Attributes:
        rows: live rows, in the order of the texts.
        slots: the cache's row of each; finished rows keep theirs until the next compaction.
    """

    def __init__(self, model: Llama, rows: list[_Row], prompts: Prompts | None) -> None:
        self.model, self.prompts = model, prompts
        self.rows, self.slots = list(rows), list(range(len(rows)))
        self.cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        capacity = max(len(row.prompt) + row.limit for row in self.rows)
        weight = self.model.output_weight
        return KVCache(
            self.model.config, len(self.rows), capacity, dtype=weight.dtype, device=weight.device
        )

    @torch.inference_mode()
    def prefill(self, chunk: int) -> Tensor:
        """Run the prompts, `chunk` tokens at a time; returns logits (rows, V) of their ends."""
        lengths = [len(row.prompt) for row in self.rows]
        ends: dict[int, Tensor] = {}
        for start in range(0, max(lengths), chunk):
            width = min(chunk, max(lengths) - start)
            hidden = self._run([row.prompt[start : start + width] for row in self.rows], width)
            for slot, length in enumerate(lengths):
                if start < length <= start + width:
                    ends[slot] = hidden[slot, length - start - 1]
        return self.model.logits(torch.stack([ends[slot] for slot in self.slots]))

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run every live row's newest token; returns logits (rows, V)."""
        newest: list[list[int]] = [[] for _ in range(len(self.cache.lengths))]
        for slot, row in zip(self.slots, self.rows, strict=True):
            newest[slot] = row.tokens[-1:]
        return self.model.logits(self._run(newest, 1)[self.slots, 0])

    def _run(self, tokens: list[list[int]], width: int) -> Tensor:
        """Hidden states (B, width, C) of each slot's next tokens, at most `width` of them."""
        padded = [part + [0] * (width - len(part)) for part in tokens]
        return self.model.hidden(
            torch.tensor(padded, device=self.cache.lengths.device),
            self.prompts,
            cache=self.cache,
            new_lengths=[len(part) for part in tokens],
        )

    @torch.inference_mode()
    def keep(self, live: list[int]) -> None:
        """Go on with these of the rows only."""
        self.rows = [self.rows[i] for i in live]
        self.slots = [self.slots[i] for i in live]
        if len(self.rows) > (1 - COMPACTION_SHARE) * len(self.cache.lengths):
            return
        # the newest token is not in the cache yet
        cached = [row.length - 1 for row in self.rows]
        old, new, used = self.cache, self._new_cache(), max(cached)
        for layer in range(len(old.k)):
            new.k[layer, :, :used] = old.k[layer, self.slots, :used]
            new.v[layer, :, :used] = old.v[layer, self.slots, :used]
        new.advance(cached)
        self.prompts = _select_prompts(self.prompts, self.slots)
        self.cache, self.slots = new, list(range(len(self.rows)))


def _check_prompts(prompts: Prompts | None, batch: int) -> None:
    """Refuse prompts that belong to another number of texts."""
    if prompts is None:
        return
    if prompts.adapter_index is not None:
        shape = tuple(prompts.adapter_index.shape)
        if shape != (batch,):
            raise ValueError(f"adapter_index must have shape (B,) = ({batch},), got {shape}")
        return
    for layer, prompt in prompts.layers.items():
        if prompt.k.ndim == 4 and len(prompt.k) != batch:
            raise ValueError(
                f"prompts of layer {layer} must be for B = {batch} texts, got {len(prompt.k)}"
            )


def _select_prompts(prompts: Prompts | None, slots: list[int]) -> Prompts | None:
    """Prompts of these rows of the batch; a bank and a shared prompt stay as they are."""
    if prompts is None:
        return None
    if prompts.adapter_index is not None:
        return Prompts(prompts.layers, prompts.adapter_index[slots], prompts.prompt_lengths)
    layers = {
        layer: LayerPrompt(
            prompt.k[slots] if prompt.k.ndim == 4 else prompt.k,
            prompt.v[slots] if prompt.v.ndim == 4 else prompt.v,
            prompt.gate[slots] if prompt.gate.ndim == 2 else prompt.gate,
        )
        for layer, prompt in prompts.layers.items()
    }
    return Prompts(layers)
