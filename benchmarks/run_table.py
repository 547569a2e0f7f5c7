"""What the benchmarks that train have in common: tables of runs, and the file that keeps them.

A benchmark is a list of cells, each of an experiment, that ask for runs; cells may share one. Rows
are written as they are measured, and the same command again continues.
"""

import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.ablation_report import Section, Setting
from llama_adapter.checkpoints.atomic import write_atomically

Row = dict[str, Any]
Run = TypeVar("Run", bound=Any)


@dataclass(frozen=True)
class Cell(Generic[Run]):
    """One place in one experiment's table, for one seed; cells may share a run."""

    experiment: str
    setting: Setting
    run: Run


class Results(Generic[Run]):
    """The rows measured so far, and the file that keeps them."""

    def __init__(
        self, path: Path, kind: type[Run], identity: Row, environment: Row, fresh: bool
    ) -> None:
        """Take over what the file holds.

        Args:
            path: JSON file, which may not exist yet.
            kind: dataclass of what one run trains; a row holds its fields.
            identity: what rows depend on besides their run: base, data, recipe.
            environment: versions, threads and commit that further rows are measured with.
            fresh: start over.

        Raises:
            ValueError: the file holds rows of another base, data or recipe, or is no such file.
        """
        self.path, self.kind = path, kind
        self.identity = json.loads(json.dumps(identity))
        self.environments: list[Row] = []
        self.rows: dict[Run, Row] = {}
        if path.exists() and not fresh:
            self._read()
        self.environment = environment

    def _read(self) -> None:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            self.environments = held["environments"]
            names = [spec.name for spec in fields(self.kind)]
            self.rows = {self.kind(**{n: row[n] for n in names}): row for row in held["rows"]}
            before = held["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no {self.path.stem} ({error}); --fresh overwrites it"
            ) from None
        changed = [name for name in self.identity if before.get(name) != self.identity[name]]
        if changed:
            raise ValueError(
                f"{self.path} was measured with another {' and '.join(changed)}: start over with "
                "--fresh, or give another --output"
            )

    def add(self, run: Run, row: Row) -> None:
        """Keep one more row."""
        if self.environment not in self.environments:
            self.environments.append(self.environment)
        index = self.environments.index(self.environment)
        self.rows[run] = {**asdict(run), **row, "environment": index}

    def of(self, wanted: Sequence[Cell[Run]]) -> dict[Setting, list[Row]] | None:
        """Rows by setting, or None while one is missing."""
        found: dict[Setting, list[Row]] = {}
        for cell in wanted:
            if cell.run not in self.rows:
                return None
            found.setdefault(cell.setting, []).append(self.rows[cell.run])
        return found

    def write(self, table: Sequence[Cell[Run]], facts: Row, verdicts: Row) -> None:
        """Write the rows that `table` asks for; rows of a former plan are dropped.

        Args:
            table: all cells.
            facts: what the file says besides, by name.
            verdicts: on the claims.
        """
        wanted = {cell.run: None for cell in table}
        rows = [self.rows[run] for run in wanted if run in self.rows]
        content = {
            "identity": self.identity,
            **facts,
            "environments": self.environments,
            "runs_planned": len(wanted),
            "processor_seconds": round(sum(row["processor_seconds"] for row in rows), 1),
            "verdicts": verdicts,
        }
        text = json.dumps(content, indent=1)[:-2] + ',\n "rows": [\n  '
        text += ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"
        write_atomically(self.path, text.encode())


def execute(
    runs: Sequence[Run],
    measure: Callable[[Run], Row],
    in_process: Callable[[Run], tuple[Run, Row]],
    jobs: int,
) -> Generator[tuple[Run, Row], None, None]:
    """Measure runs, each with one thread, in `jobs` processes.

    Args:
        runs: what is measured.
        measure: one, here.
        in_process: one, in a process of its own, which it is sent to; returns the run with its row.
        jobs: 1 measures here.

    Yields:
        Every run with its row, in the order they finish in.
    """
    if jobs == 1:
        for run in runs:
            yield run, measure(run)
        return
    # leaving the block ends the processes at once, whatever they are in the middle of
    with multiprocessing.get_context("spawn").Pool(jobs, start_worker) as pool:
        yield from pool.imap_unordered(in_process, runs)


def start_worker() -> None:
    """Set up a worker process: one thread, and Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def exit_with(main: Callable[[], int]) -> None:
    """End the process with what a command returns; a kill ends its workers too, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


def section_of(
    name: str,
    results: Results[Run],
    table: Sequence[Cell[Run]],
    make: Callable[[dict[Setting, list[Row]]], Section],
) -> Section | str:
    """One experiment's section, or a text that says how many of its runs are missing."""
    wanted = [cell for cell in table if cell.experiment == name]
    rows = results.of(wanted)
    if rows is None:
        missing = sum(cell.run not in results.rows for cell in wanted)
        return f"## {name}\n\n{missing} of {len(wanted)} runs are not measured yet.\n"
    return make(rows)
