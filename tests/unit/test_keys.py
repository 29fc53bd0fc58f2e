"""The file of keys: what is in it, what is not, and who is refused without one."""

import hashlib
import socket
import threading
from pathlib import Path

import pytest

from scripts import key, keys
from scripts.errors import ServeFailed, SettingInvalid
from scripts.settings import Settings


def lines(folder: Path) -> list[str]:
    return (folder / keys.FILE).read_text().splitlines()


def test_a_key_is_kept_as_its_hash_only(tmp_path: Path) -> None:
    made = keys.add(tmp_path, "alice")
    assert made.startswith("sk-") and len(made) >= 46
    digest = hashlib.sha256(made.encode()).hexdigest()
    assert lines(tmp_path) == [f"{digest} alice", "keyed yes"]
    for path in tmp_path.iterdir():
        assert made.removeprefix("sk-") not in path.read_text(), path
    assert keys.load(tmp_path) == {"alice": digest[:8]}


def test_no_two_keys_are_the_same(tmp_path: Path) -> None:
    assert len({keys.add(tmp_path, f"client-{number}") for number in range(20)}) == 20


def test_only_the_owner_reads_the_file(tmp_path: Path) -> None:
    keys.prepare(tmp_path)
    assert (tmp_path / keys.FILE).stat().st_mode & 0o777 == 0o600
    keys.add(tmp_path, "alice")
    assert (tmp_path / keys.FILE).stat().st_mode & 0o777 == 0o600


def test_keyed_is_there_only_while_a_key_is(tmp_path: Path) -> None:
    keys.prepare(tmp_path)
    assert lines(tmp_path) == []
    for name in ("alice", "bob"):
        keys.add(tmp_path, name)
    assert lines(tmp_path)[2:] == ["keyed yes"]
    keys.revoke(tmp_path, "alice")
    assert "keyed yes" in lines(tmp_path)
    assert list(keys.load(tmp_path)) == ["bob"]
    keys.revoke(tmp_path, "bob")
    assert lines(tmp_path) == []
    assert keys.load(tmp_path) == {}


def test_prepare_keeps_the_keys_that_are_there(tmp_path: Path) -> None:
    keys.add(tmp_path, "alice")
    before = lines(tmp_path)
    keys.prepare(tmp_path)
    assert lines(tmp_path) == before


def test_a_name_is_given_once(tmp_path: Path) -> None:
    keys.add(tmp_path, "alice")
    before = lines(tmp_path)
    with pytest.raises(SettingInvalid, match="make key NAME=alice REVOKE=1"):
        keys.add(tmp_path, "alice")
    assert lines(tmp_path) == before


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", ".", "a\nb", "ä", "a;b", "a" * 64, "../a"])
def test_a_name_that_would_break_the_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingInvalid, match="letters, digits"):
        keys.add(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_not_revoked_and_the_known_ones_are_told(tmp_path: Path) -> None:
    keys.add(tmp_path, "alice")
    with pytest.raises(SettingInvalid, match="one of alice"):
        keys.revoke(tmp_path, "bob")


def test_a_client_may_be_called_keyed(tmp_path: Path) -> None:
    keys.add(tmp_path, "keyed")
    assert list(keys.load(tmp_path)) == ["keyed"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_other_hosts_are_not_let_in_without_a_key(host: str) -> None:
    settings = Settings.from_environ({"HOST": host})
    with pytest.raises(SettingInvalid, match="there is no key") as refusal:
        keys.require(settings, any_key=False)
    assert "make key NAME=alice" in str(refusal.value)
    keys.require(settings, any_key=True)


def test_this_host_is_let_in_without_a_key() -> None:
    keys.require(Settings.from_environ({}), any_key=False)
    keys.require(Settings.from_environ({"HOST": "::1"}), any_key=False)


class Admin:
    """HAProxy's admin socket: keeps what it is told, and answers with `answer`."""

    def __init__(self, folder: Path, answer: str = "") -> None:
        self.told: list[str] = []
        self.answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / keys.SOCKET))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                self.told.append(connection.recv(4096).decode().rstrip("\n"))
                connection.sendall(f"{self.answer}\n".encode())


def test_the_running_gateway_is_told_of_every_change(tmp_path: Path) -> None:
    admin = Admin(tmp_path)
    made = keys.add(tmp_path, "alice")
    digest = hashlib.sha256(made.encode()).hexdigest()
    file = tmp_path / keys.FILE
    assert admin.told == [f"add map {file} {digest} alice", f"add map {file} keyed yes"]
    keys.add(tmp_path, "bob")
    keys.revoke(tmp_path, "alice")
    assert admin.told[3:] == [f"del map {file} {digest}"]
    keys.revoke(tmp_path, "bob")
    assert admin.told[-1] == f"del map {file} keyed"


def test_a_gateway_that_does_not_take_a_change_is_told_of(tmp_path: Path) -> None:
    Admin(tmp_path, "Unknown map identifier.")
    with pytest.raises(ServeFailed, match="Unknown map identifier"):
        keys.add(tmp_path, "alice")


def test_a_socket_that_a_dead_gateway_has_left_does_no_harm(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / keys.SOCKET))
    assert keys.add(tmp_path, "alice")


def test_the_command_prints_the_key_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KEYS_DIR", str(tmp_path))
    assert key.main(["add", "alice"]) == 0
    made, hint = capsys.readouterr()
    assert made.startswith("sk-") and made.count("\n") == 1
    assert "shown once" in hint
    assert key.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("alice") and made.strip() not in listed
    assert key.main(["revoke", "alice"]) == 0
    assert keys.load(tmp_path) == {}
