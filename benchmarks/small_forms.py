"""Which forms of the small operations' kernels are compiled for chips that are not here?

Those of rms_norm, apply_rotary, write_cache, swiglu and linear_cross_entropy, and of their backward
passes, that make triton compile them anew, at the widths of LLaMA's models and at odd ones.
"""

from dataclasses import astuple, dataclass
from itertools import product

import torch

from adapter_kernels.arch import ARCHS
from adapter_kernels.launch import Launch
from adapter_kernels.linear_cross_entropy_kernel import cross_entropy_launch
from adapter_kernels.rms_norm_kernel import PROGRAMS, rms_norm_backward_launch, rms_norm_launch
from adapter_kernels.rotary_kernel import rotary_launch
from adapter_kernels.swiglu_kernel import swiglu_backward_launch, swiglu_launch
from benchmarks.specialisations import on_meta

# of a prompt, of a cache and its pages, and the heads of LLaMA 3 with 8 billion parameters
BATCH, TOKENS, PAGE, HEADS, GROUPS = 8, 2048, 64, 32, 8
DTYPES = (torch.bfloat16, torch.float32)
# by operation: its forms, and its widths, an odd one first: C, F, V, or of a head D
FORMS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "rms_norm": (("alone", "residual"), (67, 4096, 5120, 8192)),
    "rms_norm_backward": (
        # what reaches x + residual from its other uses is added; the weight's gradient is summed
        ("x", "x dh", "weight", "x dh weight"),
        (67, 4096, 5120, 8192),
    ),
    "apply_rotary": (("interleaved", "halves"), (24, 64, 128)),
    # a gradient alone takes the place of k
    "apply_rotary_backward": (
        tuple(
            f"{pairs}, {given}" for pairs in ("interleaved", "halves") for given in ("one", "two")
        ),
        (24, 64, 128),
    ),
    # where keys and values go, then what is turned on the way
    "write_cache": (
        tuple(f"{at}, {turned}" for at in ("contiguous", "paged") for turned in ("-", "k", "q k")),
        (24, 64, 128),
    ),
    "swiglu": (("plain",), (131, 11008, 14336)),
    "swiglu_backward": (("both", "gate", "up"), (131, 11008, 14336)),
    # of every row, or of those that have a label
    "linear_cross_entropy": (
        tuple(f"{of}, {made}" for of in ("every", "some") for made in ("loss", "dx", "dweight")),
        (10007, 32000, 128256),
    ),
}


@dataclass(frozen=True)
class SmallForm:
    """One form of a small kernel.

    Attributes:
        capability: of the chip, major * 10 + minor.
        operation: of FORMS.
        form: of the operation.
        width: C, D, F or V.
        dtype: of everything but angles and statistics, which are float32.
    """

    capability: int
    operation: str
    form: str
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in astuple(self))

    @property
    def odd(self) -> bool:
        """Whether the width is the odd one."""
        return self.width == FORMS[self.operation][1][0]

    @property
    def widest(self) -> bool:
        """Whether the operation is compiled at no larger width."""
        return self.width == FORMS[self.operation][1][-1]


def small_table() -> list[SmallForm]:
    """Every form of every kernel on every architecture."""
    return [
        SmallForm(capability, operation, form, width, dtype)
        for capability, (operation, (forms, widths)) in product(ARCHS, FORMS.items())
        for form, width, dtype in product(forms, widths, DTYPES)
    ]


def small_launch(form: SmallForm) -> Launch:
    """The launch of a form: of a prompt, and of write_cache that of a decoding step."""
    width, dtype = form.width, form.dtype
    if form.operation == "rms_norm":
        x, rstd = on_meta((TOKENS, width), dtype), on_meta((TOKENS, 1), torch.float32)
        added = x if form.form == "residual" else None
        return rms_norm_launch(x, x[0], added, x, added, rstd, 1e-5)
    if form.operation == "rms_norm_backward":
        x, rstd = on_meta((TOKENS, width), dtype), on_meta((TOKENS, 1), torch.float32)
        asked = form.form.split()
        parts = on_meta((PROGRAMS, width), torch.float32) if "weight" in asked else None
        dx, dh = (x if name in asked else None for name in ("x", "dh"))
        return rms_norm_backward_launch(x, dh, x, x[0], rstd, dx, parts)
    if form.operation == "swiglu":
        x = on_meta((TOKENS, width), dtype)
        return swiglu_launch(x, x, x)
    if form.operation == "swiglu_backward":
        x = on_meta((TOKENS, width), dtype)
        places = (x if form.form in ("both", name) else None for name in ("gate", "up"))
        return swiglu_backward_launch(x, x, x, *places)
    if form.operation == "linear_cross_entropy":
        of, made = form.form.split(", ")
        labels, numbers = on_meta((BATCH * TOKENS,), torch.int64), on_meta((TOKENS,), torch.float32)
        rows = labels[:TOKENS] if of == "some" else None
        dloss, loss = (numbers, None) if made == "dweight" else (None, numbers)
        logits = on_meta((TOKENS, width), dtype)
        return cross_entropy_launch(logits, labels, rows, dloss, loss, made != "loss")
    # the odd width with the fewest heads of keys, and with heads that fill no tile
    heads, groups = (7, 1) if form.odd else (HEADS, GROUPS)
    tokens = TOKENS if form.operation != "write_cache" else 1
    q, k = (on_meta((BATCH, tokens, n, width), dtype) for n in (heads, groups))
    angles = on_meta((BATCH, tokens, width // 2), torch.float32)
    if form.operation == "apply_rotary":
        interleaved = form.form == "interleaved"
        return rotary_launch(q, k, None, angles, angles, q, k, None, None, None, interleaved)
    if form.operation == "apply_rotary_backward":
        pairs, given = form.form.split(", ")
        own = q if given == "two" else None
        return rotary_launch(
            own, k, None, angles, angles, own, k, None, None, None, pairs == "interleaved", True
        )
    at, turned = form.form.split(", ")
    lead = (BATCH * TOKENS // PAGE, PAGE) if at == "paged" else (BATCH, TOKENS)
    table = on_meta((BATCH, TOKENS // PAGE), torch.int32) if at == "paged" else None
    cache, positions = on_meta((*lead, groups, width), dtype), on_meta((BATCH, 1), torch.int32)
    given, angle = q if "q" in turned else None, None if turned == "-" else angles
    return rotary_launch(given, k, k, angle, angle, given, cache, cache, positions, table, True)
