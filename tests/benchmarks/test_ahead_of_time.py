"""Do the shipped kernels fit the chips that are not here: memory, registers, instructions?"""

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from adapter_kernels.arch import ARCHS
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.configs import TileConfig

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces what a compiler takes", allow_module_level=True)

import triton

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import (  # a GPU's compiler, with triton alone
    TABLES,
    Resources,
    compile_for,
    compiled,
    complaints,
    count_spills,
    digest_of,
    held_by,
    line_of,
    measured,
    named,
    settle_keys,
    small_complaints,
)
from benchmarks.small_forms import SmallForm, small_launch, small_table
from benchmarks.specialisations import (
    Specialisation,
    launch_of,
    pairwise,
)

# two choices that cover every pair, so many triples too
CHOSEN = list(dict.fromkeys(spec for seed in range(2) for spec in pairwise(seed)))
# what most users run, first
COMMON = [
    Specialisation(capability, direction, 128, torch.bfloat16, form, rows, "causal", 1, "all")
    for capability in (80, 90)
    for direction, form, rows in (
        ("forward", "shared", 10),
        ("backward_dq", "shared", 10),
        ("backward_dkv", "none", 1),
        ("prompt_forward", "shared", 10),
        ("prompt_backward", "shared", 10),
    )
]
# every form of the small operations at an odd width, and at the widest
SMALL = [
    form
    for form in small_table()
    if form.dtype == torch.bfloat16
    and (form.odd if form.capability == 80 else form.capability == 90 and form.widest)
]


CHANGES = (
    ("head_dim", 64),
    ("dtype", torch.float16),
    ("layout", "padded"),
    ("form", "bank"),
    ("group", 4),
)


def check(spec: Specialisation) -> None:
    found = compile_for(launch_of(spec), spec.capability)
    print(spec, found)
    assert not complaints(found, spec, measured(spec)), found


