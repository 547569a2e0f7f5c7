"""VQA's normal form and accuracy, on cases worked out by hand."""

import pytest

from llama_adapter.evaluation.vqa_answer import accuracy, holds_words, normalise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red  Car.", "red car"),
        ("two\nbirds\t", "2 birds"),
        ("None", "0"),
        ("a an the", ""),
        # a mark between letters is a space, one beside a space vanishes, and then everywhere
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        # digits grouped by a comma make every mark vanish
        ("1,000", "1000"),
        ("1,000-ton", "1000ton"),
        # periods stay before digits only
        ("3.5 m.", "3.5 m"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ows'at", "ows'at"),
        ("ill", "ill"),
        ("lets", "lets"),
        ("$5: ok", "$5: ok"),
    ],
)
def test_normal_form(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # with k of ten who agree: k are left out beside k - 1 who agree, 10 - k beside k
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_of_ten_answers(agreeing: int, expected: float) -> None:
    answers = ["Red."] * agreeing + [f"colour{i}" for i in range(10 - agreeing)]
    assert accuracy("the red", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "always", "as_is"),
    [
        ("Yes.", ["yes"] * 10, 1.0, 0.0),
        ("\tyes\n", ["yes", " yes", *["yes\n"] * 8], 1.0, 1.0),
        ("t shirt", ["t-shirt"] * 10, 1.0, 0.0),
        ("t-shirt", ["t-shirt"] * 10, 1.0, 1.0),
        # one who says it otherwise, if only in its letters, and all is normalised
        ("Yes.", [*["yes"] * 9, "Yes"], 1.0, 1.0),
        # nine agree with each of nine left out, and with the tenth
        ("t shirt", [*["t-shirt"] * 9, "shirt"], 1.0, 1.0),
    ],
)
def test_unanimous_answers_as_they_are(
    prediction: str, answers: list[str], always: float, as_is: float
) -> None:
    assert accuracy(prediction, answers) == always
    assert accuracy(prediction, answers, unanimous_as_is=True) == as_is


def test_accuracy_needs_answers() -> None:
    with pytest.raises(ValueError, match="answers must hold at least one, got none"):
        accuracy("red", [])


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a red car there", "red car", True),
        ("red", "red", True),
        ("redder", "red", False),
        ("car red", "red car", False),
        ("it's 3.5 m", "3.5", True),
        ("it's 375 m", "3.5", False),
        ("red", "", False),
        ("", "red", False),
    ],
)
def test_whole_words(text: str, words: str, expected: bool) -> None:
    assert holds_words(text, words) is expected
