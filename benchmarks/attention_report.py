"""The attention benchmark's targets, legend, tables and figures; reporting.py judges and draws."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from benchmarks.ablation_report import picture
from benchmarks.harness import TIMED, Row, ratio
from benchmarks.reporting import (
    Cells,
    Target,
    bars,
    heading,
    page,
    standings,
    table,
    timed,
    verdicts_of,
)
from benchmarks.roofline import GPUS, MODES, Shape, useful_flops
from llama_adapter.utilisation import gpu_of

OURS = ("ours", "fused", "hybrid", "reference", "ours_plain", "fused_plain", "ours_block")
WITHOUT_PROMPT = ("ours_plain", "fused_plain", "sdpa", "flash", "cudnn")
LIBRARIES = ("sdpa", "flash", "cudnn")
BLOCKS = ("ours_block", "peft_block")
LEGEND = (
    "ours: zero_init_attention as it chooses; fused, hybrid, reference: its backends; official: "
    "the official code's concatenations; two_*: two library calls and eager glue (two_sdpa: "
    "torch's own choice), or compiled; ours_plain, fused_plain and one library call (sdpa, flash, "
    "cudnn): no prompt at all; *_block: with the projections around it, on both sides. "
    "TFLOP/s credit the tokens' products alone, 2 forward and 5 backward. Ratios are a provider's "
    "time over that of ours (of a block: over ours_block): above 1, ours is faster."
)


def on_gpu(shape: Shape) -> bool:
    """The shape of the GPU's targets: 2,048 tokens, D = 128, causal, H = G, bfloat16."""
    own = (shape.tokens, shape.head_dim, shape.kv_heads, shape.causal, shape.dtype)
    return own == (2048, 128, shape.heads, True, "bfloat16")


def on_processor(shape: Shape) -> bool:
    """The shapes of the processor's targets: 1,024 tokens, D = 64 and 128, causal, H = G."""
    own = (shape.tokens, shape.heads, shape.kv_heads, shape.causal, shape.dtype)
    return own == (1024, 8, 8, True, "float32") and shape.head_dim in (64, 128)


_TWO = ("two_cudnn", "two_flash")
TARGETS = (
    *(
        Target(
            f"The prompt costs the fused kernel at most 5 % over itself without one, {mode}",
            "fused", ("fused_plain",), mode, 1.05, False, on_gpu,
        )
        for mode in ("forward", "backward")
    ),
    Target(
        "As dispatched, at least 1.15 times as fast as two cuDNN calls, forward",
        "ours", ("two_cudnn",), "forward", 1.15, True, on_gpu,
    ),
    Target(
        "As dispatched, at least 1.5 times as fast as two flash calls, forward",
        "ours", ("two_flash",), "forward", 1.5, True, on_gpu,
    ),
    Target(
        "As dispatched, at least 1.15 times as fast as the faster two calls, backward",
        "ours", _TWO, "backward", 1.15, True, on_gpu,
    ),
    Target(
        "As dispatched, at most 1.20 times the time of the best library call without prompt, "
        "forward",
        "ours", LIBRARIES, "forward", 1.20, False, on_gpu,
    ),
    Target(
        "As dispatched, at most 1.15 times the time of the best library call without prompt, "
        "backward",
        "ours", LIBRARIES, "backward", 1.15, False, on_gpu,
    ),
    Target(
        "As dispatched, at least 6 times as fast as the official formula, forward and backward",
        "ours", ("official",), "both", 6.0, True, on_gpu, gpu="H200",
    ),
    *(
        Target(
            f"On a processor with one thread, the hybrid is at least twice as fast as the official "
            f"formula, {words}",
            "hybrid", ("official",), mode, 2.0, True, on_processor, place="a processor",
        )
        for mode, words in (("forward", "forward"), ("both", "forward and backward"))
    ),
)  # fmt: skip


