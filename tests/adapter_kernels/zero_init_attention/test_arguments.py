"""Does every wrong argument get a message that names it, what was expected and what was got?"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)
from tests.adapter_kernels.zero_init_attention.cases import int32

B, T, S, H, G, D, P, A = 2, 3, 5, 4, 2, 8, 3, 6


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


META = {"device": "meta"}
SHARED = {"prompt_k": x(P, G, D), "prompt_v": x(P, G, D), "gate": x(H)}
SAMPLE = {"prompt_k": x(B, P, G, D), "prompt_v": x(B, P, G, D), "gate": x(H)}
BANK = {
    "prompt_k": x(A, P, G, D),
    "prompt_v": x(A, P, G, D),
    "gate": x(A, H),
    "adapter_index": int32(0, 1),
}
DENSE = {"q": x(B, T, H, D), "k": x(B, S, G, D), "v": x(B, S, G, D)}
PACKED = {
    "q": x(6, H, D),
    "k": x(9, G, D),
    "v": x(9, G, D),
    "cu_seqlens_q": int32(0, 2, 6),
    "cu_seqlens_k": int32(0, 5, 9),
    "max_seqlen_q": 4,
    "max_seqlen_k": 5,
}
PAGED = PACKED | {
    "k": x(7, 2, G, D),
    "v": x(7, 2, G, D),
    "page_table": int32(0, 1, 2, 3, 4, 5).view(2, 3),
}
DECODE = {
    "q": x(B, T, H, D),
    "k_cache": x(B, S, G, D),
    "v_cache": x(B, S, G, D),
    "cache_lengths": int32(5, 0),
}
PAGES = DECODE | {
    "k_cache": x(7, 2, G, D),
    "v_cache": x(7, 2, G, D),
    "page_table": int32(0, 1, 2, 3, 4, 5).view(2, 3),
}
GATED = {"q": x(B, T, H, D)} | SHARED

SHARED_FORM = "(P, G, D) = (P, 2, 8) or (B, P, G, D) = (2, P, 2, 8)"
OTHER_BATCH = (
    "prompt_k must have shape (B, P, G, D) with B = 2, or come with adapter_index where it is a "
    "bank (A, P, G, D), got (3, 3, 2, 8)"
)
WHOLE_BANK = "(A, P, G, D) = (A, P, 2, 8)"
FORWARD = [
    ({"q": x(T, H, D)}, "q must have shape (B, T, H, D), got (3, 4, 8)"),
    ({"q": [1.0]}, "q must be a tensor, got list"),
    (
        {"q": x(B, T, H, D, dtype=torch.float64)},
        "q must be float16 or bfloat16 or float32, got float64",
    ),
    (
        {"q": x(B, T, H, 12)},
        "q must have a head dimension D from 8 to 256 in steps of 8, got 12",
    ),
    (
        {"q": x(B, T, H, 264)},
        "q must have a head dimension D from 8 to 256 in steps of 8, got 264",
    ),
    (
        {"q": x(B, T, H, 0)},
        "q must have a head dimension D from 8 to 256 in steps of 8, got 0",
    ),
    (
        {"q": x(B, T, D, H).mT},
        "q must be contiguous in its last dimension, got strides (96, 32, 1, 4)",
    ),
    ({"q": x(B, T, 5, D)}, "q must have a multiple of the G = 2 heads of k, got H = 5"),
    (
        {"k": x(B, S, 0, D), "v": x(B, S, 0, D)},
        "q must have a multiple of the G = 0 heads of k, got H = 4",
    ),
    (
        {"k": x(3, S, G, D)},
        "k must have shape (B, S, G, D) = (2, S, G, 8), got (3, 5, 2, 8)",
    ),
    (
        {"k": x(B, S, G, 16)},
        "k must have shape (B, S, G, D) = (2, S, G, 8), got (2, 5, 2, 16)",
    ),
    ({"k": None}, "k must be a tensor, got NoneType"),
    ({"k": x(B, S, G, D, dtype=torch.float16)}, "k must be float32, got float16"),
    ({"k": x(B, S, G, D).to(**META)}, "k must be on the device of q, cpu, got meta"),
    (
        {"k": x(B, S, D, G).mT},
        "k must be contiguous in its last dimension, got strides (80, 16, 1, 2)",
    ),
    (
        {"v": x(B, S + 1, G, D)},
        "v must have shape (B, S, G, D) = (2, 5, 2, 8), got (2, 6, 2, 8)",
    ),
    ({"v": x(B, S, G, D, dtype=torch.bfloat16)}, "v must be float32, got bfloat16"),
    ({"scale": "1"}, "scale must be a finite number, got '1'"),
    ({"scale": x(1)}, "scale must be a finite number, got tensor([0.])"),
    ({"key_starts": x(B)}, "key_starts must be int32, got float32"),
    ({"key_starts": int32(0)}, "key_starts must have shape (B,) = (2,), got (1,)"),
    ({"key_starts": int32(0, 6)}, "key_starts must be from 0 to 5, got 6"),
    ({"key_lengths": int32(5, -1)}, "key_lengths must be from 0 to 5, got -1"),
    (
        {"key_lengths": int32(5, 5).long()},
        "key_lengths must be int32, got int64",
    ),
    (
        {"key_lengths": int32(5, 5).to(**META)},
        "key_lengths must be on the device of q, cpu, got meta",
    ),
    (
        {"prompt_k": x(P, G, D)},
        "prompt_k, prompt_v and gate must be given together or not at all, got prompt_k alone",
    ),
    (
        SHARED | {"prompt_v": None},
        "prompt_k, prompt_v and gate must be given together or not at all, got prompt_k, gate "
        "alone",
    ),
    (
        {"adapter_index": int32(0, 0)},
        "prompt_k, prompt_v and gate must be given together or not at all, got adapter_index alone",
    ),
    (
        SHARED | {"prompt_k": x(P, H, D)},
        f"prompt_k must have shape {SHARED_FORM}, got (3, 4, 8)",
    ),
    (
        SAMPLE | {"prompt_k": x(3, P, G, D)},
        OTHER_BATCH,
    ),
    (
        SHARED | {"prompt_k": x(0, G, D), "prompt_v": x(0, G, D)},
        "prompt_k must hold at least one prompt row, got shape (0, 2, 8)",
    ),
    (
        SHARED | {"prompt_k": x(P, G, D, dtype=torch.float16)},
        "prompt_k must be float32, got float16",
    ),
    (
        SHARED | {"prompt_v": x(P + 1, G, D)},
        "prompt_v must have shape that of prompt_k = (3, 2, 8), got (4, 2, 8)",
    ),
    (
        SHARED | {"prompt_v": x(P, D, G).mT},
        "prompt_v must be contiguous in its last dimension, got strides (16, 1, 2)",
    ),
    (
        SHARED | {"gate": x(1, H, 1, 1)},
        "gate must have shape (H,) = (4,), got (1, 4, 1, 1)",
    ),
    (SHARED | {"gate": x(B, H)}, "gate must have shape (H,) = (4,), got (2, 4)"),
    (
        SAMPLE | {"gate": x(3, H)},
        "gate must have shape (H,) = (4,) or (B, H) = (2, 4), got (3, 4)",
    ),
    (
        SHARED | {"gate": x(H, dtype=torch.bfloat16)},
        "gate must be float32, got bfloat16",
    ),
    (
        SHARED | {"gate": x(H).to(**META)},
        "gate must be on the device of q, cpu, got meta",
    ),
    (SHARED | {"gate": 0.5}, "gate must be a tensor, got float"),
    (
        BANK | {"prompt_k": x(P, G, D)},
        f"prompt_k must have shape {WHOLE_BANK}, got (3, 2, 8)",
    ),
    (BANK | {"gate": x(H)}, "gate must have shape (A, H) = (6, 4), got (4,)"),
    (
        BANK | {"adapter_index": int32(0)},
        "adapter_index must have shape (B,) = (2,), got (1,)",
    ),
    (
        BANK | {"adapter_index": int32(0, 1).long()},
        "adapter_index must be int32, got int64",
    ),
    (
        BANK | {"adapter_index": int32(0, 6)},
        "adapter_index must be from -1 to 5, got 6",
    ),
    (
        BANK | {"adapter_index": int32(-2, 0)},
        "adapter_index must be from -1 to 5, got -2",
    ),
    (
        BANK | {"prompt_lengths": int32(1, 1)},
        "prompt_lengths must have shape (A,) = (6,), got (2,)",
    ),
    (
        BANK | {"prompt_lengths": int32(1, 2, 3, 4, 0, 0)},
        "prompt_lengths must be from 0 to 3, got 4",
    ),
    (
        SHARED | {"prompt_lengths": int32(1, 1)},
        "prompt_lengths must come with adapter_index, since it holds the lengths of a bank's "
        "prompts; got no adapter_index",
    ),
    ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    ({"scale": 1e-46}, "scale must be 0 or of a magnitude from 1e-30 to 1e+30, got 1e-46"),
    ({"scale": -1e38}, "scale must be 0 or of a magnitude from 1e-30 to 1e+30, got -1e+38"),
    ({"scale": 10**400}, "scale must be a finite number, got 1000"),
    ({"causal": "yes"}, "causal must be True or False, got 'yes'"),
    ({"return_lse": 1}, "return_lse must be True or False, got 1"),
    (
        BANK | {"prompt_k": x(0, 3, 2, D), "prompt_v": x(0, 3, 2, D), "gate": x(0, H)},
        "prompt_k must hold at least one adapter, got (0, 3, 2, 8)",
    ),
    (
        {"backend": "cuda"},
        "backend must be None or one of ('triton', 'native', 'hybrid', 'reference')",
    ),
    (
        # libraries take positive scales only
        {"backend": "hybrid", "scale": -1.0},
        "backend 'hybrid' is not available for zero_init_attention on cpu; available: ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FORWARD, ids=[m[:60] for _, m in FORWARD])
def test_dense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_init_attention(**(DENSE | changes))


VARLEN = [
    (PACKED | {"q": x(B, T, H, D)}, "q must have shape (total_q, H, D), got (2, 3, 4, 8)"),
    (
        PACKED | {"k": x(9, G, 16)},
        "k must have shape (total_k, G, D) = (total_k, G, 8), got (9, 2, 16)",
    ),
    (
        PACKED | {"v": x(8, G, D)},
        "v must have shape (total_k, G, D) = (9, 2, 8), got (8, 2, 8)",
    ),
    (
        PACKED | {"cu_seqlens_q": int32()},
        "cu_seqlens_q must have shape (B + 1,), got (0,)",
    ),
    (
        PACKED | {"cu_seqlens_q": int32(0, 2, 6).long()},
        "cu_seqlens_q must be int32, got int64",
    ),
    (
        PACKED | {"cu_seqlens_q": int32(1, 2, 6)},
        "cu_seqlens_q must start at 0 and never decrease, got [1, 2, 6]",
    ),
    (
        PACKED | {"cu_seqlens_q": int32(0, 7, 6)},
        "cu_seqlens_q must start at 0 and never decrease, got [0, 7, 6]",
    ),
    (
        PACKED | {"cu_seqlens_q": int32(0, 2, 5)},
        "cu_seqlens_q must end at the packed total 6, got 5",
    ),
    (
        PACKED | {"cu_seqlens_k": int32(0, 5, 10)},
        "cu_seqlens_k must end at the packed total 9, got 10",
    ),
    (
        PACKED | {"cu_seqlens_k": int32(0, 9)},
        "cu_seqlens_k must have shape (B + 1,) = (3,), got (2,)",
    ),
    (
        PACKED | {"max_seqlen_q": 3},
        "max_seqlen_q must be at least the longest sequence, 4, got 3",
    ),
    (
        PACKED | {"max_seqlen_k": 4},
        "max_seqlen_k must be at least the longest sequence, 5, got 4",
    ),
    (
        PACKED | {"max_seqlen_q": -1},
        "max_seqlen_q must be an integer from 0 to 2147483647, got -1",
    ),
    (
        PACKED | {"max_seqlen_k": 5.0},
        "max_seqlen_k must be an integer from 0 to 2147483647, got 5.0",
    ),
    (
        PACKED | SAMPLE | {"prompt_k": x(3, P, G, D)},
        OTHER_BATCH,
    ),
    (
        PAGED | {"k": x(14, G, D), "v": x(14, G, D)},
        "k must have shape (N, page, G, D) = (N, page, G, 8), got (14, 2, 8)",
    ),
    (
        PAGED | {"k": x(7, 0, G, D), "v": x(7, 0, G, D)},
        "there must be at least one page, of at least one key, got a pool of shape (7, 0, 2, 8)",
    ),
    (
        PAGED | {"page_table": int32(0, 1, 2)},
        "page_table must have shape (B, max_pages) = (2, max_pages), got (3,)",
    ),
    (
        PAGED | {"max_seqlen_k": 7},
        "max_seqlen_k must be at most the 6 keys that page_table can name, got 7",
    ),
    (
        PAGED | {"page_table": int32(0, 1, 7, 3, 4, 5).view(2, 3)},
        "page_table must be from 0 to 6, got 7",
    ),
    (PACKED | {"causal": None}, "causal must be True or False, got None"),
    (PACKED | {"max_seqlen_q": 2**62}, "max_seqlen_q must be an integer from 0 to 2147483647"),
    (
        PAGED | {"k": x(0, 4, 2, D), "v": x(0, 4, 2, D)},
        "there must be at least one page, of at least one key, got a pool of shape (0, 4, 2, 8)",
    ),
    (
        PAGED | {"backend": "triton"},
        "backend 'triton' is not available for zero_init_attention_varlen on cpu",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), VARLEN, ids=[m[:60] for _, m in VARLEN])
def test_varlen(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_init_attention_varlen(**arguments)


FP8_TOGETHER = "k_scale, v_scale and a float8_e4m3fn cache must be given together, got a {}"


def fp8(*shape: int) -> Tensor:
    return x(*shape).to(torch.float8_e4m3fn)


FP8_CACHE = DECODE | {"k_cache": fp8(B, S, G, D), "v_cache": fp8(B, S, G, D)}
SCALES = {"k_scale": x(G).exp(), "v_scale": x(G).exp()}
STEP = [
    (
        DECODE | {"q": x(B, 17, H, D)},
        "q must hold at most 16 new tokens per sequence, got T = 17; zero_init_attention_varlen "
        "takes longer chunks",
    ),
    (
        DECODE | {"k_cache": x(3, S, G, D)},
        "k_cache must have shape (B, S_max, G, D) = (2, S_max, G, 8), got (3, 5, 2, 8)",
    ),
    (
        DECODE | {"v_cache": x(B, S, H, D)},
        "v_cache must have shape (B, S_max, G, D) = (2, 5, 2, 8), got (2, 5, 4, 8)",
    ),
    (
        DECODE | {"v_cache": x(B, S, G, D, dtype=torch.float16)},
        "v_cache must be float32, got float16",
    ),
    (
        DECODE | {"cache_lengths": int32(5, 6)},
        "cache_lengths must be from 0 to 5, got 6",
    ),
    (
        DECODE | {"cache_lengths": int32(5, 2)},
        "cache_lengths must be 0 or count the T = 3 new tokens, got 2",
    ),
    (
        DECODE | {"cache_lengths": int32(5, 5).long()},
        "cache_lengths must be int32, got int64",
    ),
    (
        DECODE | {"cache_lengths": int32(5)},
        "cache_lengths must have shape (B,) = (2,), got (1,)",
    ),
    (PAGES | {"cache_lengths": int32(3, 7)}, "cache_lengths must be from 0 to 6, got 7"),
    (
        PAGES | {"page_table": int32(0, 1, -1, 3, 4, 5).view(2, 3)},
        "page_table must be from 0 to 6, got -1",
    ),
    (
        PAGES | {"page_table": int32(0, 1, 2, 3, 4, 5).view(2, 3).long()},
        "page_table must be int32, got int64",
    ),
    (
        DECODE | SHARED | {"gate": x(G)},
        "gate must have shape (H,) = (4,), got (2,)",
    ),
    (DECODE | {"k_scale": x(G)}, FP8_TOGETHER.format("float32 cache with scales")),
    (FP8_CACHE, FP8_TOGETHER.format("float8_e4m3fn cache without scales")),
    (FP8_CACHE | {"v_scale": x(G)}, "k_scale must be given with a float8_e4m3fn cache, got None"),
    (
        FP8_CACHE | SCALES | {"v_cache": x(B, S, G, D)},
        "v_cache must be float8_e4m3fn, got float32",
    ),
    (FP8_CACHE | SCALES | {"k_scale": x(H)}, "k_scale must have shape (G,) = (2,), got (4,)"),
    (
        FP8_CACHE
        | SCALES
        | {"q": x(B, T, H, 16), "k_cache": fp8(B, S, G, 16), "v_cache": fp8(B, S, G, 16)}
        | {"v_scale": -SCALES["v_scale"]},
        "v_scale must be positive and finite, got -",
    ),
    (FP8_CACHE | SCALES | {"k_scale": x(G).double()}, "k_scale must be float32, got float64"),
    (
        FP8_CACHE | SCALES,
        "q must have a head dimension D in steps of 16 with a float8",
    ),
    (
        DECODE | {"backend": "triton"},
        "backend 'triton' is not available for zero_init_attention_decode on cpu",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), STEP, ids=[m[:60] for _, m in STEP])
def test_decode(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_init_attention_decode(**arguments)


SEGMENT = [
    (GATED | {"q": x(B, H, D)}, "q must have shape (B, T, H, D), got (2, 4, 8)"),
    (
        GATED | {"cu_seqlens_q": int32(0, 6)},
        "q must have shape (total_q, H, D), got (2, 3, 4, 8)",
    ),
    (
        GATED | {"q": x(6, H, D), "cu_seqlens_q": int32(0, 7)},
        "cu_seqlens_q must end at the packed total 6, got 7",
    ),
    (GATED | {"prompt_k": None}, "prompt_k must be a tensor, got NoneType"),
    (GATED | {"gate": None}, "gate must be a tensor, got NoneType"),
    (
        GATED | {"prompt_k": x(P, 3, D), "prompt_v": x(P, 3, D)},
        "q must have a multiple of the G = 3 heads of prompt_k, got H = 4",
    ),
    (
        GATED | {"prompt_k": x(P, G, 16)},
        "prompt_k must have shape (P, G, D) = (P, G, 8) or (B, P, G, D) = (2, P, G, 8), got "
        "(3, 2, 16)",
    ),
    (
        GATED | {"out": x(B, T, G, D)},
        "out must have shape that of q = (2, 3, 4, 8), got (2, 3, 2, 8)",
    ),
    (
        GATED | {"out": x(B, T, H, D, dtype=torch.bfloat16)},
        "out must be float32, got bfloat16",
    ),
    (
        GATED | {"backend": "hybrid"},
        "backend 'hybrid' is not available for gated_prompt_attention on cpu",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), SEGMENT, ids=[m[:60] for _, m in SEGMENT])
def test_prompt_segment(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_prompt_attention(**arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (zero_init_attention, DENSE | BANK),
        (zero_init_attention, DENSE | SAMPLE | {"gate": x(B, H)}),
        (zero_init_attention_varlen, PACKED | SHARED),
        (zero_init_attention_varlen, PAGED),
        (zero_init_attention_decode, DECODE | SHARED),
        (zero_init_attention_decode, PAGES),
        (gated_prompt_attention, GATED),
    ],
)
def test_what_the_errors_vary_is_accepted(function: Any, arguments: dict[str, Any]) -> None:
    """The arguments above are wrong by what was changed in them, and by nothing else."""
    assert function(**arguments).shape == arguments["q"].shape


def test_values_are_checked_on_the_cpu_alone() -> None:
    """On another device no value is read: the same arguments pass there as shapes."""
    wrong = DENSE | BANK | {"adapter_index": int32(0, 6), "key_lengths": int32(9, 9)}
    moved = {name: value.to("meta") for name, value in wrong.items()}
    out = zero_init_attention(**moved)
    assert isinstance(out, Tensor)
    assert out.shape == (B, T, H, D)


def test_contents_are_checked_in_every_call() -> None:
    """A form that passed before is not a value that passed before."""
    bank = {"prompt_k": x(3, P, G, D), "prompt_v": x(3, P, G, D), "gate": x(3, H)}
    good = DECODE | bank | {"adapter_index": int32(2, -1), "prompt_lengths": int32(3, 0, 1)}
    for change, message in (
        ({"adapter_index": int32(3, 0)}, "adapter_index must be from -1 to 2, got 3"),
        ({"prompt_lengths": int32(3, 0, 4)}, "prompt_lengths must be from 0 to 3, got 4"),
        ({"cache_lengths": int32(99, 1)}, "cache_lengths must be from 0 to"),
        ({"scale": True}, "scale must be a finite number, got True"),
    ):
        zero_init_attention_decode(**good, scale=1)
        with pytest.raises(ValueError, match=re.escape(message)):
            zero_init_attention_decode(**{"scale": 1} | good | change)
