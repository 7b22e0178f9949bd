from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.data import EncodedDataset, SequenceDataset, SyntheticConfig, generate, write_dataset
from hstu.data.atomic_directory import require_writable

TINY = {"num_users": 20, "num_items": 40, "num_clusters": 4, "num_types": 2, "max_seqlen": 20}


def tiny(seed: int = 1) -> EncodedDataset:
    return generate(SyntheticConfig(**TINY, seed=seed))


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_replaces_a_data_set_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    (target / "u.data").write_text("raw")
    write_dataset(tiny(1), target)
    first = content(target)
    write_dataset(tiny(2), target)
    assert content(target) != first and content(target).keys() == first.keys()
    assert (target / "u.data").read_text() == "raw"
    write_dataset(tiny(1), target)
    assert content(target) == first
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("stage", ["write", "rename"])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, stage: str
) -> None:
    target = tmp_path / "tiny"
    if existing:
        write_dataset(tiny(1), target)
    before = content(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    dataset = tiny(2)
    if stage == "write":
        monkeypatch.setattr("hstu.data.writer.Schema.save", _fail)
    else:
        rename = Path.rename

        def fail_at_the_last(self: Path, to: Path) -> Path:
            if Path(to) == target / "schema.json" and "ready" in self.parts:
                raise OSError(28, "No space left on device")
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", fail_at_the_last)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); choose another"):
        write_dataset(dataset, target)
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_foreign_data_directory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "photo.jpg").write_text("x")
    with pytest.raises(ValueError, match="exists, but .* is no data set"):
        write_dataset(tiny(), tmp_path / "mine")
    assert content(tmp_path) == {"mine/data/photo.jpg": b"x"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for check in (require_writable, lambda place: write_dataset(tiny(), place)):
        with pytest.raises(ValueError, match=r"file/sub.*cannot be written"):
            check(tmp_path / "file" / "sub")
    require_writable(tmp_path / "new" / "sub")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("events_per_part", [1, 50, 10**6])
def test_parts_hold_whole_users(tmp_path: Path, events_per_part: int) -> None:
    dataset = tiny()
    write_dataset(dataset, tmp_path / "tiny", events_per_part=events_per_part)
    parts = len(list((tmp_path / "tiny" / "data").iterdir()))
    assert parts == {1: 20, 10**6: 1}.get(events_per_part, parts)
    read = SequenceDataset.open(tmp_path / "tiny")
    batch = read.gather(np.arange(20), np.zeros(20), read.lengths)
    np.testing.assert_array_equal(batch.items, dataset.events["item_id"])
