"""Which of the papers' results for ViT and CLIP do our own numbers bear out?

Accuracies are in percent. "Above" and "below" mean that the ranges over the seeds do not overlap.
"""

from collections.abc import Mapping, Sequence

from benchmarks.ablation_claims import Claim, Spread, verdict

OURS, VPT, FULL, FLAMINGO = "zero_init", "vpt_deep", "full", "flamingo"
# part of the tasks on which the paper's prompts are better than VPT's: 16 of 19
WINS = 16 / 19
# percentage points: a median so little under another is not worse
SAME = 1.0


def _shown(spread: Spread) -> str:
    return spread.show(".1f")


def _against(name: str, paper: str, ours: Spread, other: Spread) -> Claim:
    return Claim(
        paper,
        f"Zero-init above {name}, in the mean of all; partly: the median higher.",
        verdict(ours.above(other), ours.median > other.median),
        f"{_shown(ours)} against {_shown(other)}.",
    )


def vit_claims(
    mean: Mapping[str, Spread],
    groups: Mapping[str, Mapping[str, Spread]],
    tasks: Mapping[str, Mapping[str, Spread]],
    parameters: Mapping[str, int],
    labels: Mapping[str, str],
) -> list[Claim]:
    """Tables 7 and 9, and the supplement's section on Flamingo.

    Args:
        mean: of all tasks, by method.
        groups: mean of a group's tasks, by group, then by method.
        tasks: by task, then by method.
        parameters: trained without the head, by method.
        labels: of the methods.
    """
    ours, vpt = mean[OURS], mean[VPT]
    better = [name for name, found in groups.items() if found[OURS].above(found[VPT])]
    higher = [name for name, found in groups.items() if found[OURS].median > found[VPT].median]
    won = [name for name, found in tasks.items() if found[OURS].median > found[VPT].median]
    shown = ", ".join(
        f"{name} {_shown(found[OURS])} against {_shown(found[VPT])}"
        for name, found in groups.items()
    )
    claims = [
        _against(
            labels["linear"],
            "Not in the papers: zero-init attention adapts a ViT beyond a head on its features.",
            ours,
            mean["linear"],
        ),
        _against(
            labels[VPT],
            "Table 7: zero-init is better than VPT (81.74 / 84.43 / 56.75 against 78.48 / 82.43 / "
            "54.98 %).",
            ours,
            vpt,
        ),
        Claim(
            "Table 7: it is better than VPT in each of the three groups.",
            "Above in every group; partly: the median higher in at least two.",
            verdict(len(better) == len(groups), len(higher) >= min(2, len(groups))),
            f"{shown}.",
        ),
        Claim(
            "Table 9: it is better than VPT on 16 of 19 tasks.",
            f"The median higher on at least {WINS:.0%} of the tasks; partly: on more than half.",
            verdict(len(won) >= WINS * len(tasks), 2 * len(won) > len(tasks)),
            f"on {len(won)} of {len(tasks)}: {', '.join(won) or 'none'}.",
        ),
    ]
    cited = {
        FULL: "75.88 / 83.36 / 47.64",
        "bias": "73.30 / 78.25 / 44.09",
        "adapter": "70.39 / 77.11 / 33.43",
        "side": "58.21 / 68.12 / 23.41",
    }
    for name, numbers in cited.items():
        paper = f"Table 7: it is better than {labels[name]} ({numbers} %)."
        claims.append(_against(labels[name], paper, ours, mean[name]))
    return [*claims, flamingo_claim(mean, parameters)]


