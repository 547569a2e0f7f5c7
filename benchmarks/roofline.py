"""What can attention with a prompt cost at least? `python -m benchmarks.roofline`, without a GPU.

Every operation has its products (FLOPs) and the bytes it must move; a GPU's peak rates turn them
into milliseconds, of which the larger is a floor. Letters: B batch, T query tokens, S key tokens,
H query heads, G key heads, D head width, P prompt rows.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapter_kernels.zero_init_attention.configs import prompt_tile
from llama_adapter import utilisation
from llama_adapter.options import Parser
from llama_adapter.utilisation import Gpu

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("forward", "backward", "both")
# products of T x S x D: forward QK, PV; ideal backward QK, dO V, dQ, dK, dV; in two passes, one
# for dQ and one for dK and dV, the first two happen twice
FORWARD, BACKWARD, TWO_PASS = 2, 5, 7
# of the prompt's part: QK, dO V, dK, dV
PROMPT_ONLY = 4
# keys of the narrowest tile that the libraries cut: a second call pads a prompt to it
LIBRARY_TILE = 64
LSE_BYTES = 4


GPUS = {
    **utilisation.GPUS,
    "H200-measured": Gpu(
        790, 67, 4.3, r"(?!)", "large matrix product and copy, as measured on one H200"
    ),
}


@dataclass(frozen=True)
class Shape:
    """One attention with a prompt that the batch shares; see the module for the letters."""

    batch: int
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    prompt: int
    causal: bool
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what is no shape.

        Raises:
            ValueError: a number is too small, H is no multiple of G, or the dtype is unknown.
        """
        for name in ("batch", "tokens", "keys", "heads", "kv_heads", "head_dim", "prompt"):
            least = 0 if name == "prompt" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads = {self.heads}, got kv_heads = {self.kv_heads}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def describe(self) -> str:
        """`S=2048 D=128 H=32 B=8 causal bfloat16`, and what is unusual."""
        parts = [f"S={self.keys} D={self.head_dim} H={self.heads} B={self.batch}"]
        parts += [f"G={self.kv_heads}"] if self.kv_heads != self.heads else []
        parts += [f"T={self.tokens}"] if self.tokens != self.keys else []
        return " ".join([*parts, "causal" if self.causal else "full", self.dtype])

    @property
    def element(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].itemsize

    @property
    def visible_pairs(self) -> float:
        """Pairs of a query and a key it sees, of one head.

        Half of them all where a causal diagonal crosses a square, as is the convention for FLOPs;
        elsewhere the exact count.
        """
        if not self.causal:
            return self.tokens * self.keys
        if self.tokens == self.keys:
            return self.keys**2 / 2
        blind = max(self.tokens - self.keys, 0)
        first = self.keys - self.tokens + blind + 1
        return (self.tokens - blind) * (first + self.keys) / 2

    @property
    def padded_prompt(self) -> int:
        """P as our kernels compute it, in whole tiles."""
        return _padded(self.prompt, prompt_tile(self.prompt, self.head_dim, DTYPES[self.dtype]))

    def token_flops(self, products: int) -> float:
        """FLOPs of that many products over all visible pairs."""
        return 2.0 * products * self.batch * self.heads * self.head_dim * self.visible_pairs

    def prompt_flops(self, products: int, rows: int) -> float:
        """FLOPs of that many products of every query with so many prompt rows."""
        return 2.0 * products * self.batch * self.heads * self.head_dim * self.tokens * rows

    @property
    def query_bytes(self) -> float:
        """Bytes of q, and of every tensor of its shape."""
        return float(self.batch * self.tokens * self.heads * self.head_dim * self.element)

    @property
    def key_bytes(self) -> float:
        """Bytes of k, and of v."""
        return float(self.batch * self.keys * self.kv_heads * self.head_dim * self.element)

    @property
    def prompt_bytes(self) -> float:
        """Bytes of prompt_k and prompt_v together."""
        return float(2 * self.prompt * self.kv_heads * self.head_dim * self.element)

    @property
    def lse_bytes(self) -> float:
        """Bytes of lse, and of delta."""
        return float(self.batch * self.heads * self.tokens * LSE_BYTES)


