"""What an end of vLLM means, and after how many of them nobody tries again."""

import os
import signal
import types
from pathlib import Path

import pytest

from scripts import errors, watch
from scripts.watch import Watch

TRACEBACK = 'Traceback (most recent call last):\n  File "/opt/venv/lib/x.py", line 1, in y\n'
NO_MEMORY = {
    "the allocator": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.25 GiB.",
    "the allocator of an engine": (
        "(EngineCore_0 pid=71) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    ),
    "no block": (
        "ValueError: No available memory for the cache blocks. Try increasing"
        " `gpu_memory_utilization` when initializing the engine."
    ),
    "a context too long": (
        "ValueError: To serve at least one request with the models's max seq len (131072), (5.00"
        " GiB KV cache is needed, which is larger than the available KV cache memory (2.31 GiB)."
    ),
    "a context too long, in the old words": (
        "ValueError: The model's max seq len (131072) is larger than the maximum number of tokens"
        " that can be stored in KV cache (38432)."
    ),
    "a card in use": (
        "ValueError: Free memory on device (3.1/79.1 GiB) on startup is less than desired GPU"
        " memory utilization (0.9, 71.2 GiB)."
    ),
}
WRONG_SETTING = {
    "an argument of a wrong kind": (
        "vllm serve: error: argument --max-model-len: invalid human_readable_int_or_auto value"
    ),
    "an unknown argument, by serve": "vllm serve: error: unrecognized arguments: --x",
    "an unknown argument, of the old server": "api_server.py: error: unrecognized arguments: --x",
    "what pydantic refuses": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (900000) is greater than the derived"
        " max_model_len [type=value_error]"
    ),
    "what vLLM refuses": "ValueError: Unknown quantization method: fp9.",
    "what its engine refuses": "(EngineCore_0 pid=71) ValueError: Unknown quantization method",
}
NO_DRIVER = {
    "no card": "RuntimeError: No CUDA GPUs are available",
    "an old driver": ("RuntimeError: CUDA driver version is insufficient for CUDA runtime version"),
}
UNKNOWN = {
    "nothing at all": "",
    "an unknown traceback": f"{TRACEBACK}RuntimeError: Engine core initialization failed.",
    "a word in a log line": "INFO 11-24 10:00:00 api.py:5] a client sent a ValueError: 5",
    "a kernel": f"{TRACEBACK}torch.AcceleratorError: CUDA error: an illegal memory access",
}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        *((text, errors.GpuMemoryShort) for text in NO_MEMORY.values()),
        *((text, errors.SettingInvalid) for text in WRONG_SETTING.values()),
        *((text, errors.DriverMissing) for text in NO_DRIVER.values()),
        *((text, errors.ServeFailed) for text in UNKNOWN.values()),
    ],
    ids=[*NO_MEMORY, *WRONG_SETTING, *NO_DRIVER, *UNKNOWN],
)
def test_the_words_of_vllm_tell_the_cause(text: str, meaning: type) -> None:
    assert watch.cause(f"INFO 11-24 10:00:00 starting\n{TRACEBACK}{text}\n") is meaning


@pytest.mark.parametrize("program", ["vllm", "bound.py"])
def test_the_words_of_the_program_around_serve_tell_the_cause(program: str) -> None:
    # As vLLM 0.32 and 0.6.3 (by scripts/bound.py) say it of VLLM_ARGS=--nonsense.
    text = f"usage: {program} [-h] [-v]\n{program}: error: unrecognized arguments: --nonsense\n"
    assert watch.cause(text) is errors.SettingInvalid


class Supervisor:
    """What the watch does to supervisord, and a clock."""

    def __init__(self) -> None:
        self.signals: list[tuple[int, int]] = []
        self.stopped: list[str] = []
        self.now = 1000.0

    def stopProcess(self, name: str, wait: bool) -> None:
        self.stopped.append(name)


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    fake = Supervisor()
    rpc = types.SimpleNamespace(supervisor=fake)
    monkeypatch.setattr(os, "kill", lambda pid, number: fake.signals.append((pid, number)))
    monkeypatch.setattr(watch.childutils, "getRPCInterface", lambda environ: rpc)
    monkeypatch.setattr(watch.time, "monotonic", lambda: fake.now)
    return fake


def ends(watched: Watch, name: str, text: str, times: int = 1, pid: int = 7) -> None:
    for _ in range(times):
        # As supervisor hands it on: in pieces.
        watched.printed(name, TRACEBACK + text[:9])
        watched.printed(name, text[9:] + "\n")
        watched.ended(name, pid)


