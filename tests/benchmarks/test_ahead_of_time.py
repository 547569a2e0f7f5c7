"""Do the shipped kernels fit the chips that are not here: memory, registers, instructions?"""

import json

import pytest
import torch

from adapter_kernels.arch import ARCHS
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.configs import TileConfig

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces what a compiler takes", allow_module_level=True)

from benchmarks.ahead_of_time import (  # a GPU's compiler, with triton alone
    TABLE,
    Resources,
    compile_for,
    complaints,
    count_spills,
    named,
    sources_digest,
)
from benchmarks.specialisations import (
    Specialisation,
    launch_of,
    pairwise,
    table,
)

# two choices that cover every pair, so many triples too
CHOSEN = list(dict.fromkeys(spec for seed in range(2) for spec in pairwise(seed)))
# what most users run, first
COMMON = [
    Specialisation(capability, direction, 128, torch.bfloat16, "shared", 10, "causal", 1, "all")
    for capability in (80, 90)
    for direction in ("forward", "backward_dq", "backward_dkv", "prompt_forward")
]


def check(spec: Specialisation) -> None:
    found = compile_for(launch_of(spec), spec.capability)
    print(spec, found)
    assert not complaints(found, spec), found


@pytest.mark.parametrize("spec", COMMON, ids=str)
def test_common_kernels_compile_within_the_chip(spec: Specialisation) -> None:
    check(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", CHOSEN, ids=str)
def test_every_pair_of_properties_compiles_within_the_chip(spec: Specialisation) -> None:
    check(spec)


def test_the_choice_is_some_two_hundred() -> None:
    assert 170 <= len(CHOSEN) <= 230


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (TileConfig(128, 128, 8, 4), "shared memory"),
        (TileConfig(128, 64, 4, 3), "spills"),
    ],
)
def test_an_oversized_tile_is_noticed(config: TileConfig, complaint: str) -> None:
    """The compiler takes both without a word."""
    spec = COMMON[0]
    found = complaints(compile_for(launch_of(spec, config), spec.capability), spec)
    assert any(complaint in text for text in found), found


def test_the_committed_table_is_that_of_the_sources() -> None:
    """Every tile of every architecture: `make aot-all` after a change of what it compiles."""
    held = json.loads(TABLE.read_text(encoding="utf-8"))
    assert held["sources_sha256"] == sources_digest(), "the table is stale: make aot-all"
    wanted = [named(spec) for spec in table()]
    assert [{name: row[name] for name in wanted[0]} for row in held["rows"]] == wanted
    assert not [row for row in held["rows"] if row["complaints"]]


def test_complaints_say_what_is_wrong() -> None:
    spec, limit = COMMON[0], ARCHS[80].shared_memory
    good = Resources(limit, 255, 64, 0, 0, 12, 3)
    assert complaints(good, spec) == []
    bad = Resources(limit + 1, 255, 72, 8, 2, 0, 0)
    assert complaints(bad, spec) == [
        f"shared memory {limit + 1} exceeds sm_80's {limit}",
        "2 spills inside loops",
        "a stack of 72 bytes",
        "no tensor-core instruction",
        "no 128-bit load",
    ]


def test_spills_are_told_apart_by_loops() -> None:
    code = """
        STL [R1], R2 ;
    .L_x_1:
        LDL R3, [R1] ;
        HMMA.16816.F32 R4, R4, R6, R4 ;
    @P0 BRA `(.L_x_1) ;
        BRA `(.L_x_2) ;
        LDL R3, [R1+0x4] ;
    .L_x_2:
        EXIT ;
    """
    assert count_spills(code) == (3, 1)
    outer = f".L_x_0:\n        LDL R9, [R1] ;\n{code}\n        @P1 BRA `(.L_x_0) ;"
    assert count_spills(outer) == (4, 1)
