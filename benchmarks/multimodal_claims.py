"""Which of the papers' results on images do our own numbers bear out?

Accuracies are in percent. "Above" and "below" mean that the ranges over the seeds do not overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.ablation_claims import Claim, Spread, verdict

# percentage points: the least gain that counts, and the most that counts as none
GAIN, SAME = 5.0, 3.0
# of interference, and of captions that count as learned
LOSS, LEARNED = 20.0, 90.0


@dataclass(frozen=True)
class Classes:
    """Accuracy of one kind of adapter by class column, and by kind of question."""

    by_name: Mapping[str, Spread]

    def of(self, name: str) -> Spread:
        """One of them."""
        return self.by_name[name]


def _gain(better: Spread, worse: Spread) -> float:
    return better.median - worse.median


def class_claims(text: Classes, multi: Classes, shuffled: Classes, chance: float) -> list[Claim]:
    """Table 2: text-only against multi-modal.

    Args:
        text: the adapter that sees no picture.
        multi: the multi-modal one.
        shuffled: the same one, with the pictures of the test shuffled.
        chance: accuracy of guessing, on the questions that need their picture.
    """
    gains = {name: _gain(multi.of(name), text.of(name)) for name in ("Avg", "IMG", "NO")}
    above = multi.of("Avg").above(text.of("Avg"))
    blind, seen, mixed = text.of("pictured"), multi.of("pictured"), shuffled.of("pictured")
    kept = gains["NO"] >= -SAME
    return [
        Claim(
            "Table 2: pictures add to accuracy (85.19 against 78.31 %).",
            f"Avg above text-only's, by at least {GAIN:g} percentage points of the medians; "
            "partly: above.",
            verdict(above and gains["Avg"] >= GAIN, above),
            f"{multi.of('Avg').show('.1f')} against {text.of('Avg').show('.1f')}.",
        ),
        Claim(
            "Table 2: the gain sits in the questions with a picture.",
            "IMG gains at least twice what NO gains, and NO loses at most "
            f"{SAME:g} points; partly: the first.",
            verdict(
                gains["IMG"] >= GAIN and gains["IMG"] >= 2 * gains["NO"] and kept,
                gains["IMG"] >= GAIN and gains["IMG"] >= 2 * gains["NO"],
            ),
            f"IMG {gains['IMG']:+.1f}, NO {gains['NO']:+.1f}.",
        ),
        Claim(
            "Not in the papers: without its picture a question that needs one is a guess.",
            f"Text-only's median at most {SAME:g} points over guessing; partly: below multi-modal.",
            verdict(blind.median <= chance + SAME, seen.above(blind)),
            f"{blind.show('.1f')} against {chance:.1f} by guessing.",
        ),
        Claim(
            "Not in the papers: it is the picture itself that helps.",
            "With shuffled pictures the questions that need them drop below the multi-modal "
            f"accuracy, to at most {SAME:g} points over text-only's; partly: drop below.",
            verdict(seen.above(mixed) and mixed.median <= blind.median + SAME, seen.above(mixed)),
            f"{seen.show('.1f')}, shuffled {mixed.show('.1f')}, text-only {blind.show('.1f')}.",
        ),
    ]


def scale_claims(multi: Classes, last: Classes) -> list[Claim]:
    """Section 3.3: features of several layers against those of the last."""
    a, b = multi.of("IMG"), last.of("IMG")
    return [
        Claim(
            "Section 3.3: global features of several scales describe a picture better (no number "
            "is given).",
            "IMG with several layers' features above that with the last layer's; partly: the "
            "median higher.",
            verdict(a.above(b), a.median > b.median),
            f"{a.show('.1f')} against {b.show('.1f')}.",
        )
    ]


def fusion_claims(late: Classes, early: Classes) -> list[Claim]:
    """V2, section 4.3: tokens in the first layer against one that is added to the prompts."""
    a, b = early.of("IMG"), late.of("IMG")
    return [
        Claim(
            "V2, section 4.3: early fusion serves pictures at least as well as late fusion (no "
            "number is given).",
            "IMG of early fusion not below that of late fusion; partly: below, but the median by "
            f"at most {SAME:g} points.",
            verdict(not b.above(a), b.median - a.median <= SAME),
            f"{a.show('.1f')} against {b.show('.1f')}.",
        )
    ]


def data_claims(pictured: Mapping[int, Spread]) -> list[Claim]:
    """Supplement, Table 9, from accuracy on what needs a picture by questions with one."""
    order = sorted(pictured)
    falls = [f"{a} to {b}" for a, b in pairwise(order) if pictured[a].above(pictured[b])]
    gain = pictured[order[-1]].above(pictured[order[0]])
    rising = all(pictured[b].median >= pictured[a].median for a, b in pairwise(order))
    shown = " / ".join(pictured[count].show(".1f") for count in order)
    return [
        Claim(
            "Supplement, Table 9: more visual instruction data helps (MME 1222 / 1256 / 1618).",
            "With the most above with the fewest, no median under the one before; partly: the "
            "first.",
            verdict(gain and rising and not falls, gain),
            f"questions with pictures {' / '.join(map(str, order))}: {shown}.",
        )
    ]


@dataclass(frozen=True)
class Skills:
    """What an adapter of instructions and captions can do.

    Attributes:
        inst, cap, vqa: after all training, in percent.
        inst_before, vqa_before: before the captions; as after where both are trained in turn.
        moved: largest change of a logit of a question without picture, by the captions.
    """

    inst: Spread
    cap: Spread
    vqa: Spread
    inst_before: Spread
    vqa_before: Spread
    moved: Spread


def group_claims(found: Mapping[str, Skills], base: float) -> list[Claim]:
    """V2, sections 3 and 4: disjoint groups against all parameters.

    Args:
        found: "late all" (A), "early all" (B), "early disjoint" (C) and "late disjoint" (D), one
            stage after the other; "joint all" (E) and "joint disjoint" (F), in turn.
        base: INST of the untouched base.
    """
    a, c = found["late all"], found["early disjoint"]
    e, f = found["joint all"], found["joint disjoint"]
    lost = a.inst_before.median - a.inst.median
    exact = c.moved.high == 0.0
    learned = c.cap.median >= LEARNED
    gained = c.vqa.median - c.vqa_before.median
    taught = a.inst_before
    return [
        Claim(
            "Not in the papers: the first stage teaches the instructions that the others are held "
            "against.",
            f"A: INST before the captions at least {SAME:g} points over the untouched base's in "
            "every seed; partly: the median over it.",
            verdict(taught.low >= base + SAME, taught.median > base),
            f"{taught.show('.1f')} against {base:.1f}.",
        ),
        Claim(
            "V2, section 3: captions, learned by all parameters of a late-fusion adapter after "
            "instructions, destroy instruction following.",
            f"A: INST below what it was, by at least {LOSS:g} points of the medians; partly: "
            "below.",
            verdict(a.inst_before.above(a.inst) and lost >= LOSS, a.inst_before.above(a.inst)),
            f"{a.inst_before.show('.1f')} before, {a.inst.show('.1f')} after.",
        ),
        Claim(
            "V2, section 4.2: the visual group alone learns captions, and instructions are left "
            "as they were.",
            f"C: at least {LEARNED:g} % of captions' words right in the median, and the logits of "
            "questions without picture bitwise the same; partly: the latter.",
            verdict(exact and learned, exact),
            f"CAP {c.cap.show('.1f')}, logits moved by at most {c.moved.high:g}.",
        ),
        Claim(
            "V2, section 1: instructions and captions combine to answers on pictures that nobody "
            "trained.",
            f"C: VQA above what it was before the captions, by at least {SAME:g} points of the "
            "medians; partly: the median higher.",
            verdict(c.vqa.above(c.vqa_before) and gained >= SAME, gained > 0),
            f"{c.vqa_before.show('.1f')} before, {c.vqa.show('.1f')} after.",
        ),
        Claim(
            "V2, section 4.2: in joint training too, shared parameters interfere and disjoint "
            "groups do not.",
            "INST of F above that of E; partly: the median higher.",
            verdict(f.inst.above(e.inst), f.inst.median > e.inst.median),
            f"{f.inst.show('.1f')} against {e.inst.show('.1f')}.",
        ),
    ]
