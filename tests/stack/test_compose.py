"""The docker runtime: from nothing to a green smoke test, and through every kind of end."""

import json
import threading
import time

import pytest
import requests

from scripts.rehearsal import DIALOGUES
from tests.stacks import Done, Stack, run, wait_for

pytestmark = pytest.mark.docker
LONG = max(DIALOGUES, key=lambda dialogue: len(dialogue.answer))


def container(stack: Stack) -> str:
    return stack.compose("ps", "--all", "--quiet", "serve").check().output.strip()


def health(stack: Stack) -> str:
    form = "{{.State.Status}} {{.State.Health.Status}} {{.State.ExitCode}}"
    return run("docker", "inspect", "--format", form, container(stack)).check().output.strip()


def inside(stack: Stack, *command: str) -> Done:
    return stack.compose("exec", "--no-TTY", "serve", *command)


def pid_of_vllm(stack: Stack) -> int:
    # What the agent noted when it had answered.
    return int(inside(stack, "cat", "/run/stack/answered-0").check().output.strip() or 0)


def ask(stack: Stack, **more) -> requests.Response:
    body = {
        "model": "glm-4-9b-chat",
        "messages": [{"role": "user", "content": LONG.question}],
        "temperature": 0,
        **more,
    }
    return requests.post(f"{stack.url}/v1/chat/completions", json=body, timeout=120, stream=True)


def test_download_shows_progress_and_verifies(compose_stack: Stack) -> None:
    for text in ("files", "fetched and verified in", "complete and verified"):
        assert text in compose_stack.notes["download"]


def test_make_models_lists_what_is_on_the_volume(compose_stack: Stack) -> None:
    done = compose_stack.run("make", "models", RUNTIME="docker", CUDA="cpu").check()
    done.says("rehearsal/glm-4-tiny", "v1", "complete", "GB free")


def test_smoke_tests_are_green(compose_stack: Stack) -> None:
    compose_stack.run("make", "smoke", URL=compose_stack.url).check().says("passed")


def test_a_second_make_up_changes_nothing_and_is_quick(compose_stack: Stack) -> None:
    before = container(compose_stack)
    begin = time.monotonic()
    done = compose_stack.run("make", "up", RUNTIME="docker", CUDA="cpu").check()
    done.says("nothing to do", "ready after", compose_stack.url, "curl")
    print(f"second make up: {time.monotonic() - begin:.0f} s")
    assert container(compose_stack) == before


def test_the_server_cannot_reach_the_outside_and_the_root_is_read_only(
    compose_stack: Stack,
) -> None:
    script = (
        "import socket\n"
        "for host in ('hub', '192.0.2.1'):\n"
        "    try: socket.create_connection((host, 8100), timeout=3); print('reached', host)\n"
        "    except OSError: pass\n"
        "open('/app/x', 'w')"
    )
    done = inside(compose_stack, "python", "-c", script)
    assert "reached" not in done.output
    done.says("Read-only file system")


def test_the_server_resolves_nothing_outside_and_is_reached_through_the_gateway_alone(
    compose_stack: Stack,
) -> None:
    script = "import socket; print(socket.gethostbyname('modelscope.cn'))"
    inside(compose_stack, "python", "-c", script).check(1).says("gaierror")
    found = run("docker", "port", container(compose_stack)).check().output
    assert found.strip() == "", found
    form = "{{json .NetworkSettings.Networks}}"
    networks = run("docker", "inspect", "--format", form, container(compose_stack)).check().output
    assert [name.split("_")[-1] for name in json.loads(networks)] == ["inside"]


def test_no_capability_is_left_and_models_are_read_only(compose_stack: Stack) -> None:
    inside(compose_stack, "grep", "CapEff", "/proc/1/status").check().says("0000000000000000")
    inside(compose_stack, "touch", "/models/x").says("Read-only file system")


