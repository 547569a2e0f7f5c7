"""How many tokens of fine-tuning fit in how much memory? `python -m benchmarks.memory`.

The largest pass, forward, backward and optimiser's step, of a frozen base in bfloat16, int8 and NF4
under caps of 12 to 141 GB: computed from what a step must keep, and on a GPU measured by steps of
packed records under a cap that torch's allocator is held to. On a processor the bytes that a step
keeps are counted, of a model of its size. `--quick` only tries the machinery out, on a toy.
"""

import argparse
import gc
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import adapter_kernels
import llama_adapter
from benchmarks import command, generate_models, harness, train_step_problem
from benchmarks.generate_models import CONFIGS, random_model, stored_bytes
from benchmarks.harness import FAILED, TIMED, Protocol, Row
from benchmarks.reporting import MET, MISSED, PENDING, TRIAL, table
from benchmarks.roofline import DTYPES
from benchmarks.train_step_problem import alpaca_like
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.quantize import quantize
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.packed import micro_batches, pack
from llama_adapter.trainer import Trainer

GB = 1e9
# of the driver, which torch's allocator does not see
CONTEXT = 0.6 * GB
# a search ends where the next size is so much larger, or smaller than this
STEP, FEWEST = 1.03, 128
# nothing is timed
PROTOCOL = Protocol(rounds=1, warmup=0, round_ms=0.0)
# model, base and cap in GB to the tokens that must fit
TARGETS = {("llama-7b", "bfloat16", 24): 2900, ("llama-7b", "nf4", 12): 2900}
HERE, MODEL = Path(__file__).parent, Path(llama_adapter.__path__[0])
SOURCES = [Path(adapter_kernels.__file__).parent, Path(__file__), MODEL / "data" / "packed.py"]
SOURCES += [MODEL / f"{name}.py" for name in ("adapter", "model", "packing", "trainer")]
SOURCES += [MODEL / "checkpoints" / "quantize.py"]
SOURCES += [Path(one.__file__ or "") for one in (generate_models, harness, train_step_problem)]
LEGEND = (
    "A pass is forward, backward and AdamW's step of prompts and gates on a frozen base with "
    "random weights; records of Alpaca's lengths are packed, the template's beginnings computed "
    "once, and tokens are those computed. Kept: what a token must leave for the backward pass, "
    "4 C + 2 G D of attention and 2 C + 2 F of the rest in every adapted layer. Computed: what a "
    "cap leaves beside weights, driver and the gradients of one layer, over that. Measured: the "
    "largest pass that torch's allocator takes under the cap, within 3 %. GB are 10^9 bytes."
)


@dataclass(frozen=True)
class Setting:
    """A base under a cap.

    Attributes:
        model: name of its shape.
        base: how its weights are held: a dtype, or a format of `quantize`.
        cap: GB, 0 for no cap.
    """

    model: str
    base: str
    cap: int

    def describe(self) -> str:
        """In words."""
        return f"{self.model} {self.base}" + (f" in {self.cap} GB" if self.cap else "")


def settings(device: str, extent: str) -> list[Setting]:
    """What is measured: "quick", "core" or "full", which holds what core does."""
    if extent == "quick":
        return [Setting("toy", "float32" if device == "cpu" else "bfloat16", 0)]
    if device == "cpu":
        return [Setting("25m", "float32", 0), Setting("25m", "int8", 0)]
    core = [
        Setting("llama-7b", base, cap)
        for base, caps in (("bfloat16", (24, 40, 80, 141)), ("nf4", (12, 16, 24)), ("int8", (16,)))
        for cap in caps
    ]
    rest = [Setting("llama-3-8b", base, cap) for base, cap in (("bfloat16", 24), ("nf4", 12))]
    return core + rest * (extent == "full")


def kept_numbers(config: LlamaConfig, adapted: int) -> int:
    """Numbers that a token leaves for the backward pass: see LEGEND."""
    keys = config.kv_heads * config.head_dim
    return adapted * (4 * config.dim + 2 * keys + 2 * config.hidden_dim)


def passing_numbers(config: LlamaConfig) -> int:
    """Numbers of a token that live while one layer's gradients are taken: of gate, up and their
    product, of the layer's input and output, and the model's final hidden state."""
    return 3 * config.hidden_dim + 3 * config.dim


def computed_tokens(config: LlamaConfig, adapted: int, cap: float, weights: int) -> int:
    """The largest pass in half precision under a cap in bytes, beside weights of so many bytes.

    Args:
        config: of the model.
        adapted: layers with a prompt.
        cap: bytes, of which the driver takes CONTEXT.
        weights: bytes of the base.
    """
    each = 2 * (kept_numbers(config, adapted) + passing_numbers(config))
    return max(0, int((cap - CONTEXT - weights) / each))


