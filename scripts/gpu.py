"""Look at the NVIDIA driver and GPUs, and refuse what this variant cannot be served on."""

import contextlib
import os
from dataclasses import dataclass

from scripts import errors, variants
from scripts.settings import Settings
from scripts.variants import Variant, dotted

_GIB = 1 << 30
# Beyond the weights: what CUDA, cuBLAS and the activations of a smallest batch take.
_LEAST_BESIDE_WEIGHTS = 1 * _GIB
BFLOAT16_SINCE = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU: NVML's index and name, compute capability, memory in bytes (0: not told).

    `total` is what CUDA sees: without what the driver keeps for itself.
    """

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, compute capability {dotted(self.capability)})"

    @property
    def room(self) -> str:
        """Its memory in words."""
        return f"{self.free / _GIB:.1f} of {self.total / _GIB:.1f} GiB free"


def look() -> tuple[str, list[Gpu]]:
    """Return the driver's version and the GPUs that CUDA_VISIBLE_DEVICES leaves, by NVML.

    Raises:
        DriverMissing: there is no driver here, or it shows no GPU.
    """
    # nvidia-ml-py: only the environments of GPU variants have it.
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _missing(f"no NVIDIA driver is visible here ({error})") from None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        gpus = [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise _missing(f"the NVIDIA driver does not answer ({error})") from None
    finally:
        pynvml.nvmlShutdown()
    if not gpus:
        raise _missing(f"NVIDIA driver {driver} shows no GPU here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # UUIDs are left to CUDA: they name no NVML index.
    if visible and all(part.strip().isdigit() for part in visible.split(",")):
        chosen = {int(part) for part in visible.split(",")}
        gpus = [gpu for gpu in gpus if gpu.index in chosen]
    return driver, gpus


def _missing(found: str) -> errors.DriverMissing:
    return errors.DriverMissing(
        found,
        "an NVIDIA GPU, its driver, and for a container the NVIDIA Container Toolkit",
        "on the host `nvidia-smi` must work, and so must `docker run --rm --gpus all IMAGE"
        " nvidia-smi`; in .env CONTAINER_RUNTIME must be nvidia; without a GPU: make up CUDA=cpu",
    )


def _gpu(pynvml, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        total, free = memory.total - memory.reserved, memory.free
    except pynvml.NVMLError:
        total = free = 0  # A part of a GPU (MIG) may not tell.
        with contextlib.suppress(pynvml.NVMLError):
            # Drivers before 510 do not tell what they keep; on an idle card it is the difference.
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            total, free = memory.total, memory.free
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(index, pynvml.nvmlDeviceGetName(handle), capability, total, free)


def cuda_of_driver() -> str:
    """Return the newest CUDA that the driver runs, such as 13.0."""
    import pynvml

    pynvml.nvmlInit()
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    finally:
        pynvml.nvmlShutdown()
    return f"{version // 1000}.{version % 1000 // 10}"


def users(index: int) -> list[int]:
    """Return the ids of the processes that compute on a GPU, as far as this user may see them."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def require(settings: Settings, quiet: bool = False) -> list[Gpu]:
    """Return the GPUs that vLLM will take, when this variant runs on them; none for a CPU.

    Raises:
        DriverMissing, DriverTooOld, GpuUnsupported: with the CUDA= that fits instead, where there
            is one.
    """
    variant = variants.load()[settings.variant]
    if not variant.cuda:
        return []
    driver, gpus = look()
    if not variant.drives(driver):
        raise errors.DriverTooOld(
            f"NVIDIA driver {driver}",
            f"{variant.least_driver} or newer, for the CUDA {variant.cuda} of {variant.name}",
            f"{_instead(variant, driver, gpus)}update the driver",
        )
    wanted = settings.tensor_parallel_size or 1
    if len(gpus) < wanted:
        raise errors.GpuUnsupported(
            f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}",
            f"{wanted}, as TENSOR_PARALLEL_SIZE says",
            "lower TENSOR_PARALLEL_SIZE, or see NVIDIA_VISIBLE_DEVICES",
        )
    # vLLM takes the first ones, in this order (serve.py sets CUDA_DEVICE_ORDER).
    gpus = gpus[: settings.tensor_parallel_size or None]
    for gpu in gpus:
        if not variant.has_kernels(gpu.capability):
            least, greatest = variant.capabilities
            raise errors.GpuUnsupported(
                str(gpu),
                f"compute capability {least} to {greatest}, for which {variant.name} has kernels",
                f"{_instead(variant, driver, gpus)}use another GPU",
            )
        if settings.dtype == "bfloat16" and gpu.capability < BFLOAT16_SINCE:
            raise errors.GpuUnsupported(
                f"{gpu}, which has no bfloat16, and DTYPE=bfloat16",
                f"compute capability {dotted(BFLOAT16_SINCE)} for bfloat16, or float16",
                "set DTYPE=float16 in .env",
            )
        if not quiet:
            print(f"gpu: NVIDIA driver {driver}, {gpu}, {gpu.room}", flush=True)
    return gpus


def require_memory(settings: Settings, gpus: list[Gpu], weights: int) -> None:
    """Raise GpuMemoryShort when a GPU's part of the weights, in bytes, or vLLM's share lacks room.

    A GPU that does not tell its memory is not refused.
    """
    for gpu in filter(lambda gpu: gpu.total, gpus):
        _require_room(settings.gpu_memory_utilization, gpu, weights // len(gpus))


def _require_room(share: float, gpu: Gpu, weights: int) -> None:
    least = weights + _LEAST_BESIDE_WEIGHTS
    free = f"{gpu}: {gpu.room}"
    if least > gpu.total:
        raise errors.GpuMemoryShort(
            free,
            f"{least / _GIB:.1f} GiB: the weights and a little beside them",
            "use a GPU with more memory, more GPUs (TENSOR_PARALLEL_SIZE), or a quantised model"
            " (MODEL_ID)",
        )
    if gpu.free < max(share * gpu.total, least):
        fits = int(gpu.free / gpu.total * 100) / 100
        lower = fits * gpu.total >= least
        raise errors.GpuMemoryShort(
            free,
            f"{share * gpu.total / _GIB:.1f} GiB, as GPU_MEMORY_UTILIZATION={share} says"
            f" (at least {least / _GIB:.1f} for the weights)",
            "end what else uses this GPU (`nvidia-smi` lists it)"
            + (f", or set GPU_MEMORY_UTILIZATION={fits} in .env" if lower else ""),
        )
    if share * gpu.total < least:
        raise errors.GpuMemoryShort(
            f"{free}, of which GPU_MEMORY_UTILIZATION={share} allows"
            f" {share * gpu.total / _GIB:.1f}",
            f"{least / _GIB:.1f} GiB: the weights and a little beside them",
            "raise GPU_MEMORY_UTILIZATION in .env",
        )


def _instead(variant: Variant, driver: str, gpus: list[Gpu]) -> str:
    """Return the advice to take another variant, or nothing where none fits."""
    others = [
        other
        for other in variants.fitting(driver, [gpu.capability for gpu in gpus])
        if other.name != variant.name
    ]
    if not others:
        return ""
    return f"use CUDA={others[0].short} (VARIANT={others[0].name} in .env), or "
