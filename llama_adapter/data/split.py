"""Which records are held out: by what they ask, so that no question is on both sides.

A question is a number, see `question_of`; millions of them are arrays.
"""

import hashlib
import random
from array import array

import numpy as np
from numpy.typing import NDArray

from llama_adapter.data.mixture import AnyRecord

Questions = NDArray[np.uint64]


def question_of(record: AnyRecord) -> int:
    """What a record asks, as a number below 2**64 that tells duplicates: its texts and its image.

    One question about two pictures is two, and one picture may be asked about on both sides. Blanks
    around texts do not count. Of a million questions, two that differ have one number with a
    probability of 3e-8; they would be held out together.
    """
    *first, last = record.question
    asked = "".join(f"{len(text)} {text}" for text in first) + last
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), "little")


def hold_out(questions: Questions, size: int, seed: int) -> NDArray[np.bool_]:
    """Hold `size` records out, at random.

    Records that ask the same stay on one side together, so a question of the held-out part is never
    one that was trained on. The held-out part can therefore come out a little smaller than asked
    for, never larger.

    Args:
        questions: (n,), of the records of one file in its order.
        size: records to hold out; 0 holds none out.
        seed: of the choice.

    Returns:
        (n,), True for what is held out.

    Raises:
        ValueError: size is negative, or leaves no record on one of the sides.
    """
    if not 0 <= size < len(questions):
        raise ValueError(f"val_size must be from 0 to {len(questions) - 1}, got {size}")
    if not size:
        return np.zeros(len(questions), bool)
    # records by question, those of one in the file's order; starts of the questions among them
    by_question = np.argsort(questions, kind="stable")
    ordered = questions[by_question]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    del ordered
    ends = np.append(starts[1:], len(questions))
    # questions as they first appear in the file
    in_order = np.argsort(by_question[starts])
    order = array("q", range(len(starts)))
    # a string seeds by its hash, which does not change between Python versions
    random.Random(f"held out {seed}").shuffle(order)
    chosen = np.zeros(len(questions), bool)
    count = 0
    for place in order:
        begin, end = int(starts[in_order[place]]), int(ends[in_order[place]])
        if count + end - begin <= size:
            chosen[by_question[begin:end]] = True
            count += end - begin
        if count == size:
            break
    if not count:
        raise ValueError(f"val_size = {size} is too small: every question has more duplicates")
    return chosen


def asked_again(questions: Questions, held_out: Questions) -> dict[int, int]:
    """Which training records ask what a separate held-out file asks too.

    Args:
        questions: (n,), of the training records.
        held_out: (m,), of the held-out file's.

    Returns:
        By the place of such a training record, the place of the last held-out one that asks it.
    """
    both = np.intersect1d(questions, held_out)
    places = np.flatnonzero(np.isin(held_out, both))
    last = {int(held_out[place]): int(place) for place in places}
    again = np.flatnonzero(np.isin(questions, both))
    return {int(place): last[int(questions[place])] for place in again}
