"""Who gets in, by which route, and how much of it: the gateway of the compose stack."""

import contextlib
import json
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

from scripts import variants
from tests.gateway.conftest import Gateway
from tests.stacks import ROOT, Done, free_port, run, wait_for

pytestmark = pytest.mark.docker

OFFERED = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
}


def is_error(response: requests.Response, status: int) -> dict:
    """Check that an answer is an error as OpenAI's API has it, and return it."""
    assert response.status_code == status, f"expected {status}: {response.text[:500]}"
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["message"] and error["type"] and "param" in error and "code" in error
    assert re.fullmatch(r"[0-9a-f-]{36}", response.headers["x-request-id"])
    return error


@pytest.fixture
def key(gateway: Gateway) -> Iterator[str]:
    """A key of the running gateway, while the test runs."""
    done = run_key(gateway, "add", "alice")
    yield next(line for line in done.output.splitlines() if line.startswith("sk-"))
    run_key(gateway, "revoke", "alice")


def run_key(gateway: Gateway, *words: str) -> Done:
    return gateway.compose("run", "--rm", "key", *words).check()


def models(gateway: Gateway, **headers: str) -> requests.Response:
    return requests.get(f"{gateway.url}/v1/models", headers=headers, timeout=30)


# --- without keys ---


def test_without_keys_this_hosts_programs_are_answered(gateway: Gateway) -> None:
    assert models(gateway).status_code == 200
    port = gateway.url.rsplit(":", 1)[1]
    assert models(gateway, Host=f"localhost:{port}").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", ""]
)
def test_without_keys_a_foreign_host_name_is_403(gateway: Gateway, host: str) -> None:
    is_error(models(gateway, Host=host), 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000"])
def test_without_keys_no_website_is_answered(gateway: Gateway, origin: str) -> None:
    is_error(models(gateway, Origin=origin), 403)


# --- keys ---


def test_with_a_key_only_who_has_it_is_answered(gateway: Gateway, key: str) -> None:
    is_error(models(gateway), 401)
    for wrong in ("sk-wrong", key[:-1], f"{key}x", "", f"{key} {key}"):
        is_error(models(gateway, Authorization=f"Bearer {wrong}"), 401)
    is_error(models(gateway, Authorization=key.upper()), 401)
    assert models(gateway, Authorization=f"Bearer {key}").status_code == 200
    # A key is what guards now, whatever the name that was used.
    assert models(gateway, Authorization=f"Bearer {key}", Host="my.example").status_code == 200
    assert requests.get(f"{gateway.url}/health", timeout=10).status_code == 200


def test_openais_client_raises_its_own_errors(gateway: Gateway, key: str) -> None:
    base = f"{gateway.url}/v1"
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        openai.OpenAI(base_url=base, api_key="no", max_retries=0).models.list()
    client = openai.OpenAI(base_url=base, api_key=key, max_retries=0)
    with pytest.raises(openai.NotFoundError, match="no such route"):
        client.files.list()
    with pytest.raises(openai.BadRequestError, match="the most here"):
        client.completions.create(model="glm-4-9b-chat", prompt="a", n=10_000)
    assert client.models.list().data[0].id == "glm-4-9b-chat"


def test_a_key_is_nowhere_but_with_its_owner(gateway: Gateway, key: str) -> None:
    assert models(gateway, Authorization=f"Bearer {key}").status_code == 200
    names = run(
        "docker", "ps", "-aq", "--filter", f"name={gateway.environ['COMPOSE_PROJECT_NAME']}"
    )
    inspected = run("docker", "inspect", *names.check().output.split()).check().output
    logs = gateway.compose("logs").output
    history = "".join(
        run("docker", "history", "--no-trunc", f"glm4-stack:dev-{name}").check().output
        for name in ("gateway", "cpu", "download")
    )
    files = gateway.compose("exec", "-T", "gateway", "cat", "/keys/keys.map").check().output
    for text in (inspected, logs, history, files):
        assert key not in text and key.removeprefix("sk-")[:20] not in text
    assert "key=alice" in logs and "alice" in files
    mode = gateway.compose("exec", "-T", "gateway", "stat", "-c", "%a %u", "/keys/keys.map")
    assert mode.check().output.strip() == "600 10001"


def test_keys_change_under_load_and_only_the_revoked_one_is_refused(
    gateway: Gateway, key: str, tmp_path: Path
) -> None:
    done = run_key(gateway, "add", "bob")
    other = next(line for line in done.output.splitlines() if line.startswith("sk-"))
    with (
        gateway.load(tmp_path, 15, users=3, KEY=key) as end,
        gateway.load(tmp_path, 15, users=3, KEY=other) as end_other,
    ):
        run_key(gateway, "add", "carol")
        run_key(gateway, "revoke", "bob")
        outcomes, revoked = end(), end_other()
    run_key(gateway, "revoke", "carol")
    print(f"\nkey rotation: kept {outcomes}; revoked {revoked}")
    assert len(outcomes.done) == len(outcomes.lines), outcomes.failed[:3]
    statuses = [line["status"] for line in sorted(revoked.lines, key=lambda line: line["at"])]
    assert set(statuses) == {200, 401}, set(statuses)
    # What had been let in was served to its end.
    assert all(line["done"] for line in revoked.lines if line["status"] == 200)


def test_a_second_key_of_a_name_and_an_unknown_one_are_refused(gateway: Gateway, key: str) -> None:
    gateway.compose("run", "--rm", "key", "add", "alice").check(2).says("there is a key alice")
    gateway.compose("run", "--rm", "key", "revoke", "nobody").check(2).says("one of alice")
    run_key(gateway, "list").says("alice")


# --- routes ---


@pytest.fixture(scope="module")
def routes(request: pytest.FixtureRequest, build_images) -> set[tuple[str, str]]:
    """Every route of every vLLM that is built here."""
    found: set[tuple[str, str]] = set()
    for name in request.config.getoption("--variants").split(","):
        variant = variants.load()[name]
        build_images(variant.short)
        file = ROOT / "tests" / "gateway" / "routes.py"
        command = ["docker", "run", "--rm", "--runtime=runc", f"--volume={file}:/routes.py:ro"]
        image = f"glm4-stack:dev-{name}"
        done = run(*command, "--entrypoint=python", image, "/routes.py").check()
        own = {tuple(line.split(" ", 1)) for line in done.output.splitlines()}
        print(f"\n{name}: {len(own)} routes")
        assert {("POST", "/v1/chat/completions"), ("GET", "/metrics")} <= own, own
        found |= own
    return found


def test_every_route_that_is_not_offered_is_404_on_every_vllm(
    gateway: Gateway, routes: set[tuple[str, str]]
) -> None:
    hidden = {(method, path) for method, path in routes if (method, path) not in OFFERED}
    print(f"\n{len(hidden)} routes are hidden")
    assert len(hidden) > 10
    for method, path in sorted(hidden):
        path = re.sub(r"\{[^}]*\}", "x", path)
        for form in {path, f"{path}/", f"/{path}", f"/v1/..{path}", f"{path}?x=1", f"/.{path}"}:
            answer = raw(gateway, f"{method} {form} HTTP/1.1\r\nContent-Length: 2\r\n", b"{}")
            assert b" 404 " in answer.split(b"\r\n")[0], f"{method} {form}: {answer[:200]!r}"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "FOO"])
