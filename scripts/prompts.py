"""Read prompts in the forms that people have them in, and keep the file of their results."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from scripts import errors

# What a line may say about its own sampling; vLLM's SamplingParams checks the values.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
# OpenAI's newer name, and what it may say that changes nothing here.
_RENAMED = {"max_completion_tokens": "max_tokens"}
_NEUTRAL = {"stream": (False, None), "n": (1, None)}
# https://platform.openai.com/docs/api-reference/batch: the input object, and the output object.
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_BATCH = ("custom_id", "method", "url", "body")


class BadLine(Exception):
    """A line that is no prompt; `str()` says why."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its line from 1, and either `text` or chat `messages`.

    `url` is empty for a plain line, and the endpoint of OpenAI's for one of the batch form.
    """

    line: int
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    url: str = ""
    custom_id: str = ""
    metadata: Any = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def digest(self, *more: object) -> str:
        """Return what identifies this prompt asked in this way: a SHA-256 in hexadecimal."""
        content = [self.text, self.messages, self.url, self.sampling, more]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read(lines: Iterable[str], form: str, names: Iterable[str]) -> Iterator[Prompt | tuple]:
    """Yield a Prompt for each line that has one, and (line number, why) for each that is bad.

    `form` is text (a prompt a line), jsonl, or auto: jsonl if the first line is a JSON object.
    `names` are the model names that a line may ask for. Empty lines are no prompts.
    """
    names = tuple(names)
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        if form == "auto":
            form = "jsonl" if _is_object(line) else "text"
        if form == "text":
            yield Prompt(number, text=line)
            continue
        try:
            yield _parse(number, line, names)
        except BadLine as error:
            yield number, str(error)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(number: int, line: str, names: tuple[str, ...]) -> Prompt:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from None
    if isinstance(found, str):
        return Prompt(number, text=found)
    if not isinstance(found, dict):
        raise BadLine(f"a JSON {type(found).__name__}, not an object or a string")
    custom_id = found.pop("custom_id", "")
    if not isinstance(custom_id, str | int):
        raise BadLine("custom_id is neither a string nor a number")
    url, body = "", found
    if "body" in found or "url" in found:
        url, body = _batch(found)
    metadata = body.pop("metadata", None)
    model = body.pop("model", None)
    if model is not None and model not in names:
        raise BadLine(f"model {model!r} is not this one, {names[0]}")
    text, messages = body.pop("prompt", None), body.pop("messages", None)
    if (text is None) == (messages is None):
        raise BadLine("needs `prompt` or `messages`, and not both")
    if url and (url == _CHAT) != (messages is not None):
        raise BadLine(f"{url} takes `{'messages' if url == _CHAT else 'prompt'}`")
    if text is not None and not isinstance(text, str):
        raise BadLine("`prompt` is not a string")
    return Prompt(
        number,
        text=text or "",
        messages=_messages(messages) if messages is not None else (),
        url=url,
        custom_id=str(custom_id),
        metadata=metadata,
        sampling=_sampling(body),
    )


def _batch(found: dict) -> tuple[str, dict]:
    """Return the endpoint and the body of a line in OpenAI's batch form."""
    unknown = set(found) - set(_BATCH)
    if unknown:
        raise BadLine(f"unknown in a batch line: {', '.join(sorted(unknown))}")
    url, body = found.get("url"), found.get("body")
    if url not in (_CHAT, _COMPLETION):
        raise BadLine(f"url {url!r} is neither {_CHAT} nor {_COMPLETION}")
    if found.get("method", "POST") != "POST" or not isinstance(body, dict):
        raise BadLine("a batch line needs the method POST and a body that is an object")
    return url, body


def _messages(found: Any) -> tuple[Mapping[str, Any], ...]:
    good = isinstance(found, list) and found
    if not good or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found):
        raise BadLine("`messages` is not a list of objects with a `role`")
    for message in found:
        if not isinstance(message.get("content"), str):
            raise BadLine("the `content` of a message is not a string")
    return tuple(found)


