"""From the rows of the attention benchmark to tables, verdicts and figures.

A ratio is the median over rounds of two providers' times in the same round, so that a clock that
changes between rounds does not count. A target is decided at the shapes it names; every other
shape is told beside it, and every cell that we lose is listed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from matplotlib.figure import Figure

from benchmarks.ablation_report import picture
from benchmarks.harness import TIMED, Row, ratio
from benchmarks.roofline import GPUS, MODES, Shape, gpu_of, useful_flops

MET, MISSED, PENDING, UNDECIDED = "met", "MISSED", "pending", "undecided"
Cells = Mapping[tuple[Shape, str], Mapping[str, Row]]

OURS = ("ours", "fused", "hybrid", "reference", "ours_plain", "fused_plain", "ours_block")
WITHOUT_PROMPT = ("ours_plain", "fused_plain", "sdpa", "flash", "cudnn")
LIBRARIES = ("sdpa", "flash", "cudnn")
BLOCKS = ("ours_block", "peft_block")
COLOURS = {"ours": "#1f6fb4", "plain": "#999999", "others": "#e07b1a"}
TRIAL = "This is the reduced form: it tries the machinery out, its numbers mean nothing."
LEGEND = (
    "ours: zero_init_attention as it chooses; fused, hybrid, reference: its backends; official: "
    "the official code's concatenations; two_*: two library calls and eager glue (two_sdpa: "
    "torch's own choice), or compiled; ours_plain, fused_plain and one library call (sdpa, flash, "
    "cudnn): no prompt at all; *_block: with the projections around it, on both sides. "
    "TFLOP/s credit the tokens' products alone, 2 forward and 5 backward. Ratios are a provider's "
    "time over that of ours (of a block: over ours_block): above 1, ours is faster."
)


@dataclass(frozen=True)
class Target:
    """A goal for a ratio of times.

    Attributes:
        text: the goal in words.
        ours: the provider it is about.
        others: what it is compared with, the fastest of them in a cell.
        mode: one of MODES.
        limit: of the ratio.
        faster: whether the ratio is how many times as fast ours is, at least `limit`; otherwise it
            is how many times as long it takes, at most `limit`.
        where: whether it is decided at a shape.
        gpu: the only GPU on which it is decided.
    """

    text: str
    ours: str
    others: tuple[str, ...]
    mode: str
    limit: float
    faster: bool
    where: Callable[[Shape], bool]
    gpu: str | None = None


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
            "hybrid", ("official",), mode, 2.0, True, on_processor,
        )
        for mode, words in (("forward", "forward"), ("both", "forward and backward"))
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of a target: MET, MISSED, PENDING or UNDECIDED, and the numbers."""

    target: str
    verdict: str
    evidence: str


def cells_of(rows: Iterable[Row]) -> dict[tuple[Shape, str], dict[str, Row]]:
    """Rows by cell and provider, in the order of the file."""
    found: dict[tuple[Shape, str], dict[str, Row]] = {}
    for row in rows:
        key = (Shape(**row["cell"]["shape"]), row["cell"]["mode"])
        found.setdefault(key, {})[row["provider"]] = row
    return found


def _timed(rows: Mapping[str, Row], names: Iterable[str]) -> list[str]:
    return [name for name in names if rows.get(name, {}).get("status") == TIMED]


def _measured(target: Target, rows: Mapping[str, Row]) -> tuple[float, str] | str:
    """The target's ratio in a cell with what ours was compared with, or why there is none."""
    rivals = _timed(rows, target.others)
    if not _timed(rows, [target.ours]) or not rivals:
        absent = [name for name in (target.ours, *target.others) if name not in _timed(rows, rows)]
        return ", ".join(
            f"{name}: {rows[name].get('reason', 'not timed') if name in rows else 'not measured'}"
            for name in absent
        )
    best = min(rivals, key=lambda name: rows[name]["ms"][0])
    ours, other = rows[target.ours], rows[best]
    return (ratio(other, ours) if target.faster else ratio(ours, other)), best


