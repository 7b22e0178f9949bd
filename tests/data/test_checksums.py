"""Sums of blocks against hashlib, and damage that is found: always by a whole look, most often by a sample."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from hstu.data import checksums
from hstu.data.checksums import SummedFile, file_sums, find_damage, record_sum


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_every_block_has_the_sum_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 64)
    rng, file = random.Random(size), SummedFile(tmp_path / "x")
    content, written = rng.randbytes(size), 0
    while written < size:
        step = rng.randint(1, 150)
        file.write(memoryview(content)[written : written + step])
        written += step
    known = file.finish()
    assert (tmp_path / "x").read_bytes() == content and known["bytes"] == size
    blocks = [content[start : start + 64] for start in range(0, size, 64)]
    assert known["blocks"] == [hashlib.sha256(block).hexdigest()[:16] for block in blocks]
    assert find_damage(tmp_path / "x", known, whole=True) is None
    assert file_sums([tmp_path / "x"])["x"] == {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


def test_one_bit_anywhere_is_found_by_a_whole_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 64)
    file, content = SummedFile(tmp_path / "x"), bytes(1000)
    file.write(content)
    known, sampled = file.finish(), 0
    for place in range(0, 1000, 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "x").write_bytes(damaged)
        assert find_damage(tmp_path / "x", known, whole=True) == (
            f"has other contents than were written, near byte {place // 64 * 64}"
        )
        sampled += find_damage(tmp_path / "x", known, whole=False) is not None
    # 8 of 16 blocks are looked at: 143 / 2 on average, with a standard deviation of 6.
    assert 40 < sampled < 103


def test_a_record_has_one_sum_whatever_its_order() -> None:
    assert record_sum({"a": 1, "b": [2.5, None]}) == record_sum({"b": [2.5, None], "a": 1}) != record_sum({"a": 1})
