"""How many tokens of fine-tuning fit in how much memory? `python -m benchmarks.memory`.

The largest pass, forward, backward and optimiser's step, of a frozen base in bfloat16, int8 and NF4
under caps of 12 to 141 GB: computed from what a step must keep, and on a GPU measured by steps of
packed records under a cap that torch's allocator is held to. On a processor the bytes that a step
keeps are counted, of a model of its size. `--quick` only tries the machinery out, on a toy.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import ref

import torch
from torch import Tensor

import adapter_kernels
import llama_adapter
from benchmarks import command, generate_models, harness, train_step_problem
from benchmarks.generate_models import CONFIGS, plain_tensors, random_model, stored_bytes
from benchmarks.harness import FAILED, TIMED, Protocol, Row
from benchmarks.reporting import MET, MISSED, PENDING, TRIAL, table
from benchmarks.roofline import DTYPES
from benchmarks.train_step_problem import alpaca_like
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.quantize import quantize
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.packed import Prefix, micro_batches, pack
from llama_adapter.recompute import RECOMPUTED
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
    "4 C + 2 G D + 2 F numbers in every adapted layer, without 2 F where the MLP is computed again "
    "and C alone where the block is. Computed: what a cap leaves beside weights, driver and the "
    "gradients of one layer, over that. Measured: the largest pass that torch's allocator takes "
    "under the cap, within 3 %. GB are 10^9 bytes."
)


@dataclass(frozen=True)
class Setting:
    """A base under a cap.

    Attributes:
        model: name of its shape.
        base: how its weights are held: a dtype, or a format of `quantize`.
        cap: GB, 0 for no cap.
        recompute: what the backward computes again, as in recompute.py.
    """

    model: str
    base: str
    cap: int
    recompute: str | None = None

    def describe(self) -> str:
        """In words."""
        again = f", {self.recompute} computed again" if self.recompute else ""
        return f"{self.model} {self.base}" + (f" in {self.cap} GB" if self.cap else "") + again


def settings(device: str, extent: str) -> list[Setting]:
    """What is measured: "quick", "core" or "full", which holds what core does."""
    if extent == "quick":
        return [Setting("toy", "float32" if device == "cpu" else "bfloat16", 0)]
    if device == "cpu":
        again = [Setting("25m", "float32", 0, recompute) for recompute in RECOMPUTED]
        return [Setting("25m", "float32", 0), Setting("25m", "int8", 0), *again]
    core = [
        Setting("llama-7b", base, cap)
        for base, caps in (("bfloat16", (24, 40, 80, 141)), ("nf4", (12, 16, 24)), ("int8", (16,)))
        for cap in caps
    ]
    core += [Setting("llama-7b", "bfloat16", 24, recompute) for recompute in RECOMPUTED]
    rest = [Setting("llama-3-8b", base, cap) for base, cap in (("bfloat16", 24), ("nf4", 12))]
    return core + rest * (extent == "full")


def kept_numbers(config: LlamaConfig, recompute: str | None = None) -> int:
    """Numbers that a token of an adapted layer leaves for the backward pass: see LEGEND."""
    keys = config.kv_heads * config.head_dim
    attention, mlp = 4 * config.dim + 2 * keys, 2 * config.hidden_dim
    return {None: attention + mlp, "mlp": attention, "block": config.dim}[recompute]


def passing_numbers(config: LlamaConfig, recompute: str | None = None) -> int:
    """Numbers of a token that live while one layer's gradients are taken: of gate, up and their
    product, of the layer's input and output, the model's final hidden state, and what is computed
    again."""
    again = kept_numbers(config) - kept_numbers(config, recompute)
    return 3 * config.hidden_dim + 3 * config.dim + again


def computed_tokens(
    config: LlamaConfig, adapted: int, cap: float, weights: int, recompute: str | None = None
) -> int:
    """The largest pass in half precision under a cap in bytes, beside weights of so many bytes.

    Args:
        config: of the model.
        adapted: layers with a prompt.
        cap: bytes, of which the driver takes CONTEXT.
        weights: bytes of the base.
        recompute: what the backward computes again.
    """
    each = 2 * (adapted * kept_numbers(config, recompute) + passing_numbers(config, recompute))
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
        trainer = self._trainer(tokens, starts)
        trainer.step(Batch(tuple(examples), tuple(trainer.groups)), 1e-3)
        return len(pack(examples, prefixes=starts).tokens)

    def _trainer(self, tokens: int, starts: Sequence[Prefix]) -> Trainer:
        return Trainer(
            self.base,
            self.adapter,
            micro_batch_tokens=tokens,
            prefixes=starts,
            recompute=self.setting.recompute,
        )

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
        trainer = self._trainer(tokens, starts)
        parameters = (*self.base.parameters(), *self.adapter.parameters())
        held = {
            plain.untyped_storage().data_ptr() for x in parameters for plain in plain_tensors(x)
        }
        saved: list[ref[Tensor]] = []

        def keep(x: Tensor) -> Tensor:
            # a quantised weight has no storage of its own, and is none of a token's
            if type(x) is Tensor and x.untyped_storage().data_ptr() not in held:
                saved.append(ref(x))
            return x

        batch = pack(examples, self.device, starts)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = trainer.hidden(batch)
        assert hidden.requires_grad
        # below the adapted layers what was saved is gone again
        storages = [x.untyped_storage() for one in saved if (x := one()) is not None]
        kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
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
        "kept_bytes": size * given.adapted * kept_numbers(given.config, setting.recompute),
    }
    if device.type == "cpu" or not setting.cap:
        return {**row, "counted_bytes": round(given.kept_bytes(700))}
    cap, again = setting.cap * GB, setting.recompute
    computed = computed_tokens(given.config, given.adapted, cap, given.weights, again)
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
