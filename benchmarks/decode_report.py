"""The decode benchmark's targets, legend, tables and figures; reporting.py judges and draws.

The read bandwidth of a cell is that of the faster of two large reads measured in the same rounds.
What a provider reaches of it is the time that the bytes it must move take at that rate, over its
own time.
"""

from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ablation_report import picture
from benchmarks.harness import TIMED, Row, ratio
from benchmarks.reporting import (
    Cells,
    Target,
    bars,
    fastest,
    heading,
    page,
    standings,
    table,
    timed,
    verdicts_of,
)
from benchmarks.roofline import Shape

MODE = "decode"
READS = ("read_sum", "read_dot")
BACKENDS = ("hybrid", "reference")
OURS = ("ours", "ours_paged", "ours_plain", "ours_bank_32", "ours_bank_1000", *BACKENDS)
WITHOUT_PROMPT = ("ours_plain", "sdpa", "flex", *READS)
# what ours must move, read at the read bandwidth
FLOOR = "the read bandwidth"
LEGEND = (
    "ours: zero_init_attention_decode as it chooses; ours_paged: over shuffled pages of 64 tokens; "
    "ours_bank_*: each sequence its own adapter of so many; hybrid (on a CPU) and reference: the "
    "backends of those names; "
    "ours_plain, sdpa (one library call) and flex (FlexAttention, compiled): no prompt at all; "
    "two_*: two such calls and eager glue (two_flex: compiled); official: the official code's "
    "concatenations. Sequences are as long as the cache, S, or at random down to half of it; "
    "libraries get a mask, made before, where they differ. GB/s credit what must be moved: keys "
    "and values below the lengths, prompts in use once, q and out. Caches are cold before every "
    "pass. Ratios are a provider's time over that of ours: above 1, ours is faster."
)


def on_gpu(shape: Shape) -> bool:
    """The GPU's shapes: 32 heads of 128, bfloat16."""
    return (shape.heads, shape.head_dim, shape.dtype) == (32, 128, "bfloat16")


def many_on_gpu(shape: Shape) -> bool:
    """Those of at least 32 sequences."""
    return on_gpu(shape) and shape.batch >= 32


TARGETS = (
    Target(
        "From 32 sequences on, at least 85 % of the read bandwidth measured in the same run",
        "ours", (FLOOR,), MODE, 0.85, True, many_on_gpu, gpu="H200",
    ),
    Target(
        "The prompt costs at most 2 % over the same call without one (of the attention call alone: "
        "the goal of 2 % of a step is for the whole model, and another measurement)",
        "ours", ("ours_plain",), MODE, 1.02, False, on_gpu, gpu="H200",
    ),
    Target(
        "1,000 adapters cost at most 3 % over one",
        "ours_bank_1000", ("ours",), MODE, 1.03, False, on_gpu, gpu="H200",
    ),
)  # fmt: skip


def at_bandwidth(rows: Mapping[str, Row], name: str) -> Row | None:
    """A row of the times that the bytes of a provider take at the cell's read bandwidth.

    Args:
        rows: of the cell.
        name: of the provider.

    Returns:
        None where the provider or every read lacks a time.
    """
    best = fastest(rows, READS)
    if best is None or not timed(rows, [name]):
        return None
    read, share = rows[best], rows[name]["bytes"] / rows[best]["bytes"]
    scaled = {key: [ms * share for ms in read[key]] for key in ("ms", "round_ms")}
    return {"status": TIMED, **scaled}


def reached(rows: Mapping[str, Row], name: str) -> float | None:
    """The part of the read bandwidth that a provider reaches in a cell."""
    floor = at_bandwidth(rows, name)
    return None if floor is None else ratio(floor, rows[name])


def with_floor(cells: Cells) -> dict[tuple[Any, str], dict[str, Row]]:
    """The cells with FLOOR as one more provider, for the targets."""
    found = {}
    for cell, rows in cells.items():
        floor = at_bandwidth(rows, "ours")
        found[cell] = {**rows} if floor is None else {**rows, FLOOR: floor}
    return found


def rate(row: Row) -> float:
    """GB/s of what a row must move."""
    return row["bytes"] / row["ms"][0] / 1e6


