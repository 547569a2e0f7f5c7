"""From the rows of the multi-modal benchmark to tables, figures and verdicts."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.ablation_claims import Spread
from benchmarks.ablation_report import Rows, Section, draw_line, new_figure
from benchmarks.multimodal_claims import (
    Classes,
    Skills,
    class_claims,
    data_claims,
    fusion_claims,
    group_claims,
    scale_claims,
)
from benchmarks.multimodal_plan import GROUPS
from benchmarks.run_table import Row
from llama_adapter.evaluation.runner import Item
from llama_adapter.evaluation.scienceqa import CLASSES, LETTERS

COLOURS = {"text": "#777777", "late": "#1f6fb4", "early": "#3a9a4c", "shuffled": "#e07b1a"}
KINDS = ("see", "recall", "told", "read", "fact")
COLUMNS = (*CLASSES, "pictured", *KINDS)
ACCURACY = "accuracy, %"
# letters of the settings of GROUPS, as the note on the experiment has them
MARKS = dict(zip(GROUPS, "ABCDEF", strict=True))


def classes_of(rows: Sequence[Row], name: str = "scores") -> Classes:
    """Accuracies by class over the seeds' rows."""
    return Classes({key: Spread.of([row[name][key] for row in rows]) for key in rows[0][name]})


def _cells(found: Classes) -> list[str]:
    return [found.of(name).show(".1f") for name in COLUMNS]


def classes_section(rows: Rows, facts: Row) -> Section:
    """Table 2; settings are ("text",) and ("late",)."""
    text, late = classes_of(rows[("text",)]), classes_of(rows[("late",)])
    shuffled = classes_of(rows[("late",)], "shuffled")
    base = [f"{facts['base_scores'][name]:.1f}" for name in COLUMNS]
    chance = [f"{facts['chance'][name]:.1f}" for name in COLUMNS]
    counts = {name: rows[(name,)][0]["parameters"] for name in ("text", "late")}
    table = [
        ["guessing", "", *chance],
        ["base, untouched", "0", *base],
        ["text-only", f"{counts['text']:,}", *_cells(text)],
        ["multi-modal", f"{counts['late']:,}", *_cells(late)],
        ["multi-modal, pictures shuffled", f"{counts['late']:,}", *_cells(shuffled)],
    ]
    figure, (axes,) = new_figure(1, 9.0)
    names = [*CLASSES, "pictured"]
    both = {"text": text, "late": late, "shuffled": shuffled}
    labels = {"text": "text-only", "late": "multi-modal", "shuffled": "pictures shuffled"}
    for offset, (key, found) in zip((-0.27, 0.0, 0.27), both.items(), strict=True):
        spreads = [found.of(name) for name in names]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.bar(
            [i + offset for i in range(len(names))],
            [s.median for s in spreads],
            0.26,
            yerr=errors,
            color=COLOURS[key],
            capsize=2,
            label=labels[key],
        )
    for i, name in enumerate(names):
        value = facts["chance"][name]
        label = "guessing" if i == 0 else None
        axes.plot([i - 0.42, i + 0.42], [value, value], color="black", linestyle=":", label=label)
    axes.set_xticks(range(len(names)), [*CLASSES, "needs its\npicture"])
    axes.set(title="By class of questions (Table 2)", ylabel=ACCURACY, ylim=(0, 119))
    axes.legend(ncols=4, loc="upper center", fontsize=8)
    return Section(
        "Text-only against multi-modal (LLaMA-Adapter, Table 2)",
        ["adapter", "parameters", *COLUMNS],
        table,
        class_claims(text, late, shuffled, facts["chance"]["pictured"]),
        {"classes": figure},
    )


