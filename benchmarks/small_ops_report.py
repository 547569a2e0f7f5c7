"""The small operations' targets, legend, tables and figure; reporting.py judges.

The targets are this project's own. An operation that only moves data is as good as the part that it
reaches of the bandwidth that large reads reach in the same rounds; every byte counts once. A loss
is as good as the part that its matrix products alone take of its time.
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
from benchmarks.small_ops_problem import (
    LOSSES,
    MODES,
    PRODUCTS,
    PROMPT,
    SmallShape,
    loss_floor,
)
from llama_adapter.utilisation import GPUS, gpu_of

# what is measured beside the providers, to hold them against
YARDSTICKS = (*READ_NAMES, PRODUCTS)

LEGEND = (
    "ours: the public function. eager: the formula of a model's code: LlamaRMSNorm, LlamaMLP and "
    "apply_rotary_pos_emb of transformers (halves), Meta's complex numbers (pairs), with an "
    "index_put into the caches (write_cache); compiled: torch.compile of it; torch: F.rms_norm; "
    "two_calls: our apply_rotary, then the index_put. A backward is the operation that autograd "
    "calls; eager: what autograd computes of the formula. write_cache turns q and k too. "
    "linear_cross_entropy is the mean loss of a frozen head over labelled rows, _dx with the "
    "gradient of x, both by autograd; eager: F.cross_entropy of all logits in float32; products: "
    "its one or two matrix products, alone, which TFLOP/s credit. GB/s credit every input read "
    "once and every result written once; percentages are of the read bandwidth, or of the "
    "products' speed, measured in the same rounds. Caches are cold before every pass. Ratios are a "
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


def _target(mode: str, text: str, other: str, limit: float) -> Target:
    text = f"{mode}: from 2,048 tokens on, {text}"
    return Target(text, "ours", (other,), mode, limit, True, large_on_gpu, gpu="H200")


# between its products a loss reads the logits, and for the gradient again, and writes them: at
# 2,048 rows of LLaMA's head some 35 and 95 us on an H200, beside 680 us of each product
AT_BANDWIDTH = "at least 80 % of the read bandwidth measured in the same run", FLOOR, 0.80
AT_PRODUCTS = "at least 90 % as fast as its matrix products alone", PRODUCTS, 0.90
NO_SLOWER = "never slower than torch.compile (at least 0.95 times as fast)", "compiled", 0.95
TARGETS = tuple(
    _target(mode, *goal)
    for mode in MODES
    for goal in (AT_PRODUCTS if mode in LOSSES else AT_BANDWIDTH, NO_SLOWER)
)


def of_floor(rows: Mapping[str, Row], name: str, mode: str) -> float | None:
    """The part that a provider reaches of the read bandwidth, or of the products' speed."""
    if mode not in LOSSES:
        return reached(rows, name)
    both = timed(rows, {PRODUCTS, name})
    return ratio(rows[PRODUCTS], rows[name]) if set(both) == {PRODUCTS, name} else None


def _line(name: str, rows: Mapping[str, Row], mode: str, shape: SmallShape) -> list[str]:
    row = rows[name]
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", "", "", ""]
    middle, low, high = (1e3 * ms for ms in row["ms"])
    part, compared = of_floor(rows, name, mode), timed(rows, ["ours"])
    speed = loss_floor(shape, mode).flops / middle / 1e6 if mode in LOSSES else rate(row)
    return [
        name,
        f"{middle:.1f} ({low:.1f}, {high:.1f})",
        f"{speed:.4g}",
        "-" if part is None else f"{part:.1%}",
        f"{ratio(row, rows['ours']):.2f}" if compared and name not in YARDSTICKS else "-",
    ]


def _floor_line(mode: str, shape: SmallShape, device: str) -> list[str]:
    """The least that a loss can take at the peak rates of a GPU; nothing of other modes, GPUs."""
    gpu = gpu_of(device)
    if mode not in LOSSES or gpu is None:
        return []
    floor = loss_floor(shape, mode)
    return [
        f"At least {1e3 * floor.ms(GPUS[gpu], shape.dtype):.1f} us at the peak rates of {gpu}: "
        f"{floor.flops / 1e9:.4g} GFLOP, {floor.bytes / 1e6:.4g} MB.",
        "",
    ]


def tables(cells: Cells, device: str) -> list[str]:
    """One table per mode and shape, in the order of the modes; `device` by its name."""
    lines: list[str] = []
    for mode in MODES:
        units = ("TFLOP/s", "the products") if mode in LOSSES else ("GB/s", "read bandwidth")
        header = ["provider", "us (20 %, 80 %)", units[0], f"of {units[1]}", "to ours"]
        for (shape, own), rows in cells.items():
            if own == mode:
                body = [_line(name, rows, mode, shape) for name in rows]
                lines += [f"### {mode} {shape.describe()}", ""]
                lines += [*_floor_line(mode, shape, device), *table(header, body), ""]
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
    others = {name: "ours" for name in names if name not in ("ours", *YARDSTICKS)}
    head = heading("The small operations of a layer", environment, LEGEND, trial)
    measured = ["## Times", "", *tables(cells, environment["device"])]
    return page(
        [*head, bandwidth_line(cells)], lines, standings(cells, MODES, others, ()), measured
    ), verdicts


def _panel(
    axes: Axes,
    mode: str,
    cells: Cells,
    value: Callable[[Mapping[str, Row], str, str], float | None],
) -> None:
    """A mark for every provider at every shape of a mode, in the order of their tokens."""
    own = [(shape, rows) for (shape, of), rows in cells.items() if of == mode]
    own.sort(key=lambda pair: (pair[0].tokens, pair[0].width, pair[0].groups))
    for name in dict.fromkeys(name for _, rows in own for name in rows if name not in YARDSTICKS):
        found = [(i, value(rows, name, mode)) for i, (_, rows) in enumerate(own)]
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
    """PNG by name: the part of the bandwidth, or of the products' speed, by mode and shape."""
    modes = [mode for mode in MODES if any(mode == own for _, own in cells)]
    lines = -(-len(modes) // 2)
    figure = Figure(figsize=(13, 3.6 * max(lines, 1)), layout="constrained")
    grid = figure.subplots(max(lines, 1), 2, squeeze=False).flatten()
    for axes in grid[len(modes) :]:
        axes.set_visible(False)

    def percent(rows: Mapping[str, Row], name: str, mode: str) -> float | None:
        part = of_floor(rows, name, mode)
        return None if part is None else 100 * part

    for axes, mode in zip(grid, modes, strict=False):
        _panel(axes, mode, cells, percent)
        speed = "products' speed" if mode in LOSSES else "read bandwidth"
        axes.set_ylabel(f"% of the {speed}")
    return {"bandwidth": picture(figure)}
