"""A step of the decoder is the model's next row, in any bucket; graphs replay what eager gives."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_adapter import decoder
from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.adapter_bank import AdapterBank
from llama_adapter.cache import PAGE_SIZE, PagePool, Span, decode_span, packed_span
from llama_adapter.config import LlamaConfig
from llama_adapter.decoder import EAGER_STEPS, Decoder, Live, bucket_sizes
from llama_adapter.model import Llama, Step
from llama_adapter.rotary_angles import rotary_angles

# the first opens a page, the last fills one
LENGTHS = (65, 5, 64)


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (30, [1, 2, 4, 8, 16, 24, 30])],
)
def test_buckets(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


def prefilled(model: Llama, pool: PagePool, prompts: Prompts | None) -> tuple[list[Live], list]:
    """Three sequences whose pages lie in disorder, cached but for their newest token."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS]
    tables = [[4, 1], [3], [0, 2]]
    counts = [n - 1 for n in LENGTHS]
    span = packed_span([0, 0, 0], counts, tables, pool.device)
    packed = torch.tensor([[t for own in tokens for t in own[:-1]]], device=pool.device)
    if prompts is not None:
        index = torch.tensor([0, -1, 1], dtype=torch.int32, device=pool.device)
        prompts = Prompts(prompts.layers, index, prompts.prompt_lengths)
    with torch.inference_mode():
        angles = rotary_angles(model.config, span.positions)
        model.run(packed, Step(*angles, prompts, pool, span))
    live = []
    for own, pages, adapter in zip(tokens, tables, (0, -1, 1), strict=True):
        table = torch.full((3,), 10**6, dtype=torch.int32)
        table[: len(pages)] = torch.tensor(pages)
        live.append(Live(own[-1], len(own), adapter, table))
    return live, tokens


def make_bank(model: Llama, adapter: Adapter) -> AdapterBank:
    bank = AdapterBank(model, capacity=3, prompt_length=5)
    bank.load("a", adapter)
    with torch.no_grad():
        adapter.gates.neg_()
    bank.load("b", adapter)
    return bank


def check_a_step_is_the_next_row(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    bank = make_bank(tiny_model, tiny_adapter)
    pool = PagePool(tiny_config, 6)
    one = Decoder(tiny_model, pool, bank.prompts, largest=8, longest=3, graphs=False)
    live, tokens = prefilled(tiny_model, pool, bank.prompts)
    # three sequences in a bucket of four
    got = one.step(live)
    assert got.shape == (3, tiny_config.vocab_size)
    with torch.no_grad():
        flipped = tiny_model.project(tiny_adapter)
        tiny_adapter.gates.neg_()
        straight = tiny_model.project(tiny_adapter)
        for row, own, prompts in zip(got, tokens, (straight, None, flipped), strict=True):
            expected = tiny_model(torch.tensor([own]), prompts)[0, -1]
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    # the page that nobody holds is as it was
    assert pool.k[:, 5].count_nonzero() == 0


@pytest.mark.kernel
def test_a_step_is_the_next_row(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    check_a_step_is_the_next_row(tiny_model, tiny_adapter, tiny_config)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_page_off_by_one_is_noticed(
    off: int,
    tiny_model: Llama,
    tiny_adapter: Adapter,
    tiny_config: LlamaConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted error: a token that opens a page goes to the page beside it."""

    def planted(lengths: Tensor, table: Tensor) -> Span:
        span = decode_span(lengths, table)
        opens = (span.positions.view(1, -1) % PAGE_SIZE == 0) & (span.positions.view(1, -1) > 0)
        return replace(span, slots=torch.where(opens, span.slots + off * PAGE_SIZE, span.slots))

    monkeypatch.setattr(decoder, "decode_span", planted)
    with pytest.raises(AssertionError, match="not close"):
        check_a_step_is_the_next_row(tiny_model, tiny_adapter, tiny_config)


def test_warmup_writes_nothing(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    pool = PagePool(tiny_config, 2)
    one = Decoder(tiny_model, pool, None, largest=9, longest=2, graphs=False)
    one.warmup()
    assert pool.k.count_nonzero() == pool.v.count_nonzero() == 0


def test_graphs_need_a_gpu(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    with pytest.raises(ValueError, match="graphs must be False on cpu, got True"):
        Decoder(tiny_model, PagePool(tiny_config, 2), None, largest=9, longest=2, graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_is_eager(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig, dtype: torch.dtype
) -> None:
    """Bitwise, before and after an adapter is replaced in place."""
    model = tiny_model.to("cuda", dtype)
    bank = make_bank(model, tiny_adapter.to("cuda"))
    results = []
    for graphs in (False, True):
        pool = PagePool(tiny_config, 6, dtype=dtype, device="cuda")
        one = Decoder(model, pool, bank.prompts, largest=4, longest=3, graphs=graphs)
        live, _ = prefilled(model, pool, bank.prompts)
        steps = []
        for n in range(EAGER_STEPS + 3):
            steps.append(one.step(live).clone())
            token = int(steps[-1][1].argmax())
            live = [replace(last, token=token) for last in live]
            if n == EAGER_STEPS + 1:
                bank.load("c", tiny_adapter)
                bank.unload("c")
        results.append(steps)
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def test_a_base_made_for_much_costs_what_its_sequences_can_hold(tiny_config: LlamaConfig) -> None:
    model = Llama(replace(tiny_config, max_seq_len=10**9))
    pool = PagePool(tiny_config, 4, dtype=torch.float32, device="cpu")
    decoder = Decoder(model, pool, None, largest=2, longest=3, graphs=False)
    assert [len(table) for table in decoder._angles] == [3 * PAGE_SIZE] * 2
