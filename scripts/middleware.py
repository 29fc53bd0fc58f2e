"""What every request passes inside vLLM: bounds on what it may ask for, and an honest status.

vLLM takes the class by its argument --middleware, on every line; so it runs in vLLM's own process,
reads a body with the parser that vLLM reads it with, and needs nothing but the standard library.
"""

import asyncio
import contextvars
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Send = Callable[[dict], Awaitable[None]]
Receive = Callable[[], Awaitable[dict]]

_log = logging.getLogger("vllm.requests")
_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

# What the gateway and the agent ask about every second: not worth a line, and never to be held up.
_QUIET = ("/health", "/metrics")
_BODY_SECONDS = 60
# Prompts times choices of one request: as many as vLLM runs at once on a small card.
_MOST_SEQUENCES = 256
# Bytes of JSON that describe what an answer must look like, depth of any JSON, strings in a list.
_MOST_SCHEMA, _MOST_DEPTH, _MOST_STRINGS = 64 << 10, 64, 256
_INT64 = 1 << 63
_PLAIN = re.compile(r"-?[0-9]{1,19}")
_STRUCTURES = (
    *("guided_json", "guided_grammar", "guided_regex", "guided_choice"),
    *("response_format", "structured_outputs", "guided_whitespace_pattern"),
)
_PATTERNS = (
    *("guided_regex", "guided_grammar", "regex", "grammar", "pattern", "patternProperties"),
    *("guided_whitespace_pattern", "whitespace_pattern"),
)
# pydantic makes a number of a text, and of "NaN" one that is none.
_NUMBERS = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "priority"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "truncate_prompt_tokens"),
)
# Of chat_template_kwargs: arguments of the function that renders the template, not of the template.
_NOT_OF_A_TEMPLATE = ("chat_template", "tokenize", "tools", "documents", "return_tensors")
_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refused(Exception):
    """A request that is answered with `status` and a message, without vLLM."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        self.status, self.param = status, param
        super().__init__(message)


@dataclass(frozen=True)
class Bounds:
    """How much one request may ask for; token ids are below `vocabulary` (0: not known)."""

    choices: int
    vocabulary: int
    patterns: bool
    body_bytes: int
    seconds: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Bounds":
        """Read what scripts/serve.py has set."""
        return cls(
            choices=int(environ.get("MAX_CHOICES", "16")),
            vocabulary=int(environ.get("VOCABULARY", "0")),
            patterns=environ.get("TAKE_PATTERNS", "1") == "1",
            body_bytes=int(environ.get("MAX_BODY_MB", "16")) << 20,
            seconds=int(environ.get("REQUEST_SECONDS", "3600")),
        )

    def check(self, body: bytes) -> bool:
        """Return whether a body asks for an answer of some form.

        Raises:
            Refused: it is not JSON, or asks for more than is good for others.
        """
        document = _parse(body)
        if not isinstance(document, dict):
            raise Refused(400, "the body is not a JSON object")
        self._check_counts(document)
        self._check_ids(document)
        formed = self._check_structure(document)
        kwargs = document.get("chat_template_kwargs")
        for name in kwargs if isinstance(kwargs, dict) else ():
            if name in _NOT_OF_A_TEMPLATE:
                raise Refused(400, f"chat_template_kwargs may not contain {name}", name)
        if document.get("chat_template"):
            raise Refused(400, "templates in a request are not taken here", "chat_template")
        return formed

    def _check_counts(self, document: dict) -> None:
        for name in _NUMBERS:
            value = document.get(name)
            if isinstance(value, str):
                raise Refused(400, f"{name} is a text, and not a number", name)
            if isinstance(value, int) and not -_INT64 <= value < _INT64:
                raise Refused(400, f"{name} is too large a number", name)
        bias = document.get("logit_bias")
        if isinstance(bias, dict) and any(isinstance(value, str) for value in bias.values()):
            raise Refused(400, "logit_bias has a text, and not a number", "logit_bias")
        choices = 1
        for name in ("n", "best_of"):
            value = document.get(name)
            if isinstance(value, (int, float)) and value > self.choices:
                raise Refused(
                    400, f"{name}={value} is more than {self.choices}, the most here", name
                )
            choices = max(choices, value if isinstance(value, int) else 1)
        prompt = document.get("prompt")
        prompts = len(prompt) if _is_list_of(prompt, (str, list)) else 1
        if prompts * choices > _MOST_SEQUENCES:
            raise Refused(
                400,
                f"{prompts} prompts with {choices} choices each are more than {_MOST_SEQUENCES}"
                " sequences, the most in one request here",
                "prompt",
            )
        for name in ("stop", "bad_words", "guided_choice"):
            value = document.get(name)
            if isinstance(value, list) and len(value) > _MOST_STRINGS:
                raise Refused(400, f"{name} has more than {_MOST_STRINGS} entries", name)

    def _check_ids(self, document: dict) -> None:
        """Refuse ids of no token: an old engine dies of one, and takes all others with it."""
        if not self.vocabulary:
            return
        for name, ids in _ids(document):
            for number in ids:
                # Neither 5.0 nor "5": pydantic would make a token id of them.
                if type(number) is not int or not 0 <= number < self.vocabulary:
                    raise Refused(
                        400,
                        f"{name} has {str(number)[:40]}, which is not a token id of this model"
                        f" (0 to {self.vocabulary - 1})",
                        name,
                    )

    def _check_structure(self, document: dict) -> bool:
        asked = {name: _opened(document[name]) for name in _STRUCTURES if document.get(name)}
        if document.get("tool_choice") not in (None, "none", "auto"):
            # The arguments of a function that must be called are a schema like any other.
            asked["tools"] = document.get("tools")
        if _depth(asked) > _MOST_DEPTH:
            raise Refused(400, f"a form of the answer may be {_MOST_DEPTH} levels deep")
        if len(json.dumps(asked)) > _MOST_SCHEMA:
            raise Refused(400, f"a form of the answer may have {_MOST_SCHEMA} bytes of JSON")
        if not self.patterns:
            for name in _names(asked):
                if name in _PATTERNS:
                    raise Refused(
                        400,
                        f"{name} is not taken here: this vLLM compiles an expression without any"
                        " bound (CUDA=130 has a newer one)",
                        name,
                    )
        return bool(asked)


def _parse(body: bytes) -> Any:
    """Return the JSON of a body; refuse numbers that no program downstream expects."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def real(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {digits[:24]} is too large")
        return value

    try:
        document = json.loads(body.decode(), parse_constant=constant, parse_float=real)
        deep = _depth(document) > _MOST_DEPTH
        if b"\\u" in body and b"\\ud" in body.lower():
            # Half a character: no tokenizer takes it.
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if "sys.set_int_max_str_digits" in reason:
            reason = "a number is too large"
        raise Refused(400, f"the body is not JSON as it is taken here: {reason}") from None
    if deep:
        raise Refused(400, f"the body is nested more than {_MOST_DEPTH} levels deep")
    return document


