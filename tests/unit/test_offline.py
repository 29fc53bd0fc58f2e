"""The engine without a server: the server's settings, and what makes it quicker."""

import json
from pathlib import Path

import pytest

from scripts import offline, presets
from scripts.gpu import Gpu
from scripts.settings import Settings

GLM = presets.named("glm-4-9b-chat")
GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(GLM.config))
    return tmp_path


def quicker(folder: Path, gigabytes: int = 80, **environ: str) -> str:
    settings = Settings.from_environ({"VARIANT": "cu121", **environ})
    gpus = [Gpu(0, "card", (8, 6), gigabytes * GIB, gigabytes * GIB)]
    return " ".join(offline._quicker(settings, gpus, folder, GLM.weights).vllm_args)


def test_vllm_of_cuda_121_takes_several_steps_at_a_time_without_a_server(folder: Path) -> None:
    assert quicker(folder) == "--num-scheduler-steps 8"
    assert quicker(folder, VARIANT="cu130") == ""


def test_what_a_user_decides_about_batches_stays(folder: Path) -> None:
    assert quicker(folder, VLLM_ARGS="--enable-chunked-prefill") == "--enable-chunked-prefill"
    assert quicker(folder, VLLM_ARGS="--num-scheduler-steps=2") == "--num-scheduler-steps=2"


def test_a_context_that_needs_prompts_in_pieces_goes_before_speed(folder: Path) -> None:
    assert quicker(folder, 24, MAX_MODEL_LEN="40000") == ""
    assert "--num-scheduler-steps" in quicker(folder, 24, MAX_MODEL_LEN="4096")


def test_vllm_gets_the_settings_of_the_server_and_the_users_own_arguments_last() -> None:
    environ = {
        "VARIANT": "cpu",
        "MAX_MODEL_LEN": "512",
        "TENSOR_PARALLEL_SIZE": "1",
        "VLLM_ARGS": "--seed 3",
    }
    words = offline._arguments(Settings.from_environ(environ), Path("/m"))
    assert words[:2] == ["--model", "/m"]
    assert " ".join(words).endswith("--seed 3")
    assert "--max-model-len 512" in " ".join(words)
