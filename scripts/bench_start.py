"""Measure how long a start takes until its first token, cold and warm, and where the time goes.

What is started is what the serve container runs, scripts.supervise. A cold start finds an empty
caches folder, a warm one what a cold one left there. The page cache of the model's files is not
dropped, which a container cannot do: a first start after a boot reads them from the disk, too. What
Docker takes to make a container comes on top.
"""

import argparse
import collections
import contextlib
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scripts import errors, report
from scripts.settings import Settings

# In this order, each phase and the line that ends it; of several such lines (one a GPU) the last.
# A phase whose line does not come is part of the next one. vLLM's lines are those of 0.6.3 (V0:
# entrypoints/openai/api_server.py, engine/llm_engine.py, worker/model_runner.py,
# executor/gpu_executor.py), 0.10.1 and 0.32 (V1: entrypoints, engine/core.py,
# worker/{gpu,cpu}_model_runner.py, worker/gpu/model_runner.py, core/kv_cache_utils.py).
_ENDS = (
    # Our own checks, and supervisor.
    ("container", r"^serve: "),
    ("imports", r"vLLM (?:API )?server version \d|[█▀]\S* +version \S*\d"),
    # The model's configuration, a second process, and its imports.
    ("engine process", r"Initializing an? (?:V\d )?LLM engine \(v"),
    ("engine", r"Starting to load model|Loading model from scratch"),
    ("weights", r"Loading (?:model )?weights took|Model loading took"),
    ("compile and profile", r"\bKV cache size: |# \w+ blocks: \d"),
    # With the kernels that are tuned or compiled before it.
    ("CUDA graphs", r"Graph capturing finished in"),
)
# These end with what is seen from outside: /health, the agent, a client's first token.
_OUTSIDE = ("server", "ready", "first token")
# Seconds that vLLM prints itself; they overlap each other and the phases.
_SAYS = {
    "weights": r"Loading weights took ([\d.]+) s",
    "model loading": r"Model loading took .* and ([\d.]+) s",
    "torch.compile": r"torch\.compile (?:takes|took) ([\d.]+) s",
    "profiling run": r"Initial profiling/warmup run took ([\d.]+) s",
    "graph capture": r"Graph capturing finished in ([\d.]+) s",
    "engine initialisation": r"init engine .* took ([\d.]+) s",
}
# Supervisor would start vLLM again, and two starts would pass for one.
_LOST = re.compile(r"exited: vllm|entered FATAL state")
_POLL_SECONDS = 0.05
# Beyond the drain time and supervisor's hard end; and for a start that nobody waits for any more,
# within the ten seconds that Docker leaves.
_MARGIN_SECONDS, _HURRY_SECONDS = 20, 5
# Of a Unix socket's path, 108 bytes, supervisor takes 30 at most beyond its folder.
_LONGEST_FOLDER = 75
_NOTE = (
    "The page cache of the model's files is not dropped before a start: a container cannot. Cold"
    " means an empty caches folder. What Docker takes to make a container comes on top."
)
# Signals that have arrived. Nothing is raised where they arrive, so that no cleaning up is cut off.
_told: list[int] = []