def _is_list_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], kinds)


def _opened(value: Any) -> Any:
    """Return a schema as what it is, where it is JSON in a text, here or as structured_outputs."""
    if isinstance(value, dict):
        return {name: _opened(inner) if name == "json" else inner for name, inner in value.items()}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _inner(value: Any) -> list:
    """Return what of it has an inside itself."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return []
    return [inner for inner in value if isinstance(inner, (dict, list))]


def _depth(document: Any) -> int:
    level, depth = [document], 0
    while level and depth <= _MOST_DEPTH:
        level = [inner for value in level for inner in _inner(value)]
        depth += 1
    return depth


def _names(document: Any) -> Iterator[str]:
    """Yield the names of all texts inside: a property that is called `pattern` is none."""
    if isinstance(document, dict):
        for name, value in document.items():
            if isinstance(value, str) or name == "patternProperties":
                yield name
    for inner in _inner(document):
        yield from _names(inner)


def _ids(document: dict) -> Iterator[tuple[str, list]]:
    """Yield the lists of token ids of a request, with the field they are in."""
    prompt = document.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(part, str) for part in prompt):
        lists = [part for part in prompt if isinstance(part, list)]
        yield from (("prompt", part) for part in (lists or [prompt]))
    for name in ("stop_token_ids", "allowed_token_ids"):
        if isinstance(document.get(name), list):
            yield name, document[name]
    bias = document.get("logit_bias")
    if isinstance(bias, dict):
        # int() takes "+5", " 5" and "5_0", too, and vLLM calls it.
        yield "logit_bias", [int(key) if _PLAIN.fullmatch(key) else key for key in bias]


def _error(status: int, message: str, param: str | None = None) -> bytes:
    """Return an error as OpenAI's API has it.

    https://platform.openai.com/docs/guides/error-codes
    """
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def _told(text: bytes) -> tuple[int, str, str | None] | None:
    """Return (status, message, param) where a text is an error of vLLM's, of any line."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    inner = value.get("error") if isinstance(value, dict) else None
    if inner is None and isinstance(value, dict) and value.get("object") == "error":
        inner = value
    if isinstance(inner, str):
        return 500, inner, None
    if not isinstance(inner, dict):
        return None
    code = inner.get("code")
    return code if isinstance(code, int) else 500, str(inner.get("message")), inner.get("param")


