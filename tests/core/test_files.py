"""Files are written aside and renamed, and what is read is checked."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, NoReturn

import pytest
import torch

from lightning_trust.core.files import (
    pack_bits,
    read_json,
    read_tensors,
    unpack_bits,
    write_aside,
    write_json,
    write_tensors,
    write_text,
)

KIND = "lightning_trust.test"


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_full(file: IO[bytes]) -> None:
    file.write(b"half")
    full_disk()


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "result.txt", "old")
    with pytest.raises(OSError, match="No space left"):
        write_aside(path, half_then_full)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.txt"]
    assert path.read_text() == "old"


def test_full_disk_at_fsync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "mask.safetensors", KIND, 1, {"w": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(tmp_path / "result.txt", interrupted)
    assert not list(tmp_path.iterdir())


def test_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "result.txt", "text")
    (tmp_path / "plain.txt").write_text("text")
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_json_round_trip_and_nan(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", KIND, 1, {"value": 0.1})
    assert read_json(path, KIND, 1) == {"kind": KIND, "version": 1, "value": 0.1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, KIND, 1, {"value": float("nan")})
    assert read_json(path, KIND, 1)["value"] == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "lightning_trust.test", "ver', "but it is damaged"),
        ("[1, 2]", "of kind 'lightning_trust.test', but got 'list'"),
        ('{"kind": "other", "version": 1}', "but got 'other'"),
        ('{"kind": "lightning_trust.test", "version": 2}', "schema version 1 or older, but got 2. Update"),
        ('{"kind": "lightning_trust.test"}', "schema version 1 or older, but got None"),
    ],
)
def test_unreadable_json_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = write_text(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path, KIND, 1)
    assert str(path) in str(error.value)


def test_binary_json_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="but it is damaged"):
        read_json(path, KIND, 1)


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([True, False])}
    path = write_tensors(tmp_path / "mask.safetensors", KIND, 1, tensors, note="words")
    read, meta = read_tensors(path, KIND, 1)
    assert meta == {"kind": KIND, "version": "1", "note": "words"}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_tensors_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_tensors(tmp_path / "mask.safetensors", KIND, 1, {"w": torch.arange(100.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        read_tensors(path, KIND, 1)
    assert str(path) in str(error.value)


def test_corrupted_header_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "mask.safetensors", KIND, 1, {"w": torch.arange(100.0)})
    content = bytearray(path.read_bytes())
    content[8:40] = os.urandom(4).ljust(32, b"\xff")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_tensors(path, KIND, 1)


def test_missing_and_foreign_tensor_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_tensors(tmp_path / "mask.safetensors", KIND, 1)
    path = write_tensors(tmp_path / "mask.safetensors", "other", 1, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="but got 'other'"):
        read_tensors(path, KIND, 1)
    path = write_tensors(tmp_path / "mask.safetensors", KIND, 2, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="schema version 1 or older, but got '2'"):
        read_tensors(path, KIND, 1)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packed_bits_round_trip_at_an_eighth_of_the_size(count: int) -> None:
    flags = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_bits(flags)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), flags)


def test_bits_are_packed_lowest_first() -> None:
    assert pack_bits(torch.tensor([[True, False], [False, True], [True, True]])).tolist() == [0b111001]
