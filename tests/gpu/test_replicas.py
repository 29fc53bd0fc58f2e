"""Two replicas on two GPUs behind the gateway, in an unpacked root: how this vLLM dies, under load.

HAProxy and its libraries must lie in the root (Debian's packages haproxy, liblua5.3-0,
libopentracing-c-wrapper0 and libopentracing1, unpacked there).
"""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tests.gpu.conftest import Subject
from tests.gpu.servers import Server
from tests.stacks import ROOT, free_port, run, wait_for

pytestmark = pytest.mark.gpu
REQUESTS, AT_ONCE = 240, 16


@pytest.fixture(scope="module")
def server(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    count = len(run("nvidia-smi", "-L").output.splitlines())
    if count < 2 or not subject.root or not (subject.root / "usr/sbin/haproxy").exists():
        pytest.skip("needs two GPUs, --image-root, and HAProxy in that root")
    for folder in ("keys", "run/stack"):
        (subject.root / folder).mkdir(parents=True, exist_ok=True)
        os.chown(subject.root / folder, 10001, 10001)
    # In Docker the gateway has an image of its own.
    for name in ("scripts/gateway.py", "scripts/keys.py", "docker/haproxy.cfg"):
        shutil.copy(ROOT / name, subject.root / "app" / name)
    first = free_port()
    more = {"REPLICA_HOST": "127.0.0.1", "AGENT_PORT": first, "REPLICA_PORT": first + 1}
    more |= {"HANG_SECONDS": 6, "METRICS_BIND_INSIDE": "127.0.0.1:0", "DTYPE": "bfloat16"}
    log = tmp_path_factory.mktemp("log") / f"{subject.variant}-replicas.log"
    with subject.serve(log, **{name: str(value) for name, value in more.items()}) as started:
        started.wait()
        wait_whole(started, 2, 300)
        yield started


def wait_whole(server: Server, ready: int, seconds: float) -> None:
    """Wait until the log has told so often that a replica is ready."""
    wait_for(
        lambda: server.log.read_text(errors="replace").count(": ready") >= ready,
        seconds,
        f"{ready} times a replica that is ready",
        lambda: server.tail(40),
    )
    # The gateway asks twice a second.
    time.sleep(1)


def engines() -> list[psutil.Process]:
    """Return the engines' processes: the one child of each server that does the work."""
    found = []
    for process in psutil.process_iter():
        words = " ".join(process.cmdline()) if process.is_running() else ""
        if "EngineCore" in words or "multiprocessing.spawn import spawn_main" in words:
            found.append(process)
    return sorted(found, key=lambda process: process.memory_info().rss, reverse=True)


def ask(server: Server, number: int) -> dict:
    """Send one request, streamed or not, and tell what became of it."""
    body = {"model": "glm-4-9b-chat", "prompt": f"{number}", "max_tokens": 64}
    body |= {"ignore_eos": True, "stream": number % 2 == 0}
    outcome = {"begun": False, "done": False}
    try:
        with requests.post(
            f"{server.url}/v1/completions", json=body, timeout=120, stream=True
        ) as answer:
            outcome["status"] = answer.status_code
            if answer.status_code != 200:
                return {**outcome, "error": answer.text[:200]}
            if not body["stream"]:
                return {**outcome, "done": answer.json()["usage"]["completion_tokens"] == 64}
            for line in answer.iter_lines():
                outcome["begun"] = outcome["begun"] or bool(line)
                if b'"error"' in line:
                    return {**outcome, "error": line[:200].decode()}
                outcome["done"] = outcome["done"] or line == b"data: [DONE]"
    except (requests.RequestException, ValueError, KeyError) as error:
        outcome["error"] = f"{type(error).__name__}: {error}"[:200]
    return outcome


def under_load(server: Server, what: str, fault) -> list[dict]:
    timer = threading.Timer(1.0, fault)
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        timer.start()
        outcomes = list(pool.map(lambda number: ask(server, number), range(REQUESTS)))
    done = [line for line in outcomes if line["done"]]
    broken = [line for line in outcomes if line["begun"] and not line["done"]]
    failed = [line for line in outcomes if not line["begun"] and not line["done"]]
    print(
        f"\n{what}: {len(outcomes)} requests in {time.monotonic() - began:.1f} s, {len(done)}"
        f" completed, {len(failed)} failed, {len(broken)} begun streams broken"
    )
    assert not failed, f"{failed[:3]}\n{server.tail(60)}"
    return broken


def test_each_replica_has_a_gpu_of_its_own(server: Server) -> None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = [int(line) for line in run(*query).check().output.splitlines()[:2]]
    assert all(megabytes > 20_000 for megabytes in used), used
    text = server.log.read_text(errors="replace")
    assert "fit: 2 replicas of 1 GPU each" in text


def test_an_engine_killed(server: Server) -> None:
    ready = server.log.read_text(errors="replace").count(": ready")
    under_load(server, "kill -9 of an engine", lambda: engines()[0].kill())
    wait_whole(server, ready + 1, 200)


def test_an_engine_that_hangs(server: Server) -> None:
    ready = server.log.read_text(errors="replace").count(": ready")
    under_load(server, "SIGSTOP of an engine", lambda: engines()[0].send_signal(signal.SIGSTOP))
    assert "hangs, it is ended" in server.log.read_text(errors="replace"), server.tail(60)
    wait_whole(server, ready + 1, 200)


def test_a_rolling_restart_fails_nothing(server: Server, subject: Subject) -> None:
    from tests.gpu.servers import inside

    done: list = []

    def restart() -> None:
        command = inside(subject.root, {}, "python", "-m", "scripts.restart")
        done.append(run(*command, timeout=400))

    thread = threading.Thread(target=restart)
    thread.start()
    broken: list[dict] = []
    while thread.is_alive():
        broken += under_load(server, "rolling restart", lambda: None)
    assert "restart: ok" in done[0].output, done[0].output
    assert not broken, broken[:3]


def test_the_gateway_knows_the_routes(server: Server) -> None:
    for path in ("/metrics", "/version", "/docs", "/openapi.json"):
        answer = requests.get(f"{server.url}{path}", timeout=10)
        assert answer.status_code == 404 and json.loads(answer.text)["error"], path


def test_bad_ids_and_counts_are_refused(server: Server) -> None:
    for more in ({"prompt": [1_000_000]}, {"n": 10_000}, {"logit_bias": {"9999999": 1}}):
        body = {"model": "glm-4-9b-chat", "prompt": "a", "max_tokens": 2, **more}
        answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
    assert ask(server, 1)["done"]