class _Answer:
    """Holds back the head of an answer until its first bytes show what it is.

    Nothing has been sent for a request that fails before its first token, so that the gateway may
    give it to another replica.
    """

    def __init__(self, send: Send, dead: Callable[[], bool]) -> None:
        self._send, self._dead = send, dead
        self._head: dict = {}
        self._text = b""
        self.status = 0
        self.first = 0.0
        # Whether the request asks for an answer of some form.
        self.formed = False
        self._over = False

    async def send(self, message: dict) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        if message["type"] != "http.response.body" or self.status:
            await self._send(message)
            return
        text, more = message.get("body", b""), message.get("more_body", False)
        kinds = [value for name, value in self._head["headers"] if name == b"content-type"]
        stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        if self._head["status"] >= 400:
            self._text += text
            if not more:
                found = _told(self._text) or (0, self._text.decode(errors="replace")[:2000], None)
                await self.refuse(self._head["status"], *found[1:])
        elif stream and not text and more:
            return
        elif stream and (found := _told(text.strip().removeprefix(b"data:"))):
            await self.refuse(*found)
        else:
            self.status, self.first = self._head["status"], time.monotonic()
            await self._send(self._head)
            await self._send(message)

    async def refuse(self, status: int, message: str, param: str | None = None) -> None:
        """Answer with an error, unless the answer has begun."""
        if self.status:
            event = b"data: " + _error(status, message, param) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event})
        else:
            if status >= 500 and self._dead():
                status, message = 503, "this replica has lost its engine; it restarts"
            elif status == 500 and self.formed:
                # vLLM's engine compiles it, and knows no better word for one that it cannot.
                status, message = 400, "vLLM cannot give an answer of this form"
            self.status = status
            body = _error(status, message, param)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            start = {"type": "http.response.start", "status": status, "headers": headers}
            await self._send(start)
            await self._send({"type": "http.response.body", "body": body})
        self._over = True


class Middleware:
    """ASGI middleware around vLLM's whole application."""

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.bounds = Bounds.of(os.environ)

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _QUIET:
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        _request_id.set(given or uuid.uuid4().hex)
        began = time.monotonic()
        answer = _Answer(send, lambda: _is_dead(scope))
        try:
            # Timers of asyncio, not of threads: they end what vLLM does for the request, too.
            async with asyncio.timeout(self.bounds.seconds) as limit:
                if scope["method"] == "POST":
                    body = await self._body(receive)
                    answer.formed = self.bounds.check(body)
                    receive = _replay(body, receive)
                await self.app(scope, receive, answer.send)
        except Refused as refused:
            await answer.refuse(refused.status, str(refused), refused.param)
        except Exception as error:
            if limit.expired():
                await answer.refuse(504, f"not done in REQUEST_SECONDS={self.bounds.seconds}")
                return
            if answer.status:
                raise
            _log.exception("%s failed", _request_id.get())
            await answer.refuse(500, f"vLLM failed: {type(error).__name__}")
        finally:
            now = time.monotonic()
            _log.info(
                "request %s %s %s %d after %.3f s, first byte after %.3f s",
                *(_request_id.get(), scope["method"], scope["path"], answer.status, now - began),
                (answer.first or now) - began,
            )

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client left")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.bounds.body_bytes:
                        raise Refused(413, f"a body has at most {self.bounds.body_bytes} bytes")
        except TimeoutError:
            raise Refused(408, f"the body did not arrive in {_BODY_SECONDS} s") from None
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body first, then what the real one has."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> dict:
        return waiting.pop() if waiting else await receive()

    return replayed


def _is_dead(scope: dict) -> bool:
    """Whether vLLM knows that its engine is gone: all lines name it alike."""
    client = getattr(scope["app"].state, "engine_client", None)
    try:
        return bool(client is not None and client.errored)
    except Exception:
        return False


class Json(logging.Formatter):
    """Formats a log record as one line of JSON, with the id of the request it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": _request_id.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def to_stdout() -> logging.Handler:
    """Return a handler that writes lines as they are: vLLM puts a prefix before those of print."""
    return logging.StreamHandler(open(1, "w", buffering=1, encoding="utf-8", closefd=False))


def log_config() -> dict:
    """Return the configuration of logging that makes vLLM log in JSON."""
    handler = {"()": "scripts.middleware.to_stdout", "formatter": "json"}
    one = {"handlers": ["out"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "scripts.middleware.Json"}},
        "handlers": {"out": handler},
        "loggers": {"vllm": one},
        "root": {"handlers": ["out"], "level": "WARNING"},
    }
