"""What does the paper say, word by word? Equations 5 to 8 for one token and one head at a time.

Plain loops over sequences, tokens and heads, with prompt and tokens concatenated and split again as
equation 6 does it. Slow, differentiable, and independent of the package's own reference.
"""

import math

import torch
from torch import Tensor

from tests.adapter_kernels.zero_init_attention.cases import Case

Pair = tuple[Tensor, Tensor]


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, prompt: Pair | None, g: Tensor | float, scale: float
) -> Pair:
    """One query (D,) over its visible keys (M,D) and its prompt (K,D): output (D,) and lse.

    Equation 5 scores all K + M keys at once, 6 splits the scores, 7 normalises both parts and gates
    the first, 8 weighs the values (its linear projection is the model's).
    """
    length = 0 if prompt is None else len(prompt[0])
    keys = k if prompt is None else torch.cat([prompt[0], k])
    values = v if prompt is None else torch.cat([prompt[1], v])
    s = torch.stack([(q * key).sum() * scale for key in keys]) if len(keys) else q.new_zeros(0)
    s_prompt, s_tokens = s[:length], s[length:]
    weights = torch.cat([torch.softmax(s_prompt, 0) * g, torch.softmax(s_tokens, 0)])
    out = torch.zeros_like(q)
    for weight, value in zip(weights, values, strict=True):
        out = out + weight * value
    return out, torch.logsumexp(s_tokens, 0) if len(s_tokens) else q.new_tensor(-math.inf)


def prompt_of(case: Case, b: int, h: int, group: int) -> tuple[Pair | None, Tensor | float]:
    """The prompt rows and the gate that head h of sequence b uses, whichever form they came in."""
    k, v, gate, index, lengths = case.prompts
    if k is None or v is None or gate is None or (index is not None and int(index[b]) == -1):
        return None, 0.0
    if index is not None:
        a = int(index[b])
        rows = k.shape[1] if lengths is None else int(lengths[a])
        return (k[a, :rows, group], v[a, :rows, group]), gate[a, h]
    g = gate[h] if gate.dim() == 1 else gate[b, h]
    own_k, own_v = (k, v) if k.dim() == 3 else (k[b], v[b])
    return (own_k[:, group], own_v[:, group]), g


def with_prefix(case: Case, b: int, k: Tensor, v: Tensor) -> Pair:
    """The keys and values of sequence b behind those of its prefix."""
    fk, fv, index, lengths = case.prefix
    if fk is None or fv is None or index is None or lengths is None or int(index[b]) == -1:
        return k, v
    f = int(index[b])
    return torch.cat([fk[f, : lengths[f]], k]), torch.cat([fv[f, : lengths[f]], v])


def sequences(case: Case) -> list[tuple[Tensor, Tensor, Tensor, range]]:
    """Per sequence: q (T,H,D), k and v (S,G,D), and the keys that its padding leaves."""
    found = []
    for b in range(case.batch):
        if case.cu_seqlens_q is None or case.cu_seqlens_k is None:
            q, k, v = case.q[b], case.k[b], case.v[b]
            first = 0 if case.key_starts is None else int(case.key_starts[b])
            end = len(k) if case.key_lengths is None else int(case.key_lengths[b])
        else:
            rows = slice(int(case.cu_seqlens_q[b]), int(case.cu_seqlens_q[b + 1]))
            keys = slice(int(case.cu_seqlens_k[b]), int(case.cu_seqlens_k[b + 1]))
            q, (k, v) = case.q[rows], with_prefix(case, b, case.k[keys], case.v[keys])
            first, end = 0, len(k)
        found.append((q, k, v, range(first, end)))
    return found


def literal(case: Case) -> Pair:
    """out and lse of a case, laid out as the public functions return them."""
    outs, lses = [], []
    for b, (q, k, v, keys) in enumerate(sequences(case)):
        out, lse = torch.zeros_like(q), []
        for i in range(len(q)):
            # the diagonal counts all keys of the sequence, padding included
            seen = [j for j in keys if not case.causal or j <= i + len(k) - len(q)]
            for h in range(q.shape[1]):
                group = h // (q.shape[1] // k.shape[1])
                prompt, g = prompt_of(case, b, h, group)
                o, one = attend_one(q[i, h], k[seen, group], v[seen, group], prompt, g, case.scale)
                out = out.index_put((torch.tensor(i), torch.tensor(h)), o)
                lse.append(one)
        outs.append(out)
        lses.append(torch.stack(lse).view(len(q), -1).t() if lse else q.new_zeros(q.shape[1], 0))
    if case.packed:
        return torch.cat(outs), torch.cat(lses, 1)
    return torch.stack(outs), torch.stack(lses)
