"""Pictures of the vision worlds that a person can look at: what is right, and what hosts say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.ablation_report import picture

# of each data set
SHOWN = 6
RIGHT, WRONG = "#1a7f37", "#b3261e"
# a title, the pictures in the test's order with the right answers, and answers by who gives them
Shown = tuple[str, Sequence[tuple[Path, str]], Mapping[str, Sequence[str]]]


def examples_of_images(name: str, parts: Sequence[Shown]) -> tuple[list[str], dict[str, bytes]]:
    """The first pictures of every data set, chosen by place, in one figure.

    Args:
        name: of the figure.
        parts: a row each.

    Returns:
        Lines of Markdown, and the figure as PNG by its name.
    """
    figure = Figure(figsize=(1.75 * SHOWN, 2.15 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), SHOWN, squeeze=False)
    for axes_of_row, (title, items, answers) in zip(grid, parts, strict=True):
        for axes in axes_of_row:
            axes.axis("off")
        for index, (axes, (path, right)) in enumerate(zip(axes_of_row, items, strict=False)):
            with Image.open(path) as opened:
                axes.imshow(opened.convert("RGB"), interpolation="nearest")
            axes.set_title(f"{title}\n{right}" if index == 0 else f"\n{right}", fontsize=8)
            for line, (who, given) in enumerate(answers.items()):
                good = given[index] == right
                axes.text(
                    0.5,
                    -0.06 - 0.13 * line,
                    f"{who}: {given[index]}",
                    transform=axes.transAxes,
                    ha="center",
                    va="top",
                    fontsize=7,
                    color=RIGHT if good else WRONG,
                )
    lines = [
        f"The first {SHOWN} test pictures of each data set, with the right answer above and what "
        "hosts say below, of the first seed; green is right:",
        "",
        f"![pictures and answers](hosts/{name}.png)",
    ]
    return lines, {name: picture(figure)}