def _sampling(body: dict) -> dict[str, Any]:
    result = {}
    for name, value in body.items():
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            continue
        name = _RENAMED.get(name, name)
        if name not in SAMPLING:
            hint = "; your own data may be in `metadata`"
            raise BadLine(f"`{name}` is not known; these are: {', '.join(SAMPLING)}{hint}")
        if value is not None:
            result[name] = value
    return result


def record(
    prompt: Prompt,
    digest: str,
    model: str,
    text: str,
    finish_reason: str | None,
    stop_reason: int | str | None,
    tokens: tuple[int, int],
) -> dict[str, Any]:
    """Return the line of a result; `tokens` are those of the prompt and of the answer.

    A prompt of OpenAI's batch form gets the answer in it.
    """
    result: dict[str, Any] = {"line": prompt.line}
    if prompt.custom_id:
        result["custom_id"] = prompt.custom_id
    if prompt.metadata is not None:
        result["metadata"] = prompt.metadata
    said, completed = tokens
    if not prompt.url:
        asked = {"messages": prompt.messages} if prompt.messages else {"prompt": prompt.text}
        return {
            **result,
            **asked,
            "text": text,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "prompt_tokens": said,
            "completion_tokens": completed,
            "digest": digest,
        }
    chat = prompt.url == _CHAT
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest[:24]}",
        "object": "chat.completion" if chat else "text_completion",
        "model": model,
        "choices": [
            {"index": 0, **choice, "finish_reason": finish_reason, "stop_reason": stop_reason}
        ],
        "usage": {
            "prompt_tokens": said,
            "completion_tokens": completed,
            "total_tokens": said + completed,
        },
    }
    response = {"status_code": 200, "request_id": digest[:24], "body": body}
    return {**result, "response": response, "error": None, "digest": digest}


def finished(path: Path | None) -> dict[int, str]:
    """Return the digest of each line of the input that the results in `path` have.

    A last line that was not written to its end is no result.

    Raises:
        SettingInvalid: what lies there are not such results.
    """
    found: dict[int, str] = {}
    if path is None or not path.exists():
        return found
    try:
        stream = path.open("rb")
    except OSError as error:
        raise errors.SettingInvalid(
            f"{path}: {error.strerror}", "a file that uid 10001 may read", "chmod o+r that file"
        ) from None
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                one = json.loads(line)
                found[int(one["line"])] = str(one["digest"])
            except (ValueError, KeyError, TypeError):
                raise errors.SettingInvalid(
                    f"line {number} of {path} is no result of this program",
                    "results to go on with, or no such file",
                    "give another file, or move this one away",
                ) from None
    return found


@contextlib.contextmanager
def results(path: Path) -> Iterator[TextIO]:
    """Open a file of results to go on with it, and put them in the order of the input at the end.

    What was cut off while it was written is removed.

    Raises:
        SettingInvalid: another process writes it, it cannot be opened, or it has something else.
    """
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise errors.SettingInvalid(
            f"{path}: {error.strerror}", "a file that can be written", "give another OUTPUT"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise errors.SettingInvalid(
                f"another process writes {path}", "one at a time", "wait for it, or end it"
            ) from None
        finished(path)
        stream.truncate(_whole(path))
        with path.open("a", encoding="utf-8") as text:
            yield text
        _sort(path)


def _whole(path: Path) -> int:
    """Return the bytes of a file up to its last newline."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as stream:
        at = size
        while at and not end:
            begin = max(0, at - 65536)
            stream.seek(begin)
            position = stream.read(at - begin).rfind(b"\n")
            end = begin + position + 1 if position >= 0 else 0
            at = begin
    return end


def _sort(path: Path) -> None:
    """Put results in the order of their input, at once or not at all."""
    places: list[tuple[int, int, int]] = []
    with path.open("rb") as stream:
        at = 0
        for line in stream:
            places.append((json.loads(line)["line"], at, len(line)))
            at += len(line)
        if places == sorted(places):
            return
        temporary = path.with_name(f".{path.name}.sorted")
        with temporary.open("wb") as other:
            for _, begin, length in sorted(places):
                stream.seek(begin)
                other.write(stream.read(length))
            other.flush()
            os.fsync(other.fileno())
        temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
