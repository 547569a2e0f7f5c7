"""LLaMA 1, 2, 3, 3.1 and 3.2, with the adapter's prompt segment as one more term of attention.

One file for every size and generation: grouped-query attention, rotary scaling and tied embeddings
follow from `LlamaConfig`. Parameter names are Meta's. The model is stateless: prompts and caches
are arguments, so an adapter can be switched, mixed within a batch or trained without touching it.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapter_kernels import (
    apply_rotary,
    gated_prompt_attention,
    linear,
    write_cache,
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)
from llama_adapter.adapter import Adapter, LayerPrompt, Prompts, Rows
from llama_adapter.cache import KVCache, PagePool, Span
from llama_adapter.config import LlamaConfig
from llama_adapter.layers import FeedForward, Linear, RMSNorm
from llama_adapter.packing import Packing
from llama_adapter.recompute import call
from llama_adapter.rotary_angles import rotary_angles
from llama_adapter.tuned_modules import tune
from llama_adapter.tuning import tuned_group


@dataclass(frozen=True)
class Step:
    """What every layer of one forward call shares.

    Attributes:
        cos, sin: (B, T, D/2) float32, or (T, D/2) without a cache, of the tokens' positions.
        prompts: projected prompts, or None for the base model.
        pool, span: where keys and values go and which are seen; None attends to the call's own.
        packing: where sequences lie in the call's one row; None takes a row for each.
        recompute: what of each layer the backward computes again, "mlp" or "block".
    """

    cos: Tensor
    sin: Tensor
    prompts: Prompts | None
    pool: PagePool | None = None
    span: Span | None = None
    packing: Packing | None = None
    recompute: str | None = None


class Attention(nn.Module):
    """Grouped-query attention with the zero-initialised prompt segment (equations 2 to 8)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, self.n_heads * self.head_dim)
        self.wk = Linear(config.dim, self.kv_heads * self.head_dim)
        self.wv = Linear(config.dim, self.kv_heads * self.head_dim)
        self.wo = Linear(self.n_heads * self.head_dim, config.dim)

    def project_prompt(self, rows: Rows) -> LayerPrompt:
        """Keys and values (..., P, G, D) of prompt rows (..., P, C).

        The layer's own frozen projections (equations 3 and 4), without norm and without rotary
        embedding: a prompt has no position.
        """
        prompt = rows.prompt
        if rows.image is not None:
            # one token for every row, or one for each
            image = rows.image[:, None] if rows.image.ndim == 2 else rows.image
            prompt = prompt + image.to(prompt.dtype)
        prompt = prompt.to(self.wk.weight.dtype)
        heads = (self.kv_heads, self.head_dim)
        k, v = self.wk(prompt).unflatten(-1, heads), self.wv(prompt).unflatten(-1, heads)
        return LayerPrompt(k, v, rows.gate)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend from (B, T, C) normed tokens; returns (B, T, C)."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        k = self.wk(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.wv(x).unflatten(-1, (self.kv_heads, self.head_dim))
        segments = [{}] if step.prompts is None else step.prompts.segments(self.layer)
        if step.pool is None or step.span is None:
            q, k = apply_rotary(q, k, step.cos, step.sin, interleaved=True)
            if step.packing is None:
                out = zero_init_attention(q, k, v, **segments[0])
                out = _add(q, segments[1:], out)
            else:
                # flattened, not indexed: the gradient of x[0] is a copy into zeros
                q = q.flatten(0, 1)
                packed = step.packing.arguments(k.flatten(0, 1), v.flatten(0, 1))
                out = zero_init_attention_varlen(q, **packed, **segments[0])
                out = _add(q, segments[1:], out, step.packing.cu_seqlens)[None]
        else:
            out = self._attend_cached(q, k, v, segments, step, step.pool, step.span)
        return self.wo(out.flatten(-2))

    def _attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: list[dict[str, Any]],
        step: Step,
        pool: PagePool,
        span: Span,
    ) -> Tensor:
        k_pages, v_pages = pool.layer(self.layer)
        # all tokens of all sequences are one row, and so are all slots of all pages
        shape, one = q.shape, (1, q.shape[0] * q.shape[1])
        q, k, v = (x.view(*one, *x.shape[2:]) for x in (q, k, v))
        cos, sin = (x.view(*one, x.shape[-1]) for x in (step.cos, step.sin))
        q = write_cache(k, v, *pool.row(self.layer), positions=span.slots, cos=cos, sin=sin, q=q)
        q = q.view(shape)
        if span.cu_seqlens_q is None or span.cu_seqlens_k is None:
            out = zero_init_attention_decode(
                q,
                k_pages,
                v_pages,
                **segments[0],
                cache_lengths=span.cache_lengths,
                page_table=span.page_table,
            )
            return _add(q, segments[1:], out)
        q = q.flatten(0, 1)
        out = zero_init_attention_varlen(
            q,
            k_pages,
            v_pages,
            **segments[0],
            cu_seqlens_q=span.cu_seqlens_q,
            cu_seqlens_k=span.cu_seqlens_k,
            max_seqlen_q=span.longest_q,
            max_seqlen_k=span.longest_k,
            page_table=span.page_table,
        )
        return _add(q, segments[1:], out, span.cu_seqlens_q).view(shape)


