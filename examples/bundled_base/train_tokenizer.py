"""How was the bundled tokenizer made?

A sentencepiece unigram model with LLaMA's conventions (unk 0, bos 1, eos 2, byte fallback, identity
normalisation, no padding id), fitted so that every lexicon word, with and without a space before
it, is one piece. Any other text still encodes, in pieces of letters and bytes.
`python -m examples.bundled_base.train_tokenizer` writes tokenizer.model again.
"""

from __future__ import annotations

import io
import re

import sentencepiece

from examples.bundled_base.corpus import Corpus
from examples.bundled_base.lexicon import all_words
from llama_adapter.assets import BASE

VOCAB_SIZE = 1200
SEED = 17
DOCUMENTS = 3000
WORD_REPEATS = 60


def sentences() -> list[str]:
    """Training text: lines of corpus documents, and every word in both of its positions."""
    corpus = Corpus(SEED)
    lines: list[str] = []
    for _ in range(DOCUMENTS):
        text = "".join(piece for piece, _ in corpus.document())
        lines += [line for line in text.split("\n") if line]
    # the words of the template and of the questions, rare ones included
    for word in sorted(set(re.findall("[A-Za-z]+", " ".join(lines))) - set(all_words())):
        lines += [f":{word} {word}"] * WORD_REPEATS
    # a response starts right after its colon and a JSON answer after its quote, without a space
    for word in all_words():
        lines += [f":{word} {word}", f'"{word} {word}"'] * WORD_REPEATS
    return lines


def train() -> bytes:
    """The serialised sentencepiece model, the same at every call."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    """Write tokenizer.model into the bundled base's folder."""
    BASE.mkdir(parents=True, exist_ok=True)
    (BASE / "tokenizer.model").write_bytes(train())


if __name__ == "__main__":
    main()
