"""How is anything timed here? Only what is right, in turns, and with all that a reader must know.

Every candidate is first held against the truth; one that is wrong, or raises, is a row with its
reason and no time. The others take turns in rounds, each in another order: what ran before, and a
clock that falls, meet all. Rows are written cell by cell, and the same command continues.
"""

import gc
import hashlib
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.run_folder import describe_environment

Row = dict[str, Any]
Results = Mapping[str, Tensor]

TIMED, WRONG, FAILED, SKIPPED = "timed", "wrong", "failed", "skipped"
# what a provider that cannot run raises: out of memory, unsupported, does not compile
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AssertionError)
if find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES += (TritonError,)
# a gate against mistakes; how accurate kernels are is what the tests are for
ERROR_FACTOR, FLOOR_ROUNDINGS = 3.0, 4.0
# more than the second-level cache of any GPU holds
FLUSH_BYTES = 256 * 2**20
MAX_REPEATS = 100
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


class Work(NamedTuple):
    """What of a candidate is timed: `run`, on what `before` made, which is not timed."""

    before: Callable[[], Any]
    run: Callable[[Any], Results]


class Expected(NamedTuple):
    """The truth of one result, the largest error that passes, and what counts as the error."""

    truth: Tensor
    bound: float
    distance: Callable[[Tensor, Tensor], Tensor] = torch.sub


@dataclass(frozen=True)
class Candidate:
    """One provider in one cell.

    Attributes:
        name: of the provider.
        make: its work; raises one of FAILURES where it is not supported.
        expected: by name, what its results must be.
        observed: whether the kernels of a pass on a GPU are listed: minutes where it is long.
    """

    name: str
    make: Callable[[], Work]
    expected: Mapping[str, Expected]
    observed: bool = True


@dataclass(frozen=True)
class Protocol:
    """How long is measured.

    Attributes:
        rounds: in each of which every candidate has its turn; 5 at least, for the quantiles.
        warmup: passes before the first round.
        round_ms: how long a turn should take; a slower pass is still taken once.
    """

    rounds: int = 7
    warmup: int = 3
    round_ms: float = 20.0


class DeviceLost(RuntimeError):
    """The GPU's context did not survive a candidate; `name` is the candidate, `row` its row."""

    def __init__(self, name: str, row: Row) -> None:
        """Keep what a continued run must know."""
        super().__init__(f"{name} broke the GPU's context: {row['reason']}")
        self.name, self.row = name, row


def expect(truth: Results, eager: Results) -> dict[str, Expected]:
    """What passes: an error up to ERROR_FACTOR times that of the plain formula in the same dtype.

    Args:
        truth: results in a wider dtype.
        eager: the same results of the plain formula, in the dtype of the candidates.

    Returns:
        By name the truth, and a bound to which FLOOR_ROUNDINGS of the largest value are added, as
        the plain formula may be right by luck, and the float32 roundings of sums in any order: a
        result of few numbers, such as dgate, sums over all of a larger one.
    """
    found, widest = {}, max(exact.numel() for exact in truth.values())
    for name, exact in truth.items():
        terms = max(widest / max(exact.numel(), 1), 1.0)
        rounding = FLOOR_ROUNDINGS * torch.finfo(eager[name].dtype).eps
        rounding += math.sqrt(terms) * torch.finfo(torch.float32).eps
        error = _largest(eager[name].to(exact.dtype) - exact)
        found[name] = Expected(exact, ERROR_FACTOR * error + rounding * _largest(exact))
    return found


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(results: Results, expected: Mapping[str, Expected]) -> tuple[dict[str, float], str]:
    """Hold results against the truth.

    Returns:
        By name the largest error, and what is wrong, or "".
    """
    errors, wrong = {}, []
    for name, (truth, bound, distance) in expected.items():
        if name not in results:
            wrong.append(f"{name} is missing")
            continue
        got = results[name].detach()
        if got.shape != truth.shape:
            wrong.append(f"{name} must be {tuple(truth.shape)}, got {tuple(got.shape)}")
            continue
        errors[name] = _largest(distance(got.to(truth.dtype), truth))
        # the comparison is false for NaN too
        if not errors[name] <= bound:
            wrong.append(f"{name} is off by {errors[name]:.3g}, more than {bound:.3g}")
    return {k: v if math.isfinite(v) else -1.0 for k, v in errors.items()}, "; ".join(wrong)