def _add(
    q: Tensor, segments: list[dict[str, Any]], out: Tensor, cu_seqlens_q: Tensor | None = None
) -> Tensor:
    """out + g softmax(q k_p) v_p of every further segment, with a softmax of its own each."""
    for segment in segments:
        out = gated_prompt_attention(q, **segment, cu_seqlens_q=cu_seqlens_q, out=out)
    return out


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each on a normed residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream (B, T, C) to the next one."""
        attended = self.attention(self.attention_norm(x), step)
        return call(step.recompute == "mlp", self._feed, attended, x)

    def _feed(self, attended: Tensor, x: Tensor) -> Tensor:
        normed, x = self.ffn_norm.add(attended, x)
        return x + self.feed_forward(normed)


class Llama(nn.Module):
    """The lean LLaMA. Source: Touvron et al. 2023; the LLaMA 3 family's model cards."""

    def __init__(self, config: LlamaConfig) -> None:
        """Create the model with weights N(0, 0.02) and unit norms; on the meta device, bare."""
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.output = Linear(config.dim, config.vocab_size)
        # on the meta device random numbers mean nothing, and asking for them loads a compiler (4 s)
        for parameter in self.parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def output_weight(self) -> Tensor:
        """(vocabulary, C) weight of the logits."""
        tied = self.config.tied_embeddings
        return self.tok_embeddings.weight if tied else self.output.weight

    def project(self, adapter: Adapter, visual: Tensor | None = None) -> Prompts:
        """Keys, values and gate multipliers of every adapted layer, differentiable in the adapter.

        Args:
            adapter: prompts (L, P, C) and gates (L, H) for this model; any biases, scales, norms.
            visual: what `adapter.visual_tokens` returned for the batch: (B, C), each sequence's
                token, added to all of its prompt rows (equation 10), or fused early (B, P_v, C), a
                gated prompt of the first layers beside theirs, if any (LLaMA-Adapter V2, section
                4.3). Zeros where a sequence has no image; None for a batch without any.

        Returns:
            Prompts that live as long as the caller wants: one step in training (the projection is
            part of the graph), as long as the adapter is loaded at inference.

        Raises:
            ValueError: visual has the form of another fusion than the adapter's.
        """
        tuned = None
        parameters, side = adapter.tuned_parameters(), adapter.tuning.scale_side
        if parameters:
            tuned = tune(self, self.output_weight, parameters, side)
        blocks = self.layers if tuned is None else tuned.layers
        if adapter.tuning.lora is not None and not adapter.tuning.lora.prompts:
            own = {n: x for n, x in parameters.items() if tuned_group(n) != "lora"}
            blocks = tune(self, self.output_weight, own, side).layers
        layers, images = (
            {n: cast(Block, blocks[n]).attention.project_prompt(one) for n, one in rows.items()}
            for rows in (adapter.prompt_rows(visual), adapter.visual_rows(visual))
        )
        index = adapter.visual_index(visual)
        return Prompts(layers, tuned=tuned, visual=images, visual_index=index)

    def hidden(
        self,
        tokens: Tensor,
        prompts: Prompts | None = None,
        *,
        cache: KVCache | None = None,
        new_lengths: list[int] | None = None,
    ) -> Tensor:
        """Final normed hidden states; `forward` without the projection to logits.

        Args:
            tokens: (B, T) int64 token ids, right-padded where rows differ in length.
            prompts: an adapter's projection, or None for the base model.
            cache: continues the cached sequences and appends to them; None starts at position 0.
            new_lengths: with a cache, real tokens of each row; the padding is not kept.

        Returns:
            (B, T, C) in the model's dtype; rows at padded positions mean nothing.

        Raises:
            ValueError: tokens is not (B, T), the cache is full or of another B, new_lengths are not
                B numbers up to T or have no cache.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
        if new_lengths is not None and cache is None:
            raise ValueError("new_lengths must be None without a cache")
        batch, count = tokens.shape
        if cache is not None and len(cache.lengths) != batch:
            raise ValueError(
                f"tokens must have {len(cache.lengths)} rows, one per cached sequence, got {batch}"
            )
        wanted = [count] * batch if new_lengths is None else new_lengths
        if len(wanted) != batch or not all(0 <= length <= count for length in wanted):
            raise ValueError(
                f"new_lengths must be {batch} numbers from 0 to {count}, got {new_lengths}"
            )
        if cache is None:
            positions = torch.arange(count, device=tokens.device)
            return self.run(tokens, Step(*rotary_angles(self.config, positions), prompts))
        span = cache.span(count)
        angles = rotary_angles(self.config, span.positions)
        hidden = self.run(tokens, Step(*angles, prompts, cache.pool, span))
        cache.advance(wanted)
        return hidden

    def hidden_packed(
        self,
        tokens: Tensor,
        packing: Packing,
        prompts: Prompts | None = None,
        *,
        recompute: str | None = None,
    ) -> Tensor:
        """Final normed hidden states of sequences without padding, one after the other.

        Args:
            tokens: (total,) int64, of sequences that lie as `packing` says.
            packing, prompts: prompts are of one adapter, or None for the base model.
            recompute: "mlp" or "block", what the backward computes again instead of keeping it.

        Returns:
            (total, C): for every sequence what `hidden` gives it alone.
        """
        angles = rotary_angles(self.config, packing.positions)
        step = Step(*angles, prompts, packing=packing, recompute=recompute)
        return self.run(tokens[None], step)[0]

    def run(self, tokens: Tensor, step: Step) -> Tensor:
        """Final normed hidden states (B, T, C) of tokens (B, T), wherever `step` puts their keys.

        What `hidden` calls, and what an engine calls that keeps its own books: nothing is checked.
        """
        tuned = None if step.prompts is None else step.prompts.tuned
        layers, norm = (self.layers, self.norm) if tuned is None else (tuned.layers, tuned.norm)
        x = self.tok_embeddings(tokens)
        for layer in layers:
            x = call(step.recompute == "block", layer, x, step)
        return norm(x)

    def logits(self, hidden: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Project hidden states (..., C), of these prompts, to logits (..., vocabulary)."""
        if prompts is not None and prompts.tuned is not None and prompts.tuned.output is not None:
            return prompts.tuned.output(hidden)
        return linear(hidden, self.output_weight)

    def forward(
        self,
        tokens: Tensor,
        prompts: Prompts | None = None,
        *,
        cache: KVCache | None = None,
        new_lengths: list[int] | None = None,
    ) -> Tensor:
        """Logits (B, T, vocabulary) of the next token; arguments and errors as `hidden`."""
        hidden = self.hidden(tokens, prompts, cache=cache, new_lengths=new_lengths)
        return self.logits(hidden, prompts)