def scales_section(rows: Rows, facts: Row) -> Section:
    """Section 3.3; settings are ("multi",) and ("last",)."""
    multi, last = classes_of(rows[("multi",)]), classes_of(rows[("last",)])
    table = [
        [name, f"{rows[(key,)][0]['projector']:,}", *_cells(found)]
        for name, key, found in (
            ("layers 2, 4 and 6", "multi", multi),
            ("layer 6, the last", "last", last),
        )
    ]
    return Section(
        "Several scales against one (LLaMA-Adapter, section 3.3)",
        ["features of", "projector", *COLUMNS],
        table,
        scale_claims(multi, last),
        {},
    )


def fusion_section(rows: Rows, facts: Row) -> Section:
    """V2, section 4.3; settings are ("late",) and ("early",)."""
    late, early = classes_of(rows[("late",)]), classes_of(rows[("early",)])
    table = [
        [name, f"{rows[(key,)][0]['parameters']:,}", *_cells(found)]
        for name, key, found in (
            ("late: one token added to all prompts", "late", late),
            ("early: 4 tokens in the first layer", "early", early),
        )
    ]
    return Section(
        "Early against late fusion (LLaMA-Adapter V2, section 4.3)",
        ["fusion", "parameters", *COLUMNS],
        table,
        fusion_claims(late, early),
        {},
    )


def data_section(rows: Rows, facts: Row) -> Section:
    """Supplement, Table 9; settings are (questions with a picture,)."""
    counts = sorted(setting[0] for setting in rows)
    found = {count: classes_of(rows[(count,)]) for count in counts}
    pictured = {count: found[count].of("pictured") for count in counts}
    figure, (axes,) = new_figure()
    draw_line(axes, counts, [pictured[c] for c in counts], color=COLOURS["late"], label="needed")
    others = [found[c].of("NO") for c in counts]
    draw_line(axes, counts, others, color=COLOURS["text"], label="no picture, no text")
    axes.set(
        title="More instruction data with pictures (supplement, Table 9)",
        xlabel="questions with a picture, trained on for equally many steps",
        ylabel=ACCURACY,
        ylim=(0, 103),
    )
    axes.legend(title="picture")
    table = [[str(count), str(rows[(count,)][0]["trained_on"]), *_cells(found[count])]
             for count in counts]  # fmt: skip
    return Section(
        "More instruction data with pictures (supplement, Table 9)",
        ["questions with a picture", "all questions", *COLUMNS],
        table,
        data_claims(pictured),
        {"data": figure},
    )


def skills_of(rows: Sequence[Row]) -> Skills:
    """What a setting of experiment "groups" ends with, over the seeds' rows."""

    def spread(part: str, name: str) -> Spread:
        return Spread.of([row.get(part, row["after"])[name] for row in rows])

    return Skills(
        inst=spread("after", "INST"),
        cap=spread("after", "CAP"),
        vqa=spread("after", "VQA"),
        inst_before=spread("before", "INST"),
        vqa_before=spread("before", "VQA"),
        moved=Spread.of([row.get("text_logits_moved", float("nan")) for row in rows]),
    )


def groups_section(rows: Rows, facts: Row) -> Section:
    """V2, section 4.2; settings are (name of GROUPS,)."""
    found = {name: skills_of(rows[(name,)]) for name in GROUPS}
    table = []
    for name, skills in found.items():
        kind, fusion, groups = GROUPS[name]
        stages = "in turn" if kind == "joint" else "then captions"
        before = kind != "joint"
        table.append(
            [
                MARKS[name],
                fusion,
                stages,
                groups,
                skills.inst_before.show(".1f") if before else "",
                skills.inst.show(".1f"),
                skills.cap.show(".1f"),
                skills.vqa_before.show(".1f") if before else "",
                skills.vqa.show(".1f"),
                skills.moved.show(".2g") if before else "",
            ]
        )
    figure, (axes,) = new_figure(1, 8.0)
    parts = {"INST before": "inst_before", "INST": "inst", "CAP": "cap", "VQA": "vqa"}
    shades = dict(zip(parts, ("#bbbbbb", "#777777", "#1f6fb4", "#3a9a4c"), strict=True))
    for offset, (label, part) in zip((-0.3, -0.1, 0.1, 0.3), parts.items(), strict=True):
        spreads: list[Spread] = [getattr(skills, part) for skills in found.values()]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.bar(
            [i + offset for i in range(len(found))],
            [s.median for s in spreads],
            0.19,
            yerr=errors,
            color=shades[label],
            capsize=2,
            label=label,
        )
    names = [
        f"{MARKS[name]}: {fusion}, {groups}\n{'in turn' if kind == 'joint' else 'then captions'}"
        for name, (kind, fusion, groups) in GROUPS.items()
    ]
    axes.set_xticks(range(len(found)), names, fontsize=8)
    axes.set(title="Instructions and captions (V2)", ylabel=ACCURACY, ylim=(0, 119))
    axes.legend(ncols=4, loc="upper center", fontsize=8)
    return Section(
        "Disjoint groups against all parameters (LLaMA-Adapter V2, sections 3 and 4.2)",
        [
            "",
            "fusion",
            "instructions",
            "captions train",
            "INST before",
            "INST",
            "CAP",
            "VQA before",
            "VQA",
            "text logits moved",
        ],
        table,
        group_claims(found, facts["base_instructions"]),
        {"groups": figure},
    )


