"""What a request must not ask for, and what becomes of an answer that fails."""

import asyncio
import json
import types
from collections.abc import Awaitable, Callable

import pytest

from scripts import middleware
from scripts.middleware import Bounds, Middleware, Refused

BOUNDS = Bounds(choices=16, vocabulary=1000, patterns=False, body_bytes=1000, seconds=5)
NEWER = Bounds(choices=16, vocabulary=1000, patterns=True, body_bytes=1000, seconds=5)
PATTERN = {"type": "object", "properties": {"id": {"type": "string", "pattern": "(a+)+$"}}}


def body(**fields: object) -> bytes:
    return json.dumps({"model": "glm-4-9b-chat", "max_tokens": 4, **fields}).encode()


def raw(text: str) -> bytes:
    """A request with a piece of JSON that json.dumps would not write so."""
    return f'{{"model": "glm-4-9b-chat", {text}}}'.encode()


def schema(inside: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": inside}}


NOT_JSON = {
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"model": ', "not JSON"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', "not JSON"),
    "half a character": (raw(r'"prompt": "\ud800"'), "not JSON"),
    "half a character, spelt in capitals": (raw(r'"prompt": "\uDFFF"'), "not JSON"),
    "half a character in a name": (raw(r'"\ud800": 1'), "not JSON"),
    "NaN": (raw('"temperature": NaN'), "NaN is not JSON"),
    "Infinity": (raw('"temperature": Infinity'), "Infinity is not JSON"),
    "-Infinity": (raw('"logit_bias": {"5": -Infinity}'), "-Infinity is not JSON"),
    "1e400": (raw('"temperature": 1e400'), "too large"),
    "2 to the 63": (raw(f'"seed": {2**63}'), "too large"),
    "below -2 to the 63": (raw(f'"seed": {-(2**63) - 1}'), "too large"),
    "five thousand digits": (raw(f'"seed": {"9" * 5000}'), "too large"),
    "brackets without end": (b"[" * 100_000, "not JSON"),
    "lists in lists": (raw(f'"stop": {"[" * 65}{"]" * 65}'), "levels deep"),
    "objects in objects": (b'{"a": ' * 70 + b"1" + b"}" * 70, "levels deep"),
    "a list": (b"[]", "not a JSON object"),
    "a text": (b'"prompt"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
}

TOO_MUCH = {
    "n=10000": (body(n=10_000), "n"),
    "n=17": (body(n=17), "n"),
    "n=1e4": (body(n=1e4), "n"),
    "best_of": (body(best_of=10_000), "best_of"),
    "300 prompts": (body(prompt=["a"] * 300), "prompt"),
    "300 prompts of token ids": (body(prompt=[[1]] * 300), "prompt"),
    "20 prompts, 16 times": (body(prompt=["a"] * 20, n=16), "prompt"),
    "300 stop words": (body(stop=["a"] * 300), "stop"),
    "300 bad words": (body(bad_words=["a"] * 300), "bad_words"),
    "300 choices": (body(guided_choice=["a"] * 300), "guided_choice"),
    "a token of no vocabulary": (body(prompt=[1, 1000]), "prompt"),
    "a negative token": (body(prompt=[-1]), "prompt"),
    "a token of no vocabulary in the second prompt": (body(prompt=[[1], [1000]]), "prompt"),
    "a bias for no token": (body(logit_bias={"1000": 1}), "logit_bias"),
    "a bias for a negative token": (body(logit_bias={"-1": 1}), "logit_bias"),
    "a stop token of no vocabulary": (body(stop_token_ids=[1000]), "stop_token_ids"),
    "an allowed token of no vocabulary": (body(allowed_token_ids=[-5]), "allowed_token_ids"),
    "a template": (body(chat_template="{{ 1 }}"), "chat_template"),
    "a template among its own arguments": (
        body(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        "chat_template",
    ),
    "tokens instead of text": (body(chat_template_kwargs={"tokenize": True}), "tokenize"),
    "documents": (body(chat_template_kwargs={"documents": []}), "documents"),
    "a schema of 100 kB": (body(guided_json={"enum": ["x" * 100_000]}), None),
    "a response format of 100 kB": (body(response_format=schema({"enum": ["x" * 100_000]})), None),
    "a structure of 100 kB": (body(structured_outputs={"choice": ["x" * 100_000]}), None),
}

# What vLLM before 0.20 compiles for as long as it takes.
PATTERNS = {
    "guided_regex": body(guided_regex="(a+)+$"),
    "guided_grammar": body(guided_grammar="root ::= root root"),
    "a pattern in guided_json": body(guided_json=PATTERN),
    "a pattern in response_format": body(response_format=schema(PATTERN)),
    "names by pattern": body(guided_json={"patternProperties": {"(a+)+$": {}}}),
    "a pattern in a list": body(guided_json={"anyOf": [{"type": "null"}, PATTERN]}),
    "structured_outputs": body(structured_outputs={"regex": "(a+)+$"}),
    "a grammar in structured_outputs": body(structured_outputs={"grammar": "root ::= root"}),
}

# What pydantic and vLLM read in another way than it is written.
DISGUISED = {
    "n as a text": body(n="10000"),
    "best_of as a text": body(best_of="10000"),
    "NaN as a text": body(temperature="NaN"),
    "Infinity as a text": body(top_p="Infinity"),
    "NaN as a text in a bias": body(logit_bias={"5": "nan"}),
    "a bias for +5000": body(logit_bias={"+5000": 1}),
    "a bias for 5_000": body(logit_bias={"5_000": 1}),
    "a bias for a number of 25 digits": body(logit_bias={"9" * 25: 1}),
    "a stop token as a text": body(stop_token_ids=["5000"]),
    "a stop token as a fraction": body(stop_token_ids=[5000.0]),
    "a prompt of fractions": body(prompt=[1.0, 5000.0]),
    "a prompt with one fraction": body(prompt=[1, 5000.0]),
    "a prompt of token ids as texts": body(prompt=[["5000"]]),
    "a schema as a text": body(guided_json=json.dumps(PATTERN)),
    "a pattern behind another kind": body(guided_json={"anyOf": [True, PATTERN]}),
    "a pattern for white space": body(guided_json={}, guided_whitespace_pattern="(a+)+$"),
    "a pattern of a function that must be called": body(
        tools=[{"type": "function", "function": {"name": "f", "parameters": PATTERN}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    ),
    "depth behind another kind": raw(f'"stop": [1, {"[" * 200}{"]" * 200}]'),
    "half a character in bytes": raw('"prompt": "?"').replace(b"?", b"\xed\xa0\x80"),
    "half a character in UTF-16": raw(r'"prompt": "\ud800"').decode().encode("utf-16-le"),
}

GOOD = {
    "a text": body(prompt="hello"),
    "a chat": body(messages=[{"role": "user", "content": "你好 😀"}]),
    "a character in two halves": raw(r'"prompt": "\ud83d\ude00"'),
    "a backslash before ud": raw(r'"prompt": "C:\\ud800"'),
    "the largest and least numbers": raw(f'"seed": {2**63 - 1}, "priority": {-(2**63)}'),
    "16 of each of 16 prompts": body(prompt=["a"] * 16, n=16),
    "256 prompts": body(prompt=["a"] * 256),
    "a long prompt of token ids": body(prompt=[1, 999] * 5000),
    "prompts of token ids": body(prompt=[[0], [999]]),
    "a bias": body(logit_bias={"0": -100, "999": 1.5}),
    "stop tokens": body(stop_token_ids=[0, 999], allowed_token_ids=[5]),
    "fields without a value": body(n=None, prompt="a", stop=None, logit_bias=None),
    "arguments of the template": body(chat_template_kwargs={"enable_thinking": False}),
    "a schema": body(response_format=schema({"type": "object", "properties": {}})),
    "a format": body(response_format={"type": "json_object"}),
    "64 levels": raw(f'"a": {"[" * 62}{"]" * 62}'),
    "tools": body(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "a penalty of a whole number": body(temperature=1, presence_penalty=-2, top_p=0.5),
    "the word pattern in a text": body(prompt='"pattern": "guided_regex"'),
}


@pytest.mark.parametrize(("text", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_as_vllm_can_take_it_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refusal:
        BOUNDS.check(text)
    assert refusal.value.status == 400
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(("text", "param"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_asks_for_too_much_is_refused_by_name(text: bytes, param: str | None) -> None:
    with pytest.raises(Refused) as refusal:
        NEWER.check(text)
    assert (refusal.value.status, refusal.value.param) == (400, param)


@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_patterns_are_taken_by_a_vllm_that_bounds_them_only(text: bytes) -> None:
    with pytest.raises(Refused, match="not taken here"):
        BOUNDS.check(text)
    NEWER.check(text)


@pytest.mark.parametrize("text", DISGUISED.values(), ids=DISGUISED)
def test_what_vllm_reads_in_another_way_than_it_is_written_is_refused(text: bytes) -> None:
    with pytest.raises(Refused):
        BOUNDS.check(text)


def test_a_property_may_be_called_pattern() -> None:
    BOUNDS.check(body(guided_json={"properties": {"pattern": {"type": "string"}}}))


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_an_ordinary_request_passes(text: bytes) -> None:
    BOUNDS.check(text)


def test_token_ids_pass_where_the_vocabulary_is_not_known() -> None:
    Bounds(choices=16, vocabulary=0, patterns=True, body_bytes=1000, seconds=5).check(
        body(prompt=[10**6])
    )


def test_the_bounds_are_what_serve_has_set() -> None:
    environ = {"MAX_CHOICES": "4", "VOCABULARY": "9", "TAKE_PATTERNS": "0", "MAX_BODY_MB": "2"}
    assert Bounds.of({**environ, "REQUEST_SECONDS": "7"}) == Bounds(4, 9, False, 2 << 20, 7)


# --- the class, around an application of a few lines ---

App = Callable[[dict, Callable, Callable], Awaitable[None]]


class Sent:
    """What the middleware has sent, and what it had sent when the application looked."""

    def __init__(self) -> None:
        self.messages: list[dict] = []

    async def __call__(self, message: dict) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        heads = [sent for sent in self.messages if sent["type"] == "http.response.start"]
        assert len(heads) == 1, "one head, whatever happens"
        return heads[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(sent.get("body", b"") for sent in self.messages)

    @property
    def error(self) -> dict:
        """The error, which must have OpenAI's form and the status of the head."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        return error


def ask(
    app: App,
    text: bytes = b'{"prompt": "a"}',
    bounds: Bounds = BOUNDS,
    path: str = "/v1/completions",
    errored: bool = False,
    sent: Sent | None = None,
) -> Sent:
    """Send one request through the middleware, its body in two pieces."""
    sent = sent or Sent()
    pieces = [
        {"type": "http.request", "body": text[:5], "more_body": True},
        {"type": "http.request", "body": text[5:], "more_body": False},
    ]

    async def receive() -> dict:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    client = types.SimpleNamespace(errored=errored)
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"x-request-id", b"abc-1")],
        "app": types.SimpleNamespace(state=types.SimpleNamespace(engine_client=client)),
    }
    wrapped = Middleware(app)
    wrapped.bounds = bounds
    asyncio.run(wrapped(scope, receive, sent))
    return sent


def head(status: int = 200, kind: bytes = b"application/json") -> dict:
    headers = [(b"content-type", kind), (b"content-length", b"999")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(text: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": text, "more_body": more}


def answering(*messages: dict) -> App:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        for message in messages:
            await send(message)

    return app


STREAM = b"text/event-stream; charset=utf-8"


def test_the_head_waits_for_the_first_piece_of_the_body() -> None:
    sent, seen = Sent(), []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await send(head(kind=STREAM))
        seen.append(len(sent.messages))
        await send(piece(b"", more=True))
        seen.append(len(sent.messages))
        await send(piece(b"data: {}\n\n", more=True))
        seen.append(len(sent.messages))
        await send(piece(b"data: [DONE]\n\n"))

    ask(app, sent=sent)
    assert seen == [0, 0, 2]
    assert (sent.status, sent.body) == (200, b"data: {}\n\ndata: [DONE]\n\n")


def test_a_good_answer_passes_as_it_is() -> None:
    sent = ask(answering(head(), piece(b'{"choices": []}')))
    assert sent.messages == [head(), piece(b'{"choices": []}')]


def test_the_application_reads_the_whole_body_and_then_what_comes_after_it() -> None:
    read = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        read.extend([await receive(), await receive()])
        await send(head())
        await send(piece(b"{}"))

    ask(app, b'{"prompt": "a long one"}')
    assert read[0] == {
        "type": "http.request",
        "body": b'{"prompt": "a long one"}',
        "more_body": False,
    }
    assert read[1]["type"] == "http.disconnect"


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}\n\n',
        b'data: {"object": "error", "message": "too long", "code": 400}\n\n',
    ],
)
def test_a_stream_that_begins_with_an_error_becomes_a_status(event: bytes) -> None:
    sent = ask(answering(head(kind=STREAM), piece(event, more=True), piece(b"data: [DONE]\n\n")))
    assert sent.status == 400
    assert sent.error["message"] == "too long"


def test_a_stream_that_fails_later_keeps_what_it_has_said() -> None:
    error = b'data: {"error": {"message": "lost", "code": 500}}\n\n'
    sent = ask(answering(head(kind=STREAM), piece(b"data: {}\n\n", more=True), piece(error)))
    assert sent.status == 200
    assert sent.body == b"data: {}\n\n" + error


def test_an_error_of_an_old_line_gets_the_form_of_openai() -> None:
    old = {"object": "error", "message": "no such model", "type": "NotFoundError", "param": "model"}
    sent = ask(answering(head(404), piece(json.dumps({**old, "code": 404}).encode())))
    assert sent.error == {
        "message": "no such model",
        "type": "not_found_error",
        "param": "model",
        "code": 404,
    }


def test_an_error_in_plain_text_gets_the_form_of_openai() -> None:
    text = answering(head(500, b"text/plain"), piece(b"Internal ", more=True), piece(b"Error"))
    sent = ask(text)
    assert sent.status == 500
    assert sent.error["message"] == "Internal Error"


@pytest.mark.parametrize("errored", [False, True])
def test_a_failure_of_a_replica_without_an_engine_is_503_which_may_be_repeated(
    errored: bool,
) -> None:
    sent = ask(answering(head(500, b"text/plain"), piece(b"EngineDead")), errored=errored)
    assert sent.error["code"] == (503 if errored else 500)
    # A client's own mistake stays one.
    assert ask(answering(head(400), piece(b"{}")), errored=errored).status == 400


def test_a_request_that_takes_too_long_is_504() -> None:
    ended = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    brief = Bounds(choices=16, vocabulary=0, patterns=True, body_bytes=1000, seconds=0)
    sent = ask(app, bounds=brief)
    assert sent.status == 504
    assert "REQUEST_SECONDS=0" in sent.error["message"]
    assert ended == [True], "vLLM's work for it has ended, too"


def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await send(head(kind=STREAM))
        await send(piece(b"data: {}\n\n", more=True))
        await asyncio.sleep(60)

    brief = Bounds(choices=16, vocabulary=0, patterns=True, body_bytes=1000, seconds=0.05)
    sent = ask(app, bounds=brief)
    events = sent.body.split(b"\n\n")
    assert sent.status == 200
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == 504
    assert not sent.messages[-1].get("more_body")


async def never(scope: dict, receive: Callable, send: Callable) -> None:
    """An application that must not be asked."""
    raise AssertionError("vLLM was asked")


def test_a_body_that_is_too_large_is_413() -> None:
    sent = ask(never, body(prompt="x" * 2000))
    assert sent.status == 413
    assert "1000 bytes" in sent.error["message"]


def test_a_refused_body_does_not_reach_vllm() -> None:
    sent = ask(never, body(n=10_000))
    assert sent.error["param"] == "n"
    assert sent.error["type"] == "invalid_request_error"


def test_a_body_that_does_not_arrive_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_SECONDS", 0.01)

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {}

    sent = Sent()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(Middleware(never)(scope, receive, sent))
    assert sent.error["code"] == 408


def test_an_exception_of_vllm_is_500_in_json() -> None:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        raise KeyError("/opt/venv/secret/path")

    sent = ask(app)
    assert sent.error == {
        "message": "vLLM failed: KeyError",
        "type": "server_error",
        "param": None,
        "code": 500,
    }


def test_an_exception_after_the_answer_has_begun_is_not_hidden() -> None:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await send(head(kind=STREAM))
        await send(piece(b"data: {}\n\n", more=True))
        raise KeyError("late")

    with pytest.raises(KeyError, match="late"):
        ask(app)


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_what_is_asked_every_second_passes_untouched(path: str) -> None:
    seen = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        seen.append(send)
        await send(head())

    sent = ask(app, path=path)
    assert seen == [sent]
    assert sent.messages == [head()]


def test_the_log_has_the_id_that_the_gateway_gave(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vllm.requests")
    ask(answering(head(), piece(b"{}")))
    assert "request abc-1 POST /v1/completions 200 after" in caplog.text
