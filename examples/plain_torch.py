"""Zero-initialised attention in a model of your own: plain torch, on a CPU or a GPU."""

import torch

from adapter_kernels import zero_init_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(2, 37, 8, 64, device=device)  # batch, tokens, query heads, head width
k, v = torch.randn(2, 2, 37, 2, 64, device=device)  # two key and value heads
prompt = torch.randn(2, 10, 2, 64, device=device, requires_grad=True)  # keys, values: ten rows
gate = torch.zeros(8, device=device, requires_grad=True)  # one per query head
out = zero_init_attention(q, k, v, *prompt, gate.tanh())
print("gate 0 changes nothing:", torch.equal(out, zero_init_attention(q, k, v)))
out.square().mean().backward()
print("but has a gradient:", bool(gate.grad.abs().min() > 0))
