"""From the rows of the ViT's and CLIP's worlds to tables, figures and verdicts."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.ablation_claims import Spread
from benchmarks.ablation_report import Section, new_figure
from benchmarks.hosts_plan import Entry, Row, Run, mean_of, scores_of
from benchmarks.hosts_vision_claims import clip_claims, vit_claims
from llama_adapter.tasks.base_to_novel import BASE, HARMONIC, NOVEL

ACCURACY = "accuracy"
OURS_COLOUR, OTHERS_COLOUR = "#1f6fb4", "#b5b5b5"
Scores = Mapping[str, Spread]


def by_method(
    rows: Mapping[Run, Row], world: str, data: list[str], entries: Mapping[str, Entry], score: str
) -> dict[str, Spread]:
    """The mean of a score over data sets, by method."""
    return {name: mean_of([rows[Run(world, one, name)] for one in data], score) for name in entries}


def costs(rows: Mapping[Run, Row], world: str, data: list[str], name: str) -> list[str]:
    """Cells of a method: trained parameters besides the head, a training's time, chosen rates."""
    own = [rows[Run(world, one, name)] for one in data]
    times = [seconds for row in own for seconds in row["train_seconds"]]
    rates = sorted({row["lr"] for row in own if "lr" in row})
    return [
        f"{own[0]['parameters'] - own[0]['head_parameters']:,}",
        f"{Spread.of(times).median:.1f}" if times else "",
        ", ".join(f"{rate:g}" for rate in rates),
    ]


COSTS = ["parameters", "seconds", "learning rates"]


def bars(panels: Mapping[str, Scores], labels: Mapping[str, str], ours: tuple[str, ...]) -> Figure:
    """A panel each of scores by method, with the range over the seeds."""
    figure, axes = new_figure(len(panels), 3.6, sharey=True)
    for one, (title, found) in zip(axes, panels.items(), strict=True):
        names = list(found)[::-1]
        spreads = [found[name] for name in names]
        one.barh(
            [labels[name] for name in names],
            [s.median for s in spreads],
            xerr=[[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]],
            color=[OURS_COLOUR if name in ours else OTHERS_COLOUR for name in names],
            capsize=2,
        )
        one.set(title=title, xlabel="%", xlim=(0, None))
        one.title.set_fontsize(10)
    return figure


def vit_sections(
    rows: Mapping[Run, Row], entries: Mapping[str, Entry], groups: Mapping[str, str]
) -> list[Section]:
    """Table 7 in kind, by group, and Table 9, by task.

    Args:
        rows: of all runs.
        entries: the methods.
        groups: of the tasks, by name.
    """
    labels = {name: entry.label for name, entry in entries.items()}
    tasks = list(groups)
    each = {task: by_method(rows, "vit", [task], entries, ACCURACY) for task in tasks}
    by_group = {
        group: by_method(rows, "vit", [t for t in tasks if groups[t] == group], entries, ACCURACY)
        for group in dict.fromkeys(groups.values())
    }
    mean = by_method(rows, "vit", tasks, entries, ACCURACY)
    parameters = {
        name: rows[Run("vit", tasks[0], name)]["parameters"]
        - rows[Run("vit", tasks[0], name)]["head_parameters"]
        for name in entries
    }
    table7 = [
        [
            labels[name],
            *costs(rows, "vit", tasks, name),
            *(found[name].show(".1f") for found in by_group.values()),
            mean[name].show(".1f"),
        ]
        for name in entries
    ]
    table9 = [
        [labels[name], *(found[name].show(".1f") for found in each.values())] for name in entries
    ]
    return [
        Section(
            "ViT by group of tasks (Table 7)",
            ["method", *COSTS, *by_group, "mean of tasks"],
            table7,
            vit_claims(mean, by_group, each, parameters, labels),
            {"vit_groups": bars({**by_group, "mean of tasks": mean}, labels, ("zero_init",))},
        ),
        Section(
            "ViT by task (Table 9)",
            ["method", *(f"{task} ({groups[task]})" for task in tasks)],
            table9,
            [],
            {"vit_tasks": bars(each, labels, ("zero_init",))},
        ),
    ]


def clip_sections(
    rows: Mapping[Run, Row], entries: Mapping[str, Entry], data: list[str]
) -> list[Section]:
    """Table 11 in kind, with LoRA's ranks.

    Args:
        rows: of all runs.
        entries: the methods.
        data: names of the data sets.
    """
    labels = {name: entry.label for name, entry in entries.items()}
    halves = {"base": BASE, "novel": NOVEL, "HM": HARMONIC}
    mean = {label: by_method(rows, "clip", data, entries, key) for label, key in halves.items()}
    parameters = {name: rows[Run("clip", data[0], name)]["parameters"] for name in entries}
    ranks = [name for name in entries if name.startswith("lora")]
    table = [
        [
            labels[name],
            *costs(rows, "clip", data, name),
            *(
                scores_of(rows[Run("clip", one, name)], key).show(".1f")
                for one in data
                for key in halves.values()
            ),
            *(found[name].show(".1f") for found in mean.values()),
        ]
        for name in entries
    ]
    header = [f"{one} {label}" for one in (*data, "average") for label in halves]
    return [
        Section(
            "CLIP from base to novel classes (Table 11; LoRA's ranks as in the supplement's)",
            ["method", *COSTS, *header],
            table,
            clip_claims(mean["base"], mean["novel"], mean["HM"], parameters, ranks),
            {"clip_average": bars(mean, labels, ("zero_init", "both"))},
        )
    ]