def read_bandwidth(cells: Cells) -> dict[str, Any] | None:
    """GB/s of the faster read: median and 20 % and 80 % quantiles over the rounds of all cells."""
    best = {cell: fastest(rows, READS) for cell, rows in cells.items()}
    rates = [
        cells[cell][name]["bytes"] / ms / 1e6
        for cell, name in best.items()
        if name is not None
        for ms in cells[cell][name]["round_ms"]
    ]
    if not rates:
        return None
    low, *_, high = quantiles(rates, n=5, method="inclusive")
    return {
        "gb_per_s": [round(rate, 3) for rate in (median(rates), low, high)],
        "rounds": len(rates),
        "reads": sorted({name for name in best.values() if name is not None}),
    }


def _line(name: str, rows: Mapping[str, Row]) -> list[str]:
    row = rows[name]
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", "", "", ""]
    middle, low, high = row["ms"]
    part, compared = reached(rows, name), timed(rows, ["ours"])
    return [
        name,
        f"{middle:.4f} ({low:.4f}, {high:.4f})",
        f"{rate(row):.4g}",
        "-" if part is None else f"{part:.1%}",
        f"{ratio(row, rows['ours']):.2f}" if compared and name not in READS else "-",
    ]


def tables(cells: Cells) -> list[str]:
    """One table per shape."""
    header = ["provider", "ms (20 %, 80 %)", "GB/s", "of read bandwidth", "to ours"]
    lines: list[str] = []
    for (shape, _), rows in cells.items():
        body = [_line(name, rows) for name in rows]
        lines += [f"### {shape.describe()}", "", *table(header, body), ""]
    return lines


def bandwidth_line(cells: Cells) -> str:
    """The read bandwidth in words."""
    found = read_bandwidth(cells)
    if found is None:
        return "Read bandwidth: not measured."
    middle, low, high = found["gb_per_s"]
    return (
        f"Read bandwidth: {middle:.4g} GB/s ({low:.4g}, {high:.4g}), the faster of a sum and a dot "
        f"product of a large tensor, {found['rounds']} rounds in turns with the providers."
    )


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, list[Row]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `harness.describe`, with the protocol.
        trial: whether the shapes are too small to mean anything.
    """
    lines, verdicts = verdicts_of(TARGETS, with_floor(cells), environment["device"])
    others = {
        name: "ours" for rows in cells.values() for name in rows if name not in (*OURS, *READS)
    }
    head = heading("Decoding with a prompt over a KV cache", environment, LEGEND, trial)
    measured = ["## Times", "", *tables(cells)]
    return page(
        [*head, bandwidth_line(cells)],
        lines,
        standings(cells, (MODE,), others, WITHOUT_PROMPT),
        measured,
    ), verdicts


def _colour(name: str) -> str:
    if name in WITHOUT_PROMPT:
        return "plain"
    return "ours" if name in OURS else "others"


def _reached(cells: Cells) -> Figure:
    """The part of the read bandwidth by shape, of every provider."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots()
    shapes = [shape for shape, _ in cells]
    names = dict.fromkeys(name for rows in cells.values() for name in rows if name not in READS)
    for index, name in enumerate(names):
        parts = [reached(rows, name) for rows in cells.values()]
        places = [i for i, part in enumerate(parts) if part is not None]
        marker = "^" if name in WITHOUT_PROMPT else "o" if name in OURS else "s"
        values = [100 * part for part in parts if part is not None]
        axes.plot(places, values, marker, label=name, c=f"C{index}")
    labels = [shape.describe().replace(" T=1 causal", "") for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels, rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="% of the read bandwidth", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6)
    return figure


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: times at the first shapes, and what is reached of the bandwidth at all."""
    chosen = list(dict.fromkeys(shape for shape, _ in cells))[:4]
    attention = {
        cell: {name: row for name, row in rows.items() if name not in READS}
        for cell, rows in cells.items()
    }
    drawn = {
        "times": bars(attention, chosen, (MODE,), _colour, min(len(chosen), 2)),
        "bandwidth": _reached(cells),
    }
    return {name: picture(figure) for name, figure in drawn.items()}
