"""The limit that memory sets, and the recipe's table."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench, measure, presets, report, roofline
from scripts.settings import Settings
from tests.stacks import ROOT, wait_for

GLM = presets.named("glm-4-9b-chat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"model_type": "chatglm", "tie_word_embeddings": False, **GLM.config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_step_streams_all_weights_but_the_embedding_table(folder: Path) -> None:
    table = 151552 * 4096 * 2
    assert roofline.streamed_weights(folder, GLM.weights) == GLM.weights - table
    in_fp8 = roofline.streamed_weights(folder, GLM.weights, fp8=True)
    # Half of what is not at the two ends, and the output layer.
    assert in_fp8 == (GLM.weights - 2 * table) // 2 + table


def test_a_tied_table_is_read_as_the_output_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert roofline.streamed_weights(folder, GLM.weights) == GLM.weights


def test_the_limit_is_the_one_known_of_an_h200(folder: Path) -> None:
    # 4.3 TB/s measured there: 45 requests a second of the recipe's 25 x 64/128 with the embedding
    # table counted, which no step streams.
    sizes = 40 * 1024, 25, 64, 128, 4.3e12
    assert 25 / roofline.least_seconds(GLM.weights, *sizes) == pytest.approx(45, rel=0.02)
    streamed = roofline.streamed_weights(folder, GLM.weights)
    assert 25 / roofline.least_seconds(streamed, *sizes) == pytest.approx(47.5, rel=0.01)


def test_every_backend_and_round_gets_its_own_prompts() -> None:
    options = measure.parser().parse_args([])
    first, same, other = (measure.prompts(options, run) for run in (0, 0, 1))
    assert first == same
    assert first != other
    assert {len(prompt) for prompt in first} == {64}
    assert len(first) == 25


def rows(*words: str, **environ: str) -> list[bench.Row]:
    made = argparse.ArgumentParser(parents=[measure.parser()])
    for flag in ("--fp8", "--no-hf", "--hf-compile"):
        made.add_argument(flag, action="store_true")
    made.add_argument("--row", action="append")
    return bench._rows(made.parse_args(words), Settings.from_environ(environ))


def test_further_rows_add_to_what_is_set() -> None:
    found = rows("--fp8", "--hf-compile", "--row", "steps=--num-scheduler-steps 10", VLLM_ARGS="-x")
    assert [row.name for row in found] == ["vllm", "vllm fp8", "steps", "hf", "hf compiled"]
    assert found[2].environment == {"VLLM_ARGS": "-x --num-scheduler-steps 10"}
    assert [row.name for row in rows("--no-hf")] == ["vllm"]


def document(**hf: object) -> dict:
    settings = {"num_prompts": 25}
    fast = {"name": "vllm", "runs": [1.0, 1.25, 1.0], "requests_per_second": 25.0}
    fast |= {"tokens_per_second": 4800.0, "roofline_percent": 62.5}
    slow = {"name": "hf", "runs": [5.0], "requests_per_second": 5.0, "tokens_per_second": 960.0}
    slow |= {"roofline_percent": 12.5, **hf}
    return {
        "job": "bench",
        "variant": "cu121",
        "machine": {"cpu": "x", "cpus": 2, "driver": "1", "gpus": [{"name": "NVIDIA H100"}]},
        "versions": {"vllm": "0.6.3.post1", "torch": "2.4.0", "transformers": "4.46.3"},
        "settings": settings,
        "limit": {"requests_per_second": 40.0, "copy_bytes_per_second": 3e12},
        "rows": [fast, slow],
    }


def test_the_table_compares_with_transformers_and_with_the_limit() -> None:
    shown = bench.table(document())
    assert "NVIDIA H100, driver 1; cu121: vllm 0.6.3.post1, torch 2.4.0" in shown
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in shown.splitlines()
        if line.startswith("| vllm") or line.startswith("| hf")
    ]
    assert cells == [
        ["vllm", "25.00", "20.00 to 25.00", "4800", "5.00 ×", "62 %"],
        ["hf", "5.00", "5.00 to 5.00", "960", "1.00 ×", "12 %"],
    ]
    assert "limit: 40.0 requests/s" in shown


def test_a_row_that_failed_is_in_the_table_and_nothing_is_compared_with_it() -> None:
    shown = bench.table(document(failed="it broke"))
    assert "failed: it broke" in shown
    assert "×" not in shown.splitlines()[3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_that_is_measured_outlives_the_bench(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    mark, sleeper = tmp_path / "pid", tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {mark}\nexec sleep 100\n")
    sleeper.chmod(0o755)
    script = (
        "import sys; from scripts import bench, errors; errors.end_on_sigterm();"
        f" sys.executable = {str(sleeper)!r};"
        " errors.run(lambda: list(bench._lines(['copy'], {}, 90)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: mark.exists() and mark.read_text().strip(), 30, "a child")
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_table_has_columns_of_one_width() -> None:
    lines = report.table(["a", "bb"], [["ccc", 1]]).splitlines()
    assert lines == ["| a   | bb |", "|-----|----|", "| ccc | 1  |"]