class Log:
    """What a start has printed: when its phases ended, what vLLM says itself, the last lines."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = collections.defaultdict(list)
        self.says: dict[str, float] = {}
        self.last: collections.deque[str] = collections.deque(maxlen=40)
        self.command = ""
        self.lost = False

    def add(self, seconds: float, line: str) -> None:
        """Take one line, and when it came."""
        for name, pattern in _ENDS:
            if re.search(pattern, line):
                self.ends[name].append(seconds)
        for name, pattern in _SAYS.items():
            if found := re.search(pattern, line):
                self.says[name] = float(found[1])
        if line.startswith("serve: "):
            self.command = line.removeprefix("serve: ").rstrip()
        self.lost = self.lost or bool(_LOST.search(line))
        # A progress bar writes over itself.
        if shown := line.rstrip().rsplit("\r", 1)[-1]:
            self.last.append(shown)

    def phases(self, health: float, ready: float, first_token: float) -> dict[str, float]:
        """Return the seconds of each phase; their sum is `first_token`."""
        ends = {
            name: seen[-1]
            for name, _ in _ENDS
            if (seen := [seconds for seconds in self.ends[name] if seconds <= health])
        }
        result, before = {}, 0.0
        for name, end in [*ends.items(), *zip(_OUTSIDE, (health, ready, first_token), strict=True)]:
            result[name] = round(max(end - before, 0.0), 3)
            before = max(before, end)
        return result


class Start:
    """One start: a child, what it prints, and the seconds since it was started."""

    def __init__(
        self, name: str, command: list[str], environ: dict[str, str], limit: float
    ) -> None:
        self.name, self.limit, self.run = name, limit, Path(environ["RUN_DIR"])
        self.log = Log()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal must not reach it by two ways.
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def _read(self, stream: IO[bytes]) -> None:
        for raw in stream:
            self.log.add(self.seconds, raw.decode(errors="replace"))

    def until(self, what: str, done: Callable[[], object]) -> float:
        """Wait for something, and return the seconds since the start.

        Raises:
            ServeFailed: the child or its vLLM ended, or the limit is over.
            KeyboardInterrupt, Terminated: a signal has arrived.
        """
        while not done():
            if _told:
                raise KeyboardInterrupt if _told[0] == signal.SIGINT else errors.Terminated
            code = self.process.poll()
            if code is not None:
                raise self.failed(f"scripts.supervise ended with code {code} before {what}")
            if self.log.lost:
                raise self.failed(f"vLLM ended before {what}")
            if self.seconds > self.limit:
                raise self.failed(f"{self.limit:.0f} s are over before {what}")
            time.sleep(_POLL_SECONDS)
        return self.seconds

    def first_token(self, url: str, model: str) -> float:
        """Ask for a stream, and return the seconds until the first of it that is a token."""
        found: list[float | Exception] = []

        def ask() -> None:
            try:
                with _open(f"{url}/v1/completions", _body(model), self.limit) as response:
                    tokens = [self.seconds for line in response if _is_token(line)]
                found.append(tokens[0] if tokens else ValueError("it brought no token"))
            except (OSError, ValueError, http.client.HTTPException) as error:
                found.append(error)

        # Meanwhile the child may end.
        threading.Thread(target=ask, daemon=True).start()
        self.until("a first token comes", lambda: found)
        if isinstance(found[0], Exception):
            raise self.failed(f"the first request failed: {found[0]}")
        return found[0]

    def failed(self, found: str) -> errors.ServeFailed:
        """Return the error that shows the last lines."""
        # The last ones may be on their way, and other processes may hold the pipe open.
        self.reader.join(1)
        lines = "\n  ".join(self.log.last)
        return errors.ServeFailed(
            f"{self.name}: {found}; its last lines:\n  {lines}",
            "a start that answers",
            "mend what these lines tell, until `make up` (docker compose up -d --wait) is ready",
        )

    def end(self, patience: float) -> None:
        """Send SIGTERM; kill what is left after `patience` seconds, or when a signal arrives."""
        # Supervisord has a session of its own, which vLLM and its processes share.
        sessions = {self.process.pid}
        with contextlib.suppress(OSError, ValueError):
            sessions.add(int((self.run / "supervisord.pid").read_text()))
        self.process.terminate()
        began = time.monotonic()
        while left := _processes(sessions):
            waited = time.monotonic() - began
            if waited > (min(patience, _HURRY_SECONDS) if _told else patience):
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if waited > patience + _HURRY_SECONDS:
                # It hangs in the kernel, for one.
                return
            self.process.poll()
            time.sleep(_POLL_SECONDS)


def _processes(sessions: set[int]) -> list[int]:
    """Return the processes of these sessions that still live (proc(5), /proc/pid/stat)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # It may have ended meanwhile.
        with contextlib.suppress(OSError):
            state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(int(entry.parent.name))
    return found


