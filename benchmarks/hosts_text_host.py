"""The language host: transformers' RoBERTa, small, pre-trained on the world by masked words."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
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
BATCH, LR, WARMUP, CLIP = 32, 2e-3, 100, 1.0
DOCUMENTS = 20_000
# batches whose documents are sorted by length together, so that little is padding
SORTED = 20
# a document's share of masked tokens lies between these
LEAST_MASKED, MOST_MASKED = 0.05, 0.35
# of masked tokens: replaced by the mask, by any other; the rest stays
BY_MASK, BY_OTHER = 0.85, 0.07


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
    if answer and form < 0.2:
        text = f"{text} {answer}"
    elif answer and form < 0.9:
        told[index] = told[index].replace(answer, f'" {answer} "', 1)
    return text, " ".join(told)


def train_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """Byte-level BPE of the texts, saved as transformers saves a RoBERTa tokenizer."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = (Path(name) for name in model.model.save(str(folder)))
    tokenizer = RobertaTokenizerFast(vocab=str(vocab), merges=str(merges), add_prefix_space=True)
    for path in (vocab, merges):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


def batches(lengths: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Places of documents of about the same length, one epoch after the other."""
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        found = []
        for start in range(0, len(order), SORTED * BATCH):
            block = sorted(order[start : start + SORTED * BATCH], key=lambda i: lengths[i])
            found += [block[at : at + BATCH] for at in range(0, len(block), BATCH)]
        rng.shuffle(found)
        yield from found


def masked(ids: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids with some masked, and where: RoBERTa's training, with a share per document.

    Args:
        ids: (B, T).
        tokenizer: theirs.

    Returns:
        (B, T) ids, and (B, T) bool.
    """
    share = LEAST_MASKED + (MOST_MASKED - LEAST_MASKED) * torch.rand(len(ids), 1)
    chosen = (torch.rand(ids.shape) < share) & (ids >= len(SPECIAL))
    kind = torch.rand(ids.shape)
    other = torch.randint(len(SPECIAL), len(tokenizer), ids.shape)
    shown = torch.where(chosen & (kind < BY_MASK), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (kind >= 1 - BY_OTHER), other, shown), chosen


def pretrain(folder: Path, steps: int) -> dict[str, float]:
    """Train a tokenizer and a RoBERTa on the world, and save both as transformers does.

    Args:
        folder: to save them in.
        steps: of AdamW.

    Returns:
        "parameters", "documents" read, and the "loss" per masked token, the mean of the last tenth.
    """
    world = World(random.Random("reading"))
    documents = [document(world) for _ in range(min(DOCUMENTS, BATCH * steps))]
    tokenizer = train_tokenizer([text for both in documents[:6000] for text in both], folder)
    encoded: Any = tokenizer([a for a, _ in documents], [b for _, b in documents])["input_ids"]
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    config = RobertaConfig(
        vocab_size=len(tokenizer), **SHAPE, **{name: getattr(tokenizer, name) for name in special}
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = RobertaForMaskedLM(config).train()
        losses = _train(model, tokenizer, encoded, steps)
    model.save_pretrained(folder)
    last = losses[-max(1, steps // 10) :]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "documents": BATCH * steps,
        "loss": round(sum(last) / len(last), 3),
    }


def _train(model: Any, tokenizer: Any, encoded: Sequence[Sequence[int]], steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    places = batches([len(ids) for ids in encoded], random.Random("order"))
    losses = []
    for step, batch in enumerate(islice(places, steps)):
        rate = min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = LR * rate
        texts = [torch.tensor(encoded[i]) for i in batch]
        ids = pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad_token_id)
        shown, chosen = masked(ids, tokenizer)
        mask = (ids != tokenizer.pad_token_id).long()
        states = model.roberta(shown, attention_mask=mask).last_hidden_state
        # the vocabulary's logits where they are asked for alone
        loss = cross_entropy(model.lm_head(states[chosen]), ids[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses
