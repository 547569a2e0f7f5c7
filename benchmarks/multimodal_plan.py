"""Which runs make up the multi-modal benchmark, and how large are they?

Settings are keys of an experiment's table. Cells of several experiments may ask for the same run,
which is made once.
"""

from dataclasses import dataclass

from benchmarks.multimodal_runs import Run
from benchmarks.multimodal_workplace import Sizes
from benchmarks.run_table import Cell

# the settings of experiment "groups": kind, fusion and groups of a run
GROUPS = {
    "late all": ("sequential", "late", "all"),
    "early all": ("sequential", "early", "all"),
    "early disjoint": ("sequential", "early", "disjoint"),
    "late disjoint": ("sequential", "late", "disjoint"),
    "joint all": ("joint", "early", "all"),
    "joint disjoint": ("joint", "early", "disjoint"),
}


@dataclass(frozen=True)
class Plan:
    """How large the benchmark is.

    Attributes:
        sizes: of the task and of pre-training.
        seeds: every run is made once per seed.
        steps: of a run on the task.
        stage_steps: of each of instructions and captions; of both together twice as many.
        pictured: questions with a picture, of the experiment on more data; all of them besides.
    """

    sizes: Sizes
    seeds: tuple[int, ...]
    steps: int
    stage_steps: int
    pictured: tuple[int, ...]


FULL = Plan(
    sizes=Sizes(train=1600, test=400, base_steps=1100, encoder_steps=500),
    seeds=(0, 1, 2),
    steps=250,
    stage_steps=120,
    pictured=(80, 240),
)
QUICK = Plan(
    sizes=Sizes(train=200, test=40, base_steps=30, encoder_steps=10),
    seeds=(0,),
    steps=10,
    stage_steps=4,
    pictured=(20,),
)


def cells(plan: Plan) -> list[Cell[Run]]:
    """All cells, seed by seed, so that an unfinished table has every setting early."""
    found = []
    for seed in plan.seeds:

        def question_run(
            fusion: str, scales: str = "multi", pictured: int = -1, seed: int = seed
        ) -> Run:
            return Run("questions", fusion, scales, "all", pictured, plan.steps, seed)

        text, late = question_run("text"), question_run("late")
        found += [Cell("classes", ("text",), text), Cell("classes", ("late",), late)]
        found += [Cell("scales", ("multi",), late)]
        found += [Cell("scales", ("last",), question_run("late", "last"))]
        found += [Cell("fusion", ("late",), late)]
        found += [Cell("fusion", ("early",), question_run("early"))]
        found += [
            Cell("data", (count,), question_run("late", pictured=count)) for count in plan.pictured
        ]
        found.append(Cell("data", (plan.sizes.train // 2,), late))
        for name, (kind, fusion, groups) in GROUPS.items():
            steps = plan.stage_steps * (2 if kind == "joint" else 1)
            run = Run(kind, fusion, "multi", groups, -1, steps, seed)
            found.append(Cell("groups", (name,), run))
    return found
