"""The version of a commit, and the tags that publishing it makes and moves."""

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from scripts.errors import PublishRefused, SettingInvalid

_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")
# What a tag of an image may be made of, less the longest of our own endings.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,110}")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def of_commit(root: Path) -> str:
    """Return the version of the commit that is checked out.

    1.2.3 on the tag v1.2.3, 1.2.3-4-g0a1b2c3 four commits later, 0.0.0-4-g0a1b2c3 without a tag.

    Raises:
        PublishRefused: `root` is no git repository with a commit.
        SettingInvalid: the tag cannot be part of an image's tag.
    """
    described = _git(root, "describe", "--tags", "--match", "v[0-9]*")
    if not described:
        count = _git(root, "rev-list", "--count", "HEAD")
        commit = _git(root, "rev-parse", "--short", "HEAD")
        if not commit:
            raise PublishRefused(
                f"{root.name} is no git repository with a commit",
                "a commit, which the version names",
                "publish from a clone of the repository",
            )
        described = f"v0.0.0-{count}-g{commit}"
    version = described.removeprefix("v")
    if not _TAG.fullmatch(version):
        raise SettingInvalid(
            f"the git tag {described!r}", "letters, digits, `.`, `_` and `-`", "name it like v1.2.3"
        )
    return version


def revision(root: Path) -> str:
    """Return the commit that is checked out, in full."""
    return _git(root, "rev-parse", "HEAD")


def seconds(root: Path) -> int:
    """Return the time of the commit that is checked out, 0 where there is none."""
    return int(_git(root, "show", "--no-patch", "--format=%ct", "HEAD") or 0)


def provenance(root: Path) -> dict[str, str]:
    """Return what an image's labels tell of its source, as the build's variables.

    The time is the commit's: when it was built makes no difference.
    """
    told = {"REVISION": revision(root) or "unknown"}
    if seconds(root):
        when = datetime.fromtimestamp(seconds(root), UTC)
        # Not as SOURCE_DATE_EPOCH: it would build every layer anew with each commit.
        told["CREATED"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = urlsplit(_git(root, "config", "remote.origin.url"))
    if parts.scheme in ("http", "https", "ssh") and parts.hostname:
        # Without what may stand before the host: a token.
        told["SOURCE_URL"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return told


def require_clean(root: Path) -> None:
    """Raise PublishRefused where the work tree is not what the commit says."""
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise PublishRefused(
            "the work tree has changes: " + ", ".join(line[3:] for line in changed[:5]) + more,
            "a commit that is what the images are made from",
            "commit or remove them",
        )


def is_release(version: str) -> bool:
    """Whether it is a release's: 1.2.3, and not 1.2.3-rc1 or 1.2.3-4-g0a1b2c3."""
    return _RELEASE.fullmatch(version) is not None


def moving(version: str, part: str) -> list[str]:
    """Return the tags that a release moves: for 1.2.3 and cu121, 1.2-cu121 and cu121."""
    found = _RELEASE.fullmatch(version)
    return [f"{found[1]}.{found[2]}-{part}", part] if found else []


def moves(version: str, there: str) -> bool:
    """Whether a moving tag that names the version `there`, empty for none, moves to `version`.

    Never back: a fix of an older line leaves the tag of the newest alone.
    """
    new, old = _RELEASE.fullmatch(version), _RELEASE.fullmatch(there)
    return bool(new) and (not old or _number(new) >= _number(old))


def _number(found: re.Match) -> tuple[int, ...]:
    return tuple(map(int, found.groups()))