def _padded(rows: int, tile: int) -> int:
    return -(-rows // tile) * tile


def useful_flops(shape: Shape, mode: str) -> float:
    """What a mode is credited with: 2 products forward, 5 backward, those with tokens alone.

    The same for every provider, with a prompt or without, however often it computes a product.
    """
    products = {"forward": FORWARD, "backward": BACKWARD, "both": FORWARD + BACKWARD}
    return shape.token_flops(products[mode])


class Floor(NamedTuple):
    """The least that an operation computes and moves."""

    name: str
    flops: float
    bytes: float

    def compute_ms(self, gpu: Gpu, dtype: str) -> float:
        """Milliseconds at the peak rate of products."""
        return self.flops / gpu.peak(dtype) / 1e9

    def memory_ms(self, gpu: Gpu) -> float:
        """Milliseconds at the peak rate of memory."""
        return self.bytes / gpu.tbytes / 1e9

    def ms(self, gpu: Gpu, dtype: str) -> float:
        """The floor itself, when both rates are reached at the same time."""
        return max(self.compute_ms(gpu, dtype), self.memory_ms(gpu))


def floors(shape: Shape) -> list[Floor]:
    """The floors of every way to compute attention with a prompt.

    Args:
        shape: of the call.

    Returns:
        Ours fused, the prompt's part of our hybrid beside a library's call (backward with dq added
        in place, or apart and then added), and two library calls with eager glue between them.
    """
    q, k, prompt, lse = shape.query_bytes, shape.key_bytes, shape.prompt_bytes, shape.lse_bytes
    ours, library = shape.padded_prompt, _padded(shape.prompt, LIBRARY_TILE)

    def flops(products: int, rows: int) -> float:
        return shape.token_flops(products) + shape.prompt_flops(products, rows)

    def prompt_flops(products: int) -> float:
        return shape.prompt_flops(products, ours)

    # gate * prompt part, then the sum; dO scaled by the gate, dgate reduced, the two dq added
    forward_glue, backward_glue = 5 * q, 7 * q
    # read q k v out dO, write dq dk dv; in two passes all but out are read twice
    one_pass = 4 * q + 4 * k + lse + 2 * prompt
    two_pass = 6 * q + 6 * k + 4 * lse + 3 * prompt
    return [
        Floor("fused forward", flops(FORWARD, ours), 2 * q + 2 * k + prompt + lse),
        Floor("fused backward, ideal", flops(BACKWARD, ours), one_pass),
        Floor("fused backward, two passes", flops(TWO_PASS, ours), two_pass),
        Floor("prompt-only backward", prompt_flops(PROMPT_ONLY), 2 * q + 2 * prompt),
        Floor("hybrid: prompt added, forward", prompt_flops(FORWARD), 3 * q + prompt),
        Floor("hybrid: prompt backward, dq in place", prompt_flops(BACKWARD), 4 * q + 2 * prompt),
        Floor("hybrid: prompt backward, dq apart", prompt_flops(BACKWARD), 6 * q + 2 * prompt),
        Floor(
            "two library calls and glue, forward",
            flops(FORWARD, library),
            4 * q + 2 * k + prompt + 2 * lse + forward_glue,
        ),
        Floor(
            "two library calls and glue, backward",
            flops(BACKWARD, library),
            8 * q + 4 * k + 2 * prompt + 2 * lse + backward_glue,
        ),
    ]


def table(shape: Shape, gpu: Gpu) -> str:
    """The floors as a Markdown table, times in milliseconds."""
    width = max(len(floor.name) for floor in floors(shape))
    lines = [
        f"| {'operation':{width}} |    GFLOP |       MB | compute ms | memory ms | floor ms |",
        f"| {'-' * width} | -------- | -------- | ---------- | --------- | -------- |",
    ]
    for floor in floors(shape):
        compute, memory = floor.compute_ms(gpu, shape.dtype), floor.memory_ms(gpu)
        lines.append(
            f"| {floor.name:{width}} | {floor.flops / 1e9:8.2f} | {floor.bytes / 1e6:8.1f} | "
            f"{compute:10.4f} | {memory:9.4f} | {floor.ms(gpu, shape.dtype):8.4f} |"
        )
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpu", choices=list(GPUS), default="H200", help="whose peak rates")
    parser.add_argument("--batch", type=int, default=4, help="B")
    parser.add_argument("--tokens", type=int, default=2048, help="T, query tokens")
    parser.add_argument("--keys", type=int, help="S, key tokens (default: as many as tokens)")
    parser.add_argument("--heads", type=int, default=32, help="H, query heads")
    parser.add_argument("--kv-heads", type=int, help="G, key heads (default: as many as heads)")
    parser.add_argument("--head-dim", type=int, default=128, help="D, width of a head")
    parser.add_argument("--prompt", type=int, default=10, help="P, prompt rows")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of all tensors")
    parser.add_argument(
        "--causal", action=argparse.BooleanOptionalAction, default=True, help="a causal diagonal"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print the floors of one shape on one GPU.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a shape that does not exist.
    """
    options = _parser().parse(arguments)
    try:
        shape = Shape(
            options.batch, options.tokens,
            options.tokens if options.keys is None else options.keys, options.heads,
            options.heads if options.kv_heads is None else options.kv_heads, options.head_dim,
            options.prompt, options.causal, options.dtype,
        )  # fmt: skip
    except ValueError as error:
        print(f"roofline: error: {error}", file=sys.stderr)
        return 2
    gpu = GPUS[options.gpu]
    print(
        f"{options.gpu}: {gpu.peak(shape.dtype):g} TFLOP/s, {gpu.tbytes:g} TB/s ({gpu.source})\n"
        f"{shape.describe()} P={shape.prompt}, in tiles {shape.padded_prompt}\n"
    )
    print(table(shape, gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
