"""Turn Settings into vLLM's command line, print it and become vLLM."""

import argparse
import json
import os
import shlex
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import errors, fit, gpu, middleware, snapshot, variants
from scripts.settings import Settings

_SECRET_WORDS = ("key", "token", "secret", "password")
# Drivers since this one load what Triton's own ptxas (CUDA 12) assembles.
_CUDA_12_DRIVER = "525.60.13"
_ROOT = Path(__file__).resolve().parent.parent
# Seconds before another start: 2, 4, 8, … after starts without an answer.
_MOST_BACKOFF = 30


@dataclass(frozen=True)
class _Dialect:
    """How vLLM from one release on is spoken to, where it differs from its neighbours."""

    since: str
    # What takes `serve` and its arguments; the first word is a program of the environment.
    program: tuple[str, ...] = ("vllm",)
    arguments: tuple[str, ...] = ()
    # The argument that lets running requests finish at a stop, where it has one.
    drain: str = ""
    # Whether it bounds the compilation of a client's expressions.
    patterns: bool = False
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
        patterns=True,
        # It would be compiled with nvcc at first use; the image has no nvcc.
        environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    ),
)


def _dialect(settings: Settings) -> _Dialect:
    version = variants.number(variants.load()[settings.variant].vllm)
    return [dialect for dialect in _DIALECTS if variants.number(dialect.since) <= version][-1]


def arguments(settings: Settings, where: Path, replica: int = 0) -> list[str]:
    """Return vLLM's argument list for the model in folder `where`, and a replica's number."""
    dialect = _dialect(settings)
    result = [*dialect.program, "serve", str(where)]
    result += ["--served-model-name", settings.served_model_name]
    result += ["--host", settings.replica_host, "--port", str(settings.replica_port + replica)]
    # Bounds on requests, and the line a request that takes the place of uvicorn's.
    result += ["--middleware", "scripts.middleware.Middleware", "--uvicorn-log-level", "warning"]
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


def environment(
    settings: Settings, environ: Mapping[str, str], vocabulary: int = 0
) -> dict[str, str]:
    """Return vLLM's environment: caches in the volume, no statistics, no hub, bounds.

    `vocabulary` is the number of token ids that the model has, 0 where it is not known.
    """
    caches = settings.caches / settings.variant
    one_worker = settings.variant == "cpu" and settings.tensor_parallel_size == 1
    return {
        **environ,
        # Each process costs seconds of imports; the engine's own does the work of a lone worker.
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_worker else {}),
        **_dialect(settings).environment,
        **_assembler(),
        # vLLM imports its middleware from here.
        "PYTHONPATH": str(_ROOT),
        "VOCABULARY": str(vocabulary),
        "TAKE_PATTERNS": "1" if _dialect(settings).patterns else "0",
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


def _failed_starts(run: Path, replica: int) -> int:
    """Return how many starts before this one ended without an answer, and note this one.

    vLLM keeps this process's id, and agent.py notes the one that answered.
    """
    starts, answered = run / f"starts-{replica}", run / f"answered-{replica}"
    before = starts.read_text().split() if starts.exists() else []
    if answered.exists() and answered.read_text() in before:
        before = []
    starts.write_text(" ".join([*before, str(os.getpid())]))
    return len(before)


def _share_of(replica: int, settings: Settings, gpus: list[gpu.Gpu]) -> dict[str, str]:
    """Return the environment that gives a replica its own part of the GPUs, or of the CPUs."""
    size = settings.tensor_parallel_size
    if gpus:
        own = gpus[replica * size : (replica + 1) * size]
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(card.index) for card in own)}
    count = settings.replicas or 1
    cpus = sorted(os.sched_getaffinity(0))
    if count == 1 or len(cpus) < count or size > 1:
        return {}
    each = len(cpus) // count
    own = cpus[replica * each : (replica + 1) * each]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own))}


def _log_config(settings: Settings) -> dict[str, str]:
    """Return the environment that makes vLLM log in JSON, where that is asked for."""
    if settings.log_format != "json":
        return {}
    path = settings.run / "logging.json"
    path.write_text(json.dumps(middleware.log_config()), encoding="utf-8")
    return {"VLLM_LOGGING_CONFIG_PATH": str(path)}


def main(argv: list[str] | None = None) -> int:
    """Become vLLM; returns only when that is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("replica", type=int, nargs="?", default=0, help="its number, from 0")
    replica = parser.parse_args(argv).replica
    settings = Settings.from_environ()
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    failed = _failed_starts(settings.run, replica)
    gpus = gpu.look()[1] if variants.load()[settings.variant].cuda else []
    share = _share_of(replica, settings, gpus) if settings.replicas > 1 else {}
    own = [
        card for card in gpus if str(card.index) in share.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ]
    weights = snapshot.load(where).weights
    fitted, lines = fit.of_folder(settings, own or gpus, where, weights, min(failed, 2))
    if failed:
        pause = min(2**failed, _MOST_BACKOFF)
        less = f"; {lines[-1]}" if gpus else ""
        print(f"serve: {failed} starts without an answer, waiting {pause} s{less}", flush=True)
        time.sleep(pause)
    command = arguments(fitted, where, replica)
    print(f"serve: {masked(command)}", flush=True)
    program = Path(sys.executable).with_name(command[0])
    environ = environment(fitted, os.environ, fit.vocabulary(where))
    os.execve(program, command, {**environ, **share, **_log_config(settings)})


def _noted(argv: list[str] | None = None) -> int:
    """Run `main`; leave the exit code of an error of ours for scripts/watch.py."""
    try:
        return main(argv)
    except errors.StackError as error:
        run = Path(os.environ.get("RUN_DIR") or "/run/stack")
        replica = sys.argv[1] if len(sys.argv) > 1 else "0"
        (run / f"failed-{replica}").write_text(str(error.exit_code))
        raise


if __name__ == "__main__":
    errors.run(_noted)
