"""A stack of two replicas behind the gateway, by `make up`, and load on it from Locust."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.stacks import ROOT, Done, Stack, free_port, run, wait_for

READY_SECONDS = 180


@dataclasses.dataclass
class Outcomes:
    """What became of the requests of one load."""

    lines: list[dict]
    retried: int

    @property
    def done(self) -> list[dict]:
        return [line for line in self.lines if line["done"]]

    @property
    def broken(self) -> list[dict]:
        """Streams that had begun and did not end as they should."""
        return [line for line in self.lines if line["begun"] and not line["done"]]

    @property
    def failed(self) -> list[dict]:
        """What had not begun to answer, and failed: what a second replica is there to prevent."""
        return [line for line in self.lines if not line["begun"] and not line["done"]]

    def __str__(self) -> str:
        streams = sum(line["stream"] for line in self.lines)
        slowest = max((line["seconds"] for line in self.lines), default=0)
        return (
            f"{len(self.lines)} requests ({streams} streams), {len(self.done)} completed,"
            f" {len(self.failed)} failed, {len(self.broken)} begun streams broken,"
            f" {self.retried} given to another replica, slowest {slowest:.1f} s"
        )


@dataclasses.dataclass
class Gateway(Stack):
    """The stack, and what the tests do to it."""

    def serve(self, *command: str) -> Done:
        """Run a command in the serve container."""
        return self.compose("exec", "-T", "serve", *command)

    def gateway_log(self) -> str:
        return self.compose("logs", "--no-log-prefix", "gateway").output

    def health(self) -> str:
        return self.serve("python", "-m", "scripts.health").output.strip()

    def wait_whole(self) -> None:
        """Wait until every replica is ready, for the gateway too."""
        wait_for(
            lambda: "2 of 2 replicas" in self.health(),
            READY_SECONDS,
            "two ready replicas",
            lambda: self.health() + "\n" + self.compose("logs", "--tail", "40", "serve").output,
        )
        wait_for(lambda: self.servers_up() == 2, 10, "two servers that are up", self.gateway_log)

    def metrics(self, path: str = "/metrics") -> str:
        script = (
            "import urllib.request as u;"
            f" print(u.urlopen('http://127.0.0.1:9090{path}', timeout=10).read().decode())"
        )
        return self.compose("exec", "-T", "gateway", "python3", "-c", script).check().output

    def servers_up(self) -> int:
        found = re.findall(
            r'^haproxy_server_status\{proxy="replicas",server="r\d+",state="UP"\} (\d)',
            self.metrics(),
            re.M,
        )
        return found.count("1")

    def kill(self, what: str, signal: str = "KILL") -> None:
        """Send a signal to a process inside, found by what its command line contains."""
        script = f"""
import os, signal
from pathlib import Path
for path in sorted(Path('/proc').glob('[0-9]*'), key=lambda path: int(path.name)):
    try: words = (path / 'cmdline').read_bytes().replace(b'\\0', b' ').decode()
    except OSError: continue
    if {what!r} in words and int(path.name) != os.getpid():
        os.kill(int(path.name), signal.SIG{signal}); print('sent to', path.name, words[:80]); break
else: raise SystemExit('no such process')
"""
        print(self.serve("python", "-c", script).check().output.strip())

    @contextlib.contextmanager
    def load(
        self, folder: Path, seconds: int, users: int = 8, **environ: str
    ) -> Iterator[Callable[[], Outcomes]]:
        """Run Locust for so long; yields what waits for its end and returns the outcomes."""
        file = folder / f"outcomes-{uuid.uuid4().hex[:6]}.jsonl"
        before = self.retries()
        command = [sys.executable, "-m", "locust", "-f", "tests/gateway/load.py", "--headless"]
        command += ["--users", str(users), "--spawn-rate", "50", "--host", self.url]
        command += ["--run-time", f"{seconds}s", "--stop-timeout", "90", "--only-summary"]
        log = file.with_suffix(".log").open("w")
        process = subprocess.Popen(
            [*command, "--exit-code-on-error", "0"],
            cwd=ROOT,
            env={**os.environ, "OUTCOMES": str(file), **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

        def end() -> Outcomes:
            process.wait(timeout=seconds + 150)
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert lines, Path(log.name).read_text()[-3000:]
            return Outcomes(lines, self.retries() - before)

        try:
            wait_for(
                lambda: file.exists() and file.read_text().count("\n") > 10, 60, "some answers"
            )
            yield end
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=30)
            log.close()

    def accepted(self) -> list[str]:
        """Return the gateway's lines of all chats so far that it let in."""
        return re.findall(r"^gateway: .* POST /v1/chat/completions .*$", self.gateway_log(), re.M)

    def retries(self) -> int:
        """Requests so far that the gateway has given to a second replica."""
        return len([line for line in self.accepted() if re.search(r" retries=\+?[1-9]", line)])

    def ask(self, **more: object) -> requests.Response:
        body = {"model": "glm-4-9b-chat", "prompt": "你好", "max_tokens": 4, "temperature": 0}
        return requests.post(f"{self.url}/v1/completions", json={**body, **more}, timeout=120)


@pytest.fixture(scope="session")
def gateway(images: Done) -> Iterator[Gateway]:
    """Two replicas, brought up as the README says."""
    project = f"glm4-test-{uuid.uuid4().hex[:8]}"
    port = free_port()
    environ = {
        "COMPOSE_PROJECT_NAME": project,
        "PORT": str(port),
        "REPLICAS": "2",
        # A hang is noticed after so long without a token, and as long again for the probe.
        "HANG_SECONDS": "5",
        "QUEUE_LENGTH": "16",
        "QUEUE_SECONDS": "20",
        "LOG_FORMAT": "text",
    }
    stack = Gateway(f"http://127.0.0.1:{port}", environ)
    try:
        begun = time.monotonic()
        stack.run("make", "up", CUDA="cpu", RUNTIME="docker").check()
        stack.wait_whole()
        print(f"two replicas after {time.monotonic() - begun:.0f} s")
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")
        run("docker", "network", "prune", "--force")
