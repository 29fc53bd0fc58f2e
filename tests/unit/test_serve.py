"""vLLM's command line and environment."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from scripts import dialect, gpu, serve, variants
from scripts.settings import Settings
from tests.stacks import ROOT, run


def command(**environ: str) -> list[str]:
    return serve.arguments(Settings.from_environ(environ), Path("/models/a/b"))


def test_settings_become_arguments() -> None:
    words = " ".join(command(PORT="9000", MAX_MODEL_LEN="2048", DTYPE="float16", VARIANT="cu130"))
    assert words.startswith("vllm serve /models/a/b --served-model-name glm-4-9b-chat")
    for part in ("--port 9000", "--max-model-len 2048", "--dtype float16"):
        assert part in words


def test_each_line_of_vllm_is_spoken_to_in_its_own_words() -> None:
    # Prompts are logged unless the old line is told not to; the new ones do not know the word.
    assert "--disable-log-requests" in command(VARIANT="cu121")
    for variant in ("cpu", "cu118", "cu130"):
        assert "--disable-log-requests" not in command(VARIANT=variant)
        assert command(VARIANT=variant)[:2] == ["vllm", "serve"]
    # That one listens on every interface, whatever --host says.
    assert command(VARIANT="cu121")[:4] == ["python", "-m", "scripts.bound", "serve"]
    drains = [v for v in variants.load() if "--shutdown-timeout" in command(VARIANT=v)]
    assert drains == ["cpu", "cu130"]


def test_the_old_ptxas_is_used_with_old_drivers_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings.from_environ({"VARIANT": "cu118"})
    assert "TRITON_PTXAS_PATH" not in dialect.environment(settings, {})
    ptxas = tmp_path / "nvidia/cuda_nvcc/bin/ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for driver, path in {"470.82": str(ptxas), "525.60.13": None, "580.65": None}.items():
        monkeypatch.setattr(gpu, "look", lambda driver=driver: (driver, []))
        environment = dialect.environment(settings, {})
        assert environment.get("TRITON_PTXAS_PATH") == path, driver
        assert environment["TRITON_CACHE_DIR"] == "/caches/cu118/triton"


def test_other_arguments_come_last_and_split_like_a_shell() -> None:
    assert command(VLLM_ARGS="--seed 7 --x 'a b'")[-4:] == ["--seed", "7", "--x", "a b"]


def test_a_quantization_is_passed_on() -> None:
    assert "--quantization" not in command()
    assert "--quantization fp8" in " ".join(command(QUANTIZATION="fp8"))


def test_a_cpu_does_not_compile_and_knows_no_share_of_a_card() -> None:
    cpu, gpu = command(VARIANT="cpu"), command(VARIANT="cu121")
    assert "--enforce-eager" in cpu and "--gpu-memory-utilization" not in cpu
    assert "--enforce-eager" not in gpu and "--gpu-memory-utilization" in gpu


def test_starts_without_an_answer_are_counted_and_an_answer_ends_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for pid in (11, 12, 13):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        counts.append(serve._failed_starts(tmp_path, 0))
    assert counts == [0, 1, 2]
    # agent.py notes the process that answered.
    (tmp_path / "answered-0").write_text("13")
    monkeypatch.setattr("os.getpid", lambda: 14)
    assert serve._failed_starts(tmp_path, 1) == 0, "another replica has a count of its own"
    assert serve._failed_starts(tmp_path, 0) == 0


def test_every_line_of_vllm_gets_the_bounds_on_requests() -> None:
    for variant in variants.load():
        words = " ".join(command(VARIANT=variant))
        assert "--middleware scripts.middleware.Middleware" in words
        settings = Settings.from_environ({"VARIANT": variant})
        environment = dialect.environment(settings, {"PYTHONPATH": "/elsewhere"}, 151_552)
        assert environment["PYTHONPATH"] == str(ROOT)
        assert environment["VOCABULARY"] == "151552"
        # Those before 0.20 compile a client's expression without a bound.
        new = variants.number(variants.load()[variant].vllm) >= (0, 20)
        assert environment["TAKE_PATTERNS"] == ("1" if new else "0"), variant


def test_each_replica_has_a_port_of_its_own() -> None:
    settings = Settings.from_environ({"REPLICA_PORT": "8001", "REPLICA_HOST": "0.0.0.0"})
    for replica in range(3):
        words = " ".join(serve.arguments(settings, Path("/models/a/b"), replica))
        assert f"--host 0.0.0.0 --port {8001 + replica}" in words


def test_each_replica_gets_its_own_gpus() -> None:
    cards = [gpu.Gpu(number, "card", (9, 0), 80 << 30, 80 << 30) for number in range(4)]
    settings = Settings.from_environ({"REPLICAS": "2", "TENSOR_PARALLEL_SIZE": "2"})
    shares = [serve._share_of(replica, settings, cards) for replica in range(2)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,1", "2,3"]


def test_replicas_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 3, 4, 5})
    settings = Settings.from_environ(
        {"VARIANT": "cpu", "REPLICAS": "2", "TENSOR_PARALLEL_SIZE": "1"}
    )
    shares = [serve._share_of(replica, settings, []) for replica in range(2)]
    assert [share["VLLM_CPU_OMP_THREADS_BIND"] for share in shares] == ["2,3", "4,5"]
    alone = Settings.from_environ({"VARIANT": "cpu", "REPLICAS": "1"})
    assert serve._share_of(0, alone, []) == {}


def test_json_logs_are_asked_for_by_a_file_that_logging_takes(tmp_path: Path) -> None:
    assert serve._log_config(Settings.from_environ({"RUN_DIR": str(tmp_path)})) == {}
    settings = Settings.from_environ({"RUN_DIR": str(tmp_path), "LOG_FORMAT": "json"})
    path = serve._log_config(settings)["VLLM_LOGGING_CONFIG_PATH"]
    script = (
        "import json, logging, logging.config, sys;"
        "logging.config.dictConfig(json.load(open(sys.argv[1])));"
        "logging.getLogger('vllm.engine').info('two\\nlines')"
    )
    done = run(sys.executable, "-c", script, path).check()
    line = json.loads(done.output)
    assert (line["logger"], line["message"], line["request_id"]) == (
        "vllm.engine",
        "two\nlines",
        "-",
    )


def test_secrets_are_masked_when_printed() -> None:
    shown = serve.masked(
        ["vllm", "--hf-token", "hf_1", "--x-key=k2", "--ssl_password", "p3", "--max-num-seqs", "4"]
    )
    assert shown == "vllm --hf-token *** --x-key=*** --ssl_password *** --max-num-seqs 4"


def test_nothing_is_reported_or_looked_up() -> None:
    environment = dialect.environment(Settings.from_environ({"VARIANT": "cpu"}), {"A": "b"})
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert environment[name] == "1"
    assert environment["A"] == "b"
    assert environment["VLLM_CACHE_ROOT"].startswith("/caches/cpu/")
