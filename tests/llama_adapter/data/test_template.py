"""The prompt's wording is the papers', to the byte."""

from llama_adapter.data.template import prompt_text


def test_prompt_with_input() -> None:
    assert prompt_text("Add the numbers.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add the numbers.\n"
        "\n"
        "### Input:\n"
        "2 and 3\n"
        "\n"
        "### Response:"
    )


def test_prompt_without_input() -> None:
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name a colour.\n"
        "\n"
        "### Response:"
    )
    assert prompt_text("Name a colour.") == expected
    assert prompt_text("Name a colour.", "") == expected


def test_braces_and_percent_signs_in_a_record_stay_as_they_are() -> None:
    text = prompt_text("Fill {input} in %s.", "{instruction} {0}")
    assert "### Instruction:\nFill {input} in %s.\n\n### Input:\n{instruction} {0}\n\n" in text
