"""How the next token is chosen from the logits: greedily, or drawn from the nucleus.

Every row draws from random numbers of its own, so that what is sampled for a prompt does not depend
on the batch that it is in.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when a completion ends; defaults as in the papers' code."""

    max_new_tokens: int = field(
        default=128, metadata={"help": "longest completion in tokens, within the model's context"}
    )
    temperature: float = field(
        default=0.1, metadata={"help": "divides the logits before the softmax; 0 is greedy"}
    )
    top_p: float = field(
        default=0.75,
        metadata={"help": "sample among the likeliest tokens that reach this probability together"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the sampled tokens"})
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "texts that end a completion, and are not part of it"}
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")


def token_probabilities(
    logits: Tensor, temperature: float | Tensor, top_p: float | Tensor
) -> Tensor:
    """The distribution that tokens are drawn from: temperature, softmax, then the nucleus.

    p = softmax(logits / temperature); with p sorted descending, a token is kept while the tokens
    before it sum to at most top_p, so the likeliest always is; the kept ones are normalised.
    Source: Holtzman et al. 2020; values of the LLaMA-Adapter papers' generation code.

    Args:
        logits: (B, V), any floating dtype.
        temperature: positive, or (B, 1) of them.
        top_p: above 0, at most 1, or (B, 1) of them.

    Returns:
        (B, V) float32, rows summing to 1.
    """
    logits = logits.float()
    # the largest is 0 after this, and stays 0 however small the temperature is
    shifted = logits - logits.amax(-1, keepdim=True)
    warmth = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    p = (shifted / warmth.clamp(min=torch.finfo(torch.float32).tiny)).softmax(-1)
    ordered, ids = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before > top_p, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, ids, kept)


def row_draws(seed: int, row_seed: int, count: int) -> list[float]:
    """A row's random numbers, uniform in [0, 1), one per new token.

    Args:
        seed: `SamplingConfig.seed`.
        row_seed: tells the rows of a batch apart.
        count: how many; fewer are a prefix of more.

    Returns:
        `count` floats, the same on every device.
    """
    # a hash, so that neighbouring pairs of seeds share nothing
    digest = hashlib.blake2b(f"{seed} {row_seed}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.rand(count, generator=generator).tolist()


def choose(
    logits: Tensor, samplings: Sequence[SamplingConfig], drawn: Sequence[float]
) -> list[int]:
    """The next token of every row: the likeliest, or where the draw falls in the distribution.

    token = min {t : sum_{s <= t} p_s > draw}

    Args:
        logits: (B, V), any floating dtype.
        samplings: temperature (0 is greedy) and top_p of every row.
        drawn: B numbers in [0, 1); not read where greedy.

    Returns:
        B token ids, -1 for a row whose logits are not all finite.
    """
    token = logits.argmax(-1)
    warm = [one.temperature > 0 for one in samplings]
    if any(warm):
        # a greedy row is drawn for like the others, and then not asked
        settings = [(one.temperature or 1.0, one.top_p) for one in samplings]
        numbers = torch.tensor(
            [(*row, draw, w) for row, draw, w in zip(settings, drawn, warm, strict=True)]
        ).to(logits.device)
        temperature, top_p, draw, sampled = numbers[:, :, None].unbind(1)
        p = token_probabilities(logits, temperature, top_p)
        cdf = p.cumsum(-1)
        # strictly below the total, so that some token's share always lies above the draw
        total = cdf[:, -1:]
        below = torch.minimum(draw * total, total.nextafter(torch.zeros_like(total)))
        chosen = torch.searchsorted(cdf, below, right=True)
        token = torch.where(sampled > 0, chosen, token[:, None])[:, 0]
    # one transfer to the host for both
    return torch.where(logits.isfinite().all(-1), token, -1).tolist()
