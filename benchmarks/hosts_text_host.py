"""The language host: transformers' RoBERTa, small, pre-trained on the world by masked words."""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

from benchmarks.hosts_text_world import ASKED, World, question

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 98,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 1000
BATCH, LR, MASKED = 32, 2e-3, 0.2


def document(world: World) -> tuple[str, str]:
    """Two texts that belong together.

    Events told in two sentences; or a question and its text, with the answer behind the question,
    or in quotes in the text, or not said.
    """
    rng = world.rng
    events = [world.event() for _ in range(rng.choice((1, 2, 2)))]
    told = []
    for event in events:
        more = [world.event()] if rng.random() < 0.2 else []
        told.append(" ".join(world.sentence(event, *more).words))
    if len(events) == 2 and rng.random() < 0.3:
        return told[0], told[1]
    index = rng.randrange(len(events))
    text, answer = question(events[index], rng.choice(ASKED))
    form = rng.random()
    if answer and form < 0.35:
        text = f"{text} {answer}"
    elif answer and form < 0.8:
        told[index] = told[index].replace(answer, f'" {answer} "', 1)
    return text, " ".join(told)


def train_tokenizer(texts: Sequence[str], folder: Path) -> RobertaTokenizerFast:
    """Byte-level BPE of the texts, saved as transformers saves a RoBERTa tokenizer."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = (Path(name) for name in model.model.save(str(folder)))
    tokenizer = RobertaTokenizerFast(vocab=str(vocab), merges=str(merges), add_prefix_space=True)
    for path in (vocab, merges):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer
