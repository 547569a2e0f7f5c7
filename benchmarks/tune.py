"""Which tiles are fastest on this GPU? `python -m benchmarks.tune` proposes rows for a person.

Of every tile that could be, those that do not fit the chip are dropped by compiling them; the rest
must give what the shipped row gives and then take turns with it. Nothing is written into
configs.py: a person reads the proposal and commits it. `--fit 80` stops after the compiler, for a
chip that is not here.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import adapter_kernels
from adapter_kernels.arch import ARCHS, capability_of
from adapter_kernels.launch import Launch
from adapter_kernels.zero_init_attention.configs import (
    DIRECTIONS,
    HEAD_DIMS,
    UNMEASURED,
    TileConfig,
    tile,
)
from benchmarks import harness, specialisations
from benchmarks.ahead_of_time import compile_for, complaints
from benchmarks.command import folder_of
from benchmarks.harness import (
    FAILED,
    TIMED,
    Candidate,
    DeviceLost,
    Expected,
    Protocol,
    ResultFile,
    Row,
    Work,
)
from benchmarks.roofline import DTYPES
from benchmarks.specialisations import Specialisation, forms, launch_of
from benchmarks.workers import WorkerLost, positive, side_by_side
from llama_adapter.options import Parser

PROTOCOL = Protocol(rounds=7, warmup=3, round_ms=5.0)
# a proposal below this is noise: the shipped row stays
WORTH = 1.02
# what a kernel fills
RESULTS = {
    "forward": ("out_ptr", "lse_ptr"),
    "prompt_forward": ("out_ptr",),
    "backward_dq": ("dq_ptr", "delta_ptr"),
    "backward_dkv": ("dk_ptr", "dv_ptr"),
    "prompt_backward": ("dprompt_k_ptr", "dprompt_v_ptr", "dgate_ptr"),
}
RESULTS["backward_dkv_grouped"] = RESULTS["backward_dkv"]
RESULTS["decode"] = ("partial_ptr", "lse_ptr")
ROWS = {"prompt_forward": (16, 32, 64, 128), "backward_dkv": (16, 32, 64, 128)}
ROWS["prompt_backward"] = ROWS["prompt_forward"]
KEYS = {"prompt_forward": (16,), "prompt_backward": (16,)}
# what the numbers of a tile are
FIELDS = "block_m, block_n, num_warps, num_stages"
# roundings by which tiles may differ: they sum in another order
ROUNDINGS = 8.0


def candidates(direction: str, shipped: TileConfig) -> list[TileConfig]:
    """Every tile that could be, the shipped one first."""
    kind = direction.removesuffix("_grouped")
    reload = (False, True) if direction == "forward" else (False,)
    sizes = product(
        ROWS.get(kind, (32, 64, 128)), KEYS.get(kind, (32, 64, 128)), (4, 8), (1, 2, 3, 4), reload
    )
    found = [replace(shipped, speed=UNMEASURED), *(TileConfig(*values) for values in sizes)]
    return list(dict.fromkeys(found))


def fits(direction: str, capability: int, head_dim: int, config: TileConfig) -> bool:
    """Whether the kernel fits the chip with this tile, in all its forms, spills or not."""
    for spec in forms(capability, direction, head_dim, torch.bfloat16):
        try:
            found = compile_for(launch_of(spec, config), capability)
        except harness.FAILURES:
            return False
        if complaints(found, spec, may_spill=True):
            return False
    return True


def fitting(
    direction: str, capability: int, head_dim: int, configs: Sequence[TileConfig], processes: int
) -> list[TileConfig]:
    """Those that fit, in their order; compiled side by side."""
    one = partial(fits, direction, capability, head_dim)
    good = side_by_side(one, configs, processes)
    return [config for config, fit in zip(configs, good, strict=True) if fit]


class Tensors:
    """Random tensors of a launch: the same ones, in the order of creation, for every tile."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        """Nothing is made yet."""
        self.device, self.seed = device, seed
        self.made: list[Tensor] = []
        self.at = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        if self.at == len(self.made):
            generator = torch.Generator(self.device).manual_seed(self.seed + self.at)
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device=self.device)
            # the integers of what is timed are lengths: full caches, where random ones are empty
            whole = (
                x.to(dtype)
                if dtype.is_floating_point
                else x.new_full(shape, specialisations.TOKENS, dtype=dtype)
            )
            self.made.append(whole)
        self.at += 1
        return self.made[self.at - 1]

    def launch(self, spec: Specialisation, config: TileConfig) -> Launch:
        """A launch over these tensors."""
        self.at = 0
        return launch_of(spec, config, self)


def results_of(spec: Specialisation, launch: Launch) -> dict[str, Tensor]:
    """What a launch fills, by name."""
    names = RESULTS[spec.direction]
    return {name.removesuffix("_ptr"): launch.arguments[name] for name in names}


def work_of(spec: Specialisation, tensors: Tensors, config: TileConfig) -> Work:
    """One launch, its results poisoned before: a row that is not written is not right."""
    launch = tensors.launch(spec, config)
    filled = results_of(spec, launch)

    def poison() -> None:
        for x in filled.values():
            x.fill_(float("nan"))

    def run(_: None) -> dict[str, Tensor]:
        launch.run()
        return filled

    return Work(poison, run)


def expected(spec: Specialisation, tensors: Tensors, shipped: TileConfig) -> dict[str, Expected]:
    """What the shipped tile gives, which the tests hold to the truth, and how near others stay."""
    work = work_of(spec, tensors, shipped)
    work.before()
    found = {}
    for name, x in work.run(None).items():
        truth = x.to(torch.float32, copy=True)
        bound = ROUNDINGS * torch.finfo(spec.dtype).eps * float(truth.abs().max())
        found[name] = Expected(truth, bound)
    return found


def measure(
    spec: Specialisation, configs: Sequence[TileConfig], device: torch.device, protocol: Protocol
) -> dict[str, Row]:
    """Rows of the tiles by `label`, the shipped one's first; without that one's there is no other.

    Raises:
        DeviceLost: a tile broke the GPU's context.
    """
    tensors = Tensors(device)
    try:
        truth = expected(spec, tensors, configs[0])
    except harness.FAILURES as error:
        return {label(configs[0]): {"status": FAILED, "reason": harness.one_line(error)}}
    return harness.measure(
        [
            Candidate(label(config), partial(work_of, spec, tensors, config), truth)
            for config in configs
        ],
        device,
        protocol,
    )


def label(config: TileConfig) -> str:
    """A tile as configs.py spells it, without what was measured."""
    again = ", reload_q=True" if config.reload_q else ""
    numbers = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    return f"TileConfig({', '.join(map(str, numbers))}{again})"


def proposal(rows: dict[str, Row], shipped: str, gpu: str, spec: Specialisation) -> str:
    """One line: the row to commit, or that the shipped one stays."""
    timed = {name: row for name, row in rows.items() if row["status"] == TIMED}
    where = f"{spec.direction}, D = {spec.head_dim}"
    if shipped not in timed:
        row = rows[shipped]
        return f"{where}: the shipped {shipped} is {row['status']}: {row['reason']}"
    best = min(timed, key=lambda name: timed[name]["ms"][0])
    gain = harness.ratio(timed[shipped], timed[best])
    ms = timed[best]["ms"][0]
    if best == shipped or gain < WORTH:
        return f"{where}: {shipped} stays, {timed[shipped]['ms'][0]:.4g} ms on {gpu}"
    speed = f"{ms:.4g} ms on {gpu}, {gain:.2f}x {shipped.removeprefix('TileConfig')}"
    return f'{where}: {best[:-1]}, speed="{speed}")'


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Directions and head widths that were asked for."""
    yield from product(options.direction or DIRECTIONS, options.head_dim or (64, 128))


