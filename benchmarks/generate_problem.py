"""What a provider is given to decode, and what of it is timed: whole steps of a whole model.

Ours is the engine that serves requests, with all that it does between two steps but for turning
tokens into text. Letters are those of kernels/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.decode_problem import Memory
from benchmarks.generate_models import SETTINGS, Models, read_bytes
from benchmarks.harness import Results, Row, Work
from benchmarks.roofline import DTYPES
from llama_adapter.adapter import Prompts
from llama_adapter.cache import KVCache, PagePool, pages_for
from llama_adapter.decoder import Decoder
from llama_adapter.engine import Engine
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

if TYPE_CHECKING:
    from benchmarks.generate_theirs import TheirModel

DECODE, PREFILL = "decode", "prefill"
MODES = (DECODE, PREFILL)
# adapters by kind: with more than one, each sequence has one of its own
ADAPTERS = {"plain": 0, "adapter": 1, "bank_32": 32, "bank_1000": 1000}
# a step through a bank that shares no factor with their sizes
STRIDE = 37
# sequences and new tokens that are held against the truth, and how many where PEFT must run each
SEQUENCES, TOKENS, ALONE = 8, 8, 4


@dataclass(frozen=True)
class Setting:
    """What is generated: `new` tokens behind each of `batch` prompts of `prompt` tokens."""

    model: str
    batch: int
    prompt: int
    new: int
    dtype: str

    def describe(self) -> str:
        """`llama-7b B=8 512+128 tokens bfloat16`."""
        return f"{self.model} B={self.batch} {self.prompt}+{self.new} tokens {self.dtype}"


@dataclass(frozen=True)
class Provider:
    """One way to generate.

    Attributes:
        name: of the provider.
        kind: of its adapters, one of ADAPTERS.
        weights: format of quantize.py, None for the weights as they are.
        ours: whether it is our engine, or transformers' model.
        needs: packages that must be installed.
        devices: where it runs.
    """

    name: str
    kind: str
    weights: str | None = None
    ours: bool = True
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Problem:
    """The inputs of a setting.

    Attributes:
        setting: what is generated.
        models: the base in all its forms.
        tokens: (B, prompt) int64.
        pool: pages that the engines of a cell share: only one of them runs at a time.
        memory: for the read bandwidth.
    """

    setting: Setting
    models: Models
    tokens: Tensor
    pool: PagePool
    memory: Memory


def problem(setting: Setting, models: Models, memory: Memory) -> Problem:
    """Random prompts, the same whenever they are drawn for a setting."""
    config, device = models.base.config, models.device
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.prompt)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    pages = setting.batch * pages_for(setting.prompt + setting.new)
    pool = PagePool(config, pages, dtype=DTYPES[setting.dtype], device=device)
    return Problem(setting, models, tokens, pool, memory)


def adapters_of(kind: str, batch: int) -> list[int | None]:
    """The number of every sequence's adapter: its own as far as the bank goes."""
    count = ADAPTERS[kind]
    return [(5 + STRIDE * row) % count if count else None for row in range(batch)]


def sequences_of(kind: str, batch: int) -> int:
    """How many sequences are held against the truth."""
    return min(batch, ALONE if ADAPTERS[kind] > 1 else SEQUENCES)


class Numbers(Tokenizer):
    """Texts are token ids in decimal; none of them ends a sequence, and nothing is decoded."""

    def __init__(self, vocab_size: int) -> None:
        """Accept ids below a bound."""
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, 0, -1
        self.end_ids = frozenset()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids that the text spells, no more."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """A character per id."""
        return "." * len(ids)


def _engine(given: Problem, provider: Provider, new: int) -> Engine:
    """The engine of a provider, over the pool of its cell."""
    setting, count = given.setting, ADAPTERS[provider.kind]
    model = given.models.model(provider.weights)
    bank = given.models.bank(provider.weights, count) if count else None
    longest = setting.prompt + new
    engine = Engine(
        model,
        Numbers(model.config.vocab_size),
        bank=bank,
        pool_tokens=1,
        max_batch=setting.batch,
        max_tokens=longest,
        prefill_chunk=setting.batch * setting.prompt,
    )
    # a pool of its own for each engine would not fit a GPU
    engine.pool = given.pool
    engine.decoder = Decoder(
        model,
        given.pool,
        None if bank is None else bank.prompts,
        largest=setting.batch,
        longest=pages_for(longest),
        graphs=given.tokens.is_cuda,
    )
    return engine


def _steps(engine: Engine, count: int, tickets: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The tokens, by ticket, of the requests that so many steps end."""
    done = {}
    try:
        for _ in range(count):
            for piece in engine.step():
                if piece.completion is not None:
                    done[piece.row] = piece.completion.tokens
    except harness.FAILURES:
        # their pages are everybody's
        for ticket in tickets:
            engine.cancel(ticket)
        raise
    return done


