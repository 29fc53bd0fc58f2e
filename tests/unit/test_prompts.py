"""Prompts in every form that people have them in, and the file of their results."""

import json
from pathlib import Path

import pytest

from scripts import errors, prompts
from scripts.prompts import Prompt

NAMES = ("glm-4-9b-chat", "ZhipuAI/glm-4-9b-chat")


def read(text: str, form: str = "auto") -> list:
    return list(prompts.read(text.splitlines(keepends=True), form, NAMES))


def line(**values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


def chat(**body: object) -> str:
    messages = [{"role": "user", "content": "hi"}]
    return line(
        custom_id="a",
        method="POST",
        url="/v1/chat/completions",
        body={"model": NAMES[0], "messages": messages, **body},
    )


def test_a_text_file_has_a_prompt_a_line_and_empty_lines_are_none() -> None:
    found = read("你好\r\n\n  \n[1, 2]\n")
    assert [(one.line, one.text) for one in found] == [(1, "你好"), (4, "[1, 2]")]


def test_jsonl_has_strings_prompts_and_messages() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = "\n".join(
        [line(prompt="a", temperature=0), json.dumps("b"), line(messages=messages, custom_id=7)]
    )
    first, second, third = read(text)
    assert (first.text, first.sampling) == ("a", {"temperature": 0})
    assert (second.line, second.text) == (2, "b")
    assert (list(third.messages), third.custom_id) == (messages, "7")


def test_openai_batch_lines_keep_their_endpoint_and_newer_names_are_understood() -> None:
    (found,) = read(chat(max_completion_tokens=9, n=1, stream=False, metadata={"k": 1}))
    assert (found.url, found.custom_id, found.metadata) == ("/v1/chat/completions", "a", {"k": 1})
    assert found.sampling == {"max_tokens": 9}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "JSON int"),
        (line(prompt="a", temprature=1), "`temprature` is not known"),
        (line(prompt="a", n=2), "`n` is not known"),
        (line(prompt="a", messages=[]), "not both"),
        (line(text="a"), "needs `prompt` or `messages`"),
        (line(prompt=["a"]), "not a string"),
        (line(messages=[]), "not a list"),
        (line(messages=[{"role": "user", "content": [{"type": "image"}]}]), "not a string"),
        (line(messages=[{"content": "a"}]), "`role`"),
        (line(prompt="a", model="gpt-4"), "'gpt-4' is not this one, glm-4-9b-chat"),
        (line(custom_id="a", url="/v1/embeddings", body={}), "neither"),
        (line(custom_id="a", url="/v1/completions", body={"messages": [{}]}), "takes `prompt`"),
        (line(custom_id="a", method="GET", url="/v1/completions", body={}), "POST"),
        (line(custom_id=["a"], prompt="a"), "custom_id"),
        (line(custom_id="a", url="/v1/completions", body={}, more=1), "unknown in a batch line"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_others_stay(bad: str, why: str) -> None:
    first, (number, told), last = read("\n".join([line(prompt="a"), bad, line(prompt="z")]))
    assert (first.text, last.text, number) == ("a", "z", 2)
    assert why in told


def test_the_digest_changes_with_all_that_changes_the_answer_and_not_with_the_place() -> None:
    base = Prompt(1, text="a").digest("x")
    assert Prompt(2, text="a", metadata=3, custom_id="c").digest("x") == base
    others = [
        Prompt(1, text="b").digest("x"),
        Prompt(1, text="a").digest("y"),
        Prompt(1, text="a", sampling={"seed": 1}).digest("x"),
        Prompt(1, messages=({"role": "user", "content": "a"},)).digest("x"),
    ]
    assert len({base, *others}) == 5


def test_a_result_of_a_batch_line_has_openais_form() -> None:
    (prompt,) = read(chat())
    made = prompts.record(prompt, "d" * 64, "m", "hello", "stop", 151336, (5, 2))
    choice = made["response"]["body"]["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hello"}
    assert made["response"]["body"]["usage"]["total_tokens"] == 7
    assert (made["custom_id"], made["error"], made["response"]["status_code"]) == ("a", None, 200)


def test_a_result_of_a_plain_line_has_text_reasons_and_counts() -> None:
    made = prompts.record(Prompt(3, text="q"), "d", "m", "hello", "length", None, (5, 2))
    assert made == {
        "line": 3,
        "prompt": "q",
        "text": "hello",
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "digest": "d",
    }


def test_what_was_cut_off_is_removed_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"line": 2, "digest": "b"}\n{"line": 1, "dig', encoding="utf-8")
    assert prompts.finished(path) == {2: "b"}
    with prompts.results(path) as stream:
        stream.write('{"line": 1, "digest": "a"}\n')
    assert [json.loads(one)["line"] for one in path.read_text().splitlines()] == [1, 2]


def test_results_stay_as_they_are_when_the_run_is_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt), prompts.results(path) as stream:
        stream.write('{"line": 9, "digest": "b"}\n{"line": 1, "digest": "a"}\n')
        raise KeyboardInterrupt
    assert prompts.finished(path) == {9: "b", 1: "a"}
    assert path.read_text().startswith('{"line": 9')


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with (
        prompts.results(path),
        pytest.raises(errors.SettingInvalid, match="another process writes"),
        prompts.results(path),
    ):
        pass


@pytest.mark.parametrize("content", ["text\n", '{"line": 1}\n', "[]\n", '{"digest": "a"}\n'])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with (
        pytest.raises(errors.SettingInvalid, match=r"line 1 of .* is no result"),
        prompts.results(path),
    ):
        pass
    assert path.read_text() == content
