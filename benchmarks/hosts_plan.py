"""What a part of `benchmarks.hosts` gives: a world of data sets, their hosts, and runs.

A world writes its data sets as files and pre-trains its hosts once, in a folder. A run is one
method on one data set: it chooses the learning rate on validation, then trains once per seed.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ablation_claims import Spread
from benchmarks.ablation_report import Section

Row = dict[str, Any]
Say = Callable[[str], None]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One method on one data set, all seeds; equal runs give equal numbers.

    Attributes:
        world: key of `hosts.WORLDS`.
        data: name of a data set of the world.
        method: key of the world's `entries`.
    """

    world: str
    data: str
    method: str


@dataclass(frozen=True)
class Entry:
    """A row of the tables: a method of `llama_adapter.hosts.methods` with options.

    Attributes:
        label: what the tables call it.
        name: of `METHODS`.
        options: of `MethodOptions`, by name.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Data sets, their hosts, and what is measured on them.

    Attributes:
        name: of the world.
        title: of its part of the report.
        code: names of the files in this folder that decide what is made and measured.
        make: from a folder of its own and whether this is the quick form, writes the data sets and
            pre-trains the hosts, and returns facts for the report: plain data, "parameters" of the
            hosts among them. It may use one thread.
        runs: from quick, all runs, those that the tables need most first.
        measure: from the folder, quick and a run, its row: see `hosts_runs.measure_method`. It is
            called in processes that did not call `make`.
        describe: from facts and quick, lines of Markdown on data, hosts and recipe.
        sections: from all rows by run, the facts and quick, tables with claims and figures; a
            figure's name becomes the name of a PNG.
        examples: from the folder, quick and the rows, lines of Markdown on pictures or texts a
            person can look at, and the PNGs by name that they show; the lines may hold
            `![...](hosts/NAME.png)`.
    """

    name: str
    title: str
    code: tuple[str, ...]
    make: Callable[[Path, bool], Row]
    runs: Callable[[bool], Sequence[Run]]
    measure: Callable[[Path, bool, Run], Row]
    describe: Callable[[Row, bool], list[str]]
    sections: Callable[[Mapping[Run, Row], Row, bool], list[Section]]
    examples: Callable[[Path, bool, Mapping[Run, Row]], tuple[list[str], dict[str, bytes]]]

    def digest(self) -> str:
        """Of the code that decides what is made and measured."""
        text = b"".join((HERE / name).read_bytes() for name in (*self.code, "hosts_runs.py"))
        return hashlib.sha256(text).hexdigest()[:16]


def scores_of(row: Row, name: str) -> Spread:
    """A score of the test over the seeds."""
    return Spread.of([scores[name] for scores in row["scores"]])


def mean_of(rows: Sequence[Row], name: str) -> Spread:
    """The mean of a score over data sets, over the seeds."""
    by_seed = zip(*([scores[name] for scores in row["scores"]] for row in rows), strict=True)
    return Spread.of([sum(values) / len(values) for values in by_seed])
