"""A run's losses as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_adapter.checkpoints.atomic import write_atomically

Points = Sequence[tuple[int, float]]


def draw_curves(
    path: Path,
    losses: Mapping[str, Points],
    held_out: Points,
    axes: tuple[str, str | None],
) -> None:
    """Draw training losses, and what was found on held-out data, over the steps.

    Args:
        path: PNG file to replace.
        losses: curves by their names.
        held_out: losses too, or scores.
        axes: what the axis of losses says, and that of scores; None: they are losses.
    """
    # slow to import
    from matplotlib.figure import Figure

    # without a display: a Figure of its own draws with Agg and touches no global state
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left if axes[1] is None else left.twinx()
    lines = []
    for label, points in losses.items():
        if points:
            lines += left.plot(*zip(*points, strict=True), label=label, linewidth=1)
    if held_out:
        lines += right.plot(
            *zip(*held_out, strict=True),
            label="held out",
            marker="o",
            markersize=4,
            linewidth=1,
            color=f"C{len(lines)}",
        )
    left.set(xlabel="step", ylabel=axes[0])
    if axes[1] is not None:
        right.set_ylabel(axes[1])
    left.grid(alpha=0.3)
    if lines:
        left.legend(handles=lines)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
