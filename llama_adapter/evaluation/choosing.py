"""Which of a question's options is likeliest? Each is put behind the prompt, and its loss is read.

It is how LLaMA-Adapter's authors answer multiple choice where an answer may not name an option.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy

from llama_adapter.answering import Answerer, Image


@torch.no_grad()
def losses(
    answerer: Answerer,
    texts: Sequence[str],
    outputs: Sequence[str],
    images: Sequence[Image | None],
) -> list[float]:
    """Loss in nats per token of each output behind its text, EOS included, as in training.

    Args:
        answerer: the model, and what sees images.
        texts: full prompts, B of them.
        outputs: what is put behind each, as a record's output is.
        images: of each, or None.

    Raises:
        ValueError: a text and its output do not fit the context.
    """
    model, tokenizer = answerer.base.model, answerer.base.tokenizer
    starts = [len(tokenizer.encode(text, bos=True)) for text in texts]
    rows = [
        tokenizer.encode(text + output, bos=True, eos=True)
        for text, output in zip(texts, outputs, strict=True)
    ]
    longest, context = max(map(len, rows)), model.config.max_seq_len
    if longest > context + 1:
        place = max(range(len(rows)), key=lambda n: len(rows[n]))
        raise ValueError(
            f"texts[{place}] and its output must have at most {context + 1} tokens, got {longest}"
        )
    # padding lies behind the tokens, which do not look there
    tokens = torch.zeros(len(rows), longest - 1, dtype=torch.int64)
    for n, row in enumerate(rows):
        tokens[n, : len(row) - 1] = torch.tensor(row[:-1])
    prompts = answerer.prompts_for(images)
    device = model.output_weight.device
    hidden = model.hidden(tokens.to(device), prompts)
    found = []
    for n, (row, start) in enumerate(zip(rows, starts, strict=True)):
        logits = model.logits(hidden[n, start - 1 : len(row) - 1], prompts).float()
        wanted = torch.tensor(row[start:], device=device)
        found.append(float(cross_entropy(logits, wanted)))
    return found


def likeliest(
    answerer: Answerer,
    texts: Sequence[str],
    options: Sequence[Mapping[str, str]],
    images: Sequence[Image | None],
    *,
    batch_size: int = 64,
) -> list[str]:
    """The name of the option with the least loss, for every text; the first of equals.

    Args:
        answerer: the model, and what sees images.
        texts: full prompts.
        options: for each text outputs by name.
        images: of each text, or None.
        batch_size: outputs that are computed together.

    Raises:
        ValueError: as `losses`.
    """
    rows = [(n, name) for n, own in enumerate(options) for name in own]
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        found += losses(
            answerer,
            [texts[n] for n, _ in some],
            [options[n][name] for n, name in some],
            [images[n] for n, _ in some],
        )
    best: dict[int, tuple[float, str]] = {}
    for (n, name), loss in zip(rows, found, strict=True):
        if n not in best or loss < best[n][0]:
            best[n] = (loss, name)
    return [best[n][1] for n in range(len(texts))]
