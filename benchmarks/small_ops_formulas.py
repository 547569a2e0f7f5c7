"""The formulas of the small operations as a model's code has them, of inputs by name.

In float64, on angles in the form that they take, they are the truth. What a model makes once for
all layers is among their inputs: small_ops_problem.py says which are whose.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
Parts = Mapping[str, Tensor]
Formula = Callable[[Parts], dict[str, Tensor]]


def norm_formula(parts: Parts) -> dict[str, Tensor]:
    """LlamaRMSNorm of transformers, after the residual addition where there is one."""
    h = parts["x"] if "residual" not in parts else parts["x"] + parts["residual"]
    precise = h.to(_precise(h.dtype))
    normalised = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + EPS)
    return with_sum(parts, parts["weight"] * normalised.to(h.dtype), h)


def with_sum(parts: Parts, out: Tensor, h: Tensor) -> dict[str, Tensor]:
    """The norm, and the sum of which it is, where there is a residual."""
    return {"out": out, "h": h} if "residual" in parts else {"out": out}


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def norm_backward_formula(parts: Parts) -> dict[str, Tensor]:
    """The gradient of norm_formula's h: what reaches it through out, and then its other uses."""
    rstd = parts["rstd"]
    x, dnormalised = parts["x"].to(rstd.dtype), parts["dout"] * parts["weight"]
    dnormalised = dnormalised.to(rstd.dtype)
    pull = (dnormalised * x).mean(-1, keepdim=True) * rstd.square()
    dx = (rstd * (dnormalised - x * pull)).to(parts["x"].dtype)
    return {"dx": dx + parts["dh"]}


def swiglu_formula(parts: Parts) -> dict[str, Tensor]:
    """The activation of LlamaMLP."""
    return {"out": F.silu(parts["gate"]) * parts["up"]}


def swiglu_backward_formula(parts: Parts) -> dict[str, Tensor]:
    """The gradients of swiglu_formula, as autograd has them."""
    gate, up, dout = (parts[name] for name in ("gate", "up", "dout"))
    dgate = torch.ops.aten.silu_backward(dout * up, gate)
    return {"dgate": dgate, "dup": dout * F.silu(gate)}


def halves_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_pos_emb of transformers: cos and sin (B,T,1,D) in the dtype of q."""
    found = {}
    for name in "qk":
        x = parts[name]
        a, b = x.chunk(2, -1)
        found[name] = x * parts["cos"] + torch.cat((-b, a), -1) * parts["sin"]
    return found


def pairs_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_emb of gpt-fast: neighbours, in real numbers; cos and sin (B,T,1,D/2)."""
    found, cos, sin = {}, parts["cos"], parts["sin"]
    for name in "qk":
        a, b = parts[name].to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        found[name] = turned.to(parts[name].dtype)
    return found


def complex_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_emb of Meta: neighbours, as complex numbers; turn (B,T,1,D/2)."""
    found = {}
    for name in "qk":
        x = parts[name]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        found[name] = torch.view_as_real(pairs * parts["turn"]).flatten(-2).to(x.dtype)
    return found


def complex_backward(parts: Parts) -> dict[str, Tensor]:
    """complex_formula by the opposite angles."""
    return complex_formula({**parts, "turn": parts["turn"].conj()})


def pairs_backward(parts: Parts) -> dict[str, Tensor]:
    """pairs_formula by the opposite angles."""
    return pairs_formula({**parts, "sin": -parts["sin"]})


def append(parts: Parts, k: Tensor) -> dict[str, Tensor]:
    """Put turned keys, and values, into their places of the caches."""
    places = (parts["row"], parts["column"])
    parts["k_cache"].index_put_(places, k)
    parts["v_cache"].index_put_(places, parts["v"])
    return {name: parts[name] for name in ("k_cache", "v_cache")}


def write_pairs(parts: Parts) -> dict[str, Tensor]:
    """pairs_formula, and the caches' update of transformers."""
    turned = pairs_formula(parts)
    return {"q": turned["q"], **append(parts, turned["k"])}


def write_complex(parts: Parts) -> dict[str, Tensor]:
    """complex_formula, and the caches' update of transformers."""
    turned = complex_formula(parts)
    return {"q": turned["q"], **append(parts, turned["k"])}


def loss_formula(parts: Parts) -> dict[str, Tensor]:
    """The loss of a language model's head: all logits, then their cross entropy in float32."""
    logits = F.linear(parts["x"], parts["weight"])
    return {"loss": F.cross_entropy(logits.to(_precise(logits.dtype)), parts["labels"])}


def with_dx(formula: Formula, parts: Parts) -> dict[str, Tensor]:
    """A formula's loss, and by autograd its gradient of x; the weight is frozen."""
    with torch.enable_grad():
        x = parts["x"].detach().requires_grad_()
        loss = formula({**parts, "x": x})["loss"]
        (dx,) = torch.autograd.grad(loss, x)
    return {"loss": loss.detach(), "dx": dx}


def loss_dx_formula(parts: Parts) -> dict[str, Tensor]:
    """loss_formula with its gradient of x."""
    return with_dx(loss_formula, parts)


def loss_products(parts: Parts) -> dict[str, Tensor]:
    """The matrix product in loss_formula, alone."""
    return {"logits": F.linear(parts["x"], parts["weight"])}


def loss_dx_products(parts: Parts) -> dict[str, Tensor]:
    """The two matrix products in loss_dx_formula, alone, one behind the other."""
    return {"dx": loss_products(parts)["logits"] @ parts["weight"]}
