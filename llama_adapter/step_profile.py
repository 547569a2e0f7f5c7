"""Where does a step's time go? A trace and a table of a few steps, by torch's own profiler.

`phase` marks a part of a step; without a profiler it costs some microseconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from llama_adapter.checkpoints.atomic import write_atomically

TRACE, TABLE = "trace.json", "profile.md"
# the first step compiles and allocates, the second warms the profiler
SKIPPED, MEASURED = 2, 3
_PREFIX = "step: "


def phase(name: str) -> record_function:
    """A context that is a line of the table: pack, forward, backward, reduce or optimiser.

    "pack" is what a step waits for the packing of its records, and their copy to the device.
    """
    return record_function(_PREFIX + name)


@contextmanager
def profiled(folder: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile the steps between calls of what is yielded, and write TRACE and TABLE.

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

    def write(found: Any) -> None:
        # the profiler writes the trace itself, which is only looked at
        found.export_chrome_trace(str(folder / TRACE))
        write_atomically(folder / TABLE, table(found, device).encode())

    with profile(activities=activities, schedule=when, on_trace_ready=write) as running:
        yield running.step


def table(found: Any, device: torch.device) -> str:
    """Phases and the costliest operations as Markdown: milliseconds a step, and the share of it.

    Args:
        found: a profiler after MEASURED steps.
        device: that computed: the time is its own.
    """
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    whole = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    events = list(found.key_averages())
    phases = [event for event in events if event.key.startswith(_PREFIX)]
    total = sum(getattr(event, whole) for event in phases) or 1.0
    lines = [f"# Where a step's time goes, on {device.type}, mean of {MEASURED} steps", ""]
    lines += ["| phase | ms | share |", "|---|---|---|"]
    for event in sorted(phases, key=lambda event: -getattr(event, whole)):
        spent = getattr(event, whole)
        name = event.key.removeprefix(_PREFIX)
        lines.append(f"| {name} | {spent / MEASURED / 1e3:.3f} | {spent / total:.1%} |")
    lines += ["", "| operation | calls a step | ms | share |", "|---|---|---|---|"]
    others = [event for event in events if not event.key.startswith((_PREFIX, "ProfilerStep"))]
    for event in sorted(others, key=lambda event: -getattr(event, own))[:20]:
        spent = getattr(event, own)
        lines.append(
            f"| {event.key[:60]} | {event.count / MEASURED:.0f} | {spent / MEASURED / 1e3:.3f} | "
            f"{spent / total:.1%} |"
        )
    return "\n".join(lines) + "\n"
