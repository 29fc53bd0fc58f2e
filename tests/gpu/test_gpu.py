"""An image on a real GPU: its entry point serves GLM-4-9B's shape, and refuses what cannot be."""

import concurrent.futures
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import requests

from tests.gpu.conftest import Subject
from tests.gpu.servers import Server
from tests.stacks import ROOT

pytestmark = pytest.mark.gpu
MODEL = "glm-4-9b-chat"
# The original recipe's speed test: 25 prompts of 64 tokens, 128 tokens each.
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 25, 64, 128


def post(server: Server, path: str, **body) -> requests.Response:
    response = requests.post(
        f"{server.url}{path}", json={"model": MODEL, **body}, timeout=300, stream="stream" in body
    )
    assert response.status_code == 200, f"{response.text}\n{server.tail()}"
    return response


def test_health_and_models(server: Server) -> None:
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    card = requests.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]
    assert (card["id"], card["max_model_len"]) == (MODEL, 8192)


def test_a_completion_has_the_tokens_asked_for(server: Server) -> None:
    answer = post(server, "/v1/completions", prompt="你好", max_tokens=7, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"


def test_chat_goes_through_the_template(server: Server) -> None:
    messages = [{"role": "user", "content": "你好"}]
    answer = post(
        server, "/v1/chat/completions", messages=messages, max_tokens=8, ignore_eos=True
    ).json()
    # [gMASK] <sop> <|user|> \n, six bytes, <|assistant|>
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_streaming_ends_with_usage_and_done(server: Server) -> None:
    response = post(
        server,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "你好"}],
        max_tokens=32,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert events[-1] == b"[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 32
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"


def test_sampling_runs(server: Server) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.8, "seed": 7, "max_tokens": 8, "ignore_eos": True}
    answer = post(server, "/v1/completions", prompt="你好", **sampled).json()
    assert answer["usage"]["completion_tokens"] == 8


def test_structured_output_begins_as_its_schema_says(server: Server, subject: Subject) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    # vLLM 0.6 takes this form and does not act on it.
    form = {"guided_json": schema} if subject.variant == "cu121" else {"response_format": wanted}
    messages = [{"role": "user", "content": "Reply with JSON."}]
    answer = post(server, "/v1/chat/completions", messages=messages, max_tokens=16, **form).json()
    assert answer["choices"][0]["message"]["content"].strip().startswith("{"), answer


def test_25_requests_at_once_all_get_their_tokens(server: Server, subject: Subject) -> None:
    def one(number: int) -> int:
        prompt = [(number * PROMPT_TOKENS + place) % 256 for place in range(PROMPT_TOKENS)]
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
        usage = post(server, "/v1/completions", **body).json()["usage"]
        assert usage["prompt_tokens"] == PROMPT_TOKENS
        return usage["completion_tokens"]

    seconds = []
    with concurrent.futures.ThreadPoolExecutor(PROMPTS) as pool:
        for _ in range(6):
            begin = time.monotonic()
            assert list(pool.map(one, range(PROMPTS))) == [NEW_TOKENS] * PROMPTS
            seconds.append(time.monotonic() - begin)
    # The first round warms up.
    median = statistics.median(seconds[1:])
    rate = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) / median
    print(
        f"\n{subject.variant} 25 x 64/128: {PROMPTS / median:.1f} requests/s, {rate:.0f} tokens/s"
        f" in+out (median of 5: {', '.join(f'{s:.2f}' for s in seconds[1:])} s)"
    )


def test_stop_ends_with_code_0_and_frees_the_gpu(server: Server) -> None:
    assert server.stop() == 0, server.tail()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = subprocess.run(query, check=True, capture_output=True, text=True, timeout=60).stdout
    assert int(used.split()[0]) < 2000, f"{used} MiB still in use\n{server.tail()}"


