"""An index that does not answer ends in one message, in time; and what is pruned goes."""

import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import bound, errors, install, pins
from tests.stacks import ROOT, Done, run

TORCH = pins.Pin(
    "torch @ https://download.pytorch.org/whl/cu118/torch-2.7.1-cp311-cp311-linux_x86_64.whl",
    "torch",
    "",
    "https://download.pytorch.org/whl/cu118/torch-2.7.1-cp311-cp311-linux_x86_64.whl",
)
ORDINARY = pins.Pin("six==1.16.0", "six", "1.16.0", "")


@pytest.fixture
def answers() -> Iterator[str]:
    """A host that answers, with 404 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def refused(pin: pins.Pin, **environ: str) -> str:
    begin = time.monotonic()
    with pytest.raises(errors.BuildFailed) as caught:
        pins.require_reach([pin], [], environ)
    assert time.monotonic() - begin < 60
    return str(caught.value)


@pytest.mark.parametrize("place", ["closed", "silent"])
def test_a_dead_place_is_named_with_both_ways_out(
    place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pins._PROBE_SECONDS <= 20
    monkeypatch.setattr(pins, "_PROBE_SECONDS", 2)
    url = request.getfixturevalue(place)
    text = refused(TORCH, PYTORCH_INDEX_URL=url)
    for part in (f"{url}/cu118/torch-2.7.1", "PYTORCH_INDEX_URL", "docker/wheels/", "WHEELS"):
        assert part in text
    text = refused(ORDINARY, PIP_INDEX_URL=f"{url}/simple")
    for part in (f"{url}/simple", "PIP_INDEX_URL", "docker/wheels/"):
        assert part in text


def test_a_password_of_an_index_is_not_printed(closed: str) -> None:
    text = refused(ORDINARY, PIP_INDEX_URL=closed.replace("//", "//user:secret@"))
    assert "secret" not in text and closed in text


def test_an_index_may_refuse_its_bare_root_but_a_wheel_must_be_there(answers: str) -> None:
    pins.require_reach([ORDINARY], [], {"PIP_INDEX_URL": answers})
    assert "answers with 404" in refused(TORCH, PYTORCH_INDEX_URL=answers)


def test_a_folder_that_has_every_wheel_needs_no_host(tmp_path: Path, closed: str) -> None:
    for pin in (TORCH, ORDINARY):
        (tmp_path / (pins.wheel_name(pin.url) or "six-1.16.0-py2.py3-none-any.whl")).touch()
    environ = {"PYTORCH_INDEX_URL": closed, "PIP_INDEX_URL": closed}
    pins.require_reach([TORCH, ORDINARY], [tmp_path], environ)


def test_a_wheel_named_by_url_is_installed_from_a_folder_and_its_hash_is_checked(
    tmp_path: Path, closed: str
) -> None:
    python = str(ROOT / ".venv/bin/python")
    house = tmp_path / "house"
    fetch = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(house)]
    run(*fetch, "--only-binary=:all:", "six==1.16.0").check()
    [wheel] = house.iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    # Out of reach: only the folder can have it.
    url = f"{closed}/{wheel.name}#sha256={digest}"

    def install(digest: str, name: str) -> Done:
        lock = tmp_path / "a.lock"
        lock.write_text(f"six @ {url} \\\n    --hash=sha256:{digest}\n", encoding="utf-8")
        arguments = [str(lock), str(tmp_path / name), "--wheels", str(house)]
        return run(python, "-m", "scripts.install", *arguments)

    install(digest, "good").check()
    run(str(tmp_path / "good/bin/python"), "-c", "import six; print(six.__version__)").says(
        "1.16.0"
    )
    wheel.write_bytes(wheel.read_bytes() + b" ")
    install(digest, "bad").check(11).says("error: the wheels that", "could not be installed")


def test_pruning_takes_what_is_listed_and_leaves_the_rest(tmp_path: Path, capsys) -> None:
    site, table = tmp_path / "site", tmp_path / "prune.toml"
    for name in ("a/lib/libx.a", "a/lib/libx.so", "a/tests/test_x.py", "b/include/x.h"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(b"x" * 2_000_000)
    table.write_text('[remove]\n"**/*.a" = "why"\n"**/tests" = "why"\n"no/such" = "why"\n[strip]\n')
    install._prune(site, table)
    left = sorted(path.name for path in site.rglob("*") if path.is_file())
    assert left == ["libx.so", "x.h"]
    assert "0.01 GB as installed, 0.00 GB kept" in capsys.readouterr().out


def test_a_port_bound_on_every_interface_is_kept_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket.socket, "bind", socket.socket.bind)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bound._keep_to("127.0.0.1", port)
    with socket.socket() as kept, socket.socket() as other:
        kept.bind(("", port))
        assert kept.getsockname() == ("127.0.0.1", port)
        other.bind(("", 0))
        assert other.getsockname()[0] == "0.0.0.0"
