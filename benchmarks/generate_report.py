"""The generation benchmark's targets, legend, tables and figures; reporting.py judges and draws.

A pass is all steps behind the prompt; its time over its steps is the time per step. The part of the
read bandwidth is reckoned as in decode_report.py.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ablation_report import picture
from benchmarks.decode_report import READS, bandwidth_line, reached, read_bandwidth
from benchmarks.generate_models import BUNDLED, THEIRS
from benchmarks.generate_problem import DECODE, PREFILL, Setting
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

WITHOUT_ADAPTER = ("ours_plain", "transformers")
RIVALS = {"peft": "ours", "transformers": "ours_plain"}
# tokens per second that the target names
GOAL = 255
GOAL_NAME = f"{GOAL} tok/s"
LEGEND = (
    "ours: the engine, paged cache and all, every sequence with the same adapter (10 prompt rows "
    "in all layers but two, one gate a layer, as PEFT has it); ours_plain: the engine without "
    "adapters; ours_bank_*: each sequence its own adapter of so many; ours_int8, ours_int4: the "
    "linear weights in 8 or 4 bits; peft: transformers' model with the same weights and adapter, "
    "wrapped by PEFT, eager, its cache and forward call in a loop; transformers: the same model "
    "without PEFT. Weights are random, those of tiny the bundled base's. Decoding is every step "
    "behind the one that reads the prompts and gives the first token. GB/s credit what must be "
    "read: weights, keys and values below the lengths, prompts in use once. Logits off: the "
    "largest difference at the prompts' ends over the largest logit, from the truth with "
    "unquantised weights; ties: of at most 8 sequences, those that left the truth's greedy tokens "
    "within the first 8, where its two likeliest are as close as rounding. The truth is "
)
THEIR_TRUTH = "that of PEFT and transformers in a wider dtype, without a cache."
OWN_TRUTH = "our own pass in a wider dtype, without a cache: PEFT or transformers is not installed."


def on_gpu(setting: Setting) -> bool:
    """The GPU's settings."""
    return setting.dtype == "bfloat16"


def single_7b(setting: Setting) -> bool:
    """LLaMA-7B, one sequence."""
    return on_gpu(setting) and (setting.model, setting.batch) == ("llama-7b", 1)


def on_processor(setting: Setting) -> bool:
    """The processor's settings."""
    return setting.model in (BUNDLED, "110m")


def single_on_processor(setting: Setting) -> bool:
    """Those of one sequence."""
    return on_processor(setting) and setting.batch == 1


TARGETS = (
    Target(
        f"LLaMA-7B in bfloat16 decodes one sequence with an adapter at {GOAL} tokens/s or more",
        "ours", (GOAL_NAME,), DECODE, 1.0, True, single_7b, gpu="H200",
    ),
    Target(
        "LLaMA-7B in bfloat16 decodes one sequence at least 5 times as fast as PEFT",
        "ours", ("peft",), DECODE, 5.0, True, single_7b, gpu="H200",
    ),
    Target(
        "The adapter costs at most 2 % of a step",
        "ours", ("ours_plain",), DECODE, 1.02, False, on_gpu, gpu="H200",
    ),
    Target(
        "1,000 adapters cost at most 3 % over one",
        "ours_bank_1000", ("ours",), DECODE, 1.03, False, on_gpu, gpu="H200",
    ),
    Target(
        "On a processor with one thread, at least 1.5 times as fast as PEFT, one sequence",
        "ours", ("peft",), DECODE, 1.5, True, single_on_processor, place="a processor",
    ),
    Target(
        "On a processor with one thread, the adapter makes a step at most 1.1 times as long",
        "ours", ("ours_plain",), DECODE, 1.1, False, on_processor, place="a processor",
    ),
)  # fmt: skip