def first_pass(tokens: int, vocab_size: int) -> tuple[list[Example], list[tuple[int, ...]]]:
    """As many records as fit one pass of so many tokens, and their beginnings."""
    examples, starts = alpaca_like(max(2, tokens // 40), vocab_size)
    return next(iter(micro_batches(examples, tokens, starts))), starts


class Problem:
    """A base, and passes on it."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        """Make the base and its adapter."""
        self.setting, self.device = setting, device
        self.config = CONFIGS[setting.model]
        quantised = setting.base not in DTYPES
        half = "float32" if device.type == "cpu" else "bfloat16"
        self.base = random_model(self.config, DTYPES[half if quantised else setting.base], device)
        if quantised:
            quantize(self.base, setting.base)
        generator = torch.Generator().manual_seed(1)
        self.adapter = Adapter(AdapterConfig(), self.config, generator=generator).to(device)

    @property
    def weights(self) -> int:
        """Bytes of the base."""
        return sum(stored_bytes(parameter) for parameter in self.base.parameters())

    @property
    def adapted(self) -> int:
        """Layers with a prompt."""
        return len(self.adapter.layers)

    def take(self, tokens: int) -> int:
        """One pass of at most so many tokens; returns how many were computed."""
        examples, starts = first_pass(tokens, self.config.vocab_size)
        trainer = Trainer(self.base, self.adapter, micro_batch_tokens=tokens, prefixes=starts)
        trainer.step(Batch(tuple(examples), tuple(trainer.groups)), 1e-3)
        return len(pack(examples, prefixes=starts).tokens)

    def fits(self, tokens: int) -> int:
        """The tokens of a pass of at most so many, or 0 where memory does not hold it."""
        try:
            return self.take(tokens)
        except torch.OutOfMemoryError:
            return 0
        finally:
            self.adapter.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    def largest(self, first: int) -> int:
        """The largest pass that memory holds, searched from a first guess."""
        most = good = bad = 0
        at = max(first, FEWEST)
        while at >= FEWEST and not (good and bad and bad <= STEP * good):
            found = self.fits(at)
            most = max(most, found)
            good, bad = (at, bad) if found else (good, at)
            at = (good + bad) // 2 if bad else int(at * 1.25)
        return most

    def kept_bytes(self, tokens: int) -> float:
        """Bytes that a pass keeps for its backward pass, a token."""
        examples, starts = first_pass(tokens, self.config.vocab_size)
        trainer = Trainer(self.base, self.adapter, micro_batch_tokens=tokens, prefixes=starts)
        held = {
            x.untyped_storage().data_ptr()
            for x in (*self.base.parameters(), *self.adapter.parameters())
        }
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            # a quantised weight has no storage of its own, and is none of a token's
            if type(x) is Tensor and x.untyped_storage().data_ptr() not in held:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        batch = pack(examples, self.device, starts)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = trainer.hidden(batch)
        assert hidden.requires_grad
        return sum(kept.values()) / len(batch.tokens)


def measure(setting: Setting, device: torch.device) -> Row:
    """One row: what is computed, and what is measured or counted."""
    share = 1.0
    if device.type == "cuda" and setting.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (setting.cap * GB - CONTEXT) / total
        if share > 1:
            return {"status": FAILED, "reason": f"this GPU has {total / GB:.0f} GB"}
    try:
        # without a cap: random weights are made wider than a quantised base holds them
        given = Problem(setting, device)
    except (ValueError, torch.OutOfMemoryError) as error:
        return {"status": FAILED, "reason": harness.one_line(error)}
    size = 4 if device.type == "cpu" else 2
    row: Row = {
        "status": TIMED,
        "weights": given.weights,
        "kept_bytes": size * kept_numbers(given.config, given.adapted),
    }
    if device.type == "cpu" or not setting.cap:
        return {**row, "counted_bytes": round(given.kept_bytes(700))}
    computed = computed_tokens(given.config, given.adapted, setting.cap * GB, given.weights)
    row["computed_tokens"] = computed
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        row["measured_tokens"] = given.largest(int(0.9 * computed))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return row


def verdict(setting: Setting, row: Row) -> str:
    """What a row says of its target, or "-"."""
    wanted = TARGETS.get((setting.model, setting.base, setting.cap))
    if wanted is None:
        return "-"
    if "measured_tokens" not in row:
        return f"{wanted}: {PENDING}"
    return f"{wanted}: {MET if row['measured_tokens'] >= wanted else MISSED}"


def report(rows: dict[Setting, Row], environment: Row, trial: bool) -> str:
    """All rows as Markdown."""
    packages = environment["packages"]
    head = [
        "# Memory of a step", "",
        f"{environment['device']}, torch {packages['torch']}, triton {packages['triton']}",
        LEGEND, *([TRIAL] if trial else []), "",
    ]  # fmt: skip
    names = ["base", "weights, GB", "kept kB a token", "counted kB", "computed", "measured", "goal"]
    lines = []
    for setting, row in rows.items():
        if row["status"] != TIMED:
            lines.append([setting.describe(), row["reason"][:80], *["-"] * 4, verdict(setting, {})])
            continue
        counted = row.get("counted_bytes")
        lines.append([
            setting.describe(),
            f"{row['weights'] / GB:.2f}",
            f"{row['kept_bytes'] / 1e3:.1f}",
            "-" if counted is None else f"{counted / 1e3:.1f}",
            str(row.get("computed_tokens", "-")),
            str(row.get("measured_tokens", "-")),
            verdict(setting, row),
        ])  # fmt: skip
    return "\n".join([*head, *table(names, lines), ""])


def run(options: argparse.Namespace) -> None:
    """Measure, then report."""
    device = torch.device(options.device)
    results = command.open_results("memory", options, SOURCES, PROTOCOL, ("torchao",))
    found: dict[Setting, Row] = {}
    for (setting,) in command.in_time(settings(device.type, command.extent_of(options)), results):
        cell: Row = {"shape": asdict(setting), "mode": "memory"}
        if "ours" not in results.of(cell):
            results.add(cell, {"ours": measure(setting, device)})
            results.write({})
            print(f"{setting.describe()}: {results.of(cell)['ours']}", flush=True)
        found[setting] = results.of(cell)["ours"]
    text = report(found, results.environment, trial=options.quick)
    command.publish(results, text, {}, {})


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    return command.carry_out("memory", __doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
