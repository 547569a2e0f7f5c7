"""The papers' tables for ViT, RoBERTa and CLIP in kind, on a CPU: `python -m benchmarks.hosts`.

It writes small data sets in the real ones' files, pre-trains tiny hosts of transformers, and trains
zero-init attention and every other method of the tables on them. Each row is written as soon as it
is measured, and the same command again continues. What does not reproduce is printed as such.
"""

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import hosts_text, hosts_vision_clip, hosts_vision_vit
from benchmarks.ablation_claims import NOT, PARTLY, REPRODUCED
from benchmarks.ablation_report import picture
from benchmarks.hosts_plan import Row, Run, World
from benchmarks.run_table import Cell, Results, execute, exit_with
from benchmarks.workers import command, positive, side_by_side
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.options import Parser
from llama_adapter.quiet import quiet
from llama_adapter.run_folder import describe_environment

RESULTS = Path(__file__).parent / "results" / "cpu"
WORK = Path("runs") / "hosts"
# folder of the figures, beside the report
FIGURES = "hosts"
WORLDS: dict[str, World] = {
    world.name: world
    for world in (hosts_vision_vit.WORLD, hosts_text.WORLD, hosts_vision_clip.WORLD)
}
TRIAL = ("", "This is the reduced form: it tries the machinery out, its verdicts mean nothing.")


def make_world(work: Path, quick: bool, name: str) -> Row:
    """Write a world's data and pre-train its hosts, unless the folder holds them from before.

    Returns:
        The world's facts, with the processor's seconds that it took.
    """
    world, folder = WORLDS[name], work / name
    done, identity = folder / "made.json", identity_of(world, quick)
    if done.is_file():
        held = json.loads(done.read_text(encoding="utf-8"))
        if held["identity"] == identity:
            return held["facts"]
    # nothing but what is made here
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    start = time.process_time()
    with quiet():
        facts = world.make(folder, quick)
    facts["processor_seconds"] = round(time.process_time() - start, 1)
    content = {"identity": identity, "facts": facts}
    write_atomically(done, (json.dumps(content, indent=1) + "\n").encode())
    return facts


def identity_of(world: World, quick: bool) -> Row:
    """What a world's rows depend on besides their run."""
    return {"code": world.digest(), "quick": quick}


def make_all(work: Path, quick: bool, jobs: int) -> dict[str, Row]:
    """The facts of all worlds, made side by side."""
    make = partial(make_world, work, quick)
    found: Iterator[Row] = map(make, WORLDS) if jobs == 1 else side_by_side(make, [*WORLDS], jobs)
    return dict(zip(WORLDS, found, strict=True))


def measure(work: Path, quick: bool, run: Run) -> Row:
    """A run's row."""
    with quiet():
        return WORLDS[run.world].measure(work / run.world, quick, run)


def measure_in_process(work: Path, quick: bool, run: Run) -> tuple[Run, Row]:
    """`measure` for a worker process; returns the run with its row."""
    return run, measure(work, quick, run)


def table_of(quick: bool) -> list[Cell[Run]]:
    """All runs, a cell each."""
    return [
        Cell(world.name, (run.data, run.method), run)
        for world in WORLDS.values()
        for run in world.runs(quick)
    ]


def report(
    world: World, folder: Path, work: Path, quick: bool, rows: Mapping[Run, Row], facts: Row
) -> tuple[list[str], Row]:
    """A world's part of the report, whose figures are written.

    Returns:
        Lines of Markdown, and the verdicts by section as plain data.
    """
    lines = [f"# {world.title}", "", *world.describe(facts, quick), ""]
    verdicts: Row = {}
    figures: dict[str, bytes] = {}
    for section in world.sections(rows, facts, quick):
        lines.append(section.text())
        for name, figure in section.figures.items():
            figures[name] = picture(figure)
            lines += [f"![{section.title}]({FIGURES}/{name}.png)", ""]
        if section.claims:
            verdicts[section.title] = [asdict(claim) for claim in section.claims]
    shown, pictures = world.examples(work / world.name, quick, rows)
    if shown:
        lines += ["## Examples", "", *shown, ""]
    for name, data in (figures | pictures).items():
        write_atomically(folder / FIGURES / f"{name}.png", data)
    return lines, verdicts