def test_vllm_killed_is_restarted_and_its_processes_are_ended(compose_stack: Stack) -> None:
    old = pid_of_vllm(compose_stack)
    inside(compose_stack, "python", "-c", f"import os; os.kill({old}, 9)").check()
    wait_for(
        lambda: pid_of_vllm(compose_stack) not in (0, old),
        120,
        "a new vLLM that answers",
        lambda: compose_stack.compose("logs", "--tail", "30", "serve").output,
    )
    wait_for(
        lambda: requests.get(f"{compose_stack.url}/health", timeout=5).status_code == 200,
        10,
        "a gateway that knows it",
    )
    assert ask(compose_stack).json()["choices"][0]["message"]["content"] == LONG.answer
    processes = inside(
        compose_stack,
        "sh",
        "-c",
        "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null; echo; done",
    ).output
    servers = [line for line in processes.splitlines() if "vllm serve" in line]
    assert len(servers) == 1, processes


def test_stop_lets_a_running_stream_finish(compose_stack: Stack) -> None:
    # Many choices at once make the answer last long enough to be stopped in its middle.
    more = {"n": 16, "temperature": 0.8, "ignore_eos": True, "max_tokens": 400}
    response = ask(compose_stack, stream=True, **more)
    assert response.status_code == 200, response.text
    lines = response.iter_lines()
    next(lines)
    stopping = threading.Thread(target=compose_stack.compose, args=("stop", "serve"))
    stopping.start()
    received = [line.removeprefix(b"data: ") for line in lines if line]
    stopping.join(timeout=120)
    assert received[-1] == b"[DONE]", received[-3:]
    finished = [
        choice["index"]
        for line in received[:-1]
        for choice in json.loads(line).get("choices", [])
        if choice.get("finish_reason")
    ]
    assert sorted(finished) == list(range(16))
    state = health(compose_stack)
    assert state.startswith("exited") and state.endswith(" 0"), state


def test_an_endpoint_for_everybody_is_refused_before_the_download(compose_stack: Stack) -> None:
    done = compose_stack.compose("run", "--rm", "download", HOST="0.0.0.0").check(2)
    done.says("HOST=0.0.0.0, and there is no key", "make key NAME=alice")
    assert "verified" not in done.output


def test_restart_keeps_the_download(compose_stack: Stack) -> None:
    compose_stack.compose("down").check()
    done = compose_stack.compose("run", "--rm", "download").check().says("nothing to do")
    assert "to fetch" not in done.output
    compose_stack.compose("up", "-d", "--wait").check()
    assert requests.get(f"{compose_stack.url}/health", timeout=30).status_code == 200


def test_a_wrong_setting_ends_the_container_at_once_with_its_own_code(compose_stack: Stack) -> None:
    compose_stack.compose("stop", "serve").check()
    broken = {"VLLM_ARGS": "--no-such-argument"}
    done = compose_stack.compose("up", "-d", "--wait", **broken)
    assert done.returncode != 0, done.explain("a code that is not 0")
    logs = compose_stack.compose("logs", "serve").output
    assert "cannot start so, however often it is tried" in logs, logs[-3000:]
    assert logs.count("serve: vllm serve") == 1, logs[-3000:]
    assert "--no-such-argument" in logs
    assert health(compose_stack).startswith("exited"), health(compose_stack)
    assert health(compose_stack).split()[-1] == "2"


def test_crashes_are_retried_a_few_times_and_then_end_the_container(compose_stack: Stack) -> None:
    # A middleware that cannot be made: a cause that nobody knows, so it might pass.
    broken = {"VLLM_ARGS": "--kv-cache-memory-bytes 268435456 --middleware zipfile.ZipFile"}
    done = compose_stack.compose("up", "-d", "--wait", **broken)
    assert done.returncode != 0, done.explain("a code that is not 0")
    logs = compose_stack.compose("logs", "serve").output
    assert "giving up" in logs and "waiting 4 s" in logs, logs[-3000:]
    assert health(compose_stack).split()[-1] == "12"


def test_make_down_leaves_no_container_and_keeps_the_volumes(compose_stack: Stack) -> None:
    compose_stack.run("make", "down").check()
    assert container(compose_stack) == ""
    project = compose_stack.environ["COMPOSE_PROJECT_NAME"]
    volumes = run("docker", "volume", "ls", "--quiet").check().output
    assert f"{project}_models" in volumes