SECTIONS = {
    "classes": classes_section,
    "scales": scales_section,
    "fusion": fusion_section,
    "data": data_section,
    "groups": groups_section,
}


def chosen_examples(items: Sequence[Item]) -> list[int]:
    """The first questions of each of some kinds, chosen by place, not by how they are answered."""
    found: list[int] = []
    for kind in ("see", "recall", "told", "fact"):
        found += [i for i, item in enumerate(items) if item["topic"] == kind][: _SHOWN[kind]]
    return found


_SHOWN = {"see": 4, "recall": 4, "told": 2, "fact": 2}


def _panel(axes: Any, item: Item, given: Mapping[str, str]) -> None:
    axes.axis("off")
    if item["image"] is not None:
        with Image.open(item["image"]) as picture:
            axes.imshow(picture.convert("RGB"), extent=(0, 1, 0, 1))
    axes.set(xlim=(0, 3.6), ylim=(0, 1), aspect="equal")
    right = LETTERS[item["answer"]]
    options = [f"({letter}) {one}" for letter, one in zip(LETTERS, item["choices"], strict=False)]
    lines = [*textwrap.wrap(item["question"], 40), *textwrap.wrap(item["hint"], 44)]
    axes.text(1.1, 0.98, "\n".join([*lines, "  ".join(options)]), va="top", fontsize=8)
    for row, (name, answer) in enumerate(given.items()):
        good = answer == right
        axes.text(
            1.1,
            0.2 - 0.17 * row,
            f"{name}: {answer} {'(right)' if good else f'(right: {right})'}",
            fontsize=8,
            color="#1a7f37" if good else "#b3261e",
        )


def examples_figure(items: Sequence[Item], answers: Mapping[str, str]) -> Figure:
    """Questions of the test with their pictures, and what two adapters answer.

    Args:
        items: of the test.
        answers: a letter for each item, by what the adapters are called.
    """
    chosen = chosen_examples(items)
    figure = Figure(figsize=(11, 1.6 * ((len(chosen) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(chosen) + 1) // 2, 2, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, index in zip(panels, chosen, strict=False):
        _panel(axes, items[index], {name: letters[index] for name, letters in answers.items()})
    return figure


def one_example(items: Sequence[Item], answers: Mapping[str, str]) -> int:
    """The first question on a fact of what is shown that the last of the adapters gets right."""
    letters = list(answers.values())[-1]
    recalled = [i for i, item in enumerate(items) if item["topic"] == "recall"]
    right = [i for i in recalled if letters[i] == LETTERS[items[i]["answer"]]]
    return (right or recalled)[0]


def large_picture(item: Item, times: int = 5) -> bytes:
    """A question's picture as PNG, enlarged."""
    with Image.open(item["image"]) as picture:
        size = (times * picture.width, times * picture.height)
        large = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    large.save(data, format="png")
    return data.getvalue()
