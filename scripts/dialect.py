"""How each vLLM is spoken to: the arguments of its engine, and the environment that it runs in."""

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import gpu, variants
from scripts.settings import Settings

# Drivers since this one load what Triton's own ptxas (CUDA 12) assembles.
_CUDA_12_DRIVER = "525.60.13"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Dialect:
    """How vLLM from one release on is spoken to, where it differs from its neighbours."""

    since: str
    # What takes `serve` and its arguments; the first word is a program of the environment.
    program: tuple[str, ...] = ("vllm",)
    # Of the server, of the engine under it, and of an engine without a server.
    server: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()
    # The argument that lets running requests finish at a stop, where it has one.
    drain: str = ""
    # Whether it bounds the compilation of a client's expressions.
    patterns: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


_DIALECTS = (
    Dialect(
        "0.6",
        program=("python", "-m", "scripts.bound"),
        # These log every prompt unless told not to.
        server=("--disable-log-requests",),
        # The other one, outlines, is left out of the image (images/cu121.omit).
        engine=("--guided-decoding-backend", "lm-format-enforcer"),
        # 1.31 times the requests of one step at a time, on an H100. Not for the server: a request
        # with a schema would end its engine.
        offline=("--num-scheduler-steps", "8"),
    ),
    Dialect("0.6.4", server=("--disable-log-requests",)),
    Dialect("0.10"),
    Dialect(
        "0.20",
        drain="--shutdown-timeout",
        patterns=True,
        # It would be compiled with nvcc at first use; the image has no nvcc.
        environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    ),
)


def of(settings: Settings) -> Dialect:
    """Return the dialect of the vLLM that the variant has."""
    version = variants.number(variants.load()[settings.variant].vllm)
    return [dialect for dialect in _DIALECTS if variants.number(dialect.since) <= version][-1]


def engine_arguments(settings: Settings) -> list[str]:
    """Return the arguments of vLLM's engine that follow from the settings."""
    result = ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)]
    result += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    if settings.variant == "cpu":
        # Compiling takes minutes on a few cores and gains little for the models a CPU can serve.
        result += ["--enforce-eager"]
    else:
        result += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    if settings.quantization:
        result += ["--quantization", settings.quantization]
    if settings.trust_remote_code:
        result += ["--trust-remote-code"]
    return [*result, *of(settings).engine]


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
        **of(settings).environment,
        **_assembler(),
        # vLLM imports its middleware from here.
        "PYTHONPATH": str(_ROOT),
        "VOCABULARY": str(vocabulary),
        "TAKE_PATTERNS": "1" if of(settings).patterns else "0",
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
