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
    figure = Figure(figsize=(1.75 * SHOWN, 2.5 * len(parts)), layout="constrained")
    heights = [1.0, 0.3] * len(parts)
    grid = figure.subplots(len(heights), SHOWN, squeeze=False, height_ratios=heights)
    for axes in grid.flatten():
        axes.axis("off")
    for row, (title, items, answers) in enumerate(parts):
        for index, (path, right) in enumerate(items[:SHOWN]):
            above, below = grid[2 * row][index], grid[2 * row + 1][index]
            with Image.open(path) as opened:
                above.imshow(opened.convert("RGB"), interpolation="nearest")
            above.set_title(f"{title}\n{right}" if index == 0 else f"\n{right}", fontsize=8)
            for line, (who, given) in enumerate(answers.items()):
                colour = RIGHT if given[index] == right else WRONG
                said = f"{who}: {given[index]}"
                below.text(
                    0.5, 0.95 - 0.5 * line, said, ha="center", va="top", fontsize=7, color=colour
                )
    lines = [
        f"The first {SHOWN} test pictures of each data set, with the right answer above and what "
        "hosts say below, of the first seed; green is right:",
        "",
        f"![pictures and answers](hosts/{name}.png)",
    ]
    return lines, {name: picture(figure)}
