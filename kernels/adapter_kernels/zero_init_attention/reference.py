"""Zero-initialized attention as the equations of the paper, forward and analytic backward.

Equations 5 to 8 are LLaMA-Adapter's (section 3.2); README.md derives the gradients under the same
names. Letters: B batch, G key heads, N the query rows of one key head (its query heads times the T
tokens), S keys, P prompt rows, D head width. Any device, any floating dtype that all tensors share.
"""

from typing import NamedTuple

from torch import Tensor

HIDDEN = float("-inf")
Grad = Tensor | None


class Segment(NamedTuple):
    """One part of equation 6: its k, v (B,G,S,D), what its rows see of them, and its factor g.

    bias is -inf where a row does not see a key. blind (B,1,N,1) are the rows that see none at all;
    their bias is 0, to keep their softmax finite, and their result is replaced.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    blind: Tensor | None = None
    gate: Tensor | float = 1.0


def scores(q: Tensor, part: Segment, scale: float) -> Tensor:
    """Equation 5, S = scale Q K^T (B,G,N,S), with -inf for keys that are not seen."""
    s = (q * scale) @ part.k.mT
    return s if part.bias is None else s.add_(part.bias)


def log_sum_exp(s: Tensor, p: Tensor) -> Tensor:
    """The lse of S (B,G,N,1): exp(S - lse) is P at every key, here at the largest score."""
    if s.shape[-1] == 0:
        return s.new_full((*s.shape[:-1], 1), HIDDEN)
    return s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def attend(q: Tensor, part: Segment, scale: float) -> tuple[Tensor, Tensor]:
    """Equations 7 and 8 for one part before its gate: softmax(S) V (B,G,N,D), and the lse of S."""
    s = scores(q, part, scale)
    p = s.softmax(-1)
    out, lse = p @ part.v, log_sum_exp(s, p)
    if part.blind is not None:
        out, lse = out.masked_fill_(part.blind, 0.0), lse.masked_fill_(part.blind, HIDDEN)
    return out, lse


def prompt_forward(q: Tensor, prompt: Segment, scale: float) -> Tensor:
    """The first part of equations 7 and 8 alone: g softmax(S^K) V_p."""
    return prompt.gate * attend(q, prompt, scale)[0]


def forward(
    q: Tensor, tokens: Segment, prompt: Segment | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Equations 5 to 8: out = g softmax(S^K) V_p + softmax(S^{M+1}) V, and the lse of S^{M+1}."""
    out, lse = attend(q, tokens, scale)
    if prompt is not None:
        out.add_(prompt_forward(q, prompt, scale))
    return out, lse


def score_backward(
    ds: Tensor, q: Tensor, k: Tensor, scale: float, needs: tuple[bool, ...]
) -> tuple[Grad, Grad]:
    """dq and dk of equation 5, given dS."""
    return (ds @ k).mul_(scale) if needs[0] else None, (ds.mT @ q).mul_(scale) if needs[1] else None


def prompt_backward(
    dout: Tensor, q: Tensor, prompt: Segment, scale: float, needs: tuple[bool, ...]
) -> tuple[Grad, Grad, Grad, Tensor]:
    """dq, dprompt_k, dprompt_v of the first part, and delta_p, which is the dgate of every row."""
    p = scores(q, prompt, scale).softmax(-1)
    dp = dout @ prompt.v.mT
    delta = (p * dp).sum(-1, keepdim=True)
    gated = prompt.gate * p
    ds = gated * (dp - delta)
    dprompt_v = gated.mT @ dout if needs[2] else None
    return *score_backward(ds, q, prompt.k, scale, needs), dprompt_v, delta


def token_backward(
    dout: Tensor, dlse: Grad, q: Tensor, tokens: Segment, scale: float, needs: tuple[bool, ...]
) -> tuple[Grad, Grad, Grad]:
    """dq, dk, dv of the second part, given the gradients of its output and of its lse."""
    if tokens.blind is not None:
        dout = dout.masked_fill(tokens.blind, 0.0)
        dlse = None if dlse is None else dlse.masked_fill(tokens.blind, 0.0)
    p = scores(q, tokens, scale).softmax(-1)
    dv = p.mT @ dout if needs[2] else None
    if not any(needs[:2]):
        return None, None, dv
    weighted = (dout @ tokens.v.mT).mul_(p)
    delta = weighted.sum(-1, keepdim=True)
    # P o (dP - delta + dlse), in the place of P o dP
    ds = weighted.addcmul_(p, delta if dlse is None else delta - dlse, value=-1.0)
    return *score_backward(ds, q, tokens.k, scale, needs), dv


def backward(
    dout: Tensor,
    dlse: Grad,
    q: Tensor,
    tokens: Segment,
    prompt: Segment | None,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Grad, Grad, Grad, Grad, Grad, Grad]:
    """dq, dk, dv, dprompt_k, dprompt_v and the dgate of every row; None where `needs` is False."""
    dq = dk = dv = dq_prompt = dprompt_k = dprompt_v = dgate = None
    if any(needs[:3]):
        dq, dk, dv = token_backward(dout, dlse, q, tokens, scale, needs[:3])
    if prompt is not None and (needs[0] or any(needs[3:])):
        dq_prompt, dprompt_k, dprompt_v, delta = prompt_backward(
            dout, q, prompt, scale, (needs[0], *needs[3:5])
        )
        dgate = delta if needs[5] else None
    if dq is not None and dq_prompt is not None:
        dq.add_(dq_prompt)
    return dq, dk, dv, dprompt_k, dprompt_v, dgate
