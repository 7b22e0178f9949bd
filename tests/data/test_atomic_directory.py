from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hstu.data import EncodedDataset, SequenceDataset, SyntheticConfig, generate, write_dataset
from hstu.data.atomic_directory import _swap, replacing, work_directory

TINY = {"num_users": 20, "num_items": 40, "num_clusters": 4, "num_types": 2, "max_seqlen": 20}


def tiny(seed: int) -> EncodedDataset:
    return generate(SyntheticConfig(**TINY, seed=seed))


def holds(target: Path, dataset: EncodedDataset) -> bool:
    read = SequenceDataset.open(target)
    same = replace(read.schema, vocabularies={}) == dataset.schema
    return same and read.lengths.tolist() == dataset.lengths.tolist()


def killed_in_swap(target: Path, renames: int) -> None:
    """A process that replaces the data set and is killed in front of one of its renames."""
    pid = os.fork()
    if pid == 0:  # only renames happen here: nothing that a fork could have broken
        rename, done = Path.rename, 0

        def counted(self: Path, to: Path) -> Path:
            nonlocal done
            if done == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return rename(self, to)

        Path.rename = counted
        _swap(target, work_directory(target))
        os._exit(0)
    os.waitpid(pid, 0)


def stage(target: Path, dataset: EncodedDataset) -> None:
    """The state of a run that has all it needs and has renamed nothing yet."""
    write_dataset(dataset, target.parent / "other")
    work_directory(target).mkdir()
    (target.parent / "other").rename(work_directory(target) / "ready")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("renames", range(7))
@pytest.mark.parametrize("who", ["reader", "run"])
def test_whoever_comes_after_a_kill_finishes_the_replacement(
    tmp_path: Path, existing: bool, renames: int, who: str
) -> None:
    target = tmp_path / "tiny"
    if existing:
        write_dataset(tiny(1), target)
    stage(target, tiny(2))
    killed_in_swap(target, renames)
    if who == "reader":
        # Until the first rename the old data set is whole, and a reader has no cause to look further.
        assert holds(target, tiny(1 if existing and renames == 0 else 2))
    else:
        write_dataset(tiny(3), target)
        assert holds(target, tiny(3))
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_run_that_was_killed_before_it_was_ready_leaves_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "tiny"
    write_dataset(tiny(1), target)
    work = work_directory(target)
    (work / "new" / "data").mkdir(parents=True)
    (work / "state").write_text("reading a.csv (event 7)")
    assert holds(target, tiny(1))
    with caplog.at_level("INFO"):
        write_dataset(tiny(2), target)
    assert "an earlier run was stopped while reading a.csv (event 7); starting again" in caplog.text
    assert holds(target, tiny(2)) and not work.exists()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    write_dataset(tiny(1), tmp_path / "tiny")
    with pytest.raises(RuntimeError), replacing(tmp_path / "tiny"):
        with pytest.raises(ValueError, match="another run is writing this data set"):
            write_dataset(tiny(2), tmp_path / "tiny")
        shutil.rmtree(tmp_path / "tiny")
        with pytest.raises(ValueError, match="no such file"):
            SequenceDataset.open(tmp_path / "tiny")
        raise RuntimeError


def test_a_link_to_another_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "store").mkdir(parents=True)
    (tmp_path / "tiny").symlink_to(tmp_path / "elsewhere" / "store")
    assert work_directory(tmp_path / "tiny").parent == tmp_path / "elsewhere"
    write_dataset(tiny(1), tmp_path / "tiny")
    assert holds(tmp_path / "elsewhere" / "store", tiny(1)) and (tmp_path / "tiny").is_symlink()


def test_an_interrupt_after_the_swap_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that a run was interrupted finds the old data set; this one is done."""
    target = tmp_path / "small"
    write_dataset(tiny(1), target)
    rmtree, calls = shutil.rmtree, []

    def interrupted(path: Path, **options: object) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    write_dataset(tiny(2), target)
    assert len(calls) > 1 and holds(target, tiny(2)) and not work_directory(target).exists()
