"""Which of the papers' ablation results do our own numbers bear out?

Each claim has a criterion that is computed from the seeds' results alone. "Above" and "below" mean
that the two ranges over the seeds do not overlap; anything less is noise.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

REPRODUCED, PARTLY, NOT = "reproduced", "partly reproduced", "NOT reproduced"
# a step-0 loss this near to the base's is the base's, in float32
SAME_LOSS = 1e-5
# accuracy this near to the untouched base's is no better than not training at all
NO_BETTER = 0.05
RISING = 0.9
# accuracy this little under another method's is partly comparable
CLOSE = 0.05


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest value over the seeds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one number per seed."""
        return cls(statistics.median(values), min(values), max(values))

    def above(self, other: "Spread") -> bool:
        """Whether every seed's value here exceeds every one there."""
        return self.low > other.high

    def show(self, form: str = ".3f") -> str:
        """Median (lowest to highest)."""
        shown = f"{self.median:{form}}"
        if self.low == self.high:
            return shown
        return f"{shown} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Claim:
    """One result of the papers, held against ours.

    Attributes:
        paper: what the papers report.
        criterion: when it counts as reproduced, when as partly.
        verdict: REPRODUCED, PARTLY or NOT.
        evidence: the numbers that decide.
    """

    paper: str
    criterion: str
    verdict: str
    evidence: str


