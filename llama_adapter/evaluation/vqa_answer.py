"""Short answers as the VQA benchmark compares them: its normal form, and accuracy by agreement.

The steps are those of VQA's own scorer, its oddities included: they decide published numbers.
"""

import re
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
# the scorer's pattern means "unless between digits" but keeps any period before a digit
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBERS.split())}}
# these with any one apostrophe left out are put right; "lets" is not in the scorer's table, nor are
# words that are others without theirs, such as "ill" and "were"
_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    # the scorer has this one the wrong way round
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for at, letter in enumerate(word):
            if letter == "'":
                table[word[:at] + word[at + 1 :]] = word
    return table


_CONTRACTIONS = _without_one_apostrophe()


def normalise(answer: str) -> str:
    """An answer in VQA's normal form.

    Line ends and tabs become spaces. Every mark is dropped where it stands beside a space anywhere
    in the answer, or where the answer holds a digit, a comma and a digit; else it becomes a space.
    Periods go unless a digit follows. Lower case; none, zero to ten become digits; a, an, the go;
    "dont" becomes "don't".
    """
    text = _stripped(answer)
    grouped = _COMMA.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        dropped = grouped or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if dropped else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(prediction: str, answers: Sequence[str], *, unanimous_as_is: bool = False) -> float:
    """How far people agree with an answer: the mean, each person left out once.

    accuracy = (1 / n) sum_i min(#{j != i: answer_j = prediction} / 3, 1)

    Args:
        prediction: the answer given.
        answers: those of n people, ten in VQA; both sides are normalised.
        unanimous_as_is: as VQA's scorer has it, where all people gave one answer both sides are
            compared as they are, but for blanks around them: "Yes." is not "yes" then.

    Returns:
        0 to 1; 1 from four equal answers on.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("answers must hold at least one, got none")
    form = normalise
    if unanimous_as_is and len({_stripped(answer) for answer in answers}) == 1:
        form = _stripped
    given = form(prediction)
    equal = [form(answer) == given for answer in answers]
    total = sum(equal)
    return sum(min((total - own) / 3, 1.0) for own in equal) / len(equal)


def holds_words(text: str, words: str) -> bool:
    """Whether words stand in a text as they are, not inside longer words; "" never does."""
    return bool(words) and re.search(rf"\b{re.escape(words)}\b", text) is not None
