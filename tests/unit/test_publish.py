"""Which version a commit has, which tags a release moves, and what a registry may be called."""

import subprocess
from pathlib import Path

import pytest

from scripts import errors, publish, registry, version
from scripts.registry import Local, Registry

WHO = ("-c", "user.name=Test", "-c", "user.email=test@example.org")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=where, check=True, capture_output=True)
    return done.stdout.decode().strip()


def commit(where: Path) -> None:
    git(where, *WHO, "commit", "--quiet", "--allow-empty", "--message", "a change")


def test_a_tag_names_the_version_and_later_commits_say_how_far_they_are(repository: Path) -> None:
    head = git(repository, "rev-parse", "--short", "HEAD")
    assert version.of_commit(repository) == f"0.0.0-1-g{head}"
    git(repository, "tag", "vendor-drop")
    git(repository, "tag", "v1.2.3")
    assert version.of_commit(repository) == "1.2.3"
    commit(repository)
    head = git(repository, "rev-parse", "--short", "HEAD")
    assert version.of_commit(repository) == f"1.2.3-1-g{head}"


def test_a_tag_that_no_image_can_have_is_refused(repository: Path) -> None:
    git(repository, "tag", "v1.2.3+cu")
    with pytest.raises(errors.SettingInvalid, match=r"v1\.2\.3\+cu"):
        version.of_commit(repository)


def test_a_folder_without_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.PublishRefused, match="no git repository"):
        version.of_commit(tmp_path)


def test_a_changed_tree_is_refused_by_name(repository: Path) -> None:
    version.require_clean(repository)
    (repository / "left.txt").touch()
    with pytest.raises(errors.PublishRefused, match=r"left\.txt") as raised:
        version.require_clean(repository)
    assert raised.value.exit_code == 22


def test_only_a_release_moves_tags() -> None:
    assert version.moving("1.2.3", "cu121") == ["1.2-cu121", "cu121"]
    for other in ("1.2.3-rc1", "1.2.3-4-g0a1b2c3", "0.0.0-1-g0a1b2c3", "1.2", "dev"):
        assert version.moving(other, "cu121") == []
        assert not version.moves(other, "")


@pytest.mark.parametrize(
    ("new", "there", "moved"),
    [
        ("1.2.3", "", True),
        ("1.2.3", "1.2.2", True),
        ("1.2.3", "1.2.3", True),
        ("1.10.0", "1.9.9", True),
        ("1.2.4", "1.3.0", False),
        ("1.2.3", "dev", True),
    ],
)
def test_a_moving_tag_never_goes_back(new: str, there: str, moved: bool) -> None:
    assert version.moves(new, there) is moved


def test_registries_are_hosts_with_paths() -> None:
    assert registry.parse("a.example:5000/team/, b.example") == ["a.example:5000/team", "b.example"]
    assert registry.parse("a.example,a.example") == ["a.example"]
    for wrong in ("", " , ", "https://a.example/x", "A.example", "a.example/x:tag"):
        with pytest.raises(errors.SettingInvalid, match="REGISTRY="):
            registry.parse(wrong)


def test_an_env_file_names_the_first_registry(tmp_path: Path) -> None:
    parts = {"cpu": "cpu", "download": "download", "gateway": "gateway"}
    images = {part: Local(f"glm4-stack:1.2.3-{part}", "i", "c", 1) for part in parts}
    record = publish.Record(tmp_path / "published" / "1.2.3.json", "1.2.3", "abc")
    digests = {f"1.2.3-{part}": f"sha256:{part}" for part in parts}
    record.registries = {"b.example/x": digests, "c.example": digests}
    record.keep()
    record = publish.Record.read(record.path, "1.2.3", "abc")
    targets = [Registry(name, 0, 1) for name in record.registries]
    lines = publish.settings(targets, images, "cpu", record).splitlines()
    assert "SERVE_IMAGE=b.example/x/glm4-stack@sha256:cpu" in lines
    assert "GATEWAY_IMAGE=b.example/x/glm4-stack@sha256:gateway" in lines
    assert "IMAGE=b.example/x/glm4-stack" in lines
    assert "#DOWNLOAD_IMAGE=c.example/glm4-stack@sha256:download" in lines


def test_what_is_kept_of_another_commit_does_not_count(tmp_path: Path) -> None:
    record = publish.Record(tmp_path / "1.2.3.json", "1.2.3", "abc", ["id"])
    record.keep()
    assert publish.Record.read(record.path, "1.2.3", "abc").tested == ["id"]
    assert publish.Record.read(record.path, "1.2.3", "def").tested == []
    record.path.write_text("{")
    assert publish.Record.read(record.path, "1.2.3", "abc").tested == []