def verdict(whole: bool, part: bool) -> str:
    """REPRODUCED where all of a criterion holds, PARTLY where its stated part does, else NOT."""
    return REPRODUCED if whole else PARTLY if part else NOT


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where all of one are equal."""

    def ranks(values: Sequence[float]) -> list[float]:
        below = [sum(other < value for other in values) for value in values]
        equal = [sum(other == value for other in values) for value in values]
        return [a + (b - 1) / 2 for a, b in zip(below, equal, strict=True)]

    a, b = ranks(x), ranks(y)
    mean = (len(a) - 1) / 2
    spread = math.sqrt(sum((v - mean) ** 2 for v in a) * sum((v - mean) ** 2 for v in b))
    shared = sum((v - mean) * (w - mean) for v, w in zip(a, b, strict=True))
    return shared / spread if spread else 0.0


def layers_claims(accuracy: Mapping[int, Spread]) -> list[Claim]:
    """Table 3, from accuracy by the number of inserted layers."""
    counts = sorted(accuracy)
    found = [accuracy[count] for count in counts]
    falls = [f"{a} to {b}" for a, b in pairwise(counts) if accuracy[a].above(accuracy[b])]
    rank = spearman(counts, [spread.median for spread in found])
    gain = found[-1].above(found[0])
    medians = " / ".join(f"{spread.median:.1%}" for spread in found)
    return [
        Claim(
            "Table 3: more inserted layers are better (55.95 / 73.36 / 83.85 % for 10 / 20 / 30).",
            f"All layers above the fewest, no step down below the one before, rank correlation of "
            f"the medians at least {RISING}; partly: all layers above the fewest.",
            verdict(gain and not falls and rank >= RISING, gain),
            f"L = {' / '.join(map(str, counts))}: {medians}; rank correlation {rank:.2f}; "
            f"falls: {', '.join(falls) or 'none'}.",
        )
    ]


@dataclass(frozen=True)
class InitResult:
    """One kind of attention at one prompt scale.

    Attributes:
        step0: held-out loss before training.
        halfway, final: mean training loss over the tenth of the steps before the middle, the end.
        accuracy: held-out exact match afterwards.
    """

    step0: Spread
    halfway: Spread
    final: Spread
    accuracy: Spread


def _by_scale(
    paper: str, criterion: str, holds: Mapping[float, bool], evidence: Mapping[float, str]
) -> Claim:
    """A claim that is reproduced where it holds at every prompt scale, partly where at some."""
    yes = [f"{scale:g}" for scale, held in holds.items() if held]
    no = [f"{scale:g}" for scale, held in holds.items() if not held]
    where = f"holds at {'sigma ' + ', '.join(yes) if yes else 'no sigma'}"
    where += f", not at {', '.join(no)}. " if no else ". "
    shown = "; ".join(f"sigma {scale:g}: {text}" for scale, text in evidence.items())
    return Claim(
        paper,
        f"{criterion} At every sigma; partly: at some.",
        verdict(not no, bool(yes)),
        f"{where}{shown}.",
    )


def zero_init_claims(
    results: Mapping[str, Mapping[float, InitResult]], base_loss: float, base_accuracy: float
) -> list[Claim]:
    """Table 4 and Figure 7, taken apart.

    Args:
        results: by kind ("zero_init", "gate_one", "joint"), then by sigma, the prompts' scale
            relative to the normed attention input.
        base_loss: held-out loss of the untouched base.
        base_accuracy: its exact match.
    """
    zero, one, joint = results["zero_init"], results["gate_one"], results["joint"]
    scales = sorted(zero)
    drift = max(
        max(abs(zero[s].step0.low - base_loss), abs(zero[s].step0.high - base_loss)) for s in scales
    )
    disturbed = [s for s in scales if min(one[s].step0.low, joint[s].step0.low) > base_loss]
    undisturbed = Claim(
        "Section 3.2, Figure 7: zero-init starts from the undisturbed base, random init does not.",
        f"Step-0 loss of zero-init within {SAME_LOSS:g} of the base's, of both others higher, at "
        "every sigma; partly: the first.",
        verdict(drift <= SAME_LOSS and disturbed == scales, drift <= SAME_LOSS),
        f"base {base_loss:.3f}, zero-init off by at most {drift:.1e}; "
        + "; ".join(
            f"sigma {s:g}: gate 1 {one[s].step0.median:.3f}, joint {joint[s].step0.median:.3f}"
            for s in scales
        )
        + ".",
    )
    against = {
        s: f"{zero[s].accuracy.show('.1%')} against {joint[s].accuracy.show('.1%')}" for s in scales
    }
    return [
        undisturbed,
        _by_scale(
            "Table 4: zero-init attention ends better than random init (83.85 against 40.77 %).",
            "Accuracy of zero-init above that of the joint softmax.",
            {s: zero[s].accuracy.above(joint[s].accuracy) for s in scales},
            against,
        ),
        _by_scale(
            "Table 4: random init ends no better than chance (40.77 against 39.83 %).",
            f"Median accuracy of the joint softmax at most {100 * NO_BETTER:g} percentage points "
            f"over the untouched base's {base_accuracy:.1%}.",
            {s: joint[s].accuracy.median <= base_accuracy + NO_BETTER for s in scales},
            {s: joint[s].accuracy.show(".1%") for s in scales},
        ),
        _by_scale(
            "Figure 7: zero-init converges faster and reaches a lower loss.",
            "Training loss of zero-init below the joint softmax's halfway and at the end.",
            {
                s: joint[s].halfway.above(zero[s].halfway) and joint[s].final.above(zero[s].final)
                for s in scales
            },
            {
                s: f"halfway {zero[s].halfway.median:.3f} against {joint[s].halfway.median:.3f}, "
                f"end {zero[s].final.median:.3f} against {joint[s].final.median:.3f}"
                for s in scales
            },
        ),
        _by_scale(
            "Taken apart (not in the papers): the gate that starts at zero makes the difference, "
            "not the separate softmax.",
            "Accuracy of zero-init above that of a separate softmax with its gate fixed to 1.",
            {s: zero[s].accuracy.above(one[s].accuracy) for s in scales},
            {
                s: f"{zero[s].accuracy.show('.1%')} against {one[s].accuracy.show('.1%')}"
                for s in scales
            },
        ),
        _by_scale(
            "Taken apart (not in the papers): the separate softmax makes the difference, even with "
            "its gate fixed to 1.",
            "Accuracy of the separate softmax with gate 1 above that of the joint softmax.",
            {s: one[s].accuracy.above(joint[s].accuracy) for s in scales},
            {
                s: f"{one[s].accuracy.show('.1%')} against {joint[s].accuracy.show('.1%')}"
                for s in scales
            },
        ),
    ]


@dataclass(frozen=True)
class Fit:
    """A run of some length: training loss, held-out loss (nats per label) and accuracy."""

    train: Spread
    held_out: Spread
    accuracy: Spread


def longer_claims(fits: Mapping[int, Fit]) -> list[Claim]:
    """Table 6, from runs by their number of epochs."""
    order = sorted(fits)
    first, last = fits[order[0]], fits[order[-1]]
    falls, rises = first.train.above(last.train), last.held_out.above(first.held_out)
    epochs = f"epochs {' / '.join(map(str, order))}: "
    losses = (
        f"training loss {' / '.join(f'{fits[e].train.median:.3f}' for e in order)}, "
        f"held-out loss {' / '.join(f'{fits[e].held_out.median:.3f}' for e in order)}."
    )
    suffers = first.accuracy.above(last.accuracy)
    keeps = last.accuracy.median >= first.accuracy.median
    return [
        Claim(
            "Table 6: longer training over-fits (training loss 0.022 / 0.004 / 0.001, validation "
            "loss 0.136 / 0.241 / 0.282 after 15 / 30 / 60 epochs).",
            "Training loss of the longest run below, held-out loss above the shortest run's; "
            "partly: the first.",
            verdict(falls and rises, falls),
            epochs + losses,
        ),
        Claim(
            "Table 6: accuracy does not suffer from over-fitting (82.08 / 83.85 / 83.94 %).",
            "Over-fitted as above, and the longest run's median accuracy not under the shortest's; "
            "partly: accuracy not below the shortest's.",
            verdict(falls and rises and keeps, not suffers),
            epochs + " / ".join(f"{fits[e].accuracy.median:.1%}" for e in order) + ".",
        ),
    ]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, at its best learning rate.

    Attributes:
        parameters: trained ones.
        file_bytes: what has to be kept of them.
        step_time: processor time per optimiser step over that of the adapter on the same batch.
        accuracy: held-out exact match.
    """

    parameters: int
    file_bytes: int
    step_time: Spread
    accuracy: Spread


