"""Are rows brought into Meta's order, and are configurations beyond any model refused?"""

import math
from pathlib import Path

import pytest
import torch

from llama_adapter.checkpoints.assemble import (
    assemble,
    common_dtype,
    expected_shapes,
    halves_to_pairs,
    is_copy,
    is_positive,
    make_config,
    read_object,
    rope_scaling,
)
from llama_adapter.config import LlamaConfig, RopeScaling, width_of
from llama_adapter.model import Llama

WHERE = Path("config.json")


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (6, 10), (2, 64)])
def test_rows_of_halves_become_neighbours(heads: int, width: int) -> None:
    theirs, out = torch.randn(heads * width, 5), torch.full((heads * width, 5), math.nan)
    halves_to_pairs(theirs, out, heads)
    for head in range(heads):
        for i in range(width // 2):
            row = head * width + i
            assert torch.equal(out[head * width + 2 * i], theirs[row])
            assert torch.equal(out[head * width + 2 * i + 1], theirs[row + width // 2])


def test_a_model_is_filled_in_order_and_frozen(tiny_config: LlamaConfig, tiny_model: Llama) -> None:
    state, order = tiny_model.state_dict(), []

    def write(name: str, out: torch.Tensor, start: int) -> None:
        assert start == 0
        order.append(name)
        out.copy_(state[name])

    model = assemble(tiny_config, write, torch.bfloat16, "cpu")
    assert order == list(state) == list(expected_shapes(tiny_config))
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].bfloat16())
        assert not model.get_parameter(name).requires_grad


@pytest.mark.parametrize("hidden", [1, 7, 8, 127, 128, 129, 1000, 11008])
@pytest.mark.parametrize("dim", [2, 48, 4096])
def test_any_feed_forward_width_can_be_said(dim: int, hidden: int) -> None:
    config = LlamaConfig(dim, 1, 1, 8, attention_head_dim=2, **width_of(dim, hidden))
    assert config.hidden_dim == hidden


def test_copies_are_told_by_shape_and_content() -> None:
    a = torch.randn(3, 4)
    assert is_copy(a, a.clone())
    for other in (None, a[:2], a.T, a + torch.eye(3, 4)[[2, 1, 0]]):
        assert not is_copy(a, other)
        assert not is_copy(other, a)


@pytest.mark.parametrize("value", [1, 0.5, 1e-8])
def test_positive_numbers(value: float) -> None:
    assert is_positive(value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, 10**400, True, "1", None, [1]])
def test_what_is_no_positive_number(value: object) -> None:
    assert not is_positive(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 1001}, "n_layers must be at most 1000, got 1001"),
        ({"vocab_size": 2**31}, "vocab_size must be from 1 to 2147483647, got 2147483648"),
        ({"dim": 6 * 10**400}, ".*too large .*float"),
        ({"n_kv_heads": 4}, "n_kv_heads must divide n_heads = 6, got 4"),
    ],
)
def test_no_model_of_impossible_size(values: dict[str, int], message: str) -> None:
    shape = {"dim": 48, "n_layers": 4, "n_heads": 6, "vocab_size": 353}
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        make_config(shape | values, WHERE)


def test_dtypes_are_common_or_given() -> None:
    half = (WHERE, "a", torch.float16)
    assert common_dtype([half, half], None) == torch.float16
    assert common_dtype([half, (WHERE, "b", torch.float32)], torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match=r"config\.json: b is torch\.float32, but a is torch\.fl"):
        common_dtype([half, (WHERE, "b", torch.float32)], None)
    with pytest.raises(ValueError, match=r"b must be float32, float16 or bfloat16, got torch\.in"):
        common_dtype([half, (WHERE, "b", torch.int32)], torch.float32)
    with pytest.raises(ValueError, match="must hold tensors, got none"):
        common_dtype([], torch.float32)


@pytest.mark.parametrize("name", ["original_max_position_embeddings", "original_max_seq_len"])
def test_the_original_context_has_three_names(name: str) -> None:
    expected = RopeScaling(32.0, original_context=77)
    assert rope_scaling({"factor": 32.0, name: 77}, "here") == expected
    assert rope_scaling({"factor": 32.0, "original_context": 77}, "here") == expected


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 100_000, "\ud800", "9" * 5000, "[1]", "nul"]
)
def test_a_file_that_holds_no_object_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(
        ValueError, match=r"x\.json (is not JSON|must hold a JSON object)"
    ) as caught:
        read_object(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"y\.json does not exist: copy it from where"):
        read_object(tmp_path / "y.json")
