"""Floors: against figures worked out by hand, brute force, and what a shape must refuse."""

from dataclasses import replace

import pytest

from benchmarks import roofline
from benchmarks.roofline import GPUS, Shape, floors, useful_flops

SHAPE = Shape(4, 2048, 2048, 32, 32, 128, 10, True, "bfloat16")
# milliseconds of products and of memory, on an A100 and at the rates measured on an H200; the
# two passes count 10 products of the prompt there, ours compute 7
BY_HAND = {
    "fused forward": ((0.447, 0.132), (0.177, 0.063)),
    "fused backward, ideal": ((1.118, 0.264), (0.442, 0.125)),
    "fused backward, two passes": ((1.576, 0.397), (0.622, 0.188)),
    "prompt-only backward": ((None, 0.066), (None, 0.031)),
    "hybrid: prompt added, forward": ((None, 0.099), (None, 0.047)),
    "hybrid: prompt backward, dq apart": ((None, 0.197), (None, 0.094)),
    "hybrid: prompt backward, dq in place": ((None, 0.132), (None, 0.062)),
}


@pytest.mark.parametrize("column", [0, 1], ids=["A100", "H200-measured"])
def test_floors_are_those_worked_out_by_hand(column: int) -> None:
    gpu = GPUS[("A100", "H200-measured")[column]]
    found = {floor.name: floor for floor in floors(SHAPE)}
    for name, columns in BY_HAND.items():
        compute, memory = columns[column]
        if compute is not None:
            assert found[name].compute_ms(gpu, "bfloat16") == pytest.approx(compute, rel=0.01)
        # hand figures have two digits here
        assert found[name].memory_ms(gpu) == pytest.approx(memory, rel=0.012)
        longer = max(found[name].compute_ms(gpu, "bfloat16"), found[name].memory_ms(gpu))
        assert found[name].ms(gpu, "bfloat16") == longer


def test_two_library_calls_move_what_their_glue_moves_too() -> None:
    found = {floor.name: floor for floor in floors(SHAPE)}
    assert found["two library calls and glue, forward"].bytes == pytest.approx(740e6, rel=0.005)
    glue = found["two library calls and glue, backward"].bytes
    assert glue - found["fused backward, ideal"].bytes == pytest.approx(11 * 67.1e6, rel=0.005)


def test_useful_flops_follow_the_convention() -> None:
    assert useful_flops(SHAPE, "forward") == 4 * 4 * 32 * 2048**2 * 128 / 2
    assert useful_flops(SHAPE, "backward") == 2.5 * useful_flops(SHAPE, "forward")
    assert useful_flops(SHAPE, "both") == 3.5 * useful_flops(SHAPE, "forward")
    assert useful_flops(replace(SHAPE, causal=False), "forward") == 4 * 4 * 32 * 2048**2 * 128


@pytest.mark.parametrize(("tokens", "keys"), [(3, 7), (7, 3), (1, 5), (5, 1), (4, 6)])
def test_visible_pairs_are_counted_exactly_off_the_square(tokens: int, keys: int) -> None:
    seen = sum(j <= i + keys - tokens for i in range(tokens) for j in range(keys))
    assert replace(SHAPE, tokens=tokens, keys=keys).visible_pairs == seen
    assert replace(SHAPE, tokens=tokens, keys=keys, causal=False).visible_pairs == tokens * keys


@pytest.mark.parametrize(
    ("prompt", "padded"), [(0, 0), (1, 16), (10, 16), (17, 32), (64, 64), (70, 80)]
)
def test_prompts_are_padded_to_whole_tiles(prompt: int, padded: int) -> None:
    assert replace(SHAPE, prompt=prompt).padded_prompt == padded


def test_grouped_heads_move_fewer_keys_and_compute_as_much() -> None:
    grouped = replace(SHAPE, kv_heads=8)
    many, few = floors(SHAPE)[0], floors(grouped)[0]
    assert few.flops == many.flops
    saved = 2 * 0.75 * SHAPE.key_bytes + 0.75 * SHAPE.prompt_bytes
    assert many.bytes - few.bytes == pytest.approx(saved)
    assert grouped.describe() == "S=2048 D=128 H=32 B=4 G=8 causal bfloat16"


def test_float32_has_its_own_rate() -> None:
    floor, gpu = floors(replace(SHAPE, dtype="float32"))[0], GPUS["A100"]
    assert floor.compute_ms(gpu, "float32") == pytest.approx(floor.flops / 19.5e12 * 1e3)
    assert floor.bytes == pytest.approx(2 * floors(SHAPE)[0].bytes, rel=0.01)


def test_shapes_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        replace(SHAPE, head_dim=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        replace(SHAPE, dtype="int8")
    assert roofline.main(["--heads", "32", "--kv-heads", "5"]) == 2
    assert "kv_heads must divide heads = 32, got kv_heads = 5" in capsys.readouterr().err


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--gpu", "A100", "--no-causal", "--keys", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "A100: 312 TFLOP/s, 2.039 TB/s (NVIDIA A100 data sheet" in printed
    assert "S=4096 D=128 H=32 B=4 T=2048 full bfloat16 P=10, in tiles 16" in printed
    own = floors(replace(SHAPE, keys=4096, causal=False))
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 2 + len(own)
    assert f"{own[0].flops / 1e9:.2f}" in printed
