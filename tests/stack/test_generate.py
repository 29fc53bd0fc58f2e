"""Offline inference: every prompt gets one result, however often the run is interrupted."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.rehearsal import DIALOGUES
from tests.stacks import ROOT, Stack, run, wait_for

pytestmark = pytest.mark.docker
COUNT = 400
# Long enough to be interrupted in the middle.
WORDS = "--temperature 0 --max-tokens 200 --ignore-eos"


def expected(index: int) -> str:
    return DIALOGUES[index % len(DIALOGUES)].answer


def write(path: Path, count: int = COUNT) -> Path:
    lines = (json.dumps({"prompt": DIALOGUES[i % len(DIALOGUES)].question}) for i in range(count))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generate(compose_stack: Stack, tmp_path: Path) -> Iterator:
    """Start `make generate` in a process group of its own, as a terminal does; end what is left."""
    started: list[subprocess.Popen] = []
    log = tmp_path / "log"

    def start(source: Path, target: Path, words: str = WORDS) -> subprocess.Popen:
        environ = {**os.environ, **compose_stack.environ, "CUDA": "cpu", "RUNTIME": "docker"}
        environ |= {"INPUT": str(source), "OUTPUT": str(target), "ARGS": words}
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["make", "generate"],
                cwd=ROOT,
                env=environ,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        started.append(process)
        process.log = log
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


def containers(stack: Stack) -> list[str]:
    project = f"label=com.docker.compose.project={stack.environ['COMPOSE_PROJECT_NAME']}"
    service = "label=com.docker.compose.service=generate"
    command = ["docker", "ps", "--quiet", "--filter", project, "--filter", service]
    return run(*command).check().output.split()


def ended(process: subprocess.Popen, seconds: float = 300) -> int:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"expected an end within {seconds} s; {process.log.read_text()[-3000:]}")


def test_interrupted_runs_lose_nothing_and_repeat_nothing(
    compose_stack: Stack, generate, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "prompts.jsonl"), tmp_path / "results.jsonl"
    kept: list[str] = []

    def go_on_until_more(signal_it) -> None:
        process = generate(source, target)
        before = len(kept)
        wait_for(
            lambda: (
                process.poll() is not None
                or (target.exists() and target.read_bytes().count(b"\n") > before + 10)
            ),
            240,
            "ten more results",
            lambda: process.log.read_text()[-3000:],
        )
        assert process.poll() is None, process.log.read_text()[-3000:]
        signal_it(process)
        assert ended(process) != 0
        wait_for(lambda: not containers(compose_stack), 60, "no container left")
        whole = target.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        # What was there before is there, byte by byte.
        assert whole[:before] == kept
        assert before < len(whole) < COUNT, len(whole)
        kept[:] = whole

    # Ctrl-C in a terminal reaches the whole group.
    go_on_until_more(lambda process: os.killpg(process.pid, signal.SIGINT))
    # The container dies: a full disk, the end of memory, another's `docker rm`.
    go_on_until_more(lambda process: run("docker", "kill", *containers(compose_stack)).check())
    # A line that was not written to its end, as after a power cut.
    with target.open("a", encoding="utf-8") as stream:
        stream.write('{"line": 399, "prompt": "cut o')

    last = generate(source, target)
    assert ended(last) == 0, last.log.read_text()[-3000:]
    text = last.log.read_text()
    assert f"{len(kept)} of {COUNT} prompts have their result already" in text, text[-3000:]
    found = lines(target)
    assert [one["line"] for one in found] == list(range(1, COUNT + 1))
    wrong = [one for one in found if not one["text"].startswith(expected(one["line"] - 1))]
    assert wrong == []
    assert {one["completion_tokens"] for one in found} == {200}
    # Those of the interrupted runs are the same lines still.
    now = set(target.read_text(encoding="utf-8").splitlines())
    assert set(kept) <= now

    began = time.monotonic()
    again = generate(source, target)
    assert ended(again) == 0, again.log.read_text()[-3000:]
    assert "offline:" not in again.log.read_text(), "expected no engine for nothing to do"
    assert set(target.read_text(encoding="utf-8").splitlines()) == now
    print(f"nothing to do: {time.monotonic() - began:.0f} s")


def test_other_settings_do_not_mix_with_what_is_there(
    compose_stack: Stack, generate, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "prompts.jsonl", 4), tmp_path / "results.jsonl"
    assert ended(generate(source, target, "--temperature 0")) == 0
    before = target.read_bytes()
    assert [one["text"] for one in lines(target)] == [expected(i) for i in range(4)]
    process = generate(source, target, "--temperature 0 --seed 3")
    assert ended(process) == 2
    assert "answers to something else from line 1 on" in process.log.read_text()
    assert target.read_bytes() == before


def test_compose_alone_answers_from_a_pipe_and_prints_results_only(compose_stack: Stack) -> None:
    batch = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"}
    batch["body"] = {"messages": [{"role": "user", "content": DIALOGUES[0].question}]}
    bad = ["{", json.dumps({"prompt": "a", "temperature": -1}), json.dumps({"prompt": "a " * 2000})]
    command = ["docker", "compose", "--env-file", "rehearsal.env", "run", "--rm", "-T"]
    done = subprocess.run(
        [*command, "generate", "--temperature", "0"],
        cwd=ROOT,
        env={**os.environ, **compose_stack.environ},
        input="\n".join([json.dumps(batch), *bad]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert one["custom_id"] == "x"
    assert one["response"]["body"]["choices"][0]["message"]["content"] == DIALOGUES[0].answer
    assert one["response"]["body"]["choices"][0]["stop_reason"] == 151336
    for number, why in ((2, "not JSON"), (3, "temperature"), (4, "MAX_MODEL_LEN is 1024")):
        assert f"line {number} is skipped" in done.stderr, done.stderr[-3000:]
        assert why in done.stderr, done.stderr[-3000:]
