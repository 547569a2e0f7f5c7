"""Which words does the bundled world know, and what is true of them?

Everything the tiny base can be asked is in these tables: nouns with their plural, kind and colour,
adjectives with their opposite, verbs with their past tense, and the numbers to twenty. Every word
is one sentencepiece piece, so the tasks are about words and not about spelling.
"""

from __future__ import annotations

from itertools import pairwise

_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "wolf": "wolves",
    "cherry": "cherries",
    "knife": "knives",
    "shelf": "shelves",
    "foot": "feet",
    "tooth": "teeth",
    "baby": "babies",
    "man": "men",
    "woman": "women",
    "child": "children",
    "church": "churches",
    "peach": "peaches",
    "brush": "brushes",
    "dress": "dresses",
    "bus": "buses",
    "fox": "foxes",
}

_KIND_TO_NOUNS = {
    "animal": "cat dog horse cow bird mouse lion bear wolf fox goat duck",
    "fruit": "apple pear plum lemon cherry peach banana grape melon",
    "tool": "hammer knife shovel brush needle spoon fork",
    "clothing": "shirt coat hat shoe sock glove dress scarf",
    "vehicle": "car bus train boat ship truck plane",
    "furniture": "chair table bed desk lamp shelf sofa",
    "body part": "hand foot nose arm leg tooth ear",
    "building": "house farm bank church tower castle school",
    "person": "baby man woman child king queen doctor farmer",
}

_COLOUR_TO_THINGS = {
    "red": "blood fire rose tomato",
    "green": "grass leaf frog forest",
    "blue": "sky sea ocean",
    "yellow": "sun butter honey gold",
    "white": "snow milk salt cloud",
    "black": "coal night tar",
    "brown": "mud wood coffee",
    "grey": "ash smoke iron",
}

_OPPOSITE_PAIRS = """
hot cold, big small, fast slow, old new, good bad, happy sad, rich poor, hard soft, full empty,
open closed, light heavy, high low, long short, wet dry, clean dirty, strong weak, early late,
loud quiet, thick thin, wide narrow, sweet sour, near far, true false, easy difficult
"""

_VERB_PASTS = """
walk walked, play played, jump jumped, cook cooked, help helped, talk talked, look looked,
wait waited, work worked, ask asked, call called, go went, eat ate, run ran, see saw, take took,
give gave, sing sang, swim swam, write wrote, drink drank, fall fell, fly flew, know knew,
make made, sleep slept, speak spoke, buy bought, think thought, bring brought, teach taught,
find found, win won, sit sat, stand stood, ride rode, drive drove, sell sold, tell told,
keep kept, lose lost, build built, draw drew, grow grew, throw threw, break broke, choose chose
"""

_NUMBERS = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
"""


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read a table of `left right` pairs separated by commas."""
    words = [entry.split() for entry in text.split(",")]
    return [(left, right) for left, right in words]


KIND: dict[str, str] = {
    noun: kind for kind, nouns in _KIND_TO_NOUNS.items() for noun in nouns.split()
}
COLOUR: dict[str, str] = {
    thing: colour for colour, things in _COLOUR_TO_THINGS.items() for thing in things.split()
}
PLURAL: dict[str, str] = {noun: _IRREGULAR_PLURALS.get(noun, noun + "s") for noun in KIND}
OPPOSITE: dict[str, str] = {
    word: other
    for left, right in _pairs(_OPPOSITE_PAIRS)
    for word, other in ((left, right), (right, left))
}
PAST: dict[str, str] = dict(_pairs(_VERB_PASTS))
NUMBERS: list[str] = _NUMBERS.split()
NEXT_NUMBER: dict[str, str] = dict(pairwise(NUMBERS))

LIST_WORDS: list[str] = [*KIND, *(thing for thing in COLOUR if thing not in KIND)]
"""The words that lists are drawn from; no word occurs twice."""


def all_words() -> list[str]:
    """Every lexicon word once, answers included, in a fixed order."""
    words = [*LIST_WORDS, *PLURAL.values(), *OPPOSITE, *PAST, *PAST.values(), *NUMBERS]
    words += [part for kind in _KIND_TO_NOUNS for part in kind.split()]
    words += list(_COLOUR_TO_THINGS)
    return list(dict.fromkeys(words))
