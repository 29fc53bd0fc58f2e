"""The real download, by its own environment, from real hubs with a layer of faults before them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from scripts import snapshot
from scripts.errors import SnapshotMissing
from tests.stacks import ROOT, Done, free_port, run, wait_for

MODEL_ID, REVISION = "tests/model", "v1"
MB = 1_000_000
# Above and below what is fetched first; random bytes, so that nothing compresses or repeats.
FILES = {
    "config.json": 300,
    "tokenizer/vocabulary.txt": 50_000,
    "model-00001-of-00003.safetensors": 40 * MB,
    "model-00002-of-00003.safetensors": 36 * MB,
    "model-00003-of-00003.safetensors": 5 * MB,
}
SHARD = "model-00001-of-00003.safetensors"
TOTAL = sum(FILES.values())
ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of images/download.lock, as the host runtime installs it."""
    venv = tmp_path_factory.mktemp("download") / "venv"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "scripts.install", "images/download.lock", str(venv)]
    run(*command, PATH=path).check()
    return str(venv / "bin" / "python")


def write_model(where: Path, seed: int = 0) -> None:
    """Write the model's files, their index among them."""
    for number, (name, size) in enumerate(FILES.items()):
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(1000 * seed + number, size))
    shards = [name for name in FILES if name.endswith(".safetensors")]
    weights = ", ".join(f'"w{number}": "{name}"' for number, name in enumerate(shards))
    (where / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')


def noise(seed: int, size: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


@dataclass
class Hub:
    """A hub with faults: its URL and the folder it serves."""

    url: str
    models: Path
    process: subprocess.Popen

    def fail(self, *faults: dict) -> None:
        """Set the faults, and forget what was sent."""
        requests.post(f"{self.url}/faults", json=faults, timeout=10).raise_for_status()

    def spans(self) -> dict[str, list[list[int]]]:
        """What was sent: for each file and request the first byte and the one after the last."""
        return requests.get(f"{self.url}/sent", timeout=10).json()["sent"]

    def sent(self, path: str = "") -> int:
        """Bytes sent, of one file or of all."""
        spans = self.spans()
        return sum(b - a for name in spans if path in ("", name) for a, b in spans[name])

    def asked(self) -> list[str]:
        return requests.get(f"{self.url}/sent", timeout=10).json()["requests"]

    def mark(self, revision: str = REVISION) -> None:
        body = {"model_id": MODEL_ID, "revision": revision}
        requests.post(f"{self.url}/mark", json=body, timeout=60).raise_for_status()

    @property
    def origin(self) -> Path:
        return snapshot.folder(self.models, MODEL_ID)


@contextlib.contextmanager
def started_hub(python: str, models: Path) -> Iterator[Hub]:
    port = free_port()
    command = [python, "-m", "tests.download.faulty", "--models", str(models), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    hub = Hub(f"http://127.0.0.1:{port}", models, process)
    try:
        wait_for(lambda: answers(hub.url), 30, "a hub")
        yield hub
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    return False


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("origin")
    where = snapshot.folder(models, MODEL_ID)
    write_model(where)
    snapshot.record(where, MODEL_ID, REVISION, "test")
    return models


@pytest.fixture(scope="session")
def shared_hub(python: str, served_models: Path) -> Iterator[Hub]:
    with started_hub(python, served_models) as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: Hub) -> Hub:
    """The hub, without faults."""
    shared_hub.fail()
    return shared_hub


@pytest.fixture
def second_hub(python: str, served_models: Path) -> Iterator[Hub]:
    """Another hub over the same files."""
    with started_hub(python, served_models) as hub:
        hub.fail()
        yield hub


@dataclass
class Job:
    """A download into a models folder of the test's own."""

    python: str
    models: Path
    caches: Path
    hub: Hub
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> Path:
        return snapshot.folder(self.models, MODEL_ID)

    def settings(self, **more: str) -> dict[str, str]:
        return {
            "MODELS_DIR": str(self.models),
            "CACHES_DIR": str(self.caches),
            "MODEL_ID": MODEL_ID,
            "MODEL_REVISION": REVISION,
            "MODEL_SOURCES": self.hub.url,
            "VARIANT": "cpu",
            **self.environ,
            **more,
        }

    def run(self, *arguments: str, timeout: float = 120, **more: str) -> Done:
        command = [self.python, "-m", "scripts.download", *arguments]
        return run(*command, timeout=timeout, **self.settings(**more))

    def start(self, log: Path, **more: str) -> subprocess.Popen:
        with log.open("w") as stream:
            return subprocess.Popen(
                [self.python, "-m", "scripts.download"],
                cwd=ROOT,
                env={**os.environ, **self.settings(**more)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def gate(self) -> bool:
        """Whether `serve` would start; then every byte must be the origin's."""
        try:
            found = snapshot.require(self.models, MODEL_ID, REVISION)
        except SnapshotMissing:
            return False
        origin = {p.relative_to(self.hub.origin) for p in snapshot.paths(self.hub.origin)}
        assert {p.relative_to(found) for p in found.rglob("*") if p.is_file()} == {
            *origin,
            Path(snapshot.MARKER),
        }
        for path in origin:
            same = (found / path).read_bytes() == (self.hub.origin / path).read_bytes()
            assert same, f"expected the gate shut, {path} differs from its origin"
        return True

    def partial(self) -> int:
        """Bytes of the model on the disk, complete or not."""
        marks = (snapshot.MARKER, ".snapshot.partial.json")
        files = [p for p in self.where.rglob("*") if p.is_file() and p.name not in marks]
        return sum(path.stat().st_size for path in files)


@pytest.fixture
def job(python: str, hub: Hub, tmp_path: Path) -> Job:
    return Job(python, tmp_path / "models", tmp_path / "caches", hub)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str, str, int], None]:
    """Note a line of the table of faults: fault, outcome for the user, bytes sent by the hub."""

    def note(fault: str, outcome: str, sent: int) -> None:
        rows = request.config.stash.setdefault(ROWS, [])
        rows.append((fault, outcome, f"{sent / MB:.1f} MB ({sent / TOTAL:.2f} × the model)"))

    return note


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> int:
    process.send_signal(number)
    return process.wait(timeout=20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("faults of a download")
        for fault, outcome, sent in rows:
            terminalreporter.line(f"| {fault} | {outcome} | {sent} |")
