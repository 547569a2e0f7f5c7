"""The training step's targets, legend, tables and figure; reporting.py judges and draws."""

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
from benchmarks.train_step_problem import OTHERS, OURS, Setting
from llama_adapter.utilisation import GPUS, gpu_of

MODE = "step"
# ours with everything
BEST = OURS[-1]
LEGEND = (
    "A step is forward and backward of one batch on a frozen base, an optimiser's step left out. "
    "Records are of random tokens with Alpaca's lengths (log-normal, median 111, at most 512), and "
    "begin with one of the template's two constant beginnings of 29 and 39 tokens. "
    "padded_512: ours, every record padded to 512, as the official recipe's; padded_batch: to the "
    "batch's longest; packed: no padding, logits of response rows alone; shared_prefix: the "
    "beginnings computed once a pass as well, what `finetune` runs. peft_*: transformers with "
    "PEFT's adaption prompts, padded to 512 or to the longest of a pass; litgpt_padded: "
    "litgpt's adapter, whose cache of the prompts is dropped before each pass, as they would not "
    "train else; its numbers are not compared, as litgpt 0.5.13 takes the prompts' keys and values "
    "from the wrong rows. lora_padded: PEFT's LoRA of rank 8 on q and v, another method. Right is "
    "PEFT's step in a wider dtype, loss and gradients. Tokens are those of the records; FLOP are "
    "what the linear maps of ours execute."
)


def on_gpu(setting: Setting) -> bool:
    """The GPU's setting of the targets."""
    return setting.model == "llama-7b"


def on_processor(setting: Setting) -> bool:
    """The processor's settings."""
    return setting.dtype == "float32" and setting.model != "toy"


TARGETS = (
    Target(
        "On a GPU at least 6 times as fast as PEFT's adaption prompts padded to 512",
        BEST, ("peft_512",), MODE, 6.0, True, on_gpu, gpu="H200",
    ),
    Target(
        "On a GPU at least 2.5 times as fast as PEFT's adaption prompts padded to a pass's longest",
        BEST, ("peft_padded",), MODE, 2.5, True, on_gpu, gpu="H200",
    ),
    Target(
        "On a processor, one thread, at least 1.5 times as fast as padded to the batch's longest",
        BEST, ("padded_batch",), MODE, 1.5, True, on_processor, place="a processor",
    ),
)  # fmt: skip


def _line(name: str, rows: Any, peak: float | None) -> list[str]:
    row: Row = rows[name]
    if row["status"] != TIMED:
        return [name, f"{row['status']}: {row['reason'][:80]}", *["-"] * 7]
    middle, low, high = row["ms"]
    rate = row["flop"] / middle / 1e9 if "flop" in row else None
    return [
        name,
        f"{middle:.1f} ({low:.1f}, {high:.1f})",
        f"{row['tokens'] / middle * 1e3:.4g}",
        f"{row['computed_tokens']}" if "computed_tokens" in row else "-",
        "-" if rate is None else f"{rate:.3g}",
        "-" if rate is None or peak is None else f"{rate / peak:.1%}",
        f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-",
        times_as_long(OURS[0], name, rows),
        times_as_long("peft_padded", name, rows),
    ]


def tables(cells: Cells, device: str) -> list[str]:
    """One table per setting, the levers in the order in which they are added."""
    gpu = gpu_of(device)
    peak = None if gpu is None else GPUS[gpu].tflops
    header = [
        "provider", "ms (20 %, 80 %)", "record tok/s", "computed tokens", "TFLOP/s", "of peak",
        "peak GB", f"as fast as {OURS[0]}", "as fast as peft_padded",
    ]  # fmt: skip
    lines = ["## Times", ""]
    for (setting, _), rows in cells.items():
        lines += [f"### {setting.describe()}", ""]
        ordered = [name for name in (*OURS, *OTHERS) if name in rows]
        lines += [*table(header, [_line(name, rows, peak) for name in ordered]), ""]
    return lines


def report(cells: Cells, environment: Row, trial: bool) -> tuple[str, dict[str, Any]]:
    """All of it as Markdown, and the verdicts as plain data.

    Args:
        cells: all rows.
        environment: of `command.open_results`.
        trial: whether the models are too small to mean anything.
    """
    lines, verdicts = verdicts_of(TARGETS, cells, environment["device"])
    head = heading("A training step on a frozen base", environment, LEGEND, trial)
    rivals = {name: BEST for name in (*OURS, *OTHERS) if name != BEST}
    against = standings(cells, (MODE,), rivals, ())
    return page(head, lines, against, tables(cells, environment["device"])), {"verdicts": verdicts}


def _colour(name: str) -> str:
    return "others" if name in OTHERS else "ours" if name == BEST else "plain"


def figures(cells: Cells) -> dict[str, bytes]:
    """PNG by name: the times of every setting."""
    chosen = list(dict.fromkeys(setting for setting, _ in cells))
    return {"times": picture(bars(cells, chosen, (MODE,), _colour, 2))}