def flamingo_claim(score: Mapping[str, Spread], parameters: Mapping[str, int]) -> Claim:
    """Supplement, section A: a gate within attention against gated layers besides.

    Args:
        score: by method, with OURS and FLAMINGO.
        parameters: trained ones, by method.
    """
    ours, other = score[OURS], score[FLAMINGO]
    fewer = parameters[OURS] < parameters[FLAMINGO]
    return Claim(
        "Supplement, on Flamingo: a gate within attention is more efficient than gated "
        "cross-attention and feed-forward layers (1.2M against over 3B parameters; no accuracy is "
        "given).",
        f"Fewer parameters, and the median at most {SAME:g} point lower; partly: fewer.",
        verdict(fewer and ours.median >= other.median - SAME, fewer),
        f"{parameters[OURS]:,} against {parameters[FLAMINGO]:,} parameters, {_shown(ours)} against "
        f"{_shown(other)}.",
    )


def clip_claims(
    base: Mapping[str, Spread],
    novel: Mapping[str, Spread],
    harmonic: Mapping[str, Spread],
    parameters: Mapping[str, int],
    ranks: Sequence[str],
) -> list[Claim]:
    """Table 11, and LoRA's ranks in the supplement's Table 11.

    Args:
        base, novel, harmonic: mean over the data sets, by method: "zero_init", "both", "frozen",
            "coop", "vpt_deep", "flamingo", and LoRA's.
        parameters: trained ones, by method.
        ranks: names of LoRA's rows.
    """
    ours = harmonic[OURS]
    held = novel[OURS].median >= novel["frozen"].median
    below = [name for name in ranks if not ours.above(harmonic[name])]
    best = max((harmonic[name] for name in ranks), key=lambda one: one.median)
    claims = [
        _against(
            "CLIP's zero-shot",
            "Table 11: zero-init's HM is above CLIP's zero-shot (84.67 against 80.15 %).",
            ours,
            harmonic["frozen"],
        ),
        _against(
            "CoOp",
            "Table 11: its HM is above CoOp's (84.67 against 79.90 %).",
            ours,
            harmonic["coop"],
        ),
        _against(
            "VPT deep",
            "Not in the papers: its HM is above VPT's, the nearest method with prompts in the "
            "visual encoder.",
            ours,
            harmonic[VPT],
        ),
        Claim(
            "Table 11: base classes gain (90.27 against CLIP's 80.45 %).",
            "Base above CLIP's zero-shot; partly: the median higher.",
            verdict(base[OURS].above(base["frozen"]), base[OURS].median > base["frozen"].median),
            f"{_shown(base[OURS])} against {_shown(base['frozen'])}.",
        ),
        Claim(
            "Table 11: novel classes do not lose (80.07 against CLIP's 79.98 %).",
            f"Novel's median not under CLIP's zero-shot; partly: by at most {SAME:g} point.",
            verdict(held, novel[OURS].median >= novel["frozen"].median - SAME),
            f"{_shown(novel[OURS])} against {_shown(novel['frozen'])}.",
        ),
        Claim(
            "Table 11: novel classes keep more than with CoOp (80.07 against 72.45 %).",
            "Novel above CoOp's; partly: the median higher.",
            verdict(novel[OURS].above(novel["coop"]), novel[OURS].median > novel["coop"].median),
            f"{_shown(novel[OURS])} against {_shown(novel['coop'])}.",
        ),
        Claim(
            "Supplement, Table 11: more than LoRA of any rank (for LLaMA: 52.2 against at most "
            "50.9 %).",
            "HM above that of every rank; partly: the median over the best rank's.",
            verdict(not below, ours.median > best.median),
            f"{_shown(ours)} against "
            + ", ".join(f"{name} {_shown(harmonic[name])}" for name in ranks)
            + ".",
        ),
        Claim(
            "Supplement: prompts may go into both of CLIP's encoders (no number is given).",
            "HM with both encoders not below that with the visual one; partly: the median at most "
            f"{SAME:g} point lower.",
            verdict(
                not ours.above(harmonic["both"]), harmonic["both"].median >= ours.median - SAME
            ),
            f"{_shown(harmonic['both'])} against {_shown(ours)}.",
        ),
    ]
    return [*claims, flamingo_claim(harmonic, parameters)]
