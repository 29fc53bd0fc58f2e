"""Each document of a benchmark becomes a picture that shows it."""

import copy
import struct
from pathlib import Path
from typing import Any

import pytest

from scripts import chart, errors

BASE = {
    "variant": "cu121",
    "machine": {
        "cpu": "AMD EPYC",
        "cpus": 16,
        "driver": "580.159.04",
        "gpus": [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_bytes": 85e9}],
    },
    "versions": {"vllm": "0.6.3.post1", "torch": "2.4.0", "transformers": "4.46.3"},
    "model": {"id": "ZhipuAI/glm-4-9b-chat", "revision": "master"},
}


def level(concurrency: int, failed: int = 0, completed: int = 16) -> dict[str, Any]:
    rate = concurrency / (1 + concurrency / 40)
    found = {
        "max_concurrency": concurrency,
        "completed": completed,
        "failed": failed,
        "request_throughput": rate,
        "request_goodput": 0.9 * rate,
        "output_throughput": 128 * rate,
    }
    for name, base in (("ttft", 30 + 8 * concurrency), ("itl", 7 + concurrency / 6)):
        found |= {f"p50_{name}_ms": base, f"p99_{name}_ms": 2 * base}
    return found


DOCUMENTS: dict[str, dict[str, Any]] = {
    "bench-serve": {
        **BASE,
        "job": "bench-serve",
        "url": "http://127.0.0.1:8000",
        "slo": {"ttft": 1000.0, "tpot": 50.0},
        "levels": [level(1), level(4), level(16, failed=3), level(64, failed=16, completed=0)],
    },
    "bench": {
        **BASE,
        "job": "bench",
        "settings": {"num_prompts": 25},
        "limit": {"requests_per_second": 37.4},
        "rows": [
            {
                "name": "vllm",
                "requests_per_second": 22.6,
                "runs": [1.05, 1.106, 1.2],
                "roofline_percent": 60.4,
            },
            {
                "name": "hf",
                "requests_per_second": 5.5,
                "runs": [4.4, 4.8],
                "roofline_percent": None,
            },
            {"name": "hf compiled", "runs": [], "failed": "out of memory"},
        ],
    },
    "bench-start": {
        **BASE,
        "job": "bench-start",
        "starts": [
            {"name": "cold 1", "phases": {"imports": 7.5, "compile": 35.2}, "seconds": 42.7},
            {"name": "warm 1", "phases": {"imports": 7.5, "weights": 4.1}, "seconds": 11.6},
        ],
    },
}


def drawn(found: dict[str, Any], path: Path) -> bytes:
    chart.draw(found, path)
    return path.read_bytes()


@pytest.mark.parametrize("job", DOCUMENTS)
def test_each_document_is_drawn_1200_pixels_wide(job: str, tmp_path: Path) -> None:
    picture = drawn(DOCUMENTS[job], tmp_path / "a.png")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 1200
    assert 400 <= height <= 1200
    # An empty one has 13 to 16 kB.
    assert 20_000 < len(picture) < 400_000


def change(job: str) -> dict[str, Any]:
    found = copy.deepcopy(DOCUMENTS[job])
    if job == "bench-serve":
        found["levels"][1]["p99_ttft_ms"] *= 2
    elif job == "bench":
        found["rows"][1]["runs"][0] *= 0.8
    else:
        found["starts"][1]["phases"]["weights"] += 1
    return found


@pytest.mark.parametrize("job", DOCUMENTS)
def test_other_numbers_make_another_picture_and_the_same_ones_the_same(
    job: str, tmp_path: Path
) -> None:
    first = drawn(DOCUMENTS[job], tmp_path / "a.png")
    assert drawn(DOCUMENTS[job], tmp_path / "b.png") == first
    assert drawn(change(job), tmp_path / "c.png") != first


def test_a_load_without_one_answer_is_drawn(tmp_path: Path) -> None:
    dead = [level(concurrency, failed=16, completed=0) for concurrency in (1, 4)]
    drawn({**DOCUMENTS["bench-serve"], "levels": dead, "slo": {}}, tmp_path / "a.png")


def test_many_phases_and_starts_have_room(tmp_path: Path) -> None:
    phases = {f"phase {number}": 1.0 + number for number in range(12)}
    starts = [{"name": f"cold {n}", "phases": phases, "seconds": 78.0} for n in range(6)]
    drawn({**DOCUMENTS["bench-start"], "starts": starts}, tmp_path / "a.png")


def test_another_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.SettingInvalid, match="a document of 'generate'"):
        chart.draw({**BASE, "job": "generate"}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
