"""The drop-in benchmark's targets, legend, tables and figure; reporting.py judges and draws."""

from dataclasses import dataclass
from typing import Any

from benchmarks.ablation_report import picture
from benchmarks.harness import TIMED, Row
from benchmarks.reporting import (
    Cells,
    Target,
    bars,
    heading,
    page,
    standings,
    table,
    times_as_long,
    verdicts_of,
)

TITLES = {
    "block": "The attention block of one layer, forward",
    "block_training": "The attention block of one layer, forward and backward",
    "step": "A training step: forward and backward of the whole model",
    "tokens": "generate(): the prompt read, then new tokens",
}
LEGEND = (
    "peft: transformers' model with PEFT's adaption prompts (10 rows in all layers but two); "
    "patched: the same model behind llama_adapter.integrations.peft.patch; transformers: the model "
    "without an adapter, whose step has no backward pass as nothing of it is trained. Eager, sdpa, "
    "random weights and gates, a causal batch without padding; an optimiser's step is left out. "
    "Right is what PEFT computes in a wider dtype, and of generate() the logits of its first new "
    "token."
)


@dataclass(frozen=True)
class Setting:
    """A model and the size of its batch.

    Attributes:
        model: name of its shape.
        batch: sequences.
        tokens: of each sequence that is read.
        new: tokens that are generated.
        dtype: of the weights.
    """

    model: str
    batch: int
    tokens: int
    new: int
    dtype: str

    def describe(self) -> str:
        """In words."""
        return (
            f"{self.model} {self.dtype}, {self.batch} x {self.tokens} tokens, {self.new} new ones"
        )


def on_gpu(setting: Setting) -> bool:
    """The GPU's settings."""
    return setting.dtype == "bfloat16"


def on_processor(setting: Setting) -> bool:
    """The processor's settings."""
    return setting.dtype == "float32" and setting.model != "toy"


TARGETS = (
    Target(
        "On a GPU the patched attention block is at least 1.7 times as fast as PEFT's",
        "patched", ("peft",), "block", 1.7, True, on_gpu, gpu="H200",
    ),
    *(
        Target(
            f"On a processor the patched model is never slower than PEFT's: {mode}",
            "patched", ("peft",), mode, 1.0, True, on_processor, place="a processor",
        )
        for mode in TITLES
    ),
)  # fmt: skip


def _line(name: str, rows: Any) -> list[str]:
    row: Row = rows[name]
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", "-", "-", "-"]
    middle, low, high = row["ms"]
    return [
        name,
        f"{middle:.3f} ({low:.3f}, {high:.3f})",
        f"{row['tokens'] / middle * 1e3:.4g}",
        times_as_long("peft", name, rows),
        times_as_long(name, "transformers", rows),
    ]


def tables(cells: Cells) -> list[str]:
    """One table per cell, mode by mode."""
    header = ["provider", "ms (20 %, 80 %)", "tok/s", "as fast as peft", "to transformers"]
    lines: list[str] = []
    for mode, title in TITLES.items():
        lines += [f"## {title}", ""]
        for (setting, own), rows in cells.items():
            if own == mode:
                lines += [f"### {setting.describe()}", ""]
                lines += [*table(header, [_line(name, rows) for name in rows]), ""]
    return lines


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, dict[str, Any]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `command.open_results`.
        trial: whether the models are too small to mean anything.
    """
    lines, verdicts = verdicts_of(TARGETS, cells, environment["device"])
    head = heading("PEFT's adaption prompts before and after patch", environment, LEGEND, trial)
    rivals = {"peft": "patched", "transformers": "patched"}
    against = standings(cells, tuple(TITLES), rivals, ("transformers",))
    return page(head, lines, against, tables(cells)), {"verdicts": verdicts}


def _colour(name: str) -> str:
    return {"patched": "ours", "transformers": "plain"}.get(name, "others")


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: the times of every cell."""
    chosen = list(dict.fromkeys(setting for setting, _ in cells))
    return {"times": picture(bars(cells, chosen, tuple(TITLES), _colour, 2))}