def with_goal(cells: Cells) -> dict[tuple[Setting, str], dict[str, Row]]:
    """The cells with GOAL_NAME as one more provider where it is a target, for the verdicts."""
    found = {}
    for (setting, mode), rows in cells.items():
        ours = rows.get("ours", {})
        if mode == DECODE and single_7b(setting) and ours.get("status") == TIMED:
            ms = ours["tokens"] / GOAL * 1e3
            goal = {"status": TIMED, "ms": [ms] * 3, "round_ms": [ms] * len(ours["round_ms"])}
            rows = {**rows, GOAL_NAME: goal}
        found[setting, mode] = dict(rows)
    return found


def _per_step(row: Row) -> list[float]:
    return [ms / row["steps"] for ms in row["ms"]]


def _checks(row: Row) -> list[str]:
    errors = row.get("errors", {})
    off, ties = errors.get("moved", errors.get("logits")), errors.get("differing")
    return ["-" if off is None else f"{off:.1e}", "-" if ties is None else f"{ties:.0f}"]


def _line(name: str, rows: Mapping[str, Row], mode: str) -> list[str]:
    row = rows[name]
    rates = ["", ""] if mode == DECODE else []
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", "", *rates, "", "", *_checks(row)]
    middle, low, high = _per_step(row)
    if mode == DECODE:
        part = reached(rows, name)
        rates = [
            f"{row['bytes'] / row['ms'][0] / 1e6:.4g}",
            "-" if part is None else f"{part:.1%}",
        ]
    read = name in READS
    return [
        name,
        f"{middle:.3f} ({low:.3f}, {high:.3f})",
        "-" if read else f"{row['tokens'] / row['ms'][0] * 1e3:.4g}",
        *rates,
        "-" if read else times_as_long("peft", name, rows),
        "-" if read else times_as_long(name, "ours_plain", rows),
        *_checks(row),
    ]


def tables(cells: Cells, mode: str) -> list[str]:
    """One table per setting of a mode."""
    what = "ms per step" if mode == DECODE else "ms"
    rates = ["GB/s", "of read bandwidth"] if mode == DECODE else []
    header = [f"{what} (20 %, 80 %)", "tok/s", *rates, "as fast as peft", "to ours_plain"]
    lines: list[str] = []
    for (setting, own), rows in cells.items():
        if own == mode:
            body = [_line(name, rows, mode) for name in rows]
            lines += [f"### {setting.describe()}", ""]
            lines += [*table(["provider", *header, "logits off", "ties"], body), ""]
    return lines


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, dict[str, Any]]:
    """All of it as Markdown, and the read bandwidth and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `command.open_results`.
        trial: whether the models are too small to mean anything.
    """
    lines, verdicts = verdicts_of(TARGETS, with_goal(cells), environment["device"])
    packages = environment["packages"]
    legend = LEGEND + (THEIR_TRUTH if all(packages[one] for one in THEIRS) else OWN_TRUTH)
    decoding = {cell: rows for cell, rows in cells.items() if cell[1] == DECODE}
    head = heading("Decoding of whole models with an adapter", environment, legend, trial)
    measured = ["## Decoding", "", *tables(cells, DECODE)]
    measured += ["## Reading the prompts, to the first new token", "", *tables(cells, PREFILL)]
    against = standings(cells, (DECODE, PREFILL), RIVALS, WITHOUT_ADAPTER)
    text = page([*head, bandwidth_line(decoding)], lines, against, measured)
    more = {"read_bandwidth": read_bandwidth(decoding), "verdicts": verdicts}
    return text, more


def _colour(name: str) -> str:
    if name in WITHOUT_ADAPTER:
        return "plain"
    return "ours" if name.startswith("ours") else "others"


def _bars(cells: Cells, mode: str) -> Figure:
    """Milliseconds per step of every provider at every setting."""
    shown = {
        cell: {
            name: {**row, "ms": _per_step(row)} if row["status"] == TIMED else row
            for name, row in rows.items()
            if name not in READS
        }
        for cell, rows in cells.items()
    }
    chosen = list(dict.fromkeys(setting for setting, _ in cells))
    return bars(shown, chosen, (mode,), _colour, min(len(chosen), 2))


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: the time of a step, and of the prompts."""
    return {mode: picture(_bars(cells, mode)) for mode in (DECODE, PREFILL)}
