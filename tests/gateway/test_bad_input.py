"""Bad input through the gateway: a corpus of ours, and what schemathesis makes from the API's own
document. Nothing is answered with a 5xx, the server lives, and its memory stays what it was."""

import json
import re
import sys
from pathlib import Path

import pytest
import requests

from tests.gateway.conftest import Gateway
from tests.stacks import run

pytestmark = pytest.mark.docker
MODEL = "glm-4-9b-chat"


def _json(**more: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2, **more}).encode()


def _with(text: str) -> bytes:
    """A completion with a piece of JSON as it is."""
    return f'{{"model": "{MODEL}", "prompt": "a", "max_tokens": 2, {text}}}'.encode()


BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "an array": b"[]",
    "null": b"null",
    "a number": b"1",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": _json().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + _json(),
    "zero bytes": b"\0" * 1000,
    "half a character": _with('"user": "\\ud800"'),
    "a zero in a text": _json(prompt="a\0b"),
    "control characters": _with('"user": "\x01"'),
    "a million brackets": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep in a field": _with('"stop": ' + "[" * 900 + "]" * 900),
    "NaN": _with('"temperature": NaN'),
    "Infinity": _with('"temperature": Infinity'),
    "-Infinity": _with('"top_p": -Infinity'),
    "1e400": _with('"temperature": 1e400'),
    "a number of 10,000 digits": _with('"seed": ' + "9" * 10_000),
    "2 to the 64": _with('"seed": 18446744073709551616'),
    "2 to the 63": _with('"max_tokens": 9223372036854775808'),
    "the same name twice": _with('"n": 1, "n": 10000'),
    "a name in escapes": _with('"\\u006e": 10000'),
    "n=10000": _json(n=10_000),
    "n=0": _json(n=0),
    "n=-1": _json(n=-1),
    "n as text": _json(n="many"),
    "best_of": _json(best_of=10_000),
    "beams": _json(use_beam_search=True, n=10_000),
    "a thousand prompts": _json(prompt=["a"] * 1000),
    "a list of nothing": _json(prompt=[]),
    "an empty prompt": _json(prompt=""),
    "a token of no vocabulary": _json(prompt=[1_000_000]),
    "a negative token": _json(prompt=[-1]),
    "tokens of many kinds": _json(prompt=[1, "a", None, {}]),
    "a million tokens": _json(prompt=[5] * 1_000_000),
    "a million words": _json(prompt="a " * 1_000_000),
    "one word of 8 MB": _json(prompt="a" * 8_000_000),
    "negative max_tokens": _json(max_tokens=-5),
    "max_tokens beyond all": _json(max_tokens=10**12),
    "min above max": _json(min_tokens=100, max_tokens=1),
    "negative temperature": _json(temperature=-1),
    "temperature 1e300": _json(temperature=1e300),
    "top_p 0": _json(top_p=0),
    "top_p 7": _json(top_p=7),
    "top_k beyond": _json(top_k=10**9),
    "top_k -7": _json(top_k=-7),
    "penalties": _json(presence_penalty=99, frequency_penalty=-99, repetition_penalty=0),
    "logprobs 10000": _json(logprobs=10_000),
    "prompt_logprobs": _json(prompt_logprobs=10**9),
    "logit_bias of no token": _json(logit_bias={"99999999": 1}),
    "logit_bias not a number": _json(logit_bias={"a": "b"}),
    "logit_bias 1e300": _json(logit_bias={"5": 1e300}),
    "allowed_token_ids": _json(allowed_token_ids=[-1]),
    "no allowed tokens": _json(allowed_token_ids=[]),
    "stop of a thousand": _json(stop=["x"] * 1000),
    "stop empty": _json(stop=""),
    "stop_token_ids": _json(stop_token_ids=[10**12]),
    "bad_words": _json(bad_words=[""]),
    "an unknown field": _json(no_such_field={"a": [1, 2]}),
    "another model": _json(model="../../etc/passwd"),
    "no model": b'{"prompt": "a"}',
    "model null": _json(model=None),
    "truncate": _json(truncate_prompt_tokens=-5),
    "echo of nothing": _json(echo=True, max_tokens=0),
    "stream as text": _json(stream="perhaps"),
    "stream options alone": _json(stream_options={"include_usage": True}),
    "suffix": _json(suffix="b" * 1000),
    "a schema that refers to itself": _json(
        structured_outputs={"json": {"$ref": "#"}}, response_format=None
    ),
    "no schema": _json(response_format={"type": "json_schema"}),
    "an expression that explodes": _json(structured_outputs={"regex": "(a{1,500}){1,500}"}),
    "a broken expression": _json(structured_outputs={"regex": "("}),
    "a broken grammar": _json(structured_outputs={"grammar": "root ::= root"}),
    "a schema of 1 MB": _json(structured_outputs={"json": {"enum": ["x" * 1_000_000]}}),
    "two forms at once": _json(structured_outputs={"regex": "a", "choice": ["b"]}),
    "lora": _json(lora_request={"name": "x"}),
    "transfer": _json(kv_transfer_params={"do_remote_prefill": True, "remote_host": "192.0.2.1"}),
    "extra arguments": _json(vllm_xargs={"a": [1]}),
    "priority": _json(priority=10**18),
    "a prompt from a file": _json(prompt_embeds="AAAA"),
}
MESSAGES = {
    "no messages": [],
    "messages of text": "hello",
    "a message of nothing": [{}],
    "no role": [{"content": "a"}],
    "a role of ours": [{"role": "root", "content": "a"}],
    "content null": [{"role": "user", "content": None}],
    "content of a number": [{"role": "user", "content": 5}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "an image inside": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:8001/"}}],
        }
    ],
    "a part of no kind": [{"role": "user", "content": [{"type": "no"}]}],
    "special tokens": [{"role": "user", "content": "<|endoftext|><|user|><|observation|>" * 100}],
    "ten thousand messages": [{"role": "user", "content": "a"}] * 10_000,
    "tool calls of nothing": [{"role": "assistant", "tool_calls": [{}]}],
    "a template's braces": [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}"}],
}
CHAT = {
    "a template": {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    "template arguments": {"chat_template_kwargs": {"tokenize": True}},
    "a template in arguments": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "a tool": {"tools": [{"type": "function", "function": {"name": "x", "parameters": 5}}]},
    "tool_choice": {"tool_choice": "required"},
    "a named tool that is not there": {
        "tool_choice": {"type": "function", "function": {"name": "x"}}
    },
    "documents": {"documents": [{"a": 5}]},
    "continue and generate": {"continue_final_message": True, "add_generation_prompt": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 10_000},
    "audio": {"modalities": ["audio"]},
}


def corpus() -> list[tuple[str, str, bytes]]:
    """Return (route, name, body) of every case."""
    found = [("/v1/completions", name, body) for name, body in BODIES.items()]
    found += [("/v1/chat/completions", name, body) for name, body in BODIES.items()]
    hello = [{"role": "user", "content": "a"}]
    for name, messages in MESSAGES.items():
        body = {"model": MODEL, "messages": messages, "max_tokens": 2}
        found.append(("/v1/chat/completions", name, json.dumps(body).encode()))
    for name, more in CHAT.items():
        body = {"model": MODEL, "messages": hello, "max_tokens": 2, **more}
        found.append(("/v1/chat/completions", name, json.dumps(body).encode()))
    for route in ("/v1/embeddings", "/v1/responses"):
        found += [(route, name, BODIES[name]) for name in ("empty", "deep objects", "NaN", "null")]
        found.append((route, "text", json.dumps({"model": MODEL, "input": "a"}).encode()))
    return found


def memory(gateway: Gateway) -> float:
    """Return the MB that the processes of the serve container have for themselves."""
    script = (
        "import psutil; own = [p.memory_info() for p in psutil.process_iter()];"
        " print(sum(info.rss - info.shared for info in own) >> 20)"
    )
    return float(gateway.serve("python", "-c", script).check().output)


def pids(gateway: Gateway) -> list[str]:
    """Return the processes of both servers."""
    marks = "cat /run/stack/answered-0 /run/stack/answered-1"
    return gateway.serve("sh", "-c", marks).check().output.split()


def send(gateway: Gateway, route: str, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    return requests.post(f"{gateway.url}{route}", data=body, headers=headers, timeout=120)


def test_no_bad_input_is_a_5xx_or_ends_the_server(gateway: Gateway) -> None:
    before = pids(gateway)
    cases = corpus()
    counts: dict[int, int] = {}
    wrong, sizes = [], []
    for round_ in range(2):
        for route, name, body in cases:
            answer = send(gateway, route, body)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            if answer.status_code >= 500:
                wrong.append(f"{route} {name}: {answer.status_code} {answer.text[:200]}")
            elif answer.status_code >= 400:
                error = answer.json()["error"]
                assert error["message"], f"{route} {name}"
        sizes.append(memory(gateway))
        assert gateway.ask().status_code == 200, f"after round {round_}"
    print(f"\n{2 * len(cases)} bad inputs: {counts}; memory {sizes[0]:.0f}, then {sizes[1]:.0f} MB")
    assert not wrong, "\n".join(wrong)
    assert pids(gateway) == before, "a server was restarted"
    assert sizes[1] < sizes[0] + 200, sizes


def test_schemathesis_finds_no_5xx(gateway: Gateway, tmp_path: Path) -> None:
    before = pids(gateway)
    where = "http://127.0.0.1:8001/openapi.json"
    script = f"import urllib.request as u; print(u.urlopen('{where}').read().decode())"
    document = gateway.serve("python", "-c", script).check().output
    schema = tmp_path / "openapi.json"
    schema.write_text(document, encoding="utf-8")
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/models"]
    options = [word for path in paths for word in ("--include-path", path)]
    done = run(
        *(sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", gateway.url),
        *options,
        *("--checks", "not_a_server_error", "--max-examples", "60", "--request-timeout", "60"),
        *("--phases", "coverage,fuzzing", "--seed", "2024", "--suppress-health-check", "all"),
        timeout=900,
    )
    summary = done.output[-3000:]
    print(summary)
    tried = re.search(r"(\d+) generated", summary)
    assert done.returncode == 0, summary
    assert tried and int(tried[1]) > 100, summary
    assert pids(gateway) == before, "a server was restarted"
    assert gateway.ask().status_code == 200
