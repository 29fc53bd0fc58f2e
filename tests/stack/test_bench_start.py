"""bench-start by compose alone: a cold and a warm start, measured; nothing is left of them."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stacks import Done, Stack, run, wait_for

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def stack(images: Done) -> Iterator[Stack]:
    """A compose project that has the rehearsal model, and serves nothing."""
    stack = Stack("", {"COMPOSE_PROJECT_NAME": f"glm4-test-{uuid.uuid4().hex[:8]}"})
    try:
        stack.compose("run", "--rm", "download").check()
        # Two cores measure better when nothing else is there.
        stack.compose("--profile", "*", "stop").check()
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")


def caches(stack: Stack) -> str:
    job = ("run", "--rm", "--no-TTY", "--entrypoint", "ls", "bench-start")
    return stack.compose(*job, "/caches").check().output


def test_a_cold_and_a_warm_start_are_measured(stack: Stack, tmp_path: Path) -> None:
    result = tmp_path / "start.json"
    command = "docker compose --env-file rehearsal.env run --rm --no-TTY bench-start"
    done = stack.run("sh", "-c", f'{command} --cold 1 --warm 1 > "$0"', str(result)).check()
    done.says("| cold 1", "| warm 1", "until first token", "of the cold one")
    found = json.loads(result.read_text(encoding="utf-8"))
    print(done.output)

    assert found["model"]["id"] == "rehearsal/glm-4-tiny"
    assert found["settings"]["weights"] == "files"
    assert "page cache" in found["note"]
    assert [(start["name"], start["kind"]) for start in found["starts"]] == [
        ("cold 1", "cold"),
        ("warm 1", "warm"),
    ]
    for start in found["starts"]:
        assert 0 < start["health"] <= start["ready"] < start["first_token"] == start["seconds"]
        # Every line that a start on a CPU has; it captures no graphs.
        assert list(start["phases"]) == [
            *("container", "imports", "engine process", "engine", "weights"),
            *("compile and profile", "server", "ready", "first token"),
        ]
        assert sum(start["phases"].values()) == pytest.approx(start["first_token"], abs=0.1)
        assert min(start["phases"].values()) > 0
        assert start["vllm_says"]["weights"] <= start["phases"]["weights"]
    cold, warm = (start["first_token"] for start in found["starts"])
    assert found["warm_of_cold"] == pytest.approx(warm / cold, abs=0.001)
    assert "bench-start" not in caches(stack)


def test_a_run_that_is_stopped_leaves_nothing(stack: Stack) -> None:
    name = f"{stack.environ['COMPOSE_PROJECT_NAME']}-stopped"
    stack.compose("run", "--detach", "--name", name, "bench-start").check()
    try:
        # Not before it has something to leave.
        def loading() -> bool:
            return "vllm serve" in run("docker", "top", name, "-eo", "pid,args").output

        wait_for(loading, 60, "a start under way", lambda: run("docker", "logs", name).output)
        run("docker", "exec", name, "ls", "/caches").check().says("bench-start-")
        run("docker", "stop", name).check()
        run("docker", "logs", name).check().says("interrupted")
        form = "{{.State.ExitCode}}"
        assert run("docker", "inspect", "--format", form, name).check().output.strip() == "143"
        assert "bench-start" not in caches(stack)
    finally:
        run("docker", "rm", "--force", name)


def test_a_start_that_cannot_be_is_told_with_the_lines_of_vllm(stack: Stack) -> None:
    job = ("run", "--rm", "--no-TTY", "bench-start", "--warm", "0")
    done = stack.compose(*job, VLLM_ARGS="--no-such-argument").check(12)
    done.says("cold 1: vLLM ended before /health answers", "--no-such-argument", "exit status 2")
    assert '"starts"' not in done.output
    assert "bench-start" not in caches(stack)
