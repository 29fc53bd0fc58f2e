"""How a start is cut into phases by vLLM's own lines, and that no start is waited for in vain."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scripts import bench_start, errors, report
from scripts.bench_start import Log, Start
from scripts.settings import Settings

# Seconds and lines of a start; the long ones cut. The first is what one printed, the others have
# the forms of the sources that scripts/bench_start.py names.
V1_CPU = """
0.251 fit: context 1024 tokens, bfloat16
0.306 2026-11-24 18:54:57,305 INFO supervisord started with pid 8
1.314 2026-11-24 18:54:58,314 INFO spawned: 'vllm_0' with pid 11
1.399 serve: vllm serve /models/rehearsal/glm-4-tiny --served-model-name glm-4-9b-chat
5.947 W1124 18:55:02.946000 11 torch/_library/triton.py:53] Triton not available
6.013 (APIServer pid=11) INFO 11-24 18:55:03 [api_utils.py:347]        █     █     █▄   ▄█
6.013 (APIServer pid=11) INFO 11-24 18:55:03 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  \
version 0.32.0
6.417 2026-11-24 18:55:03,416 INFO success: vllm_0 entered RUNNING state, process has stayed up
11.077 (APIServer pid=11) INFO 11-24 18:55:08 [model.py:733] Resolved architecture: ChatGLMModel
14.666 (EngineCore pid=29) INFO 11-24 18:55:11 [core.py:133] Initializing a V1 LLM engine \
(v0.32.0) with config: model='/models/rehearsal/glm-4-tiny', speculative_config=None
15.008 (EngineCore pid=29) INFO 11-24 18:55:12 [cpu_model_runner.py:68] Starting to load model \
/models/rehearsal/glm-4-tiny...
15.391 (EngineCore pid=29) INFO 11-24 18:55:12 [default_loader.py:501] Loading weights took 0.02 \
seconds
16.010 (EngineCore pid=29) INFO 11-24 18:55:13 [kv_cache_utils.py:2327] CPU KV cache size: 524,288 \
tokens, Maximum concurrency for 1,024 tokens per request: 512.00x
16.060 (EngineCore pid=29) INFO 11-24 18:55:13 [core.py:402] init engine (profile, create kv \
cache, warmup model) took 0.05 s
16.855 (APIServer pid=11) INFO 11-24 18:55:13 [entry.py:140] Starting vLLM server on \
http://127.0.0.1:8000
17.469 agent: replica 0: ready
"""
V1_CUDA = """
1.4 serve: vllm serve /models/ZhipuAI/glm-4-9b-chat --dtype bfloat16
7.0 {"message": "vLLM server version 0.32.0, serving model /models/ZhipuAI/glm-4-9b-chat"}
18.0 (EngineCore pid=29) INFO 11-24 18:55:11 [core.py:133] Initializing a V1 LLM engine (v0.32.0)
20.0 (EngineCore pid=29) INFO 11-24 18:55:12 [model_runner.py:396] Loading model from scratch...
23.0 (EngineCore pid=29) INFO 11-24 18:55:12 [default_loader.py:501] Loading weights took 2.50 \
seconds
24.0 (EngineCore pid=29) INFO 11-24 18:55:12 [model_runner.py:425] Model loading took 17.56 GiB \
memory and 3.912345 seconds
50.0 (EngineCore pid=29) INFO 11-24 18:55:12 [monitor.py:62] torch.compile took 25.52 s in total
51.0 (EngineCore pid=29) INFO 11-24 18:55:12 [monitor.py:91] Initial profiling/warmup run took \
0.71 s
52.0 (EngineCore pid=29) INFO 11-24 18:55:12 [model_runner.py:1128] Graph capturing finished in 1 \
secs, took 0.05 GiB
53.0 (EngineCore pid=29) INFO 11-24 18:55:13 [kv_cache_utils.py:2327] GPU KV cache size: 1,310,720 \
tokens, Maximum concurrency for 131,072 tokens per request: 10.00x
60.0 (EngineCore pid=29) INFO 11-24 18:55:12 [model_runner.py:1128] Graph capturing finished in 6 \
secs, took 0.50 GiB
60.5 (EngineCore pid=29) INFO 11-24 18:55:13 [core.py:389] init engine (profile, create kv cache, \
warmup model) took 36.40 s (compilation: 25.52 s)
"""
V1_CU118 = """
1.4 serve: vllm serve /models/ZhipuAI/glm-4-9b-chat --dtype bfloat16
4.0 INFO 11-24 18:55:01 [__init__.py:241] Automatically detected platform cuda.
7.0 (APIServer pid=11) INFO 11-24 18:55:03 [api_server.py:1805] vLLM API server version 0.10.1.1
18.0 (EngineCore_0 pid=29) INFO 11-24 18:55:11 [core.py:74] Initializing a V1 LLM engine \
(v0.10.1.1) with config: model='/models/ZhipuAI/glm-4-9b-chat'
20.0 (EngineCore_0 pid=29) INFO 11-24 18:55:12 [gpu_model_runner.py:1953] Starting to load model \
/models/ZhipuAI/glm-4-9b-chat...
24.0 (EngineCore_0 pid=29) INFO 11-24 18:55:12 [gpu_model_runner.py:2007] Model loading took \
17.5626 GiB and 3.912345 seconds
50.0 (EngineCore_0 pid=29) INFO 11-24 18:55:12 [monitor.py:34] torch.compile takes 25.52 s in total
53.0 (EngineCore_0 pid=29) INFO 11-24 18:55:13 [kv_cache_utils.py:849] GPU KV cache size: \
1,310,720 tokens
60.0 (EngineCore_0 pid=29) INFO 11-24 18:55:12 [gpu_model_runner.py:2708] Graph capturing finished \
in 6 secs, took 0.50 GiB
60.5 (EngineCore_0 pid=29) INFO 11-24 18:55:13 [core.py:214] init engine (profile, create kv \
cache, warmup model) took 36.40 seconds
"""
V0_TWO_GPUS = """
1.5 serve: python -m scripts.bound serve /models/ZhipuAI/glm-4-9b-chat --dtype bfloat16
10.0 INFO 11-24 18:55:03 api_server.py:528] vLLM API server version 0.6.3.post1
10.1 INFO 11-24 18:55:03 api_server.py:179] Started engine process with PID 31
19.0 INFO 11-24 18:55:12 llm_engine.py:237] Initializing an LLM engine (v0.6.3.post1) with config: \
model='/models/ZhipuAI/glm-4-9b-chat', speculative_config=None
21.0 INFO 11-24 18:55:14 model_runner.py:1056] Starting to load model /models/ZhipuAI/glm-4-9b-chat
21.5 (VllmWorkerProcess pid=44) INFO 11-24 18:55:14 model_runner.py:1056] Starting to load model
25.0 INFO 11-24 18:55:18 model_runner.py:1067] Loading model weights took 8.7813 GB
26.0 (VllmWorkerProcess pid=44) INFO 11-24 18:55:19 model_runner.py:1067] Loading model weights \
took 8.7813 GB
29.0 INFO 11-24 18:55:22 distributed_gpu_executor.py:57] # GPU blocks: 83500, # CPU blocks: 6553
30.0 INFO 11-24 18:55:23 model_runner.py:1395] Capturing the model for CUDA graphs.
43.0 INFO 11-24 18:55:36 model_runner.py:1523] Graph capturing finished in 13 secs.
"""


def read(text: str) -> Log:
    """Let a log read these lines, each as it comes."""
    log = Log()
    for line in text.strip().splitlines():
        seconds, _, rest = line.partition(" ")
        log.add(float(seconds), f"{rest}\r\n")
    return log


def test_a_start_on_a_cpu_has_no_cuda_graphs() -> None:
    log = read(V1_CPU)
    phases = log.phases(health=16.9, ready=17.5, first_token=17.52)
    assert phases == {
        "container": 1.399,
        "imports": 4.614,
        "engine process": 8.653,
        "engine": 0.342,
        "weights": 0.383,
        "compile and profile": 0.619,
        # What no line ends is part of what follows.
        "server": 0.89,
        "ready": 0.6,
        "first token": 0.02,
    }
    assert log.says == {"weights": 0.02, "engine initialisation": 0.05}
    assert log.command.startswith("vllm serve /models/rehearsal/glm-4-tiny ")
    assert not log.lost


@pytest.mark.parametrize("text", [V1_CUDA, V1_CU118], ids=["0.32.0", "0.10.1.1"])
def test_a_start_of_v1_on_a_gpu(text: str) -> None:
    log = read(text)
    phases = log.phases(health=61, ready=62, first_token=62.5)
    assert phases == {
        "container": 1.4,
        "imports": 5.6,
        "engine process": 11,
        "engine": 2,
        # The last of its lines, or of several GPUs; and not the graphs of a trial before the cache.
        "weights": 4,
        "compile and profile": 29,
        "CUDA graphs": 7,
        "server": 1,
        "ready": 1,
        "first token": 0.5,
    }
    assert log.says["model loading"] == 3.912345
    assert log.says["torch.compile"] == 25.52
    assert log.says["graph capture"] == 6
    assert log.says["engine initialisation"] == 36.4


def test_a_start_of_v0_on_two_gpus() -> None:
    phases = read(V0_TWO_GPUS).phases(health=44, ready=45, first_token=45.25)
    assert phases == {
        "container": 1.5,
        "imports": 8.5,
        "engine process": 9,
        "engine": 2.5,
        "weights": 4.5,
        "compile and profile": 3,
        "CUDA graphs": 14,
        "server": 1,
        "ready": 1,
        "first token": 0.25,
    }


def test_whatever_lines_come_the_phases_sum_up_to_the_first_token() -> None:
    for text in ("", V1_CPU, V1_CUDA, V0_TWO_GPUS):
        for skipped in range(len(text.splitlines())):
            lines = text.strip().splitlines()
            del lines[skipped : skipped + 3]
            phases = read("\n".join(lines[::-1])).phases(health=70, ready=71, first_token=72)
            assert sum(phases.values()) == pytest.approx(72)
            assert list(phases)[-3:] == ["server", "ready", "first token"]


def test_a_line_after_the_server_answers_ends_no_phase() -> None:
    log = read(f"{V1_CPU}18.0 middleware: somebody asks about 'KV cache size: '")
    assert log.phases(16.9, 17.5, 17.52) == read(V1_CPU).phases(16.9, 17.5, 17.52)


def test_a_progress_bar_is_one_of_the_last_lines() -> None:
    log = Log()
    log.add(1, "\rLoading shards:   0%\rLoading shards:  50%\rLoading shards: 100%\n")
    log.add(2, "\n")
    assert list(log.last) == ["Loading shards: 100%"]


def begin(tmp_path: Path, program: str, limit: float = 30) -> Start:
    environ = {**os.environ, "RUN_DIR": str(tmp_path)}
    return Start("cold 1", [sys.executable, "-c", program], environ, limit)


def test_a_child_that_ends_early_is_told_with_its_last_lines(tmp_path: Path) -> None:
    start = begin(tmp_path, "import sys\nfor k in range(60): print('line', k)\nsys.exit(3)")
    with pytest.raises(errors.ServeFailed) as caught:
        start.until("/health answers", lambda: False)
    start.end(5)
    assert "cold 1: scripts.supervise ended with code 3 before /health answers" in str(caught.value)
    assert "line 59" in str(caught.value) and "line 20" in str(caught.value)
    assert "line 19" not in str(caught.value)


def test_a_vllm_that_ends_is_told_before_supervisor_starts_another(tmp_path: Path) -> None:
    line = "2026-11-24 19:07:19,231 WARN exited: vllm_0 (exit status 2; not expected)"
    start = begin(tmp_path, f"import time\nprint({line!r}, flush=True)\ntime.sleep(60)")
    with pytest.raises(errors.ServeFailed, match="vLLM ended before it is ready") as caught:
        start.until("it is ready", lambda: False)
    start.end(5)
    assert "exit status 2" in str(caught.value)


def test_no_start_is_waited_for_beyond_the_limit(tmp_path: Path) -> None:
    start = begin(tmp_path, "import time\ntime.sleep(60)", limit=0.5)
    with pytest.raises(errors.ServeFailed, match="are over before it is ready"):
        start.until("it is ready", lambda: False)
    start.end(5)
    assert start.process.poll() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, errors.Terminated)]
)
def test_a_signal_ends_the_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type
) -> None:
    monkeypatch.setattr(bench_start, "_told", [number])
    start = begin(tmp_path, "import time\ntime.sleep(60)")
    with pytest.raises(raised):
        start.until("it is ready", lambda: False)
    start.end(5)
    assert start.process.poll() is not None


def test_what_ignores_sigterm_is_killed_also_in_supervisords_session(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, lambda *_: None); print(1, flush=True)"
    mark = str(tmp_path / "supervisord.pid")
    start = begin(
        tmp_path,
        "import subprocess, sys\n"
        f"command = [sys.executable, '-c', {deaf + '; time.sleep(60)'!r}]\n"
        "child = subprocess.Popen(command, start_new_session=True)\n"
        f"open({mark!r}, 'w').write(str(child.pid))\n"
        f"{deaf}; time.sleep(60)",
    )
    start.until("both are deaf", lambda: len(start.log.last) == 2)
    sessions = {start.process.pid, int(Path(mark).read_text())}
    assert len(bench_start._processes(sessions)) == 2
    start.end(0.5)
    assert bench_start._processes(sessions) == []
    assert start.process.poll() == -signal.SIGKILL


def settings(tmp_path: Path, **more: str) -> Settings:
    folders = {"CACHES_DIR": str(tmp_path / "caches"), "RUN_DIR": str(tmp_path / "run")}
    return Settings.from_environ({"VARIANT": "cpu", **folders, **more})


def test_the_caches_folder_goes_with_those_of_killed_runs(tmp_path: Path) -> None:
    own = settings(tmp_path)
    left = own.caches / "bench-start-1" / "vllm"
    left.mkdir(parents=True)
    (own.caches / "cpu").mkdir()
    with pytest.raises(KeyboardInterrupt), bench_start._caches_folder(own) as folder:
        (folder / "vllm").mkdir()
        assert sorted(own.caches.iterdir()) == [folder, own.caches / "cpu"]
        raise KeyboardInterrupt
    assert list(own.caches.iterdir()) == [own.caches / "cpu"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    own = settings(tmp_path)
    with bench_start._caches_folder(own) as folder:
        with (
            pytest.raises(errors.ServeFailed, match="another bench-start works"),
            bench_start._caches_folder(own),
        ):
            pass
        assert folder.is_dir()


def test_a_caches_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = settings(tmp_path, CACHES_DIR=str(tmp_path / "file"))
    with (
        pytest.raises(errors.VolumeUnwritable, match="cannot be used"),
        bench_start._caches_folder(own),
    ):
        pass


def test_the_folder_of_sockets_is_private_and_short(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        short = settings(tmp_path, RUN_DIR=f"{place}/run")
        with bench_start._run_folder(short) as folder:
            assert folder.parent == short.run
            assert folder.stat().st_mode & 0o777 == 0o700
        assert list(short.run.iterdir()) == []
    long = settings(tmp_path, RUN_DIR=str(tmp_path / ("long" * 25)))
    with bench_start._run_folder(long) as folder:
        assert len(str(folder / "supervisor.sock.4194304")) < 108
    assert not folder.exists()


def test_the_document_is_all_there_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measured = iter([(20.0, 21.0), (10.0, 10.5), (12.0, 12.5)])
    seen = []

    def measure(name: str, own: Settings, caches: Path, limit: float) -> dict:
        seen.append((name, caches.name, sorted(entry.name for entry in caches.iterdir())))
        (caches / "compiled").touch()
        ready, first = next(measured)
        phases = {"imports": ready, "CUDA graphs": 0.5, "first token": first - ready - 0.5}
        if name == "warm 1":
            del phases["CUDA graphs"]
        times = {"health": ready, "ready": ready, "first_token": first, "seconds": first}
        return {"phases": phases, **times, "vllm_says": {}, "command": "vllm serve --port 1"}

    output = io.StringIO()
    monkeypatch.setattr(bench_start, "measure", measure)
    monkeypatch.setattr(bench_start.report, "claim_output", lambda: output)
    monkeypatch.setattr(bench_start.signal, "signal", lambda *_: None)
    own = {"VARIANT": "cpu", "VLLM_ARGS": "--load-format dummy"}
    for name, value in {**own, "CACHES_DIR": str(tmp_path), "RUN_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert bench_start.main(["--limit", "60"]) == 0

    folder = f"bench-start-{os.getpid()}"
    assert seen == [
        ("cold 1", folder, []),
        ("warm 1", folder, ["compiled"]),
        ("warm 2", folder, ["compiled"]),
    ]
    found = json.loads(output.getvalue())
    assert found["job"] == "bench-start"
    assert found["settings"] == {
        **{"cold": 1, "warm": 2, "limit": 60, "weights": "dummy"},
        "command": "vllm serve --port 1",
    }
    assert [start["kind"] for start in found["starts"]] == ["cold", "warm", "warm"]
    assert found["starts"][0]["first_token"] == 21
    assert "page cache" in found["note"]
    assert found["warm_median"]["first_token"] == 11.5
    # Not in both.
    assert "CUDA graphs" not in found["warm_median"]["phases"]
    assert found["warm_of_cold"] == 0.548
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert "warm start to first token is 0.55 of the cold one" in lines
    assert any(line.startswith("| warm 1") and "–" in line for line in lines)
    assert any("random weights" in line for line in lines)


@pytest.mark.parametrize("words", [["--cold", "0"], ["--warm", "-1"], ["--limit", "x"]])
def test_counts_that_make_no_sense_are_refused(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_start", *words],
        cwd=Path(report.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "a whole number from" in done.stderr and done.stdout == ""
