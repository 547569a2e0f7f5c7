"""Are tensors taken by name only as they are told to be, and damaged archives found?"""

from pathlib import Path

import pytest
import torch

from llama_adapter.checkpoints.adapter_source import Source, open_source

HERE = Path("file.pth")


def test_widths_are_remembered() -> None:
    source = Source(HERE, {"a": torch.randn(3, 5).half(), "b": torch.randn(5), "c": torch.ones(4)})
    taken = source.take("a", "rows", "dim")
    assert taken.dtype == torch.float32
    assert source.sizes == {"rows": 3, "dim": 5}
    source.take("b", "dim")
    with pytest.raises(ValueError, match=r"file\.pth: c must have shape \(5\), got \(4,\)"):
        source.take("c", "dim")
    with pytest.raises(ValueError, match=r"file\.pth lacks tensor a"):
        source.take("a", "rows", "dim")


def test_what_is_left_is_surplus() -> None:
    source = Source(HERE, {f"x{i}": torch.ones(1) for i in range(5)})
    assert source.drop("x[01]") == ["x0", "x1"]
    with pytest.raises(ValueError, match=r"file\.pth has surplus tensors: x2, x3, x4"):
        source.finish()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "a must be a tensor, got int"),
        (torch.ones(2, 2).to_sparse(), "a must be a plain dense tensor"),
        (torch.empty(2, device="meta"), "a must be a plain dense tensor"),
        (torch.ones(1).expand(10**7, 10**7), "a must have data for its shape .*, got 4 bytes"),
    ],
)
def test_odd_values_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(HERE, {"a": value})


def test_a_changed_number_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"x": torch.full((64,), 3.25)}, "epoch": 1}, path)
    source = open_source(path)
    assert (source.names, source.extra) == (["x"], {"epoch": 1})
    number = torch.tensor(3.25).numpy().tobytes()
    data = path.read_bytes()
    at = data.index(number * 64) + 40
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    with pytest.raises(ValueError, match=r"is damaged: .*/data/0 has another checksum"):
        open_source(path)
