"""A snapshot is good or absent."""

from pathlib import Path

import pytest

from scripts import snapshot
from scripts.errors import SnapshotMissing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "a" / "b"
    (where / "sub").mkdir(parents=True)
    (where / "config.json").write_text("{}")
    (where / "sub" / "x.bin").write_bytes(b"12345")
    snapshot.record(where, "a/b", "v1", "test")
    return where


def test_record_and_load_give_the_same_manifest(folder: Path) -> None:
    found = snapshot.load(folder)
    assert (found.model_id, found.revision, found.size) == ("a/b", "v1", 7)
    assert [file.path for file in found.files] == ["config.json", "sub/x.bin"]


def test_require_takes_only_the_revision_asked_for(tmp_path: Path, folder: Path) -> None:
    assert snapshot.require(tmp_path, "a/b", "v1") == folder
    with pytest.raises(SnapshotMissing, match="holds a/b at revision v1"):
        snapshot.require(tmp_path, "a/b", "v2")


def test_a_folder_without_a_marker_is_incomplete(folder: Path) -> None:
    snapshot.unmark(folder)
    with pytest.raises(SnapshotMissing, match="is incomplete"):
        snapshot.load(folder)


def test_a_folder_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMissing, match=r"is not there(.|\n)*run `docker compose run --rm"):
        snapshot.load(tmp_path / "none" / "here")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": [{}]}', '{"files": 3}'])
def test_an_unreadable_marker_is_no_snapshot(folder: Path, content: str) -> None:
    (folder / snapshot.MARKER).write_text(content)
    with pytest.raises(SnapshotMissing, match="is unreadable"):
        snapshot.load(folder)


def test_a_missing_or_short_file_is_named(folder: Path) -> None:
    (folder / "sub" / "x.bin").write_bytes(b"1")
    with pytest.raises(SnapshotMissing, match="has 1 bytes instead of 5"):
        snapshot.load(folder)
    (folder / "sub" / "x.bin").unlink()
    with pytest.raises(SnapshotMissing, match=r"x\.bin is missing"):
        snapshot.load(folder)
