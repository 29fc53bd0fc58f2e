"""The doctor and `make up` on hosts that NVML, as tests/nvml has it, describes."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.stacks import ROOT, Done, free_port, run

CARDS = {
    "3090": ("NVIDIA GeForce RTX 3090", (8, 6), 24576),
    "4090": ("NVIDIA GeForce RTX 4090", (8, 9), 24564),
    "5090": ("NVIDIA GeForce RTX 5090", (12, 0), 32607),
    "2080Ti": ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11264),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 81920),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 81559),
    "H200": ("NVIDIA H200", (9, 0), 143771),
    "T4": ("Tesla T4", (7, 5), 15360),
    "V100": ("Tesla V100-SXM2-32GB", (7, 0), 32768),
    "P40": ("Tesla P40", (6, 1), 24576),
}


def host(driver: str, *cards: str, **more) -> str:
    gpus = []
    for card in cards:
        name, capability, total = CARDS[card]
        gpu = {"name": name, "capability": capability, "total": total, "used": 5, **more}
        # Drivers before 510 do not tell what they keep for themselves.
        gpus.append({**gpu, "reserved": 400} if driver >= "510" else gpu)
    return json.dumps({"driver": driver, "cuda": 13000, "gpus": gpus})


def stack(command: list[str], nvml: str, tmp_path: Path, **environ: str) -> Done:
    environ = {
        "PYTHONPATH": str(ROOT / "tests" / "nvml"),
        "FAKE_NVML": nvml,
        "STATE_DIR": str(tmp_path / "state"),
        "PORT": str(free_port()),
        **environ,
    }
    return run(sys.executable, "-m", *command, timeout=60, **environ)


def doctor(nvml: str, tmp_path: Path, *words: str, **environ: str) -> Done:
    return stack(["scripts.doctor", "--runtime", "host", *words], nvml, tmp_path, **environ)


@pytest.mark.parametrize(
    ("driver", "cards", "variant"),
    [
        ("580.65.06", ["3090"], "cu130"),
        ("580.159.04", ["H100"], "cu130"),
        ("580.65.06", ["5090"], "cu130"),
        ("580.65.06", ["T4"], "cu130"),
        # The newest CUDA has no kernels for Volta.
        ("580.65.06", ["V100"], "cu121"),
        ("570.86.10", ["4090"], "cu121"),
        ("550.54.14", ["A100"], "cu121"),
        ("535.104.05", ["3090"], "cu121"),
        ("530.30.02", ["2080Ti"], "cu121"),
        ("525.60.13", ["H100"], "cu121"),
        ("515.65.01", ["3090"], "cu118"),
        ("470.82.01", ["T4"], "cu118"),
        # Blackwell has no kernels below CUDA 12.8, and this driver runs nothing newer than 12.8.
        ("570.86.10", ["5090"], "cpu"),
        ("470.82.01", ["V100"], "cpu"),
        ("580.65.06", ["P40"], "cpu"),
        # Two unequal cards: what both can run.
        ("580.65.06", ["V100", "3090"], "cu121"),
        ("580.65.06", ["T4", "H200"], "cu130"),
    ],
)
def test_the_choice_for_a_host(tmp_path: Path, driver: str, cards: list, variant: str) -> None:
    done = doctor(host(driver, *cards), tmp_path)
    done.says(f"so: variant {variant}: ", driver, CARDS[cards[0]][0])
    if variant == "cpu":
        done.says("no image here runs on NVIDIA driver")


def test_no_gpu_is_a_warning_and_a_rehearsal(tmp_path: Path) -> None:
    done = doctor("", tmp_path)
    done.says("WARNING  NVIDIA driver", "so: variant cpu: no NVIDIA GPU on this host", "rehearsal")


def test_a_card_half_in_use_names_who_uses_it(tmp_path: Path) -> None:
    nvml = host("535.104.05", "3090", used=12000, pids=[os.getpid()])
    done = doctor(nvml, tmp_path)
    done.says("WARNING  GPU 0", "of 23.6 GiB free", f"({os.getpid()})", "GPU_MEMORY_UTILIZATION")


def test_a_part_of_a_card_that_tells_no_memory_is_served(tmp_path: Path) -> None:
    gpu = {"name": "NVIDIA A100 MIG 3g.40gb", "capability": [8, 0]}
    nvml = json.dumps({"driver": "535.104.05", "gpus": [gpu]})
    doctor(nvml, tmp_path).says("MIG 3g.40gb", "so: variant cu121")


@pytest.mark.parametrize(
    ("driver", "card", "cuda", "code", "texts"),
    [
        ("470.82.01", "3090", "121", 15, ["525.60.13 or newer", "use CUDA=118"]),
        ("580.65.06", "5090", "121", 16, ["7.0 to 9.0", "use CUDA=130"]),
        ("535.104.05", "3090", "130", 15, ["580", "use CUDA=121"]),
    ],
)
def test_make_up_refuses_a_variant_that_cannot_work_in_the_doctors_words(
    tmp_path: Path, driver: str, card: str, cuda: str, code: int, texts: list
) -> None:
    words = ["--cuda", cuda, "--runtime", "host"]
    begin = time.monotonic()
    done = stack(["scripts.stack", "up", *words], host(driver, card), tmp_path)
    assert time.monotonic() - begin < 5
    done.check(code).says("error: ", *texts)
    assert not (tmp_path / "state").exists()
    doctor(host(driver, card), tmp_path, "--cuda", cuda).check(code).says("FAILURE", *texts)


def test_a_taken_port_a_full_disk_and_a_dead_index_are_a_line_each(
    tmp_path: Path, small_disk
) -> None:
    full_disk = small_disk(40)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {
            "STATE_DIR": str(full_disk / "state"),
            "PORT": port,
            "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/simple",
        }
        done = doctor("", tmp_path, "--cuda", "cpu", **environ)
        begin = time.monotonic()
        refused = stack(
            ["scripts.stack", "up", "--cuda", "cpu", "--runtime", "host"], "", tmp_path, **environ
        )
        assert time.monotonic() - begin < 5
    done.check(7)
    failures = [line for line in done.output.splitlines() if line.startswith("FAILURE")]
    for line, texts in zip(
        failures,
        [("disk", "GB free", "GB"), ("port", port, "free port"), ("Python index", "127.0.0.1")],
        strict=True,
    ):
        assert all(text in line for text in texts), line
    done.says("make room there", f"make up PORT={int(port) + 1}", "PIP_INDEX_URL")
    refused.check(7).says("error: ", "GB free")
    assert not any(full_disk.iterdir())


def test_json_has_what_the_table_has(tmp_path: Path) -> None:
    done = doctor(host("535.104.05", "3090"), tmp_path, "--json")
    checks = {check["name"]: check for check in json.loads(done.output)}
    assert checks["NVIDIA driver"]["state"] == "ok"
    assert {"GPU 0", "memory", "port", "Python index", "variant cu121"} <= set(checks)


def test_a_dead_hub_names_a_mirror(tmp_path: Path) -> None:
    environ = {
        "MODEL_SOURCES": "huggingface",
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "MODEL_ID": "a/b",
    }
    doctor(host("535.104.05", "3090"), tmp_path, **environ).says(
        "WARNING  source huggingface", "does not answer", "HF_ENDPOINT=https://hf-mirror.com"
    )