def prompts_of(given: Problem, kind: str, weights: str | None, count: int) -> Prompts | None:
    """The projected prompts of the first sequences; None without an adapter."""
    adapters = ADAPTERS[kind]
    if not adapters:
        return None
    bank = given.models.bank(weights, adapters)
    rows = [bank.acquire(name) for name in adapters_of(kind, count)]
    for row in rows:
        bank.release(row)
    index = torch.tensor(rows, dtype=torch.int32, device=given.tokens.device)
    return Prompts(bank.prompts.layers, index, bank.prompts.prompt_lengths)


@torch.inference_mode()
def our_logits(given: Problem, provider: Provider) -> Tensor:
    """(rows, V) logits of the first sequences at their prompts' ends, read into a cache."""
    setting, model = given.setting, given.models.model(provider.weights)
    tokens = given.tokens[: sequences_of(provider.kind, setting.batch)]
    dtype = DTYPES[setting.dtype]
    cache = KVCache(model.config, *tokens.shape, dtype=dtype, device=tokens.device)
    prompts = prompts_of(given, provider.kind, provider.weights, len(tokens))
    hidden = model.hidden(tokens, prompts, cache=cache)
    return model.logits(hidden[:, -1])


def _answers(tokens: Tensor, logits: Tensor) -> Results:
    """What is compared: the first tokens twice, for how they differ and for how many do."""
    tokens = tokens[:, :TOKENS]
    return {"logits": logits, "moved": logits, "tokens": tokens, "differing": tokens}


def our_work(given: Problem, provider: Provider, mode: str) -> Work:
    """Steps of the engine behind the one that reads the prompts, or that one alone.

    Raises:
        ValueError, RuntimeError: the provider does not do this.
    """
    setting = given.setting
    new = setting.new if mode == DECODE else 1
    engine = _engine(given, provider, new)
    checked, logits = sequences_of(provider.kind, setting.batch), our_logits(given, provider)
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    texts = [" ".join(map(str, row)) for row in given.tokens.tolist()]
    names = adapters_of(provider.kind, setting.batch)

    def before() -> list[int]:
        tickets = [
            engine.submit(text, sampling, adapter=name)
            for text, name in zip(texts, names, strict=True)
        ]
        if mode == DECODE:
            _steps(engine, 1, tickets)
        return tickets

    def run(tickets: list[int]) -> Results:
        done = _steps(engine, max(new - 1, 1), tickets)
        return _answers(torch.tensor([done[ticket] for ticket in tickets[:checked]]), logits)

    return Work(before, run)


def their_work(given: Problem, provider: Provider, mode: str) -> Work:
    """The same of transformers' model."""
    steps, checked = given.setting.new - 1, sequences_of(provider.kind, given.setting.batch)
    model = their_model(given.models, provider.kind)
    *_, logits = model.begin(given.tokens[:checked])

    def before() -> Any:
        return model.begin(given.tokens) if mode == DECODE else None

    def run(state: Any) -> Results:
        cache, tokens, _ = state or model.begin(given.tokens)
        if mode == DECODE:
            tokens = model.proceed(cache, tokens, steps)
        return _answers(tokens[:checked], logits)

    return Work(before, run)


def their_model(models: Models, kind: str) -> "TheirModel":
    """transformers' model of a kind; PEFT's has one adapter at a time."""
    theirs = models.theirs
    assert theirs is not None
    return theirs.adapted if ADAPTERS[kind] else theirs.plain


def facts_of(given: Problem, provider: Provider, mode: str) -> Row:
    """What a row tells besides times: of a pass its steps, its tokens and, decoding, its bytes.

    The bytes are those that must be read: weights, keys and values below the lengths, prompts in
    use once. Others may read more.
    """
    setting, config = given.setting, given.models.base.config
    if mode == PREFILL:
        return {"steps": 1, "tokens": setting.batch * setting.prompt}
    steps, element = setting.new - 1, DTYPES[setting.dtype].itemsize
    token = 2 * config.kv_heads * config.head_dim * element
    lengths = sum(setting.prompt + step for step in range(1, setting.new))
    used = {name for name in adapters_of(provider.kind, setting.batch) if name is not None}
    rows = SETTINGS.prompt_length * len(SETTINGS.layers_of(config.n_layers))
    weights = read_bytes(given.models.model(provider.weights))
    cached = setting.batch * lengths * token * config.n_layers
    return {
        "steps": steps,
        "tokens": setting.batch * steps,
        "bytes": steps * (weights + len(used) * rows * token) + cached,
    }
