"""Faults under load: with two replicas, nothing fails that had not begun to answer."""

import re
from pathlib import Path

import pytest

from tests.gateway.conftest import Gateway, Outcomes
from tests.stacks import wait_for

pytestmark = pytest.mark.docker


def _judge(what: str, outcomes: Outcomes, least: int = 200) -> None:
    print(f"\nfault: {what}: {outcomes}")
    assert len(outcomes.lines) >= least, f"expected {least} requests or more: {outcomes}"
    assert not outcomes.failed, f"{outcomes}\n{outcomes.failed[:3]}"


@pytest.mark.parametrize(
    ("what", "process"),
    [("an engine", "VLLM::EngineCore"), ("an API server", "vllm serve")],
    ids=["engine", "api-server"],
)
def test_a_process_killed_loses_no_request_that_had_not_begun(
    gateway: Gateway, tmp_path: Path, what: str, process: str
) -> None:
    with gateway.load(tmp_path, 45) as end:
        gateway.kill(process)
        outcomes = end()
    _judge(f"kill -9 of {what}", outcomes)
    gateway.wait_whole()


def test_an_engine_that_hangs_is_found_and_ended_and_its_requests_go_elsewhere(
    gateway: Gateway, tmp_path: Path
) -> None:
    with gateway.load(tmp_path, 50) as end:
        gateway.kill("VLLM::EngineCore", "STOP")
        outcomes = end()
    _judge("SIGSTOP of an engine", outcomes, 100)
    assert "hangs, it is ended" in gateway.compose("logs", "serve").output
    gateway.wait_whole()


def test_a_rolling_restart_fails_nothing(gateway: Gateway, tmp_path: Path) -> None:
    with gateway.load(tmp_path, 60) as end:
        done = gateway.run("make", "restart", CUDA="cpu", RUNTIME="docker").check()
        done.says("replica 0: ready", "replica 1: ready", "restart: ok")
        outcomes = end()
    _judge("rolling restart", outcomes)
    assert len(outcomes.done) == len(outcomes.lines), f"{outcomes}\n{outcomes.broken[:3]}"
    gateway.wait_whole()


def test_a_reload_of_the_gateway_fails_nothing(gateway: Gateway, tmp_path: Path) -> None:
    with gateway.load(tmp_path, 30) as end:
        for _ in range(3):
            before = gateway.gateway_log().count("Loading success")
            gateway.compose("kill", "--signal", "SIGUSR2", "gateway").check()
            wait_for(
                lambda before=before: gateway.gateway_log().count("Loading success") > before,
                15,
                "a new worker of HAProxy",
                gateway.gateway_log,
            )
        outcomes = end()
    _judge("gateway reload, three times", outcomes, 100)
    assert len(outcomes.done) == len(outcomes.lines), f"{outcomes}\n{outcomes.broken[:3]}"


def test_a_stop_of_the_whole_stack_lets_accepted_requests_finish(
    gateway: Gateway, tmp_path: Path
) -> None:
    before = len(gateway.accepted())
    try:
        with gateway.load(tmp_path, 40, TOKENS="100") as end:
            gateway.compose("stop", "gateway", "serve").check()
            outcomes = end()
        # Afterwards nobody listens; the gateway's log has what was accepted, and how it ended.
        accepted = gateway.accepted()[before:]
    finally:
        gateway.run("make", "up", CUDA="cpu", RUNTIME="docker").check()
    print(f"\nfault: stop of the whole stack: {len(accepted)} accepted, all must be completed")
    lost = [line for line in accepted if not re.search(r" 200 .* end=--$", line)]
    assert len(outcomes.done) == len(accepted) > 8, f"{outcomes}\n{lost[:3]}"
    assert not lost, lost[:3]
    gateway.wait_whole()
