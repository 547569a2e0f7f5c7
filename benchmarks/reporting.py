"""From rows of a benchmark to what a reader sees: verdicts, standings, tables, bars.

A ratio is the median over rounds of two providers' times in the same round, so that a clock that
changes between rounds does not count. A target is decided at the shapes it names; every other
shape is told beside it, and every cell that we lose is listed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import TIMED, Row, ratio
from benchmarks.roofline import Shape
from llama_adapter.utilisation import gpu_of

MET, MISSED, PENDING, UNDECIDED = "met", "MISSED", "pending", "undecided"
# by shape and mode; a shape is what `describe` tells of: a Shape, or a benchmark's own class
Cells = Mapping[tuple[Any, str], Mapping[str, Row]]

# packages whose versions a heading tells where they take part
COMPARED = ("transformers", "peft", "torchao")
COLOURS = {"ours": "#1f6fb4", "plain": "#999999", "others": "#e07b1a"}
TRIAL = "This is the reduced form: it tries the machinery out, its numbers mean nothing."
# of so many shapes a verdict shows each number, of more the range
SHOWN = 3


@dataclass(frozen=True)
class Target:
    """A goal for a ratio of times.

    Attributes:
        text: the goal in words.
        ours: the provider it is about.
        others: what it is compared with, the fastest of them in a cell.
        mode: of the cells.
        limit: of the ratio.
        faster: whether the ratio is how many times as fast ours is, at least `limit`; otherwise it
            is how many times as long it takes, at most `limit`.
        where: whether it is decided at a shape.
        gpu: the only GPU on which it is decided.
        place: what it is decided on, in words.
    """

    text: str
    ours: str
    others: tuple[str, ...]
    mode: str
    limit: float
    faster: bool
    where: Callable[[Any], bool]
    gpu: str | None = None
    place: str = "a GPU"

    def holds(self, value: float) -> bool:
        """Whether a ratio reaches the goal."""
        return value >= self.limit if self.faster else value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of a target: MET, MISSED, PENDING or UNDECIDED, and the numbers."""

    target: str
    verdict: str
    evidence: str


def cells_of(
    rows: Iterable[Row], kind: Callable[..., Any] = Shape
) -> dict[tuple[Any, str], dict[str, Row]]:
    """Rows by cell and provider, in the order of the file.

    Args:
        rows: of a result file.
        kind: class of the cells' shapes.
    """
    found: dict[tuple[Any, str], dict[str, Row]] = {}
    for row in rows:
        key = (kind(**row["cell"]["shape"]), row["cell"]["mode"])
        found.setdefault(key, {})[row["provider"]] = row
    return found


def timed(rows: Mapping[str, Row], names: Iterable[str]) -> list[str]:
    """Those of the providers that have a time in a cell."""
    return [name for name in names if rows.get(name, {}).get("status") == TIMED]


def fastest(rows: Mapping[str, Row], names: Iterable[str]) -> str | None:
    """The one of the providers with the lowest time in a cell; None where there is none."""
    return min(timed(rows, names), key=lambda name: rows[name]["ms"][0], default=None)


def times_as_long(top: str, bottom: str, rows: Mapping[str, Row]) -> str:
    """How many times as long `top` takes as `bottom`, or "-" where one of them has no time."""
    if len(timed(rows, {top, bottom})) < len({top, bottom}):
        return "-"
    return f"{ratio(rows[top], rows[bottom]):.2f}"


def _measured(target: Target, rows: Mapping[str, Row]) -> tuple[float, str] | str:
    """The target's ratio in a cell with what ours was compared with, or why there is none."""
    best = fastest(rows, target.others)
    if not timed(rows, [target.ours]) or best is None:
        absent = [name for name in (target.ours, *target.others) if name not in timed(rows, rows)]
        return ", ".join(
            f"{name}: {rows[name].get('reason', 'not timed') if name in rows else 'not measured'}"
            for name in absent
        )
    ours, other = rows[target.ours], rows[best]
    return (ratio(other, ours) if target.faster else ratio(ours, other)), best


def _evidence(target: Target, here: Mapping[Any, tuple[float, str]]) -> list[str]:
    """The numbers at the target's shapes: each, or where there are many their range."""
    each = [f"{value:.2f} against {best} at {s.describe()}" for s, (value, best) in here.items()]
    if len(each) <= SHOWN:
        return each
    values = [value for value, _ in here.values()]
    worst = values.index(min(values) if target.faster else max(values))
    failing = sum(not target.holds(value) for value in values)
    range_ = f"{min(values):.2f} to {max(values):.2f} at {len(values)} shapes"
    return [f"{range_}, {len(values) - failing} of them within the limit", f"worst: {each[worst]}"]


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
    evidence = _evidence(target, here)
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
        nothing = f"nothing yet at the target's shapes on {target.gpu or target.place}"
        return Verdict(target.text, PENDING, "; ".join([nothing, *evidence]))
    if lacking:
        return Verdict(target.text, UNDECIDED, "; ".join([*evidence, *lacking]))
    holds = all(target.holds(value) for value, _ in here.values())
    return Verdict(target.text, MET if holds else MISSED, "; ".join(evidence))