def test_a_share_that_is_not_free_is_refused_before_vllm_starts(
    subject: Subject, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with subject.serve(log, GPU_MEMORY_UTILIZATION="1.0") as started:
        code = started.process.wait(timeout=120)
        assert code == 17, started.tail()
    for text in ("GiB free", "GPU_MEMORY_UTILIZATION=0.9", "nvidia-smi"):
        assert text in log.read_text(), log.read_text()
    assert "vllm serve" not in log.read_text()


@pytest.fixture(scope="module")
def answers() -> dict:
    """What the server of some case below said."""
    return {}


@pytest.mark.parametrize(
    "more",
    [
        {"GPU_MEMORY_UTILIZATION": "0.5"},
        {"MAX_MODEL_LEN": "32768"},
        {"VLLM_ARGS": "--load-format dummy --kv-cache-dtype fp8"},
        {"QUANTIZATION": "fp8"},
        {"MAX_MODEL_LEN": "auto"},
        # As much as 0.9 of a card of 24 GB.
        {"MAX_MODEL_LEN": "auto", "GPU_MEMORY_UTILIZATION": "0.27"},
        {
            "MAX_MODEL_LEN": "32768",
            "VLLM_ARGS": "--load-format dummy --enable-chunked-prefill=False",
        },
    ],
    ids=["half", "long", "fp8-cache", "fp8-weights", "auto", "as-24-gb", "whole"],
)
def test_the_sum_agrees_with_vllms_own(
    subject: Subject, tmp_path: Path, answers: dict, more: dict, request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.id
    if case == "whole" and subject.variant != "cu121":
        pytest.skip("only V0 takes a prompt as a whole")
    log = tmp_path / "log"
    with subject.serve(log, DTYPE="bfloat16", **more) as started:
        started.wait()
        print(f"\n{subject.variant} {case}: ready after {started.seconds:.1f} s")
        card = requests.get(f"{started.url}/v1/models", timeout=10).json()["data"][0]
        if case in ("long", "whole"):
            prompt = [number * 7919 % 256 for number in range(6000)]
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
            answers[case] = post(started, "/v1/completions", **body).json()["choices"][0]
        if "auto" in more.values():
            prompt = [number * 7919 % 256 for number in range(card["max_model_len"] - 8)]
            began = time.monotonic()
            body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}
            usage = post(started, "/v1/completions", **body).json()["usage"]
            assert usage["total_tokens"] == card["max_model_len"]
            print(f"\na prompt of {len(prompt)} tokens: {time.monotonic() - began:.1f} s")
    text = log.read_text(errors="replace")
    predicted = int(re.search(r"fit: / \d+ bytes a token = (\d+) tokens", text)[1])
    blocks = re.search(r"# GPU blocks: (\d+)", text)
    tokens = re.search(r"GPU KV cache size: ([\d,]+) tokens", text)
    own = int(blocks[1]) * 16 if blocks else int(tokens[1].replace(",", ""))
    print(
        f"\n{subject.variant} {case}: predicted {predicted}, vLLM {own} ({predicted / own:.3f}),"
        f" context {card['max_model_len']}"
    )
    assert 0.95 * own <= predicted <= own, "\n".join(re.findall("fit: .*", text))


def test_a_prompt_in_pieces_is_answered_as_a_whole_one(answers: dict) -> None:
    if len(answers) < 2:
        pytest.skip("needs both forms, so cu121")
    [pieces, whole] = (answers[case]["logprobs"] for case in ("long", "whole"))
    print(f"\nlogprobs in pieces {pieces['top_logprobs']}, as a whole {whole['top_logprobs']}")
    assert pieces["tokens"] == whole["tokens"]
    assert pieces["token_logprobs"] == pytest.approx(whole["token_logprobs"], abs=0.05)


def test_triton_compiles_and_runs_a_kernel_in_the_image(subject: Subject) -> None:
    # vLLM's own environment, so with the variant's assembler and cache.
    done = subject.run_file(ROOT / "tests" / "kernels.py", "run")
    print("\n" + done.check().output)
    done.says("add is right", "multiply is right")