def method_claims(methods: Mapping[str, Method]) -> list[Claim]:
    """Table 1, from the methods "zero_init", "lora" and "full"."""
    ours, others = methods["zero_init"], {n: methods[n] for n in ("lora", "full")}
    fewer = all(ours.parameters < m.parameters for m in others.values())
    smaller = all(ours.file_bytes < m.file_bytes for m in others.values())
    faster = [name for name, m in others.items() if m.step_time.above(ours.step_time)]
    worse = [name for name, m in others.items() if m.accuracy.above(ours.accuracy)]
    best = max(m.accuracy.median for m in others.values())
    each = {"adapter": ours, "LoRA": methods["lora"], "full": methods["full"]}

    def shown(show: Callable[[Method], str]) -> str:
        return ", ".join(f"{name} {show(method)}" for name, method in each.items()) + "."

    return [
        Claim(
            "Table 1: fewest tuned parameters and smallest file (1.2M, 4.7M against LoRA's 4.2M, "
            "16.8M and 7B, 13G).",
            "Both less than LoRA's and full fine-tuning's; partly: one of them.",
            verdict(fewer and smaller, fewer or smaller),
            shown(lambda m: f"{m.parameters:,} parameters in {m.file_bytes:,} bytes"),
        ),
        Claim(
            "Table 1: shortest training time (1 hour against LoRA's 1.5 and 3 hours).",
            "Time per step below LoRA's and full fine-tuning's; partly: below one of them.",
            verdict(len(faster) == len(others), bool(faster)),
            "time per step over the adapter's: " + shown(lambda m: m.step_time.show(".2f")),
        ),
        Claim(
            "Section 4.1: answers comparable to full fine-tuning's and LoRA's.",
            "Accuracy not below that of either at its best learning rate; partly: below, but the "
            f"median by at most {100 * CLOSE:g} percentage points.",
            verdict(not worse, ours.accuracy.median >= best - CLOSE),
            shown(lambda m: m.accuracy.show(".1%")),
        ),
    ]
