"""vLLM's command line and environment."""

from pathlib import Path

from scripts import serve
from scripts.settings import Settings


def command(**environ: str) -> list[str]:
    return serve.arguments(Settings.from_environ(environ), Path("/models/a/b"))


def test_settings_become_arguments() -> None:
    words = " ".join(command(PORT="9000", MAX_MODEL_LEN="2048", DTYPE="float16"))
    assert words.startswith("vllm serve /models/a/b --served-model-name glm-4-9b-chat")
    for part in ("--port 9000", "--max-model-len 2048", "--dtype float16"):
        assert part in words


def test_other_arguments_come_last_and_split_like_a_shell() -> None:
    assert command(VLLM_ARGS="--seed 7 --x 'a b'")[-4:] == ["--seed", "7", "--x", "a b"]


def test_a_cpu_does_not_compile_and_knows_no_share_of_a_card() -> None:
    cpu, gpu = command(VARIANT="cpu"), command(VARIANT="cu121")
    assert "--enforce-eager" in cpu and "--gpu-memory-utilization" not in cpu
    assert "--enforce-eager" not in gpu and "--gpu-memory-utilization" in gpu


def test_secrets_are_masked_when_printed() -> None:
    shown = serve.masked(
        ["vllm", "--hf-token", "hf_1", "--x-key=k2", "--ssl_password", "p3", "--max-num-seqs", "4"]
    )
    assert shown == "vllm --hf-token *** --x-key=*** --ssl_password *** --max-num-seqs 4"


def test_nothing_is_reported_or_looked_up() -> None:
    environment = serve.environment(Settings.from_environ({"VARIANT": "cpu"}), {"A": "b"})
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert environment[name] == "1"
    assert environment["A"] == "b"
    assert environment["VLLM_CACHE_ROOT"].startswith("/caches/cpu/")