def given_up(folder: Path) -> tuple[int, str]:
    code, reason = (folder / "given-up").read_text().strip().split("\n")
    return int(code), reason


ENDED = [(os.getppid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    ("text", "code"),
    [(WRONG_SETTING["what vLLM refuses"], 2), (NO_DRIVER["no card"], 14)],
)
def test_what_stays_wrong_is_tried_once(
    tmp_path: Path, supervisor: Supervisor, text: str, code: int
) -> None:
    ends(Watch(tmp_path, 1), "vllm_0", text)
    assert supervisor.signals == ENDED
    assert given_up(tmp_path)[0] == code


def test_too_little_memory_is_tried_three_times(tmp_path: Path, supervisor: Supervisor) -> None:
    watched = Watch(tmp_path, 1)
    ends(watched, "vllm_0", NO_MEMORY["no block"], times=2)
    assert supervisor.signals == []
    ends(watched, "vllm_0", NO_MEMORY["the allocator"])
    assert supervisor.signals == ENDED
    assert given_up(tmp_path) == (17, "vllm_0 found too little memory, also with less")


def test_a_crash_is_tried_four_times(tmp_path: Path, supervisor: Supervisor) -> None:
    watched = Watch(tmp_path, 1)
    ends(watched, "vllm_0", UNKNOWN["a kernel"], times=3)
    assert supervisor.signals == []
    ends(watched, "vllm_0", UNKNOWN["a kernel"])
    assert supervisor.signals == ENDED
    assert given_up(tmp_path) == (12, "vllm_0 ended 4 times in a row")


def test_crashes_that_lie_far_apart_are_not_in_a_row(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    watched = Watch(tmp_path, 1)
    for _ in range(10):
        supervisor.now += 601
        ends(watched, "vllm_0", UNKNOWN["a kernel"])
    assert supervisor.signals == []


def test_the_words_of_one_start_do_not_count_for_the_next(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    watched = Watch(tmp_path, 1)
    ends(watched, "vllm_0", NO_MEMORY["no block"])
    ends(watched, "vllm_0", UNKNOWN["a kernel"], times=2)
    assert supervisor.signals == []
    assert watched.short["vllm_0"] == 1


def test_one_that_has_served_is_started_again_whatever_it_said(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    (tmp_path / "answered-0").write_text("7")
    watched = Watch(tmp_path, 1)
    ends(watched, "vllm_0", "ValueError: something of a request", pid=7)
    assert supervisor.signals == []
    # Another process of that replica has not.
    ends(watched, "vllm_0", "ValueError: something at its start", pid=8)
    assert given_up(tmp_path)[0] == 2


def test_of_two_replicas_one_is_stopped_and_the_other_lives(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    watched = Watch(tmp_path, 2)
    ends(watched, "vllm_1", UNKNOWN["a kernel"], times=4)
    assert supervisor.stopped == ["vllm:vllm_1"]
    assert supervisor.signals == []
    assert not (tmp_path / "given-up").exists()
    ends(watched, "vllm_0", UNKNOWN["a kernel"], times=3)
    assert supervisor.signals == [], "each replica has a count of its own"
    ends(watched, "vllm_0", UNKNOWN["a kernel"])
    assert supervisor.signals == ENDED
    assert given_up(tmp_path)[0] == 12


def test_without_an_agent_nobody_goes_on(tmp_path: Path, supervisor: Supervisor) -> None:
    Watch(tmp_path, 2).give_up("agent", "agent ended", errors.ServeFailed)
    assert supervisor.stopped == []
    assert supervisor.signals == ENDED


def test_only_the_last_of_what_is_printed_is_kept(tmp_path: Path) -> None:
    watched = Watch(tmp_path, 1)
    for _ in range(10):
        watched.printed("vllm_0", "x" * 9000)
    watched.printed("vllm_0", "the end")
    assert len(watched.tails["vllm_0"]) == 20_000
    assert watched.tails["vllm_0"].endswith("the end")


def test_an_error_of_ours_keeps_its_own_code(tmp_path: Path, supervisor: Supervisor) -> None:
    # scripts/serve.py notes it; the words alone tell nothing.
    (tmp_path / "failed-0").write_text(str(errors.SnapshotMissing.exit_code))
    ends(Watch(tmp_path, 1), "vllm_0", "error: the model is not there")
    assert supervisor.signals == ENDED
    assert given_up(tmp_path)[0] == errors.SnapshotMissing.exit_code
    assert not (tmp_path / "failed-0").exists()