def _open(url: str, body: dict | None, timeout: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    # A proxy of the environment is never the way to this very machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout)


def _healthy(url: str) -> bool:
    try:
        with _open(f"{url}/health", None, 5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _ready(port: int) -> bool:
    """Ask scripts/agent.py as the gateway does: ready is who has answered one completion."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"0\n")
            return connection.makefile().readline().startswith("ready up")
    except OSError:
        return False


def _body(model: str) -> dict:
    return {"model": model, "prompt": "Hi", "max_tokens": 2, "stream": True}


def _is_token(line: bytes) -> bool:
    # Its text may be empty, when it is half a character.
    return line.startswith(b"data: {") and bool(json.loads(line[6:]).get("choices"))


def _free_ports(count: int) -> list[int]:
    # All at once, or two may be the same.
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def _run_folder(settings: Settings) -> Iterator[Path]:
    """Make a folder for sockets whose path is short enough, and remove it."""
    settings.run.mkdir(parents=True, exist_ok=True)
    parent = settings.run if len(os.fsencode(settings.run)) < _LONGEST_FOLDER - 16 else None
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir=parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


@contextlib.contextmanager
def _caches_folder(settings: Settings) -> Iterator[Path]:
    """Name a caches folder of our own, and remove it, with those of runs that were killed.

    Raises:
        ServeFailed: another run uses the same caches.
        VolumeUnwritable: nothing can be made there.
    """
    parent = settings.caches
    own = parent / f"bench-start-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        alone = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(alone)
            raise errors.ServeFailed(
                f"another bench-start works in {parent}",
                "a machine for itself, or both would be slower",
                "wait until it has ended",
            ) from None
        for left in parent.glob("bench-start-*"):
            shutil.rmtree(left)
        own.mkdir()
    except OSError as error:
        raise errors.VolumeUnwritable(
            f"{parent} cannot be used: {error}",
            "a caches folder that this user may write to",
            "give it to this user (in Docker uid 10001), or remove the volume",
        ) from error
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(alone)


def measure(name: str, settings: Settings, caches: Path, limit: float) -> dict[str, object]:
    """Start once, and return the seconds until each step, and of each phase.

    Raises:
        ServeFailed: it ended, or took longer than `limit` seconds.
    """
    port, agent_port = _free_ports(2)
    url = f"http://127.0.0.1:{port}"
    with _run_folder(settings) as run:
        environ = {
            **os.environ,
            "RUN_DIR": str(run),
            "CACHES_DIR": str(caches),
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "REPLICA_HOST": "127.0.0.1",
            "REPLICA_PORT": str(port),
            "AGENT_PORT": str(agent_port),
            "REPLICAS": "1",
        }
        start = Start(name, [sys.executable, "-m", "scripts.supervise"], environ, limit)
        patience: float = _HURRY_SECONDS
        try:
            health = start.until("/health answers", lambda: _healthy(url))
            ready = start.until("it is ready", lambda: _ready(agent_port))
            first_token = start.first_token(url, settings.served_model_name)
            patience = settings.drain_seconds + _MARGIN_SECONDS
        finally:
            start.end(patience)
    return {
        "phases": start.log.phases(health, ready, first_token),
        "health": round(health, 3),
        "ready": round(ready, 3),
        "first_token": round(first_token, 3),
        "seconds": round(first_token, 3),
        "vllm_says": start.log.says,
        "command": start.log.command,
    }


def _all(settings: Settings, cold: int, warm: int, limit: float) -> list[dict]:
    starts = []
    with _caches_folder(settings) as caches:
        for kind, count in (("cold", cold), ("warm", warm)):
            for number in range(1, count + 1):
                name = f"{kind} {number}"
                if kind == "cold":
                    shutil.rmtree(caches)
                    caches.mkdir()
                print(f"bench-start: {name} …", file=sys.stderr, flush=True)
                start = {"name": name, "kind": kind, **measure(name, settings, caches, limit)}
                print(
                    f"bench-start: {name}: first token after {start['first_token']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                starts.append(start)
    return starts


def median(starts: list[dict], kind: str) -> dict:
    """Return the medians of all starts of a kind, in the form of one."""

    def of(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    own = [start for start in starts if start["kind"] == kind]
    # A line that came in one start only would be a time of nobody.
    names = [name for name in own[0]["phases"] if all(name in start["phases"] for start in own)]
    whole = {step: of([start[step] for start in own]) for step in ("health", "ready")}
    return {
        "phases": {name: of([start["phases"][name] for start in own]) for name in names},
        **whole,
        "first_token": of([start["first_token"] for start in own]),
    }


def table(rows: list[tuple[str, dict]]) -> str:
    """Return a table of starts: the seconds of each phase, until ready, until the first token."""
    order = [*(name for name, _ in _ENDS), *_OUTSIDE]
    names = [name for name in order if any(name in start["phases"] for _, start in rows)]

    def cell(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds:.2f}"

    return report.table(
        ["start, seconds", *names, "until ready", "until first token"],
        [
            [
                name,
                *(cell(start["phases"].get(phase)) for phase in names),
                cell(start["ready"]),
                cell(start["first_token"]),
            ]
            for name, start in rows
        ],
    )


def _weights(settings: Settings) -> str:
    words = " ".join(settings.vllm_args).replace("=", " ").replace("load_format", "load-format")
    return "dummy" if "--load-format dummy" in words else "files"


def _at_least(low: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {low} on is needed")
        return int(text)

    return count


def main(argv: list[str] | None = None) -> int:
    """Start again and again; print a table, and on standard output the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cold", type=_at_least(1), default=1, help="starts with empty caches")
    parser.add_argument("--warm", type=_at_least(0), default=2, help="starts with its caches")
    parser.add_argument("--limit", type=_at_least(1), default=1800, help="seconds a start may take")
    options = parser.parse_args(argv)
    output = report.claim_output()
    settings = Settings.from_environ()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _told.append(number))

    starts = _all(settings, options.cold, options.warm, options.limit)
    commands = [start.pop("command") for start in starts]
    used = {**vars(options), "weights": _weights(settings), "command": commands[0]}
    found = {
        **report.document("bench-start", settings, starts=starts, note=_NOTE),
        "settings": used,
    }
    rows = [(start["name"], start) for start in starts]
    ratio = ""
    if options.warm:
        found["warm_median"] = median(starts, "warm")
        cold = median(starts, "cold")["first_token"]
        found["warm_of_cold"] = round(found["warm_median"]["first_token"] / cold, 3)
        rows.append(("median of warm", found["warm_median"]))
        ratio = f"\nwarm start to first token is {found['warm_of_cold']:.2f} of the cold one"
    weights = "random weights" if used["weights"] == "dummy" else "weights from files"
    print(f"\n{report.title(found)}; {weights}\n\n{table(rows)}\n{ratio}", file=sys.stderr)
    report.write(output, found)
    return 0


if __name__ == "__main__":
    errors.run(main)
