"""The keys that let clients in: a file of their hashes, and the running gateway that knows them.

The file is a map of HAProxy's: the SHA-256 of a key, a space, its name. A key has 256 random bits,
so that a plain hash tells nothing about it.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from scripts import errors
from scripts.settings import Settings

FILE, SOCKET = "keys.map", "admin.sock"
# There when any key is: what the gateway asks for to know that one is needed.
_KEYED = "keyed"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


def _read(folder: Path) -> dict[str, str]:
    """Return names by hash."""
    path = folder / FILE
    if not path.exists():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2 and line[0] != _KEYED}


def load(folder: Path) -> dict[str, str]:
    """Return the beginning of each key's hash, by name."""
    return {name: digest[:8] for digest, name in _read(folder).items()}


def require(settings: Settings, any_key: bool) -> None:
    """Raise SettingInvalid when others reach the endpoint and nobody needs a key."""
    if settings.open_to_others and not any_key:
        raise errors.SettingInvalid(
            f"HOST={settings.host}, and there is no key",
            "a key for whoever comes in from other hosts",
            "make key NAME=alice (docker compose run --rm key add alice); or HOST=127.0.0.1",
        )


def prepare(folder: Path) -> None:
    """Make the file, which HAProxy reads at its start, if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / FILE).exists():
            _write(folder, {})


def add(folder: Path, name: str) -> str:
    """Make a key of that name and return it; it is written nowhere but in this answer.

    Raises:
        SettingInvalid: the name is not one, or taken.
    """
    if not _NAME.fullmatch(name):
        raise errors.SettingInvalid(
            f"the name {name!r}", "letters, digits, and . _ @ - between", "choose another NAME"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        known = _read(folder)
        if name in known.values():
            raise errors.SettingInvalid(
                f"there is a key {name}",
                "a new name; two keys of one person may live side by side",
                f"choose another NAME, or revoke this one: make key NAME={name} REVOKE=1",
            )
        key = f"sk-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        _write(folder, {**known, digest: name})
        commands = [f"add map {folder / FILE} {digest} {name}"]
        commands += [] if known else [f"add map {folder / FILE} {_KEYED} yes"]
        try:
            _tell(folder, commands)
        except errors.ServeFailed:
            # Or the name would be taken by a key that nobody has seen.
            _write(folder, known)
            raise
    return key


def revoke(folder: Path, name: str) -> None:
    """Take a key back; running requests end as they would.

    Raises:
        SettingInvalid: there is none of that name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        known = _read(folder)
        gone = [digest for digest, owner in known.items() if owner == name]
        if not gone:
            raise errors.SettingInvalid(
                f"there is no key {name}",
                f"one of {', '.join(sorted(known.values())) or 'none: there is no key at all'}",
                "make keys lists them",
            )
        left = {digest: owner for digest, owner in known.items() if owner != name}
        _write(folder, left)
        _tell(folder, [f"del map {folder / FILE} {digest}" for digest in gone])
        if not left:
            _tell(folder, [f"del map {folder / FILE} {_KEYED}"])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, known: dict[str, str]) -> None:
    """Write the file whole, or not at all."""
    lines = [f"{digest} {name}\n" for digest, name in known.items()]
    lines += [f"{_KEYED} yes\n"] if known else []
    path = folder / f"{FILE}.new"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
    path.replace(folder / FILE)


def _tell(folder: Path, commands: list[str]) -> None:
    """Let the running gateway know; without one, the file is read at its next start.

    Raises:
        ServeFailed: it runs and does not take the change.
    """
    for command in commands:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            try:
                connection.connect(str(folder / SOCKET))
            except OSError:
                return
            try:
                connection.sendall(f"{command}\n".encode())
                answer = connection.makefile().read().strip()
            except OSError as error:
                answer = str(error)
        if answer:
            raise errors.ServeFailed(
                f"the gateway did not take the change: {answer}",
                "a gateway that knows the keys",
                "docker compose restart gateway (make down, make up on the host runtime)",
            )