def test_an_offered_route_with_another_method_is_refused(gateway: Gateway, method: str) -> None:
    answer = raw(gateway, f"{method} /v1/completions HTTP/1.1\r\n")
    assert re.match(rb"HTTP/1.1 (404|400|501) ", answer), answer[:200]


def test_tokenize_is_there_when_asked_for(gateway: Gateway) -> None:
    body = {"model": "glm-4-9b-chat", "prompt": "你好"}
    is_error(requests.post(f"{gateway.url}/tokenize", json=body, timeout=30), 404)
    with changed(gateway, OFFER_TOKENIZE="1"):
        answer = requests.post(f"{gateway.url}/tokenize", json=body, timeout=30)
        assert answer.status_code == 200 and answer.json()["count"] >= 6, answer.text


@contextlib.contextmanager
def changed(gateway: Gateway, **environ: str) -> Iterator[None]:
    """Let the gateway alone run with other settings, then as before."""

    def up(**more: str) -> None:
        gateway.compose("up", "-d", "--no-deps", "--wait", "gateway", **more).check()
        wait_for(lambda: gateway.servers_up() == 2, 15, "two servers that are up")

    up(**environ)
    try:
        yield
    finally:
        up()


def raw(gateway: Gateway, head: str, body: bytes = b"", seconds: float = 20) -> bytes:
    """Send bytes as they are, and return what comes back until the connection is closed."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        line, _, rest = head.partition("\r\n")
        connection.sendall(
            f"{line}\r\nHost: 127.0.0.1\r\nConnection: close\r\n{rest}\r\n".encode() + body
        )
        answer = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


# --- how much ---


def test_a_body_or_head_too_large_is_refused(gateway: Gateway) -> None:
    path = f"{gateway.url}/v1/completions"
    is_error(requests.post(path, data=b"x" * (17 << 20), timeout=60), 413)
    is_error(models(gateway, X=("a" * 20_000)), 431)
    answer = requests.post(path, data=iter([b"{", b"}"]), timeout=30)
    is_error(answer, 411)


def test_a_rate_beyond_the_keys_is_429(gateway: Gateway, key: str) -> None:
    with changed(gateway, KEY_RATE="5"):
        answers = [models(gateway, Authorization=f"Bearer {key}") for _ in range(8)]
        assert [answer.status_code for answer in answers[:5]] == [200] * 5
        error = is_error(answers[-1], 429)
        assert error["code"] == "rate_limit_exceeded" and answers[-1].headers["retry-after"]
        # Another key has its own count.
        other = run_key(gateway, "add", "dave").output.splitlines()
        second = next(line for line in other if line.startswith("sk-"))
        assert models(gateway, Authorization=f"Bearer {second}").status_code == 200
        run_key(gateway, "revoke", "dave")


def test_more_requests_at_once_than_a_key_may_have_are_429(gateway: Gateway) -> None:
    with changed(gateway, KEY_CONCURRENCY="2"), ThreadPoolExecutor(8) as pool:
        more = {"max_tokens": 200, "ignore_eos": True}
        answers = list(pool.map(lambda _: gateway.ask(**more), range(8)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2, statuses


def test_a_full_queue_and_a_long_wait_are_429_with_a_time_to_retry(gateway: Gateway) -> None:
    few = {"REPLICA_CONCURRENCY": "1", "QUEUE_LENGTH": "2", "QUEUE_SECONDS": "1"}
    with changed(gateway, **few), ThreadPoolExecutor(12) as pool:
        more = {"max_tokens": 900, "ignore_eos": True}
        answers = list(pool.map(lambda _: gateway.ask(**more), range(12)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused and len(refused) < 12, [answer.status_code for answer in answers]
    for answer in refused:
        is_error(answer, 429)
        assert int(answer.headers["retry-after"]) > 0
    messages = " ".join(answer.json()["error"]["message"] for answer in refused)
    assert "are waiting already" in messages and "replicas are busy" in messages, messages


def test_a_slow_sender_is_cut_off(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    heads = {
        "head": b"X: ",
        "body": b"Content-Length: 5000\r\n\r\n{",
    }
    for what, head in heads.items():
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head)
            connection.settimeout(1)
            answer = b""
            while time.monotonic() - began < 40:
                try:
                    connection.sendall(b"a")
                    piece = connection.recv(4096)
                    answer += piece
                    if not piece:
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        seconds = time.monotonic() - began
        print(f"\nslow {what}: cut off after {seconds:.0f} s, {answer[:40]!r}")
        assert seconds < 20 and b" 408 " in answer, answer[:200]
    assert models(gateway).status_code == 200


def test_a_session_stays_with_a_replica(gateway: Gateway) -> None:
    session = uuid.uuid4().hex
    ids = [
        requests.post(
            f"{gateway.url}/v1/completions",
            json={"model": "glm-4-9b-chat", "prompt": "a", "max_tokens": 1},
            headers={"X-Session-Id": session},
            timeout=30,
        ).headers["x-request-id"]
        for _ in range(6)
    ]
    log = gateway.gateway_log()
    replicas = {re.search(rf"{number} .* replica=(\w+)", log)[1] for number in ids}
    assert len(replicas) == 1, replicas
    spread = [gateway.ask().headers["x-request-id"] for _ in range(6)]
    log = gateway.gateway_log()
    assert len({re.search(rf"{number} .* replica=(\w+)", log)[1] for number in spread}) == 2


def test_vllms_log_carries_the_gateways_request_id(gateway: Gateway) -> None:
    given = {"X-Request-Id": "forged"}
    answer = requests.post(
        f"{gateway.url}/v1/completions",
        json={"model": "glm-4-9b-chat", "prompt": "a", "max_tokens": 1},
        headers=given,
        timeout=30,
    )
    number = answer.headers["x-request-id"]
    assert number != "forged"
    assert number in gateway.compose("logs", "serve").output


def test_metrics_are_inside_only(gateway: Gateway) -> None:
    assert "haproxy_backend_http_responses_total" in gateway.metrics()
    for replica in (0, 1):
        assert "vllm:generation_tokens_total" in gateway.metrics(f"/replicas/{replica}/metrics")
    published = gateway.compose("ps", "--format", "json").output
    ports = {
        (entry["Service"], port["TargetPort"])
        for entry in map(json.loads, filter(None, published.splitlines()))
        for port in entry.get("Publishers") or []
        if port["PublishedPort"]
    }
    assert {port for port in ports if port[0] != "hub"} == {("gateway", 8000)}, ports


# --- a gateway of its own, without any replica ---


@contextlib.contextmanager
def alone(*options: str, **environ: str) -> Iterator[tuple[str, int]]:
    """Run the gateway's image alone; yields the container's name and its port."""
    name, port = f"glm4-test-{uuid.uuid4().hex[:8]}", free_port()
    words = [f"--env={name_}={value}" for name_, value in environ.items()]
    command = ["docker", "run", "--detach", "--name", name, "--read-only", "--cap-drop=ALL"]
    command += [
        "--tmpfs=/run/stack:uid=10001,gid=10001",
        "--volume=/keys",
        f"--publish=127.0.0.1:{port}:8000",
    ]
    command += ["--env=GATEWAY_BIND=:8000", "--env=AGENT_PORT=8090", "--env=VARIANT=cpu"]
    command += ["--env=REPLICA_PORT=8001"]
    run(*command, *words, *options, "glm4-stack:dev-gateway").check()
    try:
        yield name, port
    finally:
        run("docker", "rm", "--force", "--volumes", name)


def test_without_a_replica_it_is_503_with_a_time_to_retry(images: Done) -> None:
    with alone() as (name, port):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/health"), 20, "a gateway", logs_of(name))
        wait_for(
            lambda: requests.get(f"{url}/health", timeout=5).status_code == 503, 10, "503 in time"
        )
        body = {"model": "x", "prompt": "a"}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=30)
        is_error(answer, 503)
        assert int(answer.headers["retry-after"]) > 0


def answers(url: str, **more: object) -> bool:
    with contextlib.suppress(requests.RequestException):
        return bool(requests.get(url, timeout=5, **more).status_code)
    return False


def logs_of(name: str):
    return lambda: run("docker", "logs", name).output


def test_open_to_others_it_does_not_start_without_a_key(images: Done) -> None:
    with alone(HOST="0.0.0.0") as (name, _):
        code = subprocess.run(
            ["docker", "wait", name], capture_output=True, text=True, timeout=60
        ).stdout.strip()
        assert code == "2", run("docker", "logs", name).output
        run("docker", "logs", name).says("HOST=0.0.0.0", "make key NAME=alice")


def test_tls_and_http_2_with_a_certificate_of_make_tls(images: Done, tmp_path: Path) -> None:
    run("make", "tls").check().says("TLS_CERT=", "IP Address:127.0.0.1")
    folder = ROOT / ".state" / "tls"
    mounts = [f"--volume={folder}/{name}.pem:/tls/{name}.pem:ro" for name in ("cert", "key")]
    with alone(*mounts, TLS_CERT="/tls/cert.pem", TLS_KEY="/tls/key.pem") as (name, port):
        url = f"https://127.0.0.1:{port}/health"
        certificate = str(folder / "cert.pem")
        wait_for(lambda: answers(url, verify=certificate), 20, "a gateway", logs_of(name))
        form = "%{http_version} %{http_code}"
        command = ["curl", "--silent", "--http2", "--cacert", certificate, "--output", "/dev/null"]
        done = run(*command, "--write-out", form, url).check()
        assert done.output == "2 503", done.output
        with pytest.raises(requests.RequestException):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
        run("curl", "--silent", "--tls-max", "1.1", "--cacert", certificate, url).check(35)
    with alone(*mounts[:1], TLS_CERT="/tls/cert.pem") as (name, _):
        run("docker", "wait", name).check()
        run("docker", "logs", name).says("TLS_KEY is empty")
