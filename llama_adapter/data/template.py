"""How an instruction becomes the text that the model continues: the papers' prompt template.

It is the one of Stanford Alpaca, which LLaMA-Adapter's language experiments (section 4.1) train on.
"""

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def prompt_text(instruction: str, input: str = "") -> str:
    """Text up to and including "### Response:"; the output follows the colon directly.

    Args:
        instruction: the task in words.
        input: what the task is about; "" leaves its section and its mention out.

    Returns:
        The prompt, without a trailing newline or space.
    """
    instruction = f"### Instruction:\n{instruction}\n\n"
    if not input:
        return f"{_TASK}{_REQUEST}{instruction}### Response:"
    return f"{_TASK}{_CONTEXT}{_REQUEST}{instruction}### Input:\n{input}\n\n### Response:"