def heading(quick: bool, environment: Row) -> list[str]:
    """What all worlds have in common."""
    packages = environment["packages"]
    named = ("torch", "transformers", "peft")
    return [
        "# The papers' tables for ViT, RoBERTa and CLIP in kind",
        "",
        "Tiny hosts of transformers, pre-trained in the run and frozen, and small data sets that "
        "are written in the real ones' files and read by `llama_adapter.tasks`. Methods are put "
        "on by `llama_adapter.hosts.methods.attach` and trained by `llama_adapter.host_training`: "
        "one loop and one grid of learning rates for all. Scores are percent.",
        "",
        "Numbers are medians over the seeds (lowest to highest). Above and below mean that these "
        "ranges do not overlap. Parameters are those that are trained besides a task's head; "
        "seconds are a processor's, of one training, median over data sets and seeds.",
        "",
        ", ".join(f"{name} {packages[name]}" for name in named if packages.get(name))
        + ", one thread a process.",
        *(TRIAL if quick else ()),
        "",
        "",
    ]


def verdict_lines(verdicts: Mapping[str, Row]) -> list[str]:
    """How many claims hold, and each with its verdict."""
    sections = {title: some for parts in verdicts.values() for title, some in parts.items()}
    claims = [one for some in sections.values() for one in some]
    words = [word for word in (REPRODUCED, PARTLY, NOT) if word in {c["verdict"] for c in claims}]
    counts = [f"{sum(c['verdict'] == word for c in claims)} {word}" for word in words]
    lines = [f"Of {len(claims)} claims {', '.join(counts)}.", ""]
    for title, some in sections.items():
        lines += [f"{title}:", ""]
        lines += [f"- **{claim['verdict']}**: {claim['paper']}" for claim in some]
        lines.append("")
    return [*lines, ""]


def _environment() -> Row:
    found: dict[str, Any] = describe_environment(torch.device("cpu"))
    names = ("transformers", "tokenizers", "peft", "pillow", "matplotlib")
    found["packages"] |= {name: importlib.metadata.version(name) for name in names}
    return found


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.hosts", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a reduced form, in a minute")
    parser.add_argument(
        "--jobs",
        type=positive,
        help="processes, with one thread each (default: 2 where there are as many cores; of the "
        "reduced form 1)",
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    parser.add_argument("--output", type=Path, help=f"folder (default: {RESULTS.name}'s results)")
    parser.add_argument(
        "--work", type=Path, help="folder of the data sets and the hosts, made where absent"
    )
    return parser


def outcome(row: Row) -> str:
    """A run's result in a few words: each score's median over the seeds."""
    found: Sequence[Mapping[str, float]] = row["scores"]
    middle = {n: sorted(one[n] for one in found)[len(found) // 2] for n in list(found[0])[:3]}
    return " ".join(f"{name} {value:.1f}" for name, value in middle.items())


def run_plan(quick: bool, fresh: bool, jobs: int, folder: Path, work: Path) -> None:
    """Make the worlds, measure what is missing, then report."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print("writing data sets and pre-training hosts", flush=True)
    facts = make_all(work, quick, jobs)
    table = table_of(quick)
    identity = {name: identity_of(world, quick) for name, world in WORLDS.items()}
    results = Results(folder / "hosts.json", Run, identity, _environment(), fresh)
    said = {"facts": facts}
    runs = [cell.run for cell in table if cell.run not in results.rows]
    print(f"{len(runs)} of {len(table)} runs to go", flush=True)
    here, away = partial(measure, work, quick), partial(measure_in_process, work, quick)
    with closing(execute(runs, here, away, jobs)) as measured:
        for done, (run, row) in enumerate(measured, 1):
            results.add(run, row)
            results.write(table, said, {})
            print(
                f"{done:3d}/{len(runs)} {time.perf_counter() - start:5.0f} s  {run.world:5} "
                f"{run.data:12} {run.method:14} {outcome(row)}",
                flush=True,
            )
    lines, verdicts = [], {}
    for name, world in WORLDS.items():
        found, verdicts[name] = report(world, folder, work, quick, results.rows, facts[name])
        lines += found
    results.write(table, said, verdicts)
    spent = sum(results.rows[cell.run]["processor_seconds"] for cell in table)
    spent += sum(one["processor_seconds"] for one in facts.values())
    end = f"Processor time of all of it: {spent / 60:.1f} minutes, with one thread a process.\n"
    head = [*heading(quick, results.environments[-1]), *verdict_lines(verdicts)]
    text = "\n".join([*head, *lines, end])
    write_atomically(folder / "hosts.md", text.encode())
    told = [*verdict_lines(verdicts), *(TRIAL if quick else ())]
    print("", *lines, *told, end, f"written to {folder}", sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 2 for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    options = _parser().parse(arguments)
    work = options.work or WORK / ("quick" if options.quick else "full")
    folder = options.output or (work / "results" if options.quick else RESULTS)
    # to start a process takes longer than half of the reduced form
    jobs = options.jobs or (1 if options.quick else min(2, os.cpu_count() or 1))
    return command("hosts", partial(run_plan, options.quick, options.fresh, jobs, folder, work))


if __name__ == "__main__":
    exit_with(main)
