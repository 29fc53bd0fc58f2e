"""An image's real entry point on a GPU, in Docker or an unpacked root, with GLM-4-9B's shape."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from scripts import rehearsal, snapshot
from tests.gpu.root import environment
from tests.stacks import Done, free_port, run

MODEL_ID, REVISION = "ZhipuAI/glm-4-9b-chat", "master"
# https://modelscope.cn/models/ZhipuAI/glm-4-9b-chat, config.json
SHAPE = {
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_layers": 40,
    "rope_ratio": 500,
}
# The bytes of its ten shards. A hole of that size: vLLM reads none of it, scripts/fit.py its size.
WEIGHTS = 18_800_000_000
READY_SECONDS = 600


def write_model(models: Path) -> None:
    """Write a snapshot of GLM-4-9B's shape, with a tokenizer of its size and a hole for weights."""
    where = snapshot.folder(models, MODEL_ID)
    where.mkdir(parents=True, exist_ok=True)
    for name, document in rehearsal.documents().items():
        if name == "config.json":
            document = {**document, **SHAPE}
        if name == "tokenizer.json":
            # The rehearsal's has bytes and special tokens only. vLLM 0.6 dies of a token id that
            # has no token, which random weights choose.
            vocabulary = document["model"]["vocab"]
            first_special = min(token["id"] for token in document["added_tokens"])
            free = set(range(first_special)) - set(vocabulary.values())
            vocabulary |= {f"<{number}>": number for number in free}
        (where / name).write_text(json.dumps(document), encoding="utf-8")
    weights = where / "model.safetensors"
    weights.unlink(missing_ok=True)
    done = snapshot.record(where, MODEL_ID, REVISION, "tests.gpu")
    with weights.open("wb") as stream:
        stream.truncate(WEIGHTS)
    # Not hashed: 19 GB of nothing would take a minute of a borrowed GPU.
    journal = snapshot.Journal.read(where)
    file = snapshot.ModelFile(weights.name, WEIGHTS, "0" * 64)
    journal.add(file, weights.stat().st_mtime_ns)
    snapshot.mark(where, replace(done, files=(*done.files, file)), journal)


@dataclass
class Server:
    """A started entry point: its URL, its process, its log, and how long it took to be ready."""

    url: str
    process: subprocess.Popen
    log: Path
    seconds: float = 0.0

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait(self) -> None:
        """Wait for /health; tell a server that ended from one that is late."""
        begin = time.monotonic()
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    self.seconds = time.monotonic() - begin
                    return
            code = self.process.poll()
            assert code is None, f"expected a server, it ended with {code}; its log:\n{self.tail()}"
            # Supervisor would try again for minutes.
            text = self.log.read_text(errors="replace")
            lost = re.search("exited: vllm|FATAL state", text)
            assert not lost, f"expected a server, vLLM ended; its log:\n{self.tail(200)}"
            late = time.monotonic() - begin > READY_SECONDS
            assert not late, f"expected /health within {READY_SECONDS} s; its log:\n{self.tail()}"
            time.sleep(0.2)

    def stop(self) -> int:
        """Send SIGTERM and return the code; kill the group if it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(timeout=10)


def settings(port: int, more: dict[str, str]) -> dict[str, str]:
    """Return what an operator would set for this run."""
    return {
        "MODEL_ID": MODEL_ID,
        "MODEL_REVISION": REVISION,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "MAX_MODEL_LEN": "8192",
        "TRUST_REMOTE_CODE": "0",
        "VLLM_ARGS": "--load-format dummy",
        **more,
    }


@contextlib.contextmanager
def in_root(root: Path) -> Iterator[None]:
    """Mount what a container has besides its own files, for as long as it is needed."""
    places = ["proc", "dev", "sys", "dev/shm"]
    for place in places:
        (root / place).mkdir(exist_ok=True)
        run("mount", "--rbind", f"/{place}", str(root / place)).check()
        # Or taking it down again would take down this machine's own.
        run("mount", "--make-rslave", str(root / place)).check()
    try:
        yield
    finally:
        for place in reversed(places):
            run("umount", "--lazy", str(root / place))


HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--init")
# Runs a file with the environment that vLLM gets; its own folder is not the program's.
AS_VLLM = """
import os, sys
from scripts import dialect
from scripts.settings import Settings
environment = dialect.environment(Settings.from_environ(), os.environ)
os.execve(sys.executable, ["python", *sys.argv[1:]], environment)
"""


def inside(root: Path, values: dict[str, str], *program: str) -> list[str]:
    """Return the command that runs a program in an unpacked root, as its image would."""
    values = {**environment(root), "HOME": "/home/stack", **values}
    pairs = [f"{name}={value}" for name, value in values.items()]
    chroot = ["chroot", "--userspec=10001:10001", str(root), "/usr/bin/env", "-i", *pairs]
    return [*chroot, "sh", "-c", 'cd /app && exec "$@"', "sh", *program]


def command(root: Path | None, image: str, port: int, models: Path, more: dict[str, str]) -> list:
    """Return the command that runs the entry point, in an unpacked root or in Docker."""
    if root:
        words = ["--gateway"] if "AGENT_PORT" in more else []
        return inside(root, settings(port, more), "python", "-m", "scripts.supervise", *words)
    values = settings(8000, {**more, "HOST": "0.0.0.0"})
    pairs = [word for name, value in values.items() for word in ("--env", f"{name}={value}")]
    places = ["--tmpfs=/tmp", "--tmpfs=/run/stack:uid=10001,gid=10001", "--shm-size=2g"]
    places += [f"--volume={models}:/models:ro", "--volume=glm4-test-caches:/caches"]
    publish = f"--publish=127.0.0.1:{port}:8000"
    return ["docker", "run", "--rm", "--gpus=all", publish, *HARDENED, *places, *pairs, image]


def run_file(root: Path | None, image: str, file: Path, *arguments: str) -> Done:
    """Run a Python file inside the image, with vLLM's environment."""
    if root:
        shutil.copy(file, root / "tmp" / file.name)
        words = ["python", "-c", AS_VLLM, f"/tmp/{file.name}", *arguments]
        return run(*inside(root, {}, *words), timeout=300)
    places = ["--tmpfs=/tmp", "--volume=glm4-test-caches:/caches", f"--volume={file}:/file.py:ro"]
    options = ["--rm", "--gpus=all", *HARDENED, *places, "--entrypoint=python"]
    words = ["-c", AS_VLLM, "/file.py", *arguments]
    return run("docker", "run", *options, image, *words, timeout=300)


@contextlib.contextmanager
def served(root: Path | None, image: str, models: Path, log: Path, **more: str) -> Iterator[Server]:
    """Start the entry point, yield it without waiting, and end it."""
    port = free_port()
    with log.open("w") as stream:
        # supervisord opens its standard output anew, as the image's user.
        log.chmod(0o666)
        process = subprocess.Popen(
            command(root, image, port, models, more),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        yield server
    finally:
        server.stop()
