"""Does kernels/README.md lead from every public function to files and tests that exist?"""

import re
from pathlib import Path

import pytest

import adapter_kernels

PAGES = (
    Path(adapter_kernels.__file__).parents[1] / "README.md",
    Path(adapter_kernels.__file__).parent / "zero_init_attention" / "README.md",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        assert (page.parent / link).exists(), link


def test_every_public_function_has_its_row() -> None:
    rows = [line for line in PAGES[0].read_text(encoding="utf-8").splitlines() if "| [" in line]
    for name in adapter_kernels.__all__:
        (row,) = [row for row in rows if re.search(rf"`{name}`", row.split("|")[1])]
        assert "/test_" in row, f"{name} has no test in its row"


def test_modules_of_an_operation_are_all_listed() -> None:
    folder = PAGES[1].parent
    text = PAGES[1].read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        if path.name != "__init__.py":
            assert f"[{path.name}]({path.name})" in text, path.name
