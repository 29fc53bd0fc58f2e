"""Turn Settings into vLLM's command line, print it and become vLLM."""

import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import errors, fit, gpu, snapshot, variants
from scripts.settings import Settings

_SECRET_WORDS = ("key", "token", "secret", "password")
# Drivers since this one load what Triton's own ptxas (CUDA 12) assembles.
_CUDA_12_DRIVER = "525.60.13"


@dataclass(frozen=True)
class _Dialect:
    """How vLLM from one release on is spoken to, where it differs from its neighbours."""

    since: str
    # What takes `serve` and its arguments; the first word is a program of the environment.
    program: tuple[str, ...] = ("vllm",)
    arguments: tuple[str, ...] = ()
    # The argument that lets running requests finish at a stop, where it has one.
    drain: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


_DIALECTS = (
    _Dialect(
        "0.6",
        program=("python", "-m", "scripts.bound"),
        arguments=(
            # These log every prompt unless told not to.
            "--disable-log-requests",
            # The other one, outlines, is left out of the image (images/cu121.omit).
            *("--guided-decoding-backend", "lm-format-enforcer"),
        ),
    ),
    _Dialect("0.6.4", arguments=("--disable-log-requests",)),
    _Dialect("0.10"),
    _Dialect(
        "0.20",
        drain="--shutdown-timeout",
        # It would be compiled with nvcc at first use; the image has no nvcc.
        environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    ),
)


def _dialect(settings: Settings) -> _Dialect:
    version = variants.number(variants.load()[settings.variant].vllm)
    return [dialect for dialect in _DIALECTS if variants.number(dialect.since) <= version][-1]


def arguments(settings: Settings, where: Path) -> list[str]:
    """Return vLLM's argument list for the model in folder `where`."""
    dialect = _dialect(settings)
    result = [*dialect.program, "serve", str(where)]
    result += ["--served-model-name", settings.served_model_name]
    result += ["--host", settings.host, "--port", str(settings.port)]
    result += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)]
    result += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    if dialect.drain:
        result += [dialect.drain, str(settings.drain_seconds)]
    if settings.variant == "cpu":
        # Compiling takes minutes on a few cores and gains little for the models a CPU can serve.
        result += ["--enforce-eager"]
    else:
        result += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    if settings.quantization:
        result += ["--quantization", settings.quantization]
    if settings.chat_template:
        result += ["--chat-template", settings.chat_template]
    if settings.trust_remote_code:
        result += ["--trust-remote-code"]
    return [*result, *dialect.arguments, *settings.vllm_args]


def _assembler() -> dict[str, str]:
    """Return TRITON_PTXAS_PATH where Triton's own ptxas makes code too new for this driver.

    Only an image for old drivers has another one (images/cu118.in). It knows no sm_90a, so it must
    not be used where it need not.
    """
    path = Path(sysconfig.get_path("purelib"), "nvidia", "cuda_nvcc", "bin", "ptxas")
    if not path.exists():
        return {}
    driver, _ = gpu.look()
    old = variants.number(driver) < variants.number(_CUDA_12_DRIVER)
    return {"TRITON_PTXAS_PATH": str(path)} if old else {}


def environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return vLLM's environment: caches in the volume, no statistics, no hub."""
    caches = settings.caches / settings.variant
    one_worker = settings.variant == "cpu" and settings.tensor_parallel_size == 1
    return {
        **environ,
        # Each process costs seconds of imports; the engine's own does the work of a lone worker.
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_worker else {}),
        **_dialect(settings).environment,
        **_assembler(),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Our own HOST and PORT are arguments; vLLM reads variables of these names for its workers.
        "VLLM_HOST_IP": "127.0.0.1",
        # The order in which scripts/gpu.py has looked at them.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "VLLM_CONFIG_ROOT": str(caches / "config" / "vllm"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "FLASHINFER_WORKSPACE_BASE": str(caches / "flashinfer"),
        "HF_HOME": str(caches / "huggingface"),
        "XDG_CACHE_HOME": str(caches),
        "XDG_CONFIG_HOME": str(caches / "config"),
    }


def masked(command: list[str]) -> str:
    """Return the command as a shell line, with the values of secret arguments replaced."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("-") and any(
            part in _SECRET_WORDS for part in flag.lstrip("-").replace("_", "-").split("-")
        )
        if hide_next and not word.startswith("--"):
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if secret and equals else shlex.quote(word))
        hide_next = secret and not equals
    return " ".join(shown)


def _failed_starts(run: Path) -> int:
    """Return how many starts before this one ended without an answer, and note this one.

    vLLM keeps this process's id, and health.py notes the one that answered.
    """
    starts, answered = run / "starts", run / "answered"
    before = starts.read_text().split() if starts.exists() else []
    if answered.exists() and answered.read_text() in before:
        before = []
    starts.write_text(" ".join([*before, str(os.getpid())]))
    return len(before)


def main() -> int:
    """Become vLLM; returns only when that is refused."""
    settings = Settings.from_environ()
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    failed = _failed_starts(settings.run)
    gpus = gpu.look()[1] if variants.load()[settings.variant].cuda else []
    weights = snapshot.load(where).weights
    fitted, lines = fit.of_folder(settings, gpus, where, weights, min(failed, 2))
    if failed and gpus:
        print(f"serve: {failed} starts without an answer; {lines[-1]}", flush=True)
    command = arguments(fitted, where)
    print(f"serve: {masked(command)}", flush=True)
    program = Path(sys.executable).with_name(command[0])
    os.execve(program, command, environment(fitted, os.environ))


if __name__ == "__main__":
    errors.run(main)
