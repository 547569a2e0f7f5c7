"""Does the benchmark of loading write each format and measure what loading it holds?"""

import re
import sys
from pathlib import Path

import pytest

from benchmarks import loading


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_quick_form_measures_every_format(tmp_path: Path) -> None:
    assert loading.main(["--quick", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "loading.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| 0\.04 \| ([\d.]+) \| (-?[\d.]+) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(loading.FORMATS)
    assert all(float(beyond) < 0.25 for _, _, beyond in rows)


def test_7b_is_the_shape_measured_by_default() -> None:
    sizes = loading.shapes_of(loading.FULL)
    assert len(sizes) == 9 * 32 + 3
    assert sizes["layers.31.feed_forward.w2.weight"] == (4096, 11008)
