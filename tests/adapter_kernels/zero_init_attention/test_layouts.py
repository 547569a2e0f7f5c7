"""Do the layouts lose, mix or read what they should not? Round trips, order of heads, poison."""

import pytest
import torch
from torch import Tensor

from adapter_kernels.zero_init_attention import layouts
from tests.adapter_kernels.tolerances import check_bitwise
from tests.adapter_kernels.zero_init_attention.cases import int32

NAN = float("nan")


def test_rows_keep_the_heads_of_a_group_together() -> None:
    x = torch.randn(2, 5, 6, 3)
    rows = layouts.to_rows(x, 2)
    assert rows.shape == (2, 2, 15, 3)
    for head in range(6):
        group, member = divmod(head, 3)
        check_bitwise(f"head {head}", rows[:, group, member * 5 : member * 5 + 5], x[:, :, head])
    check_bitwise("back", layouts.from_rows(rows, x), x)
    assert layouts.from_rows(rows, x).is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rows_are_float32_or_wider(dtype: torch.dtype, computed: torch.dtype) -> None:
    x = torch.randn(1, 2, 4, 3).to(dtype)
    check_bitwise("rows", layouts.to_rows(x, 4), x.transpose(1, 2).to(computed).contiguous())


@pytest.mark.parametrize("lengths", [(4, 0, 5), (0, 0), (7,), (), (0, 3, 0)])
def test_unpack_and_pack_are_inverse(lengths: tuple[int, ...]) -> None:
    cu = int32(0, *torch.tensor(lengths).cumsum(0).tolist())
    x = torch.randn(sum(lengths), 3, 2)
    padded = layouts.unpack(x, cu, 7)
    assert padded.shape == (len(lengths), 7, 3, 2)
    for b, (length, own) in enumerate(zip(lengths, x.split(list(lengths)), strict=True)):
        check_bitwise(f"sequence {b}", padded[b, :length], own)
        assert not padded[b, length:].any(), "padding must be zero"
    check_bitwise("back", layouts.pack(padded, cu, sum(lengths)), x)


def seen_by(
    t: int, s: int, offset: Tensor | None, starts: Tensor | None, ends: Tensor | None
) -> Tensor:
    """(B,T,S) of what is seen, blind rows included, for two query heads per key head."""
    q, k = torch.zeros(3, t, 4, 1), torch.zeros(3, s, 2, 1)
    bias, blind = layouts.visibility(q, k, offset, starts, ends)
    assert bias is not None
    assert blind is not None
    both = (bias == 0) & ~blind
    first, second = both[:, 0].unflatten(1, (2, t)).unbind(1)
    check_bitwise("query heads of a group", first, second)
    return first.expand(3, -1, -1)


@pytest.mark.parametrize(("t", "s"), [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)])
def test_diagonal_is_bottom_right_and_padding_does_not_move_it(t: int, s: int) -> None:
    starts, ends = [0, 1, 2], [s, s - 1, 1]
    got = seen_by(t, s, torch.tensor([s - t]), int32(*starts), int32(*ends))
    for b in range(3):
        for i in range(t):
            for j in range(s):
                expected = j <= i + s - t and starts[b] <= j < ends[b]
                assert bool(got[b, i, j]) == expected, (b, i, j)


def test_every_sequence_has_its_own_diagonal() -> None:
    got = seen_by(2, 4, torch.tensor([-2, 0, 2]), None, None)
    assert got.int().tolist() == [
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_nothing_hidden_needs_no_bias() -> None:
    q, k = torch.zeros(1, 2, 2, 1), torch.zeros(1, 3, 1, 1)
    assert layouts.visibility(q, k) == (None, None)


@pytest.mark.parametrize("paged", [False, True])
def test_cache_is_read_below_the_length_only(paged: bool) -> None:
    """Whatever lies beyond, NaN and page numbers of nonsense included, has no influence."""
    keys, lengths = torch.randn(3, 6, 2, 4), [5, 2, 0]
    pool, table = keys.clone(), None
    if paged:
        # pages of 2 keys, in an order of their own, and a page that nobody owns
        table = int32(5, 0, 3, 7, 2, 6, 4, 1, 8).view(3, 3)
        pool = torch.full((10, 2, 2, 4), NAN)
        pool[table.flatten().long()] = keys.view(9, 2, 2, 4)
        table[1, 1:] = torch.tensor([10**6, -5])
        table[2, :] = 9
    for b, length in enumerate(lengths):
        if not paged:
            pool[b, length:] = NAN
    k, v = layouts.cached_keys(pool, -pool, table, int32(*lengths), 6)
    for b, length in enumerate(lengths):
        check_bitwise(f"keys of {b}", k[b, :length], keys[b, :length])
        check_bitwise(f"values of {b}", v[b, :length], -keys[b, :length])
        if length:
            check_bitwise(f"rest of {b}", k[b, length:], keys[b, [length - 1] * (6 - length)])


def test_pages_are_cut_to_the_keys_that_are_asked_for() -> None:
    pool = torch.randn(4, 8, 1, 2)
    k, _ = layouts.cached_keys(pool, pool, int32(3, 1).view(1, 2), int32(11), 11)
    check_bitwise("keys", k[0], torch.cat([pool[3], pool[1, :3]]))


def test_bank_rows_of_no_adapter() -> None:
    row, present = layouts.bank_rows(int32(2, -1, 0, 3, -7), 3)
    assert row.tolist() == [2, 0, 0, 0, 0]
    assert present.tolist() == [True, False, True, False, False]


def test_gradients_of_a_bank_add_up_per_adapter_and_round_once() -> None:
    # 1 + 256 * 2 ** -9 is 1.5, which bfloat16 reaches only if the small terms are added in float32
    x = torch.full((257, 2), 2.0**-9)
    x[0] = 1.0
    index = torch.zeros(257, dtype=torch.int32)
    like = torch.zeros(3, 2, dtype=torch.bfloat16)
    got = layouts.sum_to(x, like, index)
    check_bitwise("summed", got, torch.tensor([[1.5, 1.5], [0, 0], [0, 0]], dtype=torch.bfloat16))
    x[1:] = NAN
    index[1:] = -1
    got = layouts.sum_to(x, like, index)
    check_bitwise("no adapter", got, torch.tensor([[1, 1], [0, 0], [0, 0]], dtype=torch.bfloat16))
    shared = layouts.sum_to(torch.full((256, 2), 2.0**-9), like[0], None)
    check_bitwise("shared", shared, torch.full((2,), 0.5, dtype=torch.bfloat16))


def test_poison_in_unused_prompt_rows_is_hidden() -> None:
    k = torch.randn(3, 4, 2, 8)
    k[0], k[1, 1:], k[2] = NAN, NAN, NAN
    gate = torch.tensor([[NAN] * 4, [2.0] * 4, [NAN] * 4])
    prompts = layouts.Prompts(k, k, gate, int32(1, -1), int32(4, 1, 4))
    segment = layouts.prompt_segment(torch.randn(2, 3, 4, 8), prompts)
    assert segment is not None
    check_bitwise("used row", segment.k[0, :, :1], k[1, :1].transpose(0, 1))
    assert not segment.k[0, :, 1:].any()
    assert not segment.k[1].any()
    assert isinstance(segment.gate, Tensor)
    assert segment.gate.flatten(1).unique(dim=1).tolist() == [[2.0], [0.0]]
