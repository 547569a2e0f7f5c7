"""Where does a step's time go? A trace and a table of a few steps, by torch's own profiler.

`phase` marks a part of a step; without a profiler it costs some microseconds.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from llama_adapter.checkpoints.atomic import write_atomically

TRACE, TABLE = "trace.json", "profile.md"
# the first step compiles and allocates, the second warms the profiler
SKIPPED, MEASURED = 2, 3
_PREFIX = "step: "
_OUTSIDE = "outside of steps"


def phase(name: str) -> record_function:
    """A context that is a line of the table: pack, forward, backward, reduce or optimiser.

    "pack" is what a step waits for the packing of its records, and their copy to the device.
    """
    return record_function(_PREFIX + name)


def outside() -> record_function:
    """A context between steps, such as a validation, which the table leaves out."""
    return record_function(_OUTSIDE)


@contextmanager
def profiled(folder: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile the steps between calls of what is yielded, and write TRACE and TABLE.

    Steps beyond SKIPPED are measured, at most MEASURED of them; where there are none, a warning
    says so.

    Args:
        folder: where they go, which must exist; None profiles nothing.
        device: that computes.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    when = schedule(wait=SKIPPED - 1, warmup=1, active=MEASURED, repeat=1)
    steps = 0

    def write(found: Any) -> None:
        measured = min(steps - SKIPPED, MEASURED)
        if measured > 0:
            # the profiler writes the trace itself, which is only looked at
            found.export_chrome_trace(str(folder / TRACE))
            write_atomically(folder / TABLE, table(found.events(), device, measured).encode())

    with profile(activities=activities, schedule=when, on_trace_ready=write) as running:

        def advance() -> None:
            nonlocal steps
            steps += 1
            running.step()

        yield advance
    if steps <= SKIPPED:
        warnings.warn(
            f"nothing was profiled: the first {SKIPPED} steps are not, and there were {steps}",
            stacklevel=3,
        )


@dataclass
class _Line:
    """What events of one name took together, in microseconds."""

    count: int = 0
    own: float = 0.0
    whole: float = 0.0


def table(events: list[Any], device: torch.device, steps: int) -> str:
    """Phases and the costliest operations as Markdown: milliseconds a step, and the share of it.

    Args:
        events: of torch's profiler.
        device: that computed: the time is its own.
        steps: that were profiled.
    """
    kind = "device" if device.type == "cuda" else "cpu"
    left_out = [event.time_range for event in events if event.name == _OUTSIDE]
    phases, others = defaultdict[str, _Line](_Line), defaultdict[str, _Line](_Line)
    for event in events:
        at = event.time_range.start
        if any(out.start <= at <= out.end for out in left_out):
            continue
        if event.name.startswith(_PREFIX):
            # a GPU's own copy of it says when it ran there
            if event.device_type.name != "CPU":
                continue
            line = phases[event.name.removeprefix(_PREFIX)]
        elif event.name.startswith("ProfilerStep"):
            continue
        else:
            line = others[event.name]
        line.count += 1
        line.own += getattr(event, f"self_{kind}_time_total")
        line.whole += getattr(event, f"{kind}_time_total")
    total = sum(line.whole for line in phases.values()) or 1.0
    mean = "one step" if steps == 1 else f"mean of {steps} steps"
    lines = [f"# Where a step's time goes, on {device.type}, {mean}", ""]
    lines += ["| phase | ms | share |", "|---|---|---|"]
    for name, line in sorted(phases.items(), key=lambda row: -row[1].whole):
        lines.append(f"| {name} | {line.whole / steps / 1e3:.3f} | {line.whole / total:.1%} |")
    lines += ["", "| operation | calls a step | ms | share |", "|---|---|---|---|"]
    for name, line in sorted(others.items(), key=lambda row: -row[1].own)[:20]:
        lines.append(
            f"| {name[:60]} | {line.count / steps:.0f} | {line.own / steps / 1e3:.3f} | "
            f"{line.own / total:.1%} |"
        )
    return "\n".join(lines) + "\n"
