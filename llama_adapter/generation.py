"""How a model answers: batches of prompts continued token by token, greedy or sampled.

One loop serves everything, the engine's: `stream` hands it the texts and yields each row's text as
soon as it is decided, `generate` collects what it yields. A row's tokens depend on its prompt and
its seed, not on its batch. Prompts are projected once by the caller.
"""

from collections.abc import Iterator, Sequence

from llama_adapter.adapter import Prompts
from llama_adapter.adapter_bank import RowBank
from llama_adapter.cache import PAGE_SIZE, pages_for
from llama_adapter.completion import Completion, Piece, encode_prompt
from llama_adapter.engine import Engine
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: SamplingConfig,
    *,
    prompts: Prompts | None = None,
    prefill_chunk: int | None = None,
    row_seeds: Sequence[int] | None = None,
    max_batch: int | None = None,
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
        max_batch=max_batch,
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
    max_batch: int | None = None,
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
        prefill_chunk: prompt tokens of all rows per forward call; None takes the prompts whole.
        row_seeds: B integers that with `sampling.seed` seed each row; default 0 to B - 1.
        max_batch: rows that run together, the next as soon as one ends; None is all of them.

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
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    seeds = range(len(texts)) if row_seeds is None else row_seeds
    if len(seeds) != len(texts):
        raise ValueError(f"row_seeds must have {len(texts)} entries, got {len(seeds)}")
    bank = None if prompts is None else RowBank(prompts, len(texts))
    context, most = model.config.max_seq_len, sampling.max_new_tokens
    together = max(min(len(texts), max_batch or len(texts)), 1)
    # room for the longest that can meet
    lengths = [
        len(encode_prompt(text, tokenizer, f"texts[{row}]")) for row, text in enumerate(texts)
    ]
    encoded = sorted(lengths, reverse=True)
    longest = [min(n + most, context) for n in encoded[:together]]
    engine = Engine(
        model,
        tokenizer,
        bank=bank,
        pool_tokens=PAGE_SIZE * max(sum(map(pages_for, longest)), 1),
        max_batch=together,
        max_tokens=max(longest, default=None),
        prefill_chunk=prefill_chunk or max(sum(encoded[:together]), 1),
    )
    for row, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        adapter = None if prompts is None else row
        engine.submit(text, sampling, adapter=adapter, row_seed=seed, name=f"texts[{row}]")
    return _checked(engine)


def _checked(engine: Engine) -> Iterator[Piece]:
    """The engine's pieces, up to one whose logits were not numbers."""
    for piece in engine.run():
        done = piece.completion
        if done is not None and done.finish_reason == "error":
            raise ValueError(
                f"logits must be finite, got NaN or infinity for texts[{piece.row}] "
                f"at new token {len(done.tokens)}"
            )
        yield piece
