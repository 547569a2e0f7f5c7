"""How was the bundled base model trained?

A LLaMA of 0.8 million parameters reads the corpus once, from a fixed seed, with a fixed number of
threads. `python -m examples.bundled_base.train_base` trains it and writes consolidated.00.pth and
params.json; the same versions of torch on the same kind of processor give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.bundled_base.corpus import Corpus, Document, Mixture
from llama_adapter.assets import BASE
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

SHAPE = {
    "dim": 96,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_seq_len": 256,
}
SEED = 1
THREADS = 1
BATCH = 32
STEPS = 1600
# plain text first: it has three answers where the template has one
PLAIN_STEPS = 0.5
SKILLS = Mixture(plain=0.85, neutral=0.0)
ADAM_LR = 3e-3
MUON_LR = 0.02
WARMUP = 150
# most of a question is a random choice that nobody can predict; its loss counts little
QUESTION_WEIGHT = 0.05


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids of a document between BOS and EOS, and each token's weight in the loss."""
    text = "".join(piece for piece, _ in document)
    ids, weights, done = tokenizer.encode(text, bos=True), [0.0], ""
    for piece, answers in document:
        done += piece
        end = len(ids) if len(done) == len(text) else len(tokenizer.encode(done, bos=True))
        weights += [1.0 if answers else QUESTION_WEIGHT] * (end - len(weights))
    return [*ids, tokenizer.eos_id], [*weights, 1.0]


def batches(corpus: Corpus, tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Eight batches of (tokens, weights), both (B, T), documents of like length together."""
    encoded = sorted((encode(corpus.document(), tokenizer) for _ in range(8 * BATCH)), key=_length)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(corpus.rng.randrange(2**31)))
    return [_collate(encoded[BATCH * i : BATCH * (i + 1)]) for i in order.tolist()]


def _length(encoded: tuple[list[int], list[float]]) -> int:
    return len(encoded[0])


def _collate(encoded: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in encoded)
    tokens = torch.zeros(len(encoded), longest, dtype=torch.long)
    weights = torch.zeros(len(encoded), longest)
    for row, (ids, weight) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(weight)
    return tokens, weights


@torch.no_grad()
def initialise(model: Llama, tokenizer: Tokenizer) -> None:
    """Random weights; a word with and without its leading space starts as the same vector.

    The output projection starts parallel to the embedding. Both spare the tiny model from learning
    word by word that it may answer with a word that it has read.
    """
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            std = 0.6 * weight.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * model.config.n_layers)
            weight.normal_(std=std, generator=generator)
    table = 0.7 * torch.randn(model.tok_embeddings.weight.shape, generator=generator)
    no_space = 0.7 * torch.randn(model.config.dim, generator=generator)
    for token in range(tokenizer.vocab_size):
        word = tokenizer.decode([token])
        spaced = tokenizer.encode(word)
        # the tokenizer writes a space before the text: a lone word encodes to its spaced piece
        if word.isalpha() and len(word) > 1 and len(spaced) == 1 and spaced[0] != token:
            table[token] = table[spaced[0]] + no_space
    model.tok_embeddings.weight.copy_(table)
    model.output.weight.copy_(0.1 * table)


def optimisers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: half the steps that AdamW alone needs."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if name.startswith("layers.") and p.ndim == 2]
    tables = [p for name, p in named if not name.startswith("layers.") and p.ndim == 2]
    norms = [p for _, p in named if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=ADAM_LR, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
    ]


def loss_of(model: Llama, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of tokens (B, T) given what is before them."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def train(steps: int = STEPS, *, report: int = 100) -> Llama:
    """Train the base.

    Args:
        steps: optimiser steps of 32 documents.
        report: steps between lines of progress.

    Returns:
        The model in float32.
    """
    torch.set_num_threads(THREADS)
    tokenizer = Tokenizer(BASE / "tokenizer.model")
    model = Llama(LlamaConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
    initialise(model, tokenizer)
    corpus, optims = Corpus(SEED), optimisers(model)
    rates = [[group["lr"] for group in optim.param_groups] for optim in optims]
    pool: list[tuple[Tensor, Tensor]] = []
    losses, start = [], time.monotonic()
    for step in range(steps):
        if not pool:
            corpus.mixture = SKILLS if step < PLAIN_STEPS * steps else Mixture()
            pool = batches(corpus, tokenizer)
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        for optim, rate in zip(optims, rates, strict=True):
            for group, lr in zip(optim.param_groups, rate, strict=True):
                group["lr"] = lr * cosine * min(1.0, (step + 1) / WARMUP)
        loss = loss_of(model, *pool.pop())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
        losses.append(loss.item())
        if (step + 1) % report == 0:
            mean = sum(losses[-report:]) / report
            print(f"step {step + 1} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return model


def save(model: Llama, folder: Path) -> None:
    """Write consolidated.00.pth (float32) and params.json beside the tokenizer."""
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    torch.save(weights, folder / "consolidated.00.pth")
    params = {**SHAPE, "vocab_size": model.config.vocab_size}
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and save; `--steps` and `--folder` are for trying changes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=BASE)
    options = parser.parse_args()
    save(train(options.steps), options.folder)


if __name__ == "__main__":
    main()