@pytest.mark.parametrize("spec", COMMON, ids=str)
def test_common_kernels_compile_within_the_chip(spec: Specialisation) -> None:
    check(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", CHOSEN, ids=str)
def test_every_pair_of_properties_compiles_within_the_chip(spec: Specialisation) -> None:
    check(spec)


def test_the_choice_is_some_two_hundred() -> None:
    assert 170 <= len(CHOSEN) <= 240


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
    found = complaints(compile_for(launch_of(spec, config), spec.capability), spec, may_spill=False)
    assert any(complaint in text for text in found), found


@pytest.mark.parametrize("form", SMALL, ids=str)
def test_small_kernels_compile_within_the_chip(form: SmallForm) -> None:
    found = compiled(small_launch, form)
    print(form, found)
    assert not small_complaints(found, form)


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_table_is_that_of_the_kernels(name: str) -> None:
    """Every form on every architecture: `make aot-all` after a change of what it compiles."""
    chosen = TABLES[name]
    content = json.loads(chosen.path.read_text(encoding="utf-8"))
    if content["triton"] != version("triton"):
        pytest.skip(f"the table is of triton {content['triton']}")
    rows = content["rows"]
    wanted = [
        {**named(spec), "digest": digest_of(chosen.launch(spec), spec.capability)}
        for spec in chosen.specs()
    ]
    assert len(rows) == len(wanted), "the table is stale: make aot-all"
    for row, one, spec in zip(rows, wanted, chosen.specs(), strict=True):
        assert row | one == row, "the table is stale: make aot-all"
        # of what the row holds, by today's bounds of the chips
        assert not chosen.judge(held_by(row), spec), row
        assert not row["complaints"]


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_table_is_of_the_pinned_compiler(name: str) -> None:
    """So that the test above is skipped beside other versions only."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    held = json.loads(TABLES[name].path.read_text(encoding="utf-8"))["triton"]
    assert f"triton=={held}" in pins


def test_complaints_say_what_is_wrong() -> None:
    spec, limit = COMMON[0], ARCHS[80].shared_memory
    good = Resources(limit, 255, 64, 0, 0, 12, 3)
    assert complaints(good, spec, may_spill=False) == []
    bad = Resources(limit + 1, 255, 72, 8, 2, 0, 0)
    assert complaints(bad, spec, may_spill=False) == [
        f"shared memory {limit + 1} exceeds sm_80's {limit}",
        "2 spills inside loops",
        "a stack of 72 bytes",
        "no tensor-core instruction",
        "no 128-bit load",
    ]
    assert complaints(bad, spec, may_spill=True) == [
        f"shared memory {limit + 1} exceeds sm_80's {limit}",
        "no tensor-core instruction",
        "no 128-bit load",
    ]


def test_a_row_that_was_measured_may_spill() -> None:
    (keys,) = (spec for spec in COMMON if (spec.capability, spec.direction) == (90, "backward_dkv"))
    assert measured(keys)
    assert not measured(replace(keys, head_dim=96)), "of the width that was measured"
    assert not measured(replace(keys, capability=80)), "on the chip that was measured"


def test_complaints_about_small_kernels_say_what_is_wrong() -> None:
    form = SmallForm(80, "rms_norm", "residual", 4096, torch.bfloat16)
    limit = ARCHS[80].shared_memory
    assert small_complaints(Resources(limit, 60, 0, 0, 0, 0, 1), form) == []
    narrow = Resources(limit + 1, 60, 8, 2, 0, 0, 0)
    wrong = [f"shared memory {limit + 1} exceeds sm_80's {limit}", "2 spills", "a stack of 8 bytes"]
    assert small_complaints(narrow, form) == [*wrong, "no 128-bit load"]
    assert small_complaints(narrow, replace(form, width=67)) == wrong
    halves = replace(form, operation="apply_rotary", form="halves", width=64)
    assert small_complaints(narrow, halves) == wrong
    assert small_complaints(narrow, replace(halves, form="halves, two")) == wrong
    assert small_complaints(narrow, replace(halves, width=128)) == [*wrong, "no 128-bit load"]
    pairs = replace(halves, form="interleaved")
    assert small_complaints(narrow, pairs) == [*wrong, "no 128-bit load"]


def test_small_forms_are_launched_as_they_say() -> None:
    """What is absent from a form is absent from its launch."""
    absent = {
        "alone": {"residual_ptr", "h_ptr"},
        "halves": {"v_ptr", "v_out_ptr", "positions_ptr", "page_table_ptr"},
        "contiguous, -": {"q_ptr", "q_out_ptr", "cos_ptr", "sin_ptr", "page_table_ptr"},
        "paged, k": {"q_ptr", "q_out_ptr"},
        "paged, q k": set(),
        "plain": set(),
        "both": set(),
        "gate": {"dup_ptr"},
        "up": {"dgate_ptr"},
        "x": {"dh_ptr", "parts_ptr"},
        "x dh": {"parts_ptr"},
        "weight": {"dh_ptr", "dx_ptr"},
        "x dh weight": set(),
        "halves, one": {
            *("q_ptr", "q_out_ptr"),
            *("v_ptr", "v_out_ptr", "positions_ptr", "page_table_ptr"),
        },
        "interleaved, two": {"v_ptr", "v_out_ptr", "positions_ptr", "page_table_ptr"},
        "every, loss": {"rows_ptr", "dloss_ptr"},
        "some, dx": {"dloss_ptr"},
        "every, dweight": {"rows_ptr", "loss_ptr"},
        "some, dweight": {"loss_ptr"},
    }
    for form in small_table()[: len(small_table()) // len(ARCHS)]:
        arguments = small_launch(form).arguments
        found = {name for name, value in arguments.items() if value is None}
        assert found == absent.get(form.form, found), form
        widths = [arguments.get(name) for name in ("C", "F", "V", "HEAD_DIM")]
        assert form.width in widths, form


def test_one_table_is_written_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = TABLES["small_ops"]._replace(specs=lambda: SMALL[:2])
    monkeypatch.setitem(TABLES, "small_ops", few)
    arguments = ["--only", "small_ops", "--processes", "1", "--output", str(tmp_path)]
    assert ahead_of_time.main(arguments) == 0
    assert "2 rows, 0 with complaints" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert path.name == few.path.name
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert rows == [line_of(few, form, compiled(small_launch, form)) for form in SMALL[:2]]
    # what is held is not compiled again, whatever the order
    monkeypatch.setattr(ahead_of_time, "side_by_side", lambda _, jobs, __: iter([{}][: len(jobs)]))
    monkeypatch.setitem(TABLES, "small_ops", few._replace(specs=lambda: SMALL[1::-1]))
    assert ahead_of_time.main(arguments) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == rows[::-1]


def test_a_digest_is_that_of_everything_compiled() -> None:
    spec = COMMON[0]
    launch = launch_of(spec)
    digests = {
        digest_of(launch, 80),
        digest_of(launch, 90),
        digest_of(launch._replace(num_warps=2), 80),
        digest_of(launch._replace(num_stages=1), 80),
        *(digest_of(launch_of(replace(spec, **{name: value})), 80) for name, value in CHANGES),
    }
    assert len(digests) == 4 + len(CHANGES)
    assert digest_of(launch_of(spec), 80) in digests


def test_a_digest_is_the_same_whatever_was_hashed_before() -> None:
    prefix = next(spec for spec in CHOSEN if spec.direction == "prefix")
    queries = next(spec for spec in COMMON if spec.direction == "backward_dq")
    launches, found = [launch_of(spec) for spec in (prefix, queries)], []
    for order in (launches, launches[::-1]):
        for module in [x for name, x in sys.modules.items() if name.startswith("adapter_kernels")]:
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    kernel.hash, kernel.used_global_vals = None, {}
        settle_keys.cache_clear()
        # as a compilation does it
        assert all(launch.kernel.cache_key for launch in order)
        found.append([digest_of(launch, 80) for launch in launches])
    assert found[0] == found[1]


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
