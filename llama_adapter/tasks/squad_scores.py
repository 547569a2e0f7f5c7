"""How SQuAD scores answers: exact match and F1, each the best over the right answers.

normalise: lower case, no punctuation, no articles, single blanks. F1 = 2PR / (P + R) over the bags
of words of the two. Version 2.0 also asks for the odds of no answer, and at which of them to stop.
Both are as SQuAD's own scorer of that version has them, which differ on texts without a word.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from llama_adapter.tasks.squad_files import Question

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Measure = Callable[[str, str], float]


def normalise(text: str) -> str:
    """A text without what SQuAD does not compare: case, punctuation, articles, runs of blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """1 if two texts are the same after `normalise`, else 0."""
    return float(normalise(answer) == normalise(right))


def f1(answer: str, right: str) -> float:
    """F1 of two texts' words after `normalise`; where either has none, whether both have none."""
    found, wanted = normalise(answer).split(), normalise(right).split()
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def f1_of_version_1(answer: str, right: str) -> float:
    """`f1`, but 0 where neither has a word: version 1.1's scorer counts the words in common."""
    return f1(answer, right) if normalise(answer) else 0.0


def best(measure: Measure, question: Question, answer: str, *, version_2: bool) -> float:
    """A measure of an answer to a question, the largest over those that are right.

    Args:
        measure: `exact_match`, `f1` or `f1_of_version_1`.
        question: with the right answers; with none of them, the answer must be empty.
        answer: what was answered.
        version_2: right answers without a word after `normalise` do not count.
    """
    right = question.answers
    if version_2:
        right = [text for text in right if normalise(text)]
    return max(measure(answer, text) for text in right or [""])


def squad_scores(
    questions: Sequence[Question], texts: Sequence[str], *, version_2: bool
) -> dict[str, float]:
    """Scores of answers, in per cent: the mean over the questions.

    Returns:
        exact and f1; for version 2.0 also those of the questions that have an answer, HasAns_exact
        and HasAns_f1, and of those that have none, NoAns_exact and NoAns_f1, where there are any.
    """
    overlap = f1 if version_2 else f1_of_version_1
    rows = [
        {
            "exact": best(exact_match, question, text, version_2=version_2),
            "f1": best(overlap, question, text, version_2=version_2),
        }
        for question, text in zip(questions, texts, strict=True)
    ]
    scores = _means(rows, "")
    if version_2:
        for prefix, answerable in (("HasAns_", True), ("NoAns_", False)):
            pairs = zip(questions, rows, strict=True)
            scores |= _means([row for q, row in pairs if bool(q.answers) == answerable], prefix)
    return scores


def _means(rows: Sequence[dict[str, float]], prefix: str) -> dict[str, float]:
    names = rows[0] if rows else ()
    return {prefix + name: 100 * sum(row[name] for row in rows) / len(rows) for name in names}


def best_threshold(
    questions: Sequence[Question],
    texts: Sequence[str],
    null_odds: Sequence[float],
    measure: Measure,
) -> tuple[float, float]:
    """The best that a threshold on the odds of no answer makes of answers, as version 2.0 scores.

    A question whose odds are at most t gets its text, any other the empty answer; t is one of the
    odds, or 0 where giving no answer at all is best, as in SQuAD's own scorer. That one parts
    questions of equal odds too, and takes an answer or a right one without a word for words.

    Args:
        questions: what was asked.
        texts: an answer to each.
        null_odds: the odds of no answer of each.
        measure: `exact_match` or `f1`.

    Returns:
        The best mean in per cent, and its threshold.
    """
    silent = [best(measure, question, "", version_2=True) for question in questions]
    spoken = [
        best(measure, question, text, version_2=True)
        for question, text in zip(questions, texts, strict=True)
    ]
    total = top = sum(silent)
    threshold = 0.0
    order = sorted(range(len(questions)), key=lambda place: null_odds[place])
    for position, place in enumerate(order):
        total += spoken[place] - silent[place]
        # questions of equal odds are answered together
        following = order[position + 1] if position + 1 < len(order) else None
        if following is not None and null_odds[following] == null_odds[place]:
            continue
        if total > top:
            top, threshold = total, null_odds[place]
    return 100 * top / len(questions), threshold
