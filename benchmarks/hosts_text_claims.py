"""Which of the papers' results on RoBERTa do our own numbers bear out?

Scores are in percent: F1 of answers, micro-F1 of tagged spans. "Above" means that the ranges over
the seeds do not overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.ablation_claims import Claim, Spread, verdict

# percentage points: what counts as near to full fine-tuning, what as far behind
NEAR, FAR = 3.0, 10.0


@dataclass(frozen=True)
class Table:
    """One table of the paper in kind.

    Attributes:
        name: "Table 8" or "Table 10".
        scores: by method, then by data set, over the seeds.
        means: of a method's data sets, by method, over the seeds.
        numbers: the paper's, by "full", "prompt_tuning", "p_tuning_v2" and "zero_kv".
    """

    name: str
    scores: Mapping[str, Mapping[str, Spread]]
    means: Mapping[str, Spread]
    numbers: Mapping[str, str]


def claims(table: Table) -> list[Claim]:
    """What the paper says of a table, held against ours."""
    return [*_against_prompts(table), *_against_training(table)]


def _shown(table: Table, *methods: str) -> str:
    return ", ".join(
        f"{method} " + " / ".join(s.show(".1f") for s in table.scores[method].values())
        for method in methods
    )


def _against_prompts(table: Table) -> list[Claim]:
    ours, theirs, numbers = table.scores["zero_kv"], table.scores["p_tuning_v2"], table.numbers
    above = [data for data in ours if ours[data].above(theirs[data])]
    below = [data for data in ours if theirs[data].above(ours[data])]
    better = table.means["zero_kv"].median > table.means["p_tuning_v2"].median
    zero, shallow = table.means["zero_kv"], table.means["prompt_tuning"]
    gap = zero.median - shallow.median
    return [
        Claim(
            f"{table.name}: zero-init attention on P-tuning v2's prompts is better than P-tuning "
            f"v2 ({numbers['zero_kv']} against {numbers['p_tuning_v2']}).",
            "Above on every data set; partly: the median of the mean higher, and below on none.",
            verdict(len(above) == len(ours), better and not below),
            f"{_shown(table, 'zero_kv', 'p_tuning_v2')}; above on {', '.join(above) or 'none'}, "
            f"below on {', '.join(below) or 'none'}.",
        ),
        Claim(
            f"{table.name}: prompts at the input alone are far behind "
            f"({numbers['prompt_tuning']}).",
            f"The mean of zero-init above that of prompt tuning, by {FAR:g} points of the medians; "
            "partly: above.",
            verdict(zero.above(shallow) and gap >= FAR, zero.above(shallow)),
            f"means {zero.show('.1f')} against {shallow.show('.1f')}.",
        ),
    ]


def _against_training(table: Table) -> list[Claim]:
    full, zero, head = (table.means[name] for name in ("full", "zero_kv", "linear"))
    behind, way = full.median - zero.median, zero.median - head.median
    return [
        Claim(
            f"{table.name}: zero-init attention comes near to full fine-tuning "
            f"({table.numbers['zero_kv']} against {table.numbers['full']}).",
            f"The mean at most {NEAR:g} points under that of full; partly: at least half of the "
            "way to it from the head alone.",
            verdict(behind <= NEAR, way >= behind),
            f"means {zero.show('.1f')} against {full.show('.1f')}, the head alone "
            f"{head.show('.1f')}.",
        ),
        Claim(
            "Not in the papers: zero-init attention adds to what the frozen host's head can do.",
            f"The mean above that of the head alone, by {FAR:g} points of the medians; partly: "
            "above.",
            verdict(zero.above(head) and way >= FAR, zero.above(head)),
            f"means {zero.show('.1f')} against {head.show('.1f')}.",
        ),
    ]