def one_line(error: BaseException) -> str:
    """An exception as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class _Device:
    """Timing on one device: CUDA's events behind a cold cache, or a clock of the processor."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES * self.cuda, dtype=torch.int8, device=device)

    def alive(self) -> bool:
        """Whether the device still computes: an illegal access ends every later call too."""
        try:
            self.flush.zero_()
            if self.cuda:
                torch.cuda.synchronize()
        except FAILURES:
            return False
        return True

    def passes(self, work: Work, count: int) -> list[float]:
        """Milliseconds of `count` passes."""
        if not self.cuda:
            found = []
            for _ in range(count):
                state = work.before()
                start = time.perf_counter()
                work.run(state)
                found.append((time.perf_counter() - start) * 1e3)
            return found
        events = []
        for _ in range(count):
            state = work.before()
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work.run(state)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def observe(self, work: Work, kernels: bool) -> Row:
        """Of one pass on a GPU: the most memory beyond what was there, and the timed `kernels`."""
        if not self.cuda:
            return {}
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state = work.before()
        torch.cuda.synchronize()
        with torch.profiler.profile() if kernels else nullcontext() as profile:
            work.run(state)
            torch.cuda.synchronize()
        found: Row = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        if profile is not None:
            of_gpu = (one for one in profile.events() or [] if one.device_type.name == "CUDA")
            found["kernels"] = sorted({one.name for one in of_gpu})
        return found


def _gate(candidate: Candidate, device: _Device, protocol: Protocol) -> tuple[Work | None, Row]:
    """The candidate's work if it may be timed, warm, and the first half of its row."""
    try:
        work = candidate.make()
        errors, wrong = check(work.run(work.before()), candidate.expected)
        row: Row = {"errors": errors}
        if wrong:
            return None, {**row, "status": WRONG, "reason": wrong}
        row |= device.observe(work, candidate.observed)
        row["warm_ms"] = device.passes(work, protocol.warmup)[-1]
    except FAILURES as error:
        return None, {"status": FAILED, "reason": one_line(error)}
    return work, row


def measure(
    candidates: Iterable[Candidate], on: torch.device, protocol: Protocol
) -> dict[str, Row]:
    """Time the candidates that are right, in turns.

    Args:
        candidates: of one cell.
        on: the device of their tensors.
        protocol: how long.

    Returns:
        By name: "status" TIMED, WRONG or FAILED; with TIMED "ms" as the median and the 20 % and
        80 % quantiles over all passes, "round_ms" with the median of every round, and "passes";
        otherwise "reason". "errors" by result, -1 where not finite. On a GPU also "clocks" before
        and after, "peak_bytes", and of an observed candidate "kernels".

    Raises:
        DeviceLost: a candidate broke the GPU's context.
    """
    device, clocks = _Device(on), [nvidia_smi(on, CLOCKS)]
    rows: dict[str, Row] = {}
    works: dict[str, Work] = {}
    for candidate in candidates:
        work, rows[candidate.name] = _gate(candidate, device, protocol)
        if work is not None:
            works[candidate.name] = work
        elif not device.alive():
            raise DeviceLost(candidate.name, rows[candidate.name])
        if device.cuda:  # so that no candidate runs out of memory for another's sake
            gc.collect()
            torch.cuda.empty_cache()
    times: dict[str, list[list[float]]] = {name: [] for name in works}
    for turn in range(protocol.rounds):
        for name, work in random.Random(turn).sample(list(works.items()), len(works)):
            wanted = round(protocol.round_ms / max(rows[name]["warm_ms"], 1e-6))
            try:
                times[name].append(device.passes(work, min(max(wanted, 1), MAX_REPEATS)))
            except FAILURES as error:
                rows[name] |= {"status": FAILED, "reason": one_line(error)}
                del works[name]
                if not device.alive():
                    raise DeviceLost(name, rows[name]) from None
    for name in works:
        every = sorted(ms for turn in times[name] for ms in turn)
        low, *_, high = statistics.quantiles(every, n=5, method="inclusive")
        rows[name] |= {
            "status": TIMED,
            "ms": [round(ms, 6) for ms in (statistics.median(every), low, high)],
            "round_ms": [round(statistics.median(turn), 6) for turn in times[name]],
            "passes": len(every),
        }
    clocks.append(nvidia_smi(on, CLOCKS))
    for row in rows.values():
        row.pop("warm_ms", None)
        if device.cuda:
            row["clocks"] = clocks
    return rows


