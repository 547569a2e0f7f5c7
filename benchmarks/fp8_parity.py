"""Does fine-tuning on a base in fp8 end where it ends on the base itself?

`python -m benchmarks.fp8_parity` runs the bundled recipe on the bundled base, in bfloat16 and fp8,
from three seeds each, and compares the losses on held-out records at the end. On a CPU torch
multiplies the same 8-bit numbers, slowly. `--quick` stops after a few steps. Exits with 1 where the
gate is shut.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.command import folder_of
from llama_adapter import assets
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.checkpoints.quantize import round_to_float8
from llama_adapter.options import Parser
from llama_adapter.quickstart import bundled_config
from llama_adapter.run_folder import describe_environment
from llama_adapter.training import finetune

SEEDS = (0, 1, 2)
QUICK_STEPS = 24


@dataclass(frozen=True)
class Parity:
    """Losses at the end, in nats per label, a seed after the other.

    Attributes:
        exact: on the base in bfloat16.
        fp8: on the same base in fp8.
    """

    exact: tuple[float, ...]
    fp8: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Mean over the seeds of how far fp8 is from the exact run of the same seed."""
        pairs = zip(self.exact, self.fp8, strict=True)
        return sum(abs(exact - fp8) for exact, fp8 in pairs) / len(self.exact)

    @property
    def spread(self) -> float:
        """How far the exact runs of different seeds lie apart."""
        return max(self.exact) - min(self.exact)

    @property
    def passes(self) -> bool:
        """Whether fp8 changes the result less than the choice of a seed does; NaN does not."""
        return self.difference < self.spread

    def report(self, device: torch.device, steps: int | None) -> str:
        """As Markdown."""
        environment = describe_environment(device)
        where = environment["device"]
        lines = [
            "# Loss parity of fp8",
            "",
            f"The bundled recipe on the bundled base, {where}, torch {torch.__version__}, "
            f"{'all steps' if steps is None else f'{steps} steps'}: loss on held-out records at "
            "the end, in nats per label. The gate is open where the mean over the seeds of |fp8 - "
            "bfloat16| is below the spread of bfloat16's losses by seed, largest less least.",
            "",
            "| seed | bfloat16 | fp8 | fp8 less bfloat16 |",
            "|---|---|---|---|",
        ]
        for seed, exact, fp8 in zip(SEEDS, self.exact, self.fp8, strict=True):
            lines.append(f"| {seed} | {exact:.5f} | {fp8:.5f} | {fp8 - exact:+.5f} |")
        verdict = "open" if self.passes else "shut"
        lines += [
            "",
            f"Mean difference {self.difference:.5f}, spread {self.spread:.5f}: the gate is "
            f"**{verdict}**.",
        ]
        return "\n".join(lines) + "\n"


def base_of(fp8: bool, device: torch.device) -> Base:
    """The bundled base in bfloat16, or in fp8."""
    if fp8 and device.type == "cuda":
        return load_base(assets.BASE, dtype=torch.bfloat16, device=device, quantize="fp8")
    base = load_base(assets.BASE, dtype=torch.bfloat16, device=device)
    if fp8:
        # refused on a CPU for its slowness, which is no matter here
        base = replace(base, fingerprint=fingerprint(base.model, base.name))
        round_to_float8(base.model)
    return base


def compare(device: torch.device, steps: int | None) -> Parity:
    """Run every seed on both bases.

    Args:
        device: that computes.
        steps: of every run; None takes all of the recipe's.
    """
    found: list[list[float]] = []
    for fp8 in (False, True):
        base, losses = base_of(fp8, device), []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as name:
                config = bundled_config(
                    Path(name), seed=seed, max_steps=steps, val_data=assets.FOLLOW_HELDOUT
                )
                result = finetune(config, base=base, progress=False)
            losses.append(result.val_losses[max(result.val_losses)])
            print(f"{'fp8' if fp8 else 'bfloat16'}, seed {seed}: {losses[-1]:.5f}", flush=True)
        found.append(losses)
    return Parity(tuple(found[0]), tuple(found[1]))


def main(arguments: list[str] | None = None) -> int:
    """Compare, report; returns 0 where the gate is open, 1 where it is shut, 2 without a GPU."""
    parser = Parser(prog="python -m benchmarks.fp8_parity", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of every run")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what computes; a GPU where there is one",
    )
    parser.add_argument("--output", type=Path, help="folder (default: the device's results)")
    options: argparse.Namespace = parser.parse(arguments)
    device, steps = torch.device(options.device), QUICK_STEPS if options.quick else None
    if device.type == "cuda" and not torch.cuda.is_available():
        print("fp8_parity: error: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    parity = compare(device, steps)
    text = parity.report(device, steps)
    folder = options.output or (
        Path("runs/fp8_parity-quick") if options.quick else folder_of(device)
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fp8_parity.md", text.encode())
    print(f"\n{text}\nwritten to {folder}")
    return 0 if parity.passes else 1


if __name__ == "__main__":
    sys.exit(main())
