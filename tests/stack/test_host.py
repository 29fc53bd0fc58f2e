"""The host runtime: from nothing to a green smoke test, a quick second start, a clean end."""

import json
import time
from pathlib import Path

import psutil
import requests

from scripts import snapshot
from scripts.rehearsal import DIALOGUES
from tests.stacks import Stack, wait_for


def processes(stack: Stack) -> list[psutil.Process]:
    """Every process that works in this stack's state folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if stack.environ["STATE_DIR"] in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_make_up_says_what_it_runs_and_how_to_use_it(host_stack: Stack) -> None:
    for text in ("rehearsal", "make up MODEL_ID=", "complete and verified", "curl", "make logs"):
        assert text in host_stack.notes["up"], host_stack.notes["up"]


def test_make_models_lists_and_make_pin_pins(host_stack: Stack) -> None:
    host_stack.run("make", "models").check().says("rehearsal/glm-4-tiny", "complete")
    pinned = snapshot.pin("rehearsal/glm-4-tiny")
    try:
        host_stack.run("make", "pin").check().says("pinned in images/models/")
        host_stack.run("make", "download").check().says("nothing to do")
        pinned.write_text(pinned.read_text().replace('"sha256": "', '"sha256": "0', 1))
        done = host_stack.run("make", "download").check(2)
        done.says("Error 21", "does not have what is pinned")
    finally:
        pinned.unlink()


def test_smoke_tests_are_green(host_stack: Stack) -> None:
    host_stack.run("make", "smoke", URL=host_stack.url).check().says("passed")


def test_both_logs_are_json_and_carry_the_same_request_id(host_stack: Stack) -> None:
    answer = requests.get(f"{host_stack.url}/v1/models", timeout=30)
    number = answer.headers["x-request-id"]
    for name in ("gateway.log", "vllm.log"):
        log = Path(host_stack.environ["STATE_DIR"], "log", name)
        wait_for(lambda log=log: number in log.read_text(), 10, f"the request in {name}")
        [line] = [line for line in log.read_text().splitlines() if number in line]
        assert json.loads(line)["request_id"] == number, line


def test_a_host_open_to_others_is_refused_without_a_key(host_stack: Stack) -> None:
    done = host_stack.run("make", "download", HOST="0.0.0.0").check(2)
    done.says("HOST=0.0.0.0, and there is no key")


def test_a_second_make_up_changes_nothing_and_is_quick(host_stack: Stack) -> None:
    before = {process.pid for process in processes(host_stack)}
    begin = time.monotonic()
    host_stack.run("make", "up").check().says("ready after")
    print(f"second make up: {time.monotonic() - begin:.0f} s")
    assert {process.pid for process in processes(host_stack)} == before


def test_vllm_killed_is_restarted(host_stack: Stack) -> None:
    [server] = [p for p in processes(host_stack) if "serve" in p.cmdline()]
    server.kill()
    wait_for(
        lambda: [p for p in processes(host_stack) if "serve" in p.cmdline() and p != server],
        60,
        "a new vLLM",
    )
    host_stack.run("make", "up").check()
    assert requests.get(f"{host_stack.url}/health", timeout=30).status_code == 200


def test_status_tells_that_it_is_ready(host_stack: Stack) -> None:
    host_stack.run("make", "status").check().says("ready")


def test_prompts_are_answered_without_docker_into_a_file(host_stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(dialogue.question for dialogue in DIALOGUES), encoding="utf-8")
    done = host_stack.run("make", "generate", INPUT=str(source), ARGS="--temperature 0").check()
    done.says("every good prompt has its result", "prompts.results.jsonl")
    lines = (tmp_path / "prompts.results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["text"] for one in found] == [dialogue.answer for dialogue in DIALOGUES]
    assert {one["finish_reason"] for one in found} == {"stop"}


def test_make_down_ends_everything_and_make_up_starts_it_again(host_stack: Stack) -> None:
    host_stack.run("make", "down").check()
    assert processes(host_stack) == []
    assert Path(host_stack.environ["STATE_DIR"], "models").is_dir()
    begin = time.monotonic()
    host_stack.run("make", "up").check()
    print(f"make up after make down: {time.monotonic() - begin:.0f} s")
    host_stack.run("make", "smoke", URL=host_stack.url).check()
