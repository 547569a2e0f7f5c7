"""From the rows of the ablations to tables, figures and verdicts, one section per experiment."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablation_claims import (
    Claim,
    Fit,
    InitResult,
    Method,
    Spread,
    layers_claims,
    longer_claims,
    method_claims,
    zero_init_claims,
)
from benchmarks.ablation_runs import Row

Setting = tuple[Any, ...]
Rows = Mapping[Setting, Sequence[Row]]

KINDS = {
    "zero_init": "zero gate, separate softmax (ours)",
    "gate_one": "gate 1, separate softmax",
    "joint": "joint softmax, no gate (random init)",
}
METHODS = {"zero_init": "LLaMA-Adapter", "lora": "LoRA, rank 8, wq and wv", "full": "full"}
COLOURS = {"zero_init": "#1f6fb4", "gate_one": "#3a9a4c", "joint": "#e07b1a"}
COLOURS |= {"lora": "#8a5bb5", "full": "#777777"}
# part of the steps that a loss is averaged over, and that the curves are smoothed by
WINDOW = 0.1


@dataclass(frozen=True)
class Section:
    """One experiment's outcome: a table, figures by file name, and the verdicts."""

    title: str
    header: list[str]
    table: list[list[str]]
    claims: list[Claim]
    figures: dict[str, Figure]

    def text(self) -> str:
        """Markdown."""
        lines = [f"## {self.title}", "", *markdown_table(self.header, self.table)]
        for claim in self.claims:
            lines += [
                "",
                f"- **{claim.verdict}**: {claim.paper}",
                f"  Criterion: {claim.criterion}",
                f"  Measured: {claim.evidence}",
            ]
        return "\n".join([*lines, ""])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def spread(rows: Sequence[Row], name: str) -> Spread:
    """One number of every seed's row; a loss that was not finite counts as infinite."""
    return Spread.of([float("inf") if row[name] is None else row[name] for row in rows])


def _mean_loss(rows: Sequence[Row], end: float) -> Spread:
    """Training loss averaged over the tenth of the steps before `end`, a part of all steps."""
    means = []
    for row in rows:
        losses = row["losses"]
        stop = max(1, round(end * len(losses)))
        part = losses[max(0, stop - max(1, round(WINDOW * len(losses)))) : stop]
        means.append(sum(part) / len(part) if part and row["failure"] is None else float("inf"))
    return Spread.of(means)


def _init_result(rows: Sequence[Row]) -> InitResult:
    return InitResult(
        step0=spread(rows, "step0_loss"),
        halfway=_mean_loss(rows, 0.5),
        final=_mean_loss(rows, 1.0),
        accuracy=spread(rows, "accuracy"),
    )


def best_rate(rows: Rows, what: Setting) -> float:
    """The learning rate with the highest median accuracy, then the lowest held-out loss.

    Args:
        rows: by settings that end in a learning rate.
        what: a setting without that end.
    """

    def rank(lr: float) -> tuple[float, float]:
        found = rows[(*what, lr)]
        return (spread(found, "accuracy").median, -spread(found, "held_out_loss").median)

    return max((setting[-1] for setting in rows if setting[:-1] == what), key=rank)