def judge(target: Target, cells: Cells, device: str) -> Verdict:
    """Hold a target against the rows.

    Args:
        target: the goal.
        cells: all rows.
        device: the device's name as torch gives it.
    """
    own = {shape: rows for (shape, mode), rows in cells.items() if mode == target.mode}
    decided = {shape: rows for shape, rows in own.items() if target.where(shape)}
    if target.gpu is not None and gpu_of(device) != target.gpu:
        decided = {}
    found = {shape: _measured(target, rows) for shape, rows in decided.items()}
    lacking = [f"{s.describe()}: {why}" for s, why in found.items() if isinstance(why, str)]
    here = {shape: one for shape, one in found.items() if not isinstance(one, str)}
    evidence = [
        f"{value:.2f} against {best} at {shape.describe()}" for shape, (value, best) in here.items()
    ]
    elsewhere = [
        one[0]
        for one in (_measured(target, rows) for shape, rows in own.items() if shape not in decided)
        if not isinstance(one, str)
    ]
    if len(elsewhere) == 1:
        evidence.append(f"{elsewhere[0]:.2f} at another shape")
    elif elsewhere:
        evidence.append(
            f"{min(elsewhere):.2f} to {max(elsewhere):.2f} at {len(elsewhere)} other shapes"
        )
    if not decided:
        place = target.gpu or ("a GPU" if target.where is on_gpu else "a processor")
        nothing = f"nothing yet at the target's shapes on {place}"
        return Verdict(target.text, PENDING, "; ".join([nothing, *evidence]))
    if lacking:
        return Verdict(target.text, UNDECIDED, "; ".join([*evidence, *lacking]))
    holds = all(
        value >= target.limit if target.faster else value <= target.limit
        for value, _ in here.values()
    )
    return Verdict(target.text, MET if holds else MISSED, "; ".join(evidence))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    ruled = [header, ["-" * width for width in widths], *rows]
    return [
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        for row in ruled
    ]


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
    compared = _timed(rows, [_rival(name)])
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
        lines += [f"### {shape.describe()}", "", *_table(header, body), ""]
    return lines


def standings(cells: Cells) -> list[str]:
    """By other provider and mode, in how many cells ours is faster, and each in which it is not."""
    names = dict.fromkeys(name for rows in cells.values() for name in rows)
    body = []
    for name in (name for name in names if name not in OURS):
        for mode in MODES:
            ratios = {
                shape: ratio(rows[name], rows[_rival(name)])
                for (shape, own), rows in cells.items()
                if own == mode and len(_timed(rows, [name, _rival(name)])) == 2
            }
            if not ratios:
                continue
            lost = [f"{s.describe()} ({r:.2f})" for s, r in ratios.items() if r < 1]
            values = list(ratios.values())
            body.append(
                [
                    name + (" (no prompt)" if name in WITHOUT_PROMPT else ""),
                    mode,
                    f"{len(values) - len(lost)} of {len(values)}",
                    f"{min(values):.2f}, {median(values):.2f}, {max(values):.2f}",
                    "; ".join(lost) or "nowhere",
                ]
            )
    header = ["against", "mode", "ours faster", "lowest, median, highest ratio", "ours slower at"]
    return _table(header, body) if body else ["Nothing is timed."]


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, list[Row]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `harness.describe`, with the protocol.
        trial: whether the shapes are too small to mean anything.
    """
    device = environment["device"]
    verdicts = [judge(target, cells, device) for target in TARGETS]
    packages, protocol = environment["packages"], environment["protocol"]
    also = [f"{name} {environment[name]}" for name in ("driver", "cudnn") if environment.get(name)]
    lines = [
        "# Attention with a prompt",
        "",
        f"{device}, {environment.get('instructions', 'CUDA')}, {environment['threads']} thread(s), "
        + ", ".join([f"torch {packages['torch']}", f"triton {packages['triton']}", *also]),
        f"Medians (20 % and 80 % quantiles) over {protocol['rounds']} rounds in turns; every "
        "provider was right before it was timed.",
        LEGEND,
        *([TRIAL] if trial else []),
        "",
        "## Targets",
        "",
        *(f"- **{one.verdict}**: {one.target}. Measured: {one.evidence}." for one in verdicts),
        "",
        "## Ours against each other provider",
        "",
        *standings(cells),
        "",
        "## Times",
        "",
        *tables(cells, device),
    ]
    return "\n".join(lines), [asdict(one) for one in verdicts]


def _colour(name: str) -> str:
    if name in WITHOUT_PROMPT:
        return COLOURS["plain"]
    return COLOURS["ours" if name in OURS else "others"]


def _bars(cells: Cells, chosen: Sequence[Shape]) -> Figure:
    """Times of every provider at a few shapes, with the quantiles."""
    figure = Figure(figsize=(13, 3.6 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), len(MODES), squeeze=False)
    for axes_row, shape in zip(grid, chosen, strict=True):
        for axes, mode in zip(axes_row, MODES, strict=True):
            rows = cells.get((shape, mode), {})
            names = _timed(rows, rows)[::-1]
            times = [rows[name]["ms"] for name in names]
            errors = [[m - low for m, low, _ in times], [high - m for m, _, high in times]]
            middle = [time[0] for time in times]
            axes.barh(names, middle, xerr=errors, color=[_colour(name) for name in names])
            axes.set(title=f"{shape.describe()}\n{mode}", xlabel="ms")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3, axis="x")
    return figure


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
                if _timed(cells.get((shape, mode), {}), [name])
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
    drawn = {"times": _bars(cells, chosen or measured[:1])}
    if len(lengths) > 1:
        drawn["lengths"] = _sweep(cells, sorted(lengths, key=lambda shape: shape.keys))
    return {name: picture(figure) for name, figure in drawn.items()}
