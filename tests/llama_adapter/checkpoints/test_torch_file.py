"""Is a torch file read only as what was saved, whatever happens to its archive?"""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.torch_file import check_checksums, check_tensors, read_torch_file

TIED = ("a", "z")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(6, 9, generator=generator) for name in "abcd"}


def read(path: Path) -> dict[str, Tensor]:
    return check_tensors(read_torch_file(path), path, tied=TIED)


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_are_read_as_they_were_saved(archive: bool, tmp_path: Path) -> None:
    state, path = tensors(), tmp_path / "x.pth"
    state["none"] = torch.zeros(0, 3)
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    got = read(path)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], value) for name, value in state.items())


def test_two_names_of_one_tensor_must_be_the_tied_ones(tmp_path: Path) -> None:
    state, path = tensors(), tmp_path / "x.pth"
    torch.save(state | {"z": state["a"]}, path)
    assert torch.equal(read(path)["z"], state["a"])
    torch.save(state | {"y": state["a"]}, path)
    with pytest.raises(ValueError, match=r"x\.pth: y must have memory of its own"):
        read(path)


@pytest.mark.parametrize(
    "change", [lambda x: x[1:], lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:1].expand(6, 9)]
)
def test_parts_of_other_tensors_are_refused(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(tensors() | {"b": change(torch.randn(6, 9))}, path)
    with pytest.raises(ValueError, match=r"x\.pth: b must have memory of its own, .*clone\(\)"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold tensors by name, got list"),
        ({3: torch.ones(1)}, "must hold tensors by name, got the key 3"),
        ({"a": 1}, "a must be a tensor, got int"),
        ({"a": torch.empty(3, device="meta")}, "a must be a plain tensor of numbers on the CPU"),
    ],
)
def test_other_contents_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"x\.pth:? {message}"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"y\.pth does not exist"):
        read_torch_file(tmp_path / "y.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("archive", [True, False])
def test_no_flipped_bit_outside_the_numbers_changes_a_tensor(archive: bool, tmp_path: Path) -> None:
    """Directory, headers, names and pickle: either all is as it was, or the file is refused."""
    state, path = tensors(), tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    data = path.read_bytes()
    starts = [data.index(value.numpy().tobytes()) for value in state.values()]
    numbers = {start + i for start in starts for i in range(state["a"].nbytes)}
    places = [at for at in range(len(data)) if at not in numbers]
    rng, messages = random.Random(5), []
    for at in rng.choices(places, k=400):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            got = read(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        if not archive and got.keys() != state.keys():
            # an old file has no checksum: that a name is missing is told by who knows the names
            continue
        assert got.keys() == state.keys()
        assert all(torch.equal(got[name], value) for name, value in state.items())
    assert len(messages) > 120
    assert all("\n" not in message for message in messages)


def test_records_that_change_places_are_refused(tmp_path: Path) -> None:
    """A directory that names the record of one tensor as another's."""
    path = tmp_path / "x.pth"
    torch.save(tensors(), path)
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02")
    swapped = data[at:].replace(b"/data/1", b"/data/#").replace(b"/data/2", b"/data/1")
    path.write_bytes(data[:at] + swapped.replace(b"/data/#", b"/data/2"))
    with pytest.raises(ValueError, match="is damaged or not a torch file"):
        read(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    """What is packed again with a zip program cannot be mapped."""
    source, path = tmp_path / "y.pth", tmp_path / "x.pth"
    torch.save(tensors(), source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(ValueError, match="is damaged or not a torch file"):
        read(path)


def test_checksums_are_compared_and_an_encrypted_record_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(tensors(), path)
    check_checksums(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
    number = tensors()["a"].numpy().tobytes()
    path.write_bytes(whole.replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    with pytest.raises(ValueError, match=r"data/0 has another checksum; copy it again"):
        check_checksums(path)
    # the flag of encryption, in the record's own header and in the directory
    flagged = bytearray(whole)
    flagged[record.header_offset + 6] |= 1
    entry = whole.index(b"PK\x01\x02")
    while record.filename.encode() not in whole[entry : entry + 46 + len(record.filename)]:
        entry = whole.index(b"PK\x01\x02", entry + 1)
    flagged[entry + 8] |= 1
    path.write_bytes(flagged)
    with pytest.raises(ValueError, match=r"x\.pth is damaged \(.*encrypted.*\): copy it again"):
        check_checksums(path)
