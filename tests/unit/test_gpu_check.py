"""What is refused before vLLM starts, and what is said: found, needed, and what to do instead."""

import pytest

from scripts import errors, gpu
from scripts.gpu import Gpu
from scripts.settings import Settings

GIB = 1 << 30
RTX3090 = Gpu(0, "NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, 23 * GIB)
RTX5090 = Gpu(0, "NVIDIA GeForce RTX 5090", (12, 0), 32 * GIB, 31 * GIB)
T4 = Gpu(0, "Tesla T4", (7, 5), 16 * GIB, 15 * GIB)
P40 = Gpu(0, "Tesla P40", (6, 1), 24 * GIB, 24 * GIB)
GLM4 = 18_800_000_000


@pytest.fixture
def require(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The check on a host of the test's choosing."""

    def run(driver: str, *gpus: Gpu, weights: int = GLM4, **environ: str) -> str:
        monkeypatch.setattr(gpu, "look", lambda: (driver, list(gpus)))
        set_by_hand = {"DTYPE": "bfloat16", "GPU_MEMORY_UTILIZATION": "0.9"}
        settings = Settings.from_environ({"VARIANT": "cu121", **set_by_hand, **environ})
        gpu.require_memory(settings, gpu.require(settings), weights)
        return capsys.readouterr().out

    return run


def test_a_fitting_host_is_described(require) -> None:
    found = require("535.104", RTX3090)
    assert "535.104" in found and "RTX 3090" in found and "23.0 of 24.0 GiB free" in found


def test_the_cpu_variant_asks_for_no_gpu() -> None:
    assert gpu.require(Settings.from_environ({"VARIANT": "cpu"})) == []


@pytest.mark.parametrize(
    ("variant", "driver", "card", "error", "texts"),
    [
        ("cu121", "470.82", RTX3090, errors.DriverTooOld, ["470.82", "525.60.13", "CUDA=118"]),
        ("cu130", "535.104", RTX3090, errors.DriverTooOld, ["580", "CUDA=121"]),
        ("cu118", "390.1", RTX3090, errors.DriverTooOld, ["450.80.02", "update the driver"]),
        ("cu121", "580.65.06", RTX5090, errors.GpuUnsupported, ["12.0", "7.0 to 9.0", "CUDA=130"]),
        # Blackwell has no kernels below CUDA 12.8, and this driver runs nothing newer.
        ("cu121", "570.86", RTX5090, errors.GpuUnsupported, ["12.0", "use another GPU"]),
        ("cu121", "535.104", P40, errors.GpuUnsupported, ["6.1", "use another GPU"]),
    ],
)
def test_a_driver_or_card_that_does_not_fit(require, variant, driver, card, error, texts) -> None:
    with pytest.raises(error) as caught:
        require(driver, card, VARIANT=variant)
    for text in texts:
        assert text in str(caught.value)
    assert ("use CUDA=" in str(caught.value)) == any(text.startswith("CUDA=") for text in texts)


def test_bfloat16_below_sm_80_is_refused_and_float16_is_not(require) -> None:
    with pytest.raises(errors.GpuUnsupported, match=r"7\.5.*no bfloat16[\s\S]*DTYPE=float16"):
        require("535.104", T4, weights=GIB)
    assert require("535.104", T4, weights=GIB, DTYPE="float16")


def test_too_few_gpus(require) -> None:
    with pytest.raises(errors.GpuUnsupported, match=r"1 GPU\n.*2, as TENSOR_PARALLEL_SIZE says"):
        require("535.104", RTX3090, TENSOR_PARALLEL_SIZE="2")


def test_weights_that_no_free_memory_could_hold(require) -> None:
    with pytest.raises(errors.GpuMemoryShort, match=r"18\.5 GiB: the weights[\s\S]*quantised"):
        require("535.104", T4, DTYPE="float16")


def test_two_gpus_share_the_weights(require) -> None:
    second = Gpu(1, T4.name, T4.capability, T4.total, T4.free)
    assert require("535.104", T4, second, DTYPE="float16", TENSOR_PARALLEL_SIZE="2")


def test_a_share_that_others_use_names_the_share_that_fits(require) -> None:
    busy = Gpu(0, "NVIDIA A100", (8, 0), 80 * GIB, 40 * GIB)
    with pytest.raises(errors.GpuMemoryShort, match=r"nvidia-smi.*GPU_MEMORY_UTILIZATION=0\.5 "):
        require("535.104", busy)
    full = Gpu(0, "NVIDIA A100", (8, 0), 80 * GIB, 10 * GIB)
    with pytest.raises(errors.GpuMemoryShort) as caught:
        require("535.104", full)
    assert "set GPU_MEMORY_UTILIZATION" not in str(caught.value)


def test_a_share_too_small_for_the_weights_is_to_be_raised(require) -> None:
    with pytest.raises(errors.GpuMemoryShort, match="raise GPU_MEMORY_UTILIZATION"):
        require("535.104", RTX3090, GPU_MEMORY_UTILIZATION="0.5")


def test_weights_that_do_not_fit_beside_another_process(require) -> None:
    # The share itself is free, the weights would still not fit.
    busy = Gpu(0, RTX3090.name, RTX3090.capability, 24 * GIB, 15 * GIB)
    with pytest.raises(errors.GpuMemoryShort, match=r"15.0 of 24.0[\s\S]*at least 18.5") as caught:
        require("535.104", busy, GPU_MEMORY_UTILIZATION="0.5")
    assert "nvidia-smi" in str(caught.value) and "or set" not in str(caught.value)


def test_a_gpu_that_does_not_tell_its_memory_is_not_refused(require) -> None:
    assert require("535.104", Gpu(0, "NVIDIA A100 MIG 3g.40gb", (8, 0), 0, 0))


def test_each_cause_has_a_code_of_its_own() -> None:
    kinds = errors.StackError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
