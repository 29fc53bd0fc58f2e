"""The interface of nvidia-ml-py over a host that FAKE_NVML describes, for machines without a GPU.

    FAKE_NVML='{"driver": "535.104", "cuda": 12020, "gpus": [{"name": "…", "capability": [8, 6],
                "total": 24576, "reserved": 400, "used": 10, "pids": []}]}'

Memory in MiB. Without the variable there is no driver, as on such a machine.
"""

import json
import os
from types import SimpleNamespace

nvmlMemory_v2 = 0x2000028
_MIB = 1 << 20


class NVMLError(Exception):
    """As the library's."""


def _host() -> dict:
    if not os.environ.get("FAKE_NVML"):
        raise NVMLError("NVML Shared Library Not Found")
    return json.loads(os.environ["FAKE_NVML"])


def nvmlInit() -> None:
    _host()


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return _host()["driver"]


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    return _host().get("cuda", 13000)


def nvmlDeviceGetCount() -> int:
    return len(_host()["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict:
    return _host()["gpus"][index]


def nvmlDeviceGetName(handle: dict) -> str:
    return handle["name"]


def nvmlDeviceGetCudaComputeCapability(handle: dict) -> list[int]:
    return handle["capability"]


def nvmlDeviceGetMemoryInfo(handle: dict, version: int = 0) -> SimpleNamespace:
    if "total" not in handle:
        raise NVMLError("Not Supported")
    total, reserved, used = (handle.get(n, 0) * _MIB for n in ("total", "reserved", "used"))
    if version and "reserved" not in handle:
        raise NVMLError("Function Not Found")
    return SimpleNamespace(total=total, reserved=reserved, used=used, free=total - reserved - used)


def nvmlDeviceGetComputeRunningProcesses(handle: dict) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid) for pid in handle.get("pids", [])]
