"""The small operations' targets, legend, tables and figure; reporting.py judges.

The targets are this project's own. An operation that only moves data is as good as the part that it
reaches of the bandwidth that large reads reach in the same rounds; every byte counts once.
"""

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablation_report import picture
from benchmarks.decode_report import FLOOR, bandwidth_line, rate, reached, with_floor
from benchmarks.decode_report import READS as READ_NAMES
from benchmarks.harness import TIMED, Row, ratio
from benchmarks.reporting import (
    COLOURS,
    Cells,
    Target,
    heading,
    page,
    standings,
    table,
    timed,
    verdicts_of,
)
from benchmarks.small_ops_problem import MODES, PROMPT, SmallShape

LEGEND = (
    "ours: the public function. eager: the formula of a model's code: LlamaRMSNorm, LlamaMLP and "
    "apply_rotary_pos_emb of transformers (halves), Meta's complex numbers (pairs), with an "
    "index_put into the caches (write_cache); compiled: torch.compile of it; torch: F.rms_norm; "
    "two_calls: our apply_rotary, then the index_put. A backward is the operation that autograd "
    "calls; eager: what autograd computes of the formula. write_cache turns q and k too. GB/s "
    "credit every input read once and every result written once; percentages are of the read "
    "bandwidth measured in the same rounds. Caches are cold before every pass. Ratios are a "
    "provider's time over that of ours: above 1, ours is faster."
)
# in the figure, the same in every panel
MARKS = {
    "ours": ("o", COLOURS["ours"]),
    "eager": ("s", COLOURS["plain"]),
    "compiled": ("D", COLOURS["others"]),
    "torch": ("^", "C2"),
    "two_calls": ("v", "C4"),
}


def large_on_gpu(shape: SmallShape) -> bool:
    """From a prompt of 2,048 tokens on, in bfloat16: below, launching takes the time."""
    return shape.tokens >= PROMPT and shape.dtype == "bfloat16"


TARGETS = tuple(
    target
    for mode in MODES
    for target in (
        Target(
            f"{mode}: from 2,048 tokens on, at least 80 % of the read bandwidth measured in the "
            "same run",
            "ours", (FLOOR,), mode, 0.80, True, large_on_gpu, gpu="H200",
        ),
        Target(
            f"{mode}: from 2,048 tokens on, never slower than torch.compile (at least 0.95 times "
            "as fast)",
            "ours", ("compiled",), mode, 0.95, True, large_on_gpu, gpu="H200",
        ),
    )
)  # fmt: skip


def _line(name: str, rows: Mapping[str, Row]) -> list[str]:
    row = rows[name]
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", "", "", ""]
    middle, low, high = (1e3 * ms for ms in row["ms"])
    part, compared = reached(rows, name), timed(rows, ["ours"])
    return [
        name,
        f"{middle:.1f} ({low:.1f}, {high:.1f})",
        f"{rate(row):.4g}",
        "-" if part is None else f"{part:.1%}",
        f"{ratio(row, rows['ours']):.2f}" if compared and name not in READ_NAMES else "-",
    ]


def tables(cells: Cells) -> list[str]:
    """One table per mode and shape, in the order of the modes."""
    header = ["provider", "us (20 %, 80 %)", "GB/s", "of read bandwidth", "to ours"]
    lines: list[str] = []
    for mode in MODES:
        for (shape, own), rows in cells.items():
            if own == mode:
                body = [_line(name, rows) for name in rows]
                lines += [f"### {mode} {shape.describe()}", "", *table(header, body), ""]
    return lines


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, list[Row]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `harness.describe`, with the protocol.
        trial: whether the shapes are too small to mean anything.
    """
    lines, verdicts = verdicts_of(TARGETS, with_floor(cells), environment["device"])
    names = dict.fromkeys(name for rows in cells.values() for name in rows)
    others = {name: "ours" for name in names if name not in ("ours", *READ_NAMES)}
    head = heading("The small operations of a layer", environment, LEGEND, trial)
    measured = ["## Times", "", *tables(cells)]
    return page(
        [*head, bandwidth_line(cells)], lines, standings(cells, MODES, others, ()), measured
    ), verdicts


def _panel(
    axes: Axes, mode: str, cells: Cells, value: Callable[[Mapping[str, Row], str], float | None]
) -> None:
    """A mark for every provider at every shape of a mode, in the order of their tokens."""
    own = [(shape, rows) for (shape, of), rows in cells.items() if of == mode]
    own.sort(key=lambda pair: (pair[0].tokens, pair[0].width, pair[0].groups))
    for name in dict.fromkeys(name for _, rows in own for name in rows if name not in READ_NAMES):
        found = [(i, value(rows, name)) for i, (_, rows) in enumerate(own)]
        places = [i for i, x in found if x is not None]
        values = [x for _, x in found if x is not None]
        marker, colour = MARKS[name]
        axes.plot(places, values, marker, label=name, c=colour)
    labels = [shape.describe().rsplit(" ", 1)[0] for shape, _ in own]
    axes.set_xticks(range(len(own)), labels, rotation=30, ha="right", fontsize=7)
    axes.set(title=mode, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: the part of the bandwidth, of every provider, by mode and shape."""
    modes = [mode for mode in MODES if any(mode == own for _, own in cells)]
    lines = -(-len(modes) // 2)
    figure = Figure(figsize=(13, 3.6 * max(lines, 1)), layout="constrained")
    grid = figure.subplots(max(lines, 1), 2, squeeze=False).flatten()
    for axes in grid[len(modes) :]:
        axes.set_visible(False)

    def percent(rows: Mapping[str, Row], name: str) -> float | None:
        part = reached(rows, name)
        return None if part is None else 100 * part

    for axes, mode in zip(grid, modes, strict=False):
        _panel(axes, mode, cells, percent)
        axes.set_ylabel("% of the read bandwidth")
    return {"bandwidth": picture(figure)}