def new_figure(
    columns: int = 1, width: float = 6.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure, and its panels side by side."""
    figure = Figure(figsize=(width * columns, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, list(axes)


def draw_line(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], **style: Any) -> None:
    """Medians as a line, lowest to highest as bars."""
    middle = [s.median for s in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.errorbar(x, middle, yerr=errors, marker="o", markersize=4, capsize=3, **style)


def picture(figure: Figure) -> bytes:
    """The figure as PNG, drawn without a display."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def layers_section(rows: Rows, base: Row) -> Section:
    """Table 3; settings are (number of layers,)."""
    counts = sorted(setting[0] for setting in rows)
    accuracy = {count: spread(rows[(count,)], "accuracy") for count in counts}
    table = [
        [
            str(count),
            f"{rows[(count,)][0]['parameters']:,}",
            accuracy[count].show(".1%"),
            spread(rows[(count,)], "held_out_loss").show(),
        ]
        for count in counts
    ]
    figure, (axes,) = new_figure()
    found = [accuracy[count] for count in counts]
    draw_line(axes, counts, found, color=COLOURS["zero_init"], label="adapter")
    axes.axhline(base["accuracy"], color="black", linestyle=":", label="untouched base")
    axes.set(
        title="Inserted layers (Table 3)",
        xlabel="inserted layers, from the top",
        ylabel="held-out exact match",
        xticks=counts,
        ylim=(0, 1.03),
    )
    axes.legend()
    return Section(
        "Inserted layers (LLaMA-Adapter, Table 3)",
        ["layers", "parameters", "held-out exact match", "held-out loss"],
        [["0 (base)", "0", f"{base['accuracy']:.1%}", f"{base['held_out_loss']:.3f}"], *table],
        layers_claims(accuracy),
        {"layers": figure},
    )


def _loss_curves(rows: Rows, scales: Sequence[float]) -> Figure:
    figure, panels = new_figure(len(scales), 3.4, sharey=True)
    for axes, scale in zip(panels, scales, strict=True):
        for kind, label in KINDS.items():
            curves = [row["losses"] for row in rows[(kind, scale)]]
            steps = min(len(curve) for curve in curves)
            width = max(1, round(WINDOW * steps / 2))
            smooth = [
                Spread.of(
                    [sum(c[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for c in curves]
                )
                for i in range(steps)
            ]
            style: dict[str, Any] = {"color": COLOURS[kind]}
            x = range(1, steps + 1)
            axes.plot(x, [s.median for s in smooth], label=label, **style)
            axes.fill_between(
                x, [s.low for s in smooth], [s.high for s in smooth], alpha=0.2, **style
            )
        axes.set(title=f"prompt scale {scale:g} x RMS", xlabel="step", yscale="log")
    panels[0].set(ylabel="training loss, nats per token (running mean)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def zero_init_section(rows: Rows, base: Row) -> Section:
    """Table 4 and Figure 7; settings are (kind, sigma, learning rate)."""
    scales = sorted({setting[1] for setting in rows})
    rates = {(kind, scale): best_rate(rows, (kind, scale)) for scale in scales for kind in KINDS}
    each = {setting: _init_result(found) for setting, found in rows.items()}
    results = {
        kind: {scale: each[(kind, scale, rates[kind, scale])] for scale in scales} for kind in KINDS
    }
    table = [
        [
            f"{scale:g}",
            KINDS[kind] + (" *" if lr == rates[kind, scale] else ""),
            f"{lr:g}",
            each[kind, scale, lr].step0.show(),
            each[kind, scale, lr].final.show(),
            each[kind, scale, lr].accuracy.show(".1%"),
        ]
        for kind, scale, lr in sorted(rows, key=lambda s: (s[1], list(KINDS).index(s[0]), s[2]))
    ]
    figure, (axes,) = new_figure()
    for offset, (kind, label) in zip((0.97, 1.0, 1.03), KINDS.items(), strict=True):
        found = [results[kind][scale].accuracy for scale in scales]
        # side by side, so that no bar hides another
        draw_line(axes, [offset * s for s in scales], found, color=COLOURS[kind], label=label)
    axes.axhline(base["accuracy"], color="black", linestyle=":", label="untouched base")
    axes.set_xscale("log", base=2)
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set(
        title="Zero-init against random init (Table 4)",
        xlabel=f"prompt scale / RMS of the normed attention input ({base['rms']:.2f})",
        ylabel="held-out exact match",
        ylim=(0, 1.03),
    )
    axes.legend(fontsize=8)
    return Section(
        "Zero-init against random init, taken apart (LLaMA-Adapter, Table 4 and Figure 7)",
        [
            "sigma",
            "attention (* best rate)",
            "peak lr",
            "step-0 loss, held out",
            "final training loss",
            "held-out exact match",
        ],
        table,
        zero_init_claims(results, base["held_out_loss"], base["accuracy"]),
        {
            "zero_init": figure,
            "loss_curves": _loss_curves(
                {key: rows[(*key, lr)] for key, lr in rates.items()}, scales
            ),
        },
    )


def longer_section(rows: Rows, base: Row) -> Section:
    """Table 6; settings are (epochs,)."""
    epochs = sorted(setting[0] for setting in rows)
    fits = {
        count: Fit(
            train=spread(rows[(count,)], "train_loss"),
            held_out=spread(rows[(count,)], "held_out_loss"),
            accuracy=spread(rows[(count,)], "accuracy"),
        )
        for count in epochs
    }
    table = [
        [
            str(count),
            fits[count].train.show(),
            fits[count].held_out.show(),
            fits[count].accuracy.show(".1%"),
        ]
        for count in epochs
    ]
    figure, (left, right) = new_figure(2, 5.0)
    draw_line(left, epochs, [fits[e].train for e in epochs], label="training", color="#777777")
    draw_line(left, epochs, [fits[e].held_out for e in epochs], label="held out", color="#1f6fb4")
    left.axhline(base["held_out_loss"], color="black", linestyle=":", label="untouched base")
    left.set(title="Longer training (Table 6)", ylabel="loss, nats per token", ylim=(0, None))
    left.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
    draw_line(right, epochs, [fits[e].accuracy for e in epochs], color="#1f6fb4")
    right.axhline(base["accuracy"], color="black", linestyle=":")
    right.set(ylabel="held-out exact match", ylim=(0, 1.03))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(epochs, [str(e) for e in epochs])
        axes.minorticks_off()
        axes.set_xlabel("epochs over a small training set")
    return Section(
        "Longer training on few records (LLaMA-Adapter, Table 6)",
        ["epochs", "training loss", "held-out loss", "held-out exact match"],
        table,
        longer_claims(fits),
        {"longer": figure},
    )


def methods_section(rows: Rows, base: Row) -> Section:
    """Table 1; settings are (method, learning rate), and ("timing", 0.0)."""
    times = {
        method: Spread.of([median(row["step_ms"][method]) for row in rows[("timing", 0.0)]])
        for method in METHODS
    }
    ratios = {
        method: Spread.of(
            [
                median(a / b for a, b in zip(ms[method], ms["zero_init"], strict=True))
                for ms in (row["step_ms"] for row in rows[("timing", 0.0)])
            ]
        )
        for method in METHODS
    }
    best = {method: best_rate(rows, (method,)) for method in METHODS}
    methods, table = {}, []
    for method, lr in sorted(s for s in rows if s[0] in METHODS):
        found = rows[(method, lr)]
        accuracy, first = spread(found, "accuracy"), found[0]
        if lr == best[method]:
            methods[method] = Method(
                first["parameters"], first["file_bytes"], ratios[method], accuracy
            )
        table.append(
            [
                METHODS[method] + (" *" if lr == best[method] else ""),
                f"{lr:g}",
                f"{first['parameters']:,}",
                f"{first['file_bytes'] / 1e3:,.0f}",
                times[method].show(".0f"),
                ratios[method].show(".2f"),
                accuracy.show(".1%"),
                spread(found, "held_out_loss").show(),
            ]
        )
    figure, panels = new_figure(3, 3.6)
    names = ["LLaMA-\nAdapter", "LoRA", "full"]
    values = {
        "trained parameters": [Spread.of([float(methods[m].parameters)]) for m in METHODS],
        "processor time per step, relative": [methods[m].step_time for m in METHODS],
        "held-out exact match": [methods[m].accuracy for m in METHODS],
    }
    for axes, (title, spreads) in zip(panels, values.items(), strict=True):
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = [s.median for s in spreads]
        axes.bar(names, bars, color=[COLOURS[m] for m in METHODS], yerr=errors, capsize=4)
        axes.set_title(title)
    panels[0].set_yscale("log")
    for index, name in enumerate(METHODS):
        panels[0].text(
            index,
            methods[name].parameters,
            f"{methods[name].parameters:,}",
            ha="center",
            va="bottom",
        )
    panels[2].set_ylim(0, 1.03)
    panels[2].axhline(base["accuracy"], color="black", linestyle=":", label="untouched base")
    panels[2].legend(loc="center")
    return Section(
        "Against LoRA and full fine-tuning (LLaMA-Adapter, Table 1)",
        [
            "method (* best rate)",
            "peak lr",
            "parameters",
            "file, kB",
            "processor ms per step",
            "relative",
            "held-out exact match",
            "held-out loss",
        ],
        table,
        method_claims(methods),
        {"methods": figure},
    )


SECTIONS = {
    "layers": layers_section,
    "zero_init": zero_init_section,
    "longer": longer_section,
    "methods": methods_section,
}
