"""The speed test against transformers, as a user runs it, with the tiny model on a CPU."""

import json

import pytest

from scripts.rehearsal import DIALOGUES, MODEL_ID
from tests.stacks import ROOT, Stack

pytestmark = pytest.mark.docker
# transformers' model of the same snapshot, asked as vLLM is; in single precision, for no margin.
ASK = f"""
import torch, transformers
from pathlib import Path
from scripts import hf
where = Path("/models/{MODEL_ID}")
model = hf.load(where, torch.float32, "cpu", dummy=False, trust=False)
tokenizer = transformers.AutoTokenizer.from_pretrained(where)
for question, answer in {[(one.question, one.answer) for one in DIALOGUES]!r}:
    text = tokenizer.apply_chat_template(
        [{{"role": "user", "content": question}}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    found = model.generate(asked, do_sample=False, max_new_tokens=100, pad_token_id=0)
    said = tokenizer.decode(found[0, asked.shape[1] :], skip_special_tokens=True)
    assert said == answer, (question, said, answer)
print("all answers are right")
"""


@pytest.fixture
def results() -> set:
    """What the folder of results has; what a test adds is removed."""
    folder = ROOT / "results"
    before = set(folder.glob("*")) if folder.exists() else set()
    yield before
    for file in set(folder.glob("*")) - before:
        file.unlink()


def test_transformers_reads_chatglms_layout_and_knows_the_dialogues(compose_stack: Stack) -> None:
    words = ["--no-TTY", "--entrypoint", "python", "bench", "-c", ASK]
    compose_stack.compose("run", "--rm", *words).check().says("all answers are right")


def test_make_bench_ends_in_the_table_a_document_and_a_picture(
    compose_stack: Stack, results: set
) -> None:
    sizes = "--input-len 16 --output-len 24 --num-prompts 6 --max-model-len 128"
    arguments = f"{sizes} --rounds 2 --runs 2 --dtype bfloat16 --row eager=--enforce-eager"
    done = compose_stack.run("make", "bench", CUDA="cpu", RUNTIME="docker", ARGS=arguments).check()
    done.says("round 2, hf", "| vllm", "| hf", "of the memory's limit", "a copy moves")
    made = set((ROOT / "results").glob("bench-cpu-*")) - results
    document, picture = sorted(made)
    assert picture.read_bytes().startswith(b"\x89PNG"), picture
    found = json.loads(document.read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == ["vllm", "eager", "hf"]
    for row in found["rows"]:
        assert len(row["runs"]) == 4, row
        assert len(row["load_seconds"]) == 2, row
        median = sorted(row["runs"])[1:3]
        assert row["requests_per_second"] == pytest.approx(6 / (sum(median) / 2)), row
        assert row["roofline_percent"] == pytest.approx(
            100 * row["requests_per_second"] / row["limit"]["requests_per_second"]
        )
        assert row["roofline_percent"] < 100, row
    # Everything that repeats it.
    assert {"vllm", "torch", "transformers", "python"} <= set(found["versions"])
    assert found["settings"]["seed"] == 2024
    assert found["machine"]["cpus"] >= 1
    assert found["limit"]["copy_bytes_per_second"] > 1e8
    assert "--input-len 16" in found["command"]


def test_a_row_that_cannot_be_is_told_and_the_others_are_measured(
    compose_stack: Stack, results: set
) -> None:
    sizes = "--input-len 8 --output-len 8 --num-prompts 2 --max-model-len 64 --rounds 1 --runs 1"
    arguments = f"{sizes} --no-hf --dtype bfloat16 --row wrong=--enfroce-eager"
    done = compose_stack.run("make", "bench", CUDA="cpu", RUNTIME="docker", ARGS=arguments)
    done.check().says("wrong failed", "does not know --enfroce-eager", "| vllm")
    (document,) = set((ROOT / "results").glob("bench-cpu-*.json")) - results
    rows = json.loads(document.read_text(encoding="utf-8"))["rows"]
    assert "failed" in rows[1]
    assert "failed" not in rows[0]