def verdicts_of(
    targets: Sequence[Target], cells: Cells, device: str
) -> tuple[list[str], list[Row]]:
    """The verdicts as lines of Markdown and as plain data.

    Args:
        targets: the goals.
        cells: all rows.
        device: the device's name as torch gives it.
    """
    found = [judge(target, cells, device) for target in targets]
    lines = [f"- **{one.verdict}**: {one.target}. Measured: {one.evidence}." for one in found]
    return lines, [asdict(one) for one in found]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its columns aligned in the source too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    ruled = [header, ["-" * width for width in widths], *rows]
    return [
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        for row in ruled
    ]


def standings(
    cells: Cells,
    modes: Sequence[str],
    rivals: Mapping[str, str],
    without_prompt: Sequence[str],
) -> list[str]:
    """By other provider and mode, in how many cells ours is faster, and each in which it is not.

    Args:
        cells: all rows.
        modes: their modes in the order of the table.
        rivals: by other provider, which of ours it is compared with.
        without_prompt: the providers to mark so.
    """
    body = []
    for name in dict.fromkeys(name for rows in cells.values() for name in rows if name in rivals):
        for mode in modes:
            ratios = {
                shape: ratio(rows[name], rows[rivals[name]])
                for (shape, own), rows in cells.items()
                if own == mode and len(timed(rows, [name, rivals[name]])) == 2
            }
            if not ratios:
                continue
            lost = [f"{s.describe()} ({r:.2f})" for s, r in ratios.items() if r < 1]
            values = list(ratios.values())
            body.append(
                [
                    name + (" (no prompt)" if name in without_prompt else ""),
                    mode,
                    f"{len(values) - len(lost)} of {len(values)}",
                    f"{min(values):.2f}, {median(values):.2f}, {max(values):.2f}",
                    "; ".join(lost) or "nowhere",
                ]
            )
    header = ["against", "mode", "ours faster", "lowest, median, highest ratio", "ours slower at"]
    return table(header, body) if body else ["Nothing is timed."]


def heading(title: str, environment: Row, legend: str, trial: bool) -> list[str]:
    """What was measured on what, and how.

    Args:
        title: of the report.
        environment: of `harness.describe`, with the protocol.
        legend: what the words of the report mean.
        trial: whether the shapes are too small to mean anything.
    """
    packages, protocol = environment["packages"], environment["protocol"]
    also = [f"{name} {packages[name]}" for name in COMPARED if packages.get(name)]
    also += [f"{name} {environment[name]}" for name in ("driver", "cudnn") if environment.get(name)]
    return [
        f"# {title}",
        "",
        f"{environment['device']}, {environment.get('instructions', 'CUDA')}, "
        f"{environment['threads']} thread(s), "
        + ", ".join([f"torch {packages['torch']}", f"triton {packages['triton']}", *also]),
        f"Medians (20 % and 80 % quantiles) over {protocol['rounds']} rounds in turns; every "
        "provider was right before it was timed.",
        legend,
        *([TRIAL] if trial else []),
    ]


def page(
    head: Sequence[str], targets: Sequence[str], ours: Sequence[str], measured: Sequence[str]
) -> str:
    """A report's text.

    Args:
        head: what was measured on what, of `heading`.
        targets: a line each, of `verdicts_of`.
        ours: the table of `standings`.
        measured: everything else, with headings of its own.
    """
    return "\n".join([
        *head,
        "",
        "## Targets",
        "",
        *targets,
        "",
        "## Ours against each other provider",
        "",
        *ours,
        "",
        *measured,
    ])  # fmt: skip


def bars(
    cells: Cells,
    chosen: Sequence[Any],
    modes: Sequence[str],
    colour: Callable[[str], str],
    columns: int,
) -> Figure:
    """Times of every provider at a few shapes, with the quantiles.

    Args:
        cells: all rows.
        chosen: the shapes.
        modes: of the cells, one after the other for each shape.
        colour: by provider, a key of COLOURS.
        columns: of the grid.
    """
    panels = [(shape, mode) for shape in chosen for mode in modes]
    # nothing may be measured yet
    lines, columns = max(-(-len(panels) // max(columns, 1)), 1), max(columns, 1)
    figure = Figure(figsize=(13, 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (shape, mode) in zip(grid, panels, strict=False):
        rows = cells.get((shape, mode), {})
        names = timed(rows, rows)[::-1]
        times = [rows[name]["ms"] for name in names]
        errors = [[m - low for m, low, _ in times], [high - m for m, _, high in times]]
        middle = [time[0] for time in times]
        axes.barh(names, middle, xerr=errors, color=[COLOURS[colour(name)] for name in names])
        axes.set(title=f"{shape.describe()}\n{mode}", xlabel="ms")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3, axis="x")
    return figure
