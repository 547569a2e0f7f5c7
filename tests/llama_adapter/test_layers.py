"""The parts of a layer compute their equations; with all else they are tested in test_model.py."""

import torch

from llama_adapter.config import LlamaConfig
from llama_adapter.layers import FeedForward, RMSNorm


@torch.no_grad()
def test_feed_forward_is_the_gated_product() -> None:
    config = LlamaConfig(dim=24, n_layers=1, n_heads=2, vocab_size=30, multiple_of=4)
    part = FeedForward(config)
    generator = torch.Generator().manual_seed(5)
    for weight in part.parameters():
        weight.normal_(std=0.3, generator=generator)
    x = torch.randn(2, 5, 24, generator=generator)
    wide = x.double()
    gate, up = (wide @ w.weight.double().t() for w in (part.w1, part.w3))
    wanted = (gate * gate.sigmoid() * up) @ part.w2.weight.double().t()
    assert (part(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_a_norm_divides_by_the_root_mean_square_of_the_sum() -> None:
    norm = RMSNorm(24, eps=1e-2)
    generator = torch.Generator().manual_seed(5)
    norm.weight.normal_(generator=generator)
    x, residual = (torch.randn(3, 24, generator=generator) for _ in range(2))
    normed, total = norm.add(x, residual)
    wide = x.double() + residual
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    assert torch.equal(total, x + residual)
    assert (normed - wanted).abs().max() < 1e-5
    assert torch.equal(norm(total), normed)