def _rival(name: str) -> str:
    """Which of ours a provider is compared with."""
    return "ours_block" if name in BLOCKS else "ours"


def _line(shape: Shape, mode: str, name: str, rows: Mapping[str, Row], device: str) -> list[str]:
    row, gpu = rows[name], gpu_of(device)
    if row["status"] != TIMED:
        return [mode, name, f"{row['status']}: {row['reason'][:80]}", "", "", "", ""]
    middle, low, high = row["ms"]
    rate = useful_flops(shape, mode) / middle / 1e9
    peak = f"{rate / GPUS[gpu].peak(shape.dtype):.0%}" if gpu else "-"
    compared = timed(rows, [_rival(name)])
    memory = row.get("peak_bytes")
    return [
        mode,
        name,
        f"{middle:.3f} ({low:.3f}, {high:.3f})",
        f"{rate:.3g}",
        peak,
        f"{ratio(row, rows[compared[0]]):.2f}" if compared else "-",
        "-" if memory is None else f"{memory / 1e6:,.0f}",
    ]


def tables(cells: Cells, device: str) -> list[str]:
    """One table per shape."""
    header = ["mode", "provider", "ms (20 %, 80 %)", "TFLOP/s", "of peak", "to ours", "peak MB"]
    lines: list[str] = []
    for shape in dict.fromkeys(shape for shape, _ in cells):
        body = [
            _line(shape, mode, name, rows, device)
            for mode in MODES
            for rows in [cells.get((shape, mode), {})]
            for name in rows
        ]
        lines += [f"### {shape.describe()}", "", *table(header, body), ""]
    return lines


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, list[Row]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `harness.describe`, with the protocol.
        trial: whether the shapes are too small to mean anything.
    """
    device = environment["device"]
    lines, verdicts = verdicts_of(TARGETS, cells, device)
    others = {name: _rival(name) for rows in cells.values() for name in rows if name not in OURS}
    head = heading("Attention with a prompt", environment, LEGEND, trial)
    measured = ["## Times", "", *tables(cells, device)]
    return page(head, lines, standings(cells, MODES, others, WITHOUT_PROMPT), measured), verdicts


def _colour(name: str) -> str:
    if name in WITHOUT_PROMPT:
        return "plain"
    return "ours" if name in OURS else "others"


def _sweep(cells: Cells, lengths: Sequence[Shape]) -> Figure:
    """TFLOP/s over the length, of what has a prompt or is one library call."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    names = dict.fromkeys(name for rows in cells.values() for name in rows if name not in BLOCKS)
    panels = figure.subplots(1, len(MODES), squeeze=False)[0]
    for axes, mode in zip(panels, MODES, strict=True):
        for index, name in enumerate(names):
            points = {
                shape.keys: useful_flops(shape, mode) / cells[shape, mode][name]["ms"][0] / 1e9
                for shape in lengths
                if timed(cells.get((shape, mode), {}), [name])
            }
            style = ":" if name in WITHOUT_PROMPT else "-" if name in OURS else "--"
            axes.plot([*points], [*points.values()], style, marker="o", label=name, c=f"C{index}")
        axes.set_xscale("log", base=2)
        axes.set(title=mode, xlabel="S, 16,384 tokens in all, D = 128, causal", ylabel="TFLOP/s")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: times at the targets' shapes, and rates over the length where there are some."""
    measured = list(dict.fromkeys(shape for shape, _ in cells))
    chosen = [shape for shape in measured if on_gpu(shape) or on_processor(shape)]
    lengths = [shape for shape in measured if on_gpu(replace(shape, tokens=2048, keys=2048))]
    drawn = {"times": bars(cells, chosen or measured[:1], MODES, _colour, len(MODES))}
    if len(lengths) > 1:
        drawn["lengths"] = _sweep(cells, sorted(lengths, key=lambda shape: shape.keys))
    return {name: picture(figure) for name, figure in drawn.items()}