def run(options: argparse.Namespace) -> None:
    """Compile, measure where there is a GPU, and print the proposals."""
    device = torch.device("cuda" if options.fit is None else "cpu")
    capability = options.fit or capability_of(device)
    if capability is None:
        raise ValueError("this GPU is older than all rows: compute capability 8.0 is needed")
    results = None
    if options.fit is None:
        folder = options.output or folder_of(device)
        folder.mkdir(parents=True, exist_ok=True)
        sources = [Path(adapter_kernels.__file__).parent, Path(__file__)]
        sources += [Path(module.__file__ or "") for module in (harness, specialisations)]
        results = ResultFile(
            folder / "tune.json", "tune", harness.describe(device, sources), options.fresh
        )
    for direction, head_dim in wanted(options):
        spec = forms(capability, direction, head_dim, DTYPES["bfloat16"])[0]
        shipped = tile(capability, direction, head_dim, spec.dtype)
        cell = {"direction": direction, "head_dim": head_dim}
        rows = {} if results is None else results.of(cell)
        if not any(row["status"] == TIMED for row in rows.values()):
            tried = candidates(direction, shipped)
            found = fitting(direction, capability, head_dim, tried, options.processes)
            if results is None:
                fit = f"{len(found)} of {len(tried)} tiles fit"
                print(f"{direction}, D = {head_dim}, sm_{capability}: {fit}, of {FIELDS}")
                ours = replace(shipped, speed=UNMEASURED)
                for config in found:
                    mark = "  shipped" if config == ours else ""
                    print(f"  {label(config)}{mark}", flush=True)
                continue
            # the shipped row is measured whatever the compiler says of it: all are held against it
            configs = list(dict.fromkeys([replace(shipped, speed=UNMEASURED), *found]))
            # a tile that broke the GPU before is not tried again
            configs = [config for config in configs if label(config) not in results.of(cell)]
            try:
                results.add(cell, measure(spec, configs, device, PROTOCOL))
            except DeviceLost as lost:
                results.add(cell, {lost.name: lost.row})
                raise
            finally:
                results.write({})
            rows = results.of(cell)
        gpu = torch.cuda.get_device_name(device)
        print(proposal(rows, label(shipped), gpu, spec), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Propose rows.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.tune", description=__doc__, allow_abbrev=False)
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: all")
    parser.add_argument(
        "--head-dim", action="append", type=int, choices=HEAD_DIMS, help="default: 64 and 128"
    )
    parser.add_argument("--fit", type=int, choices=list(ARCHS), help="only compile, for this chip")
    parser.add_argument("--processes", type=positive, default=2, help="that compile side by side")
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help="folder (default: the device's results)")
    options = parser.parse(arguments)
    if options.fit is None and not torch.cuda.is_available():
        print("tune: error: torch sees no GPU here; --fit 80 compiles for one", file=sys.stderr)
        return 2
    if options.fit is not None and options.output is not None:
        print("tune: error: --fit measures nothing that --output could keep", file=sys.stderr)
        return 2
    try:
        run(options)
    except KeyboardInterrupt:
        kept = "the same command continues" if options.fit is None else "nothing is kept"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        return 130
    except (DeviceLost, WorkerLost, OSError, ValueError) as error:
        print(f"tune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
