"""Running commands and stacks in tests; a failure shows what was expected and the last lines."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Done:
    """A finished command: its code and everything it printed."""

    command: tuple[str, ...]
    returncode: int
    output: str

    def check(self, code: int = 0) -> "Done":
        assert self.returncode == code, self.explain(f"code {code}")
        return self

    def explain(self, expected: str) -> str:
        tail = "\n".join(self.output.splitlines()[-40:])
        command = " ".join(self.command)
        return f"`{command}` expected {expected}, ended with {self.returncode}; last lines:\n{tail}"

    def says(self, *texts: str) -> "Done":
        for text in texts:
            assert text in self.output, self.explain(f"{text!r} in its output")
        return self


def run(*command: str, timeout: float = 900, **environ: str) -> Done:
    """Run a command in the repository's root; standard output and error come back as one."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Done(command, done.returncode, done.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Stack:
    """A running stack: its URL, and the environment in which commands reach it."""

    url: str
    environ: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, timeout: float = 900, **environ: str) -> Done:
        return run(*command, timeout=timeout, **{**self.environ, **environ})

    def compose(self, *arguments: str, **environ: str) -> Done:
        return self.run("docker", "compose", "--env-file", "rehearsal.env", *arguments, **environ)


def wait_for(
    condition: Callable[[], object],
    seconds: float,
    what: str,
    tell: Callable[[], str] = lambda: "",
) -> None:
    """Wait until a condition holds; fail with what was awaited and what `tell` has to say."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"expected {what} within {seconds} s; {tell()}"
        time.sleep(0.5)