def ratio(slow: Row, fast: Row) -> float:
    """How many times as long `slow` took: the median over the rounds, each a ratio of its own."""
    pairs = zip(slow["round_ms"], fast["round_ms"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def nvidia_smi(device: torch.device, fields: Sequence[str]) -> dict[str, str] | None:
    """What the driver's tool says of a GPU; None without a GPU or without the tool."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def describe(device: torch.device, sources: Sequence[Path]) -> Row:
    """What times depend on: versions, device, driver, threads, and the code that is timed.

    Args:
        device: that computes.
        sources: files of code and folders of them, which become one digest.
    """
    digest = hashlib.sha256()
    for source in sources:
        files = source.rglob("*") if source.is_dir() else [source]
        for file in sorted(one for one in files if one.suffix in (".py", ".cpp", ".h")):
            digest.update(file.read_bytes())
    found: Row = describe_environment(device)
    if device.type == "cuda":
        found["driver"] = (nvidia_smi(device, ["driver_version"]) or {}).get("driver_version")
        found["cudnn"] = torch.backends.cudnn.version()
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return {**found, "sources": digest.hexdigest()}


class ResultFile:
    """One benchmark's rows, measured with one environment, and the JSON file that keeps them.

    Attributes:
        rows: by cell and provider; a cell is plain data that names what was measured.
        dropped: how many rows the file held that another environment had measured.
        deadline: when nothing new begins, on the clock of `time.monotonic`.
    """

    def __init__(self, path: Path, benchmark: str, environment: Row, fresh: bool) -> None:
        """Take over the rows that the file holds of this very environment.

        Args:
            path: JSON file, which may not exist yet; its folder must.
            benchmark: its name.
            environment: see `describe`; the commit may differ where the sources do not.
            fresh: start over.

        Raises:
            ValueError: the file holds something else.
        """
        self.path, self.benchmark = path, benchmark
        self.environment: Row = json.loads(json.dumps(environment))
        self._commit = self.environment.get("commit")
        self.rows: dict[tuple[str, str], Row] = {}
        self.dropped = 0
        self.deadline = math.inf
        if path.exists() and not fresh:
            self._read()

    def _read(self) -> None:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            rows = {(_key(row["cell"]), row["provider"]): row for row in held["rows"]}
            benchmark, before = held["benchmark"], dict(held["environment"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no results ({one_line(error)}); --fresh overwrites it"
            ) from None
        if benchmark != self.benchmark:
            raise ValueError(
                f"{self.path} holds results of {benchmark}, not of {self.benchmark}: give another "
                "--output"
            )
        same = before | {"commit": None} == self.environment | {"commit": None}
        self.rows, self.dropped = (rows, 0) if same else ({}, len(rows))
        if same:  # until there is a new row, the commit is that of those
            self.environment = before

    def add(self, cell: Row, rows: Mapping[str, Row]) -> None:
        """Keep a cell's rows by provider."""
        self.environment["commit"] = self._commit
        for provider, row in rows.items():
            self.rows[_key(cell), provider] = {"cell": cell, "provider": provider, **row}

    def of(self, cell: Row) -> dict[str, Row]:
        """A cell's rows by provider."""
        key = _key(cell)
        return {provider: row for (own, provider), row in self.rows.items() if own == key}

    def write(self, more: Row) -> None:
        """Write everything, with `more` beside the rows, one row a line."""
        head = {"benchmark": self.benchmark, "environment": self.environment, **more}
        text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  '
        text += ",\n  ".join(json.dumps(row) for row in self.rows.values()) + "\n ]\n}\n"
        write_atomically(self.path, text.encode())


def _key(cell: Row) -> str:
    return json.dumps(cell, sort_keys=True)
