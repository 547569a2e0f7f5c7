"""The public functions and their signatures are a contract: others import them."""

import inspect

import pytest

import adapter_kernels

CONTRACT = {
    "zero_init_attention": "(q, k, v, prompt_k=None, prompt_v=None, gate=None, *, causal=True, "
    "scale=None, key_starts=None, key_lengths=None, adapter_index=None, prompt_lengths=None, "
    "return_lse=False, backend=None)",
    "zero_init_attention_varlen": "(q, k, v, prompt_k=None, prompt_v=None, gate=None, *, "
    "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, scale=None, "
    "adapter_index=None, prompt_lengths=None, page_table=None, prefix_k=None, prefix_v=None, "
    "prefix_index=None, prefix_lengths=None, return_lse=False, backend=None)",
    "zero_init_attention_decode": "(q, k_cache, v_cache, prompt_k=None, prompt_v=None, gate=None, "
    "*, cache_lengths, page_table=None, scale=None, adapter_index=None, prompt_lengths=None, "
    "k_scale=None, v_scale=None, backend=None)",
    "gated_prompt_attention": "(q, prompt_k, prompt_v, gate, *, scale=None, adapter_index=None, "
    "prompt_lengths=None, cu_seqlens_q=None, out=None, backend=None)",
    "write_cache": "(k, v, k_cache, v_cache, *, positions, page_table=None, cos=None, sin=None, "
    "q=None)",
    "rms_norm": "(x, weight, *, eps, residual=None)",
    "apply_rotary": "(q, k, cos, sin, *, interleaved)",
    "swiglu": "(gate, up)",
    "linear": "(x, weight)",
    "load_native": "()",
    "linear_cross_entropy": "(x, weight, labels, *, ignore_index=-100, reduction='mean')",
}


def test_public_names() -> None:
    assert sorted(adapter_kernels.__all__) == sorted(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(adapter_kernels, name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    empty = inspect.Signature.empty
    assert str(signature.replace(parameters=bare, return_annotation=empty)) == CONTRACT[name]


@pytest.mark.parametrize("name", [name for name in CONTRACT if name != "load_native"])
def test_docstring_gives_equation_shapes_errors_and_source(name: str) -> None:
    text = inspect.getdoc(getattr(adapter_kernels, name)) or ""
    for part in ("Args:", "Raises:", "Source:"):
        assert part in text, f"{name}: no {part}"
    assert "Returns:" in text or name == "write_cache"
    for parameter in inspect.signature(getattr(adapter_kernels, name)).parameters:
        assert parameter in text, f"{name}: {parameter} is not explained"
    assert "(B" in text or "(..." in text, f"{name}: no shapes"
