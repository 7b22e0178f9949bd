from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.preprocessing.kuairand import CONTEXTS, DATASETS, EVENTS, LOG_FIELDS

from .conftest import contexts, events, exposures, kuairand_contexts, make, write_kuairand

ROWS = exposures()


def expected(rows: list[tuple[int, int, int, int]]) -> dict[int, list[tuple[int, int, int]]]:
    """Each user's (video, mask, seconds) in the order of milliseconds, ties in file order."""
    ordered = sorted(rows, key=lambda row: row[2])
    return {
        user: [(video, mask, time // 1000) for owner, video, time, mask in ordered if owner == user]
        for user in sorted({row[0] for row in rows})
    }


@pytest.mark.parametrize("name", DATASETS)
def test_published_layouts(name: str, tmp_path: Path) -> None:
    assert (
        dict(
            is_click=1,
            is_like=2,
            is_follow=4,
            is_comment=8,
            is_forward=16,
            is_hate=32,
            long_view=64,
            is_profile_enter=128,
        )
        == EVENTS
    )
    write_kuairand(tmp_path / DATASETS[name].archive.root, name, ROWS)
    dataset = make(name, tmp_path)
    assert events(dataset) == expected(ROWS)
    assert dataset.schema.action.action_type == "bitmask" and dataset.schema.action.vocab_size == 256
    assert set(dataset.schema.source) == {*DATASETS[name].logs, DATASETS[name].users.name}
    values = contexts(dataset)
    for user in range(6):
        found = tuple(values[name][user] for name in CONTEXTS)
        assert found == tuple(value or "UNKNOWN" for value in kuairand_contexts(user))


def test_all_that_is_published_of_users_is_read(tmp_path: Path) -> None:
    write_kuairand(tmp_path, "kuairand-1k", ROWS)
    dataset = make("kuairand-1k", tmp_path)
    assert len(dataset.schema.contexts) == 26 and len(dataset.schema.of("user", "numeric")) == 4
    assert dataset.schema.action.bits[:2] == ("is_click", "is_like")
    users = np.arange(6)
    found = dataset.gather(users, users * 0, users * 0, ("register_days", "follow_user_num"))
    assert np.isnan(found.of_users["register_days"][:, 0]).tolist() == [False, True, *[False] * 4]
    assert found.of_users["follow_user_num"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    values = contexts(dataset)["onehot_feat4"]
    assert values[2] == "UNKNOWN" and values[3] == "7.0" and contexts(dataset)["is_live_streamer"][0] == -124


def test_users_in_one_of_the_files_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # User 0 is in the first log, 1 in the second, 5 in no file of users, 9 in that file alone.
    early, late = [row for row in ROWS if row[0] != 1], [row for row in ROWS if row[0] != 0]
    early, late = early[: min(len(early), len(late))], late[: min(len(early), len(late))]
    write_kuairand(tmp_path, "kuairand-1k", early + late, users=range(5))
    with (tmp_path / "user_features_1k.csv").open("a") as file:
        file.write("9" + "," * 30 + "\n")
    with caplog.at_level("INFO"):
        dataset = make("kuairand-1k", tmp_path)
    assert events(dataset) == expected(early + late)
    assert {values[5] for values in contexts(dataset).values()} == {"UNKNOWN"}
    assert "1 users of" in caplog.text and "1 users without events are left out" in caplog.text


def write_archive(path: Path, folder: Path, *extra: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
        for file in sorted(folder.iterdir(), reverse=True):  # the order of an archive is not that of the dates
            archive.add(file, f"KuaiRand-1K/data/{file.name}")
    path.write_bytes(content.getvalue())
    return content.getvalue()


def test_the_archive_is_read_without_unpacking_it(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "plain", "kuairand-1k", ROWS)
    evil = [tarfile.TarInfo("../../evil.txt"), tarfile.TarInfo("/tmp/hstu_evil.txt")]
    link = tarfile.TarInfo("KuaiRand-1K/data/user_features_1k.csv")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    evil[0].size = evil[1].size = 5
    (tmp_path / "packed").mkdir()
    write_archive(tmp_path / "packed" / "KuaiRand-1K.tar.gz", tmp_path / "plain", *evil, link)
    plain, packed = make("kuairand-1k", tmp_path / "plain"), make("kuairand-1k", tmp_path / "packed")
    assert events(packed) == events(plain) and contexts(packed) == contexts(plain)
    assert packed.schema == plain.schema
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/hstu_evil.txt").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_truncated_and_damaged_archives_are_refused(tmp_path: Path, kept: float) -> None:
    write_kuairand(tmp_path / "plain", "kuairand-1k", exposures(num_users=200, seed=1))
    path = tmp_path / "KuaiRand-1K.tar.gz"
    whole = write_archive(path, tmp_path / "plain")
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="KuaiRand-1K.tar.gz.*(cannot be read|holds no)"):
        make("kuairand-1k", tmp_path)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    path.write_bytes(broken)
    with pytest.raises(ValueError):
        make("kuairand-1k", tmp_path)
    assert not (tmp_path / "made" / "kuairand-1k").exists()


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "plain", "kuairand-1k", ROWS)
    write_archive(tmp_path / "KuaiRand-1K.tar.gz", tmp_path / "plain")
    with pytest.raises(ValueError, match=r"KuaiRand-1K.tar.gz: its md5 is \w+, the published file has 6b0b9c"):
        make("kuairand-1k", tmp_path, check_counts=True)


def test_an_archive_without_a_log_is_refused(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "plain", "kuairand-1k", ROWS)
    (tmp_path / "plain" / "log_standard_4_22_to_5_08_1k.csv").unlink()
    write_archive(tmp_path / "KuaiRand-1K.tar.gz", tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no log_standard_4_22_to_5_08_1k.csv"):
        make("kuairand-1k", tmp_path)


def test_published_counts_are_checked(tmp_path: Path) -> None:
    write_kuairand(tmp_path, "kuairand-27k", ROWS)
    with pytest.raises(ValueError, match="6 users, the published data set has 27,285"):
        make("kuairand-27k", tmp_path, check_counts=True)
    known = replace(DATASETS["kuairand-27k"], log_counts={"users": (5, 6), "events": 120})
    with pytest.raises(ValueError, match="user_features_27k.csv: 6 lines, the published file has 27,285"):
        make("kuairand-27k", tmp_path, known=known, check_counts=True)


@pytest.mark.parametrize(("longest", "said"), [(1.009, False), (1.02, True)])
def test_lengths_far_from_the_published_ones_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, longest: float, said: bool
) -> None:
    write_kuairand(tmp_path, "kuairand-27k", ROWS)
    known = replace(DATASETS["kuairand-27k"], log_counts={}, lengths={"seqlen_max": 0})
    known = replace(known, users=replace(known.users, rows=6))  # type: ignore[arg-type, type-var]
    counts = make("kuairand-27k", tmp_path, known=known, check_counts=True).schema.counts
    caplog.clear()
    known = replace(known, lengths={"seqlen_mean": counts["seqlen_mean"] * longest})  # type: ignore[dict-item]
    make("kuairand-27k", tmp_path, known=known, check_counts=True)
    assert ("seqlen_mean is" in caplog.text) == said


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("time_ms", "1649400000", "is no time in milliseconds"),
        ("is_like", "2", "'2' is no 0 or 1"),
        ("is_like", "-1", "'-1' is no 0 or 1"),
        ("is_hate", "", "'' is no 0 or 1"),
        ("user_id", "1.5", "'1.5' is no number"),
        ("tab", "1,1", "has 20 fields, not 19"),
    ],
)
def test_malformed_logs_are_refused(tmp_path: Path, field: str, value: str, message: str) -> None:
    write_kuairand(tmp_path, "kuairand-pure", ROWS)
    path = tmp_path / "log_standard_4_22_to_5_08_pure.csv"
    lines = path.read_text().splitlines()
    values = lines[4].split(",")
    values[LOG_FIELDS.index(field)] = value
    lines[4] = ",".join(values)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"log_standard_4_22_to_5_08_pure.csv: line 5.*{message}"):
        make("kuairand-pure", tmp_path)


def test_a_line_that_is_too_short_is_refused_though_the_fields_that_count_are_there(tmp_path: Path) -> None:
    write_kuairand(tmp_path, "kuairand-pure", ROWS)
    path = tmp_path / "log_standard_4_08_to_4_21_pure.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 4 has 18 fields, not 19"):
        make("kuairand-pure", tmp_path)
