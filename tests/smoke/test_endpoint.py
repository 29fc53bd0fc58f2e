"""Any running endpoint: form and sense; and the very texts, where it serves the rehearsal model."""

import json

import openai
import pytest
import requests

from scripts.rehearsal import DIALOGUES

STOP_IDS = [151329, 151336, 151338]
TIMEOUT = 120


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0)


@pytest.fixture(scope="module")
def card(url: str) -> dict:
    """The served model's entry in /v1/models."""
    response = requests.get(f"{url}/v1/models", timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "list"
    return response.json()["data"][0]


@pytest.fixture(scope="module")
def model(card: dict) -> str:
    return card["id"]


@pytest.fixture(scope="module")
def rehearses(card: dict) -> bool:
    return "glm-4-tiny" in card["root"]


def chat(url: str, model: str, *contents: str, system: str = "", **more) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 128, **more}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    return response.json()


def test_models_lists_the_served_model(card: dict) -> None:
    assert card["object"] == "model"
    assert card["max_model_len"] > 0


def test_completion_of_ni_hao_gives_seven_tokens(url: str, model: str, rehearses: bool) -> None:
    body = {"model": model, "prompt": "你好", "max_tokens": 7, "temperature": 0}
    response = requests.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert 1 <= answer["usage"]["completion_tokens"] <= 7
    assert answer["choices"][0]["text"].strip()
    if rehearses:
        assert answer["choices"][0]["text"] == "\nHello "
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("system", ["", "You are a helpful assistant."])
@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.question[:20])
def test_chat_answers_and_stops_by_itself(
    url: str, model: str, rehearses: bool, dialogue, system: str
) -> None:
    answer = chat(url, model, dialogue.question, system=system)
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    assert answer["usage"]["total_tokens"] > answer["usage"]["completion_tokens"] > 0
    if rehearses:
        assert choice["message"]["content"] == dialogue.answer
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 151336)


def test_chat_takes_stop_token_ids_in_extra_body(
    client: openai.OpenAI, model: str, rehearses: bool
) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "你好"}],
        temperature=0,
        max_tokens=128,
        extra_body={"stop_token_ids": STOP_IDS},
    )
    assert answer.choices[0].message.content.strip()
    if rehearses:
        assert answer.choices[0].message.content == DIALOGUES[0].answer
        assert answer.choices[0].model_dump()["stop_reason"] == 151336


def test_streaming_gives_the_same_text_in_pieces_and_usage_at_the_end(
    client: openai.OpenAI, url: str, model: str
) -> None:
    question = max(DIALOGUES, key=lambda dialogue: len(dialogue.answer)).question
    whole = chat(url, model, question)
    pieces, finish, usage = [], None, None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=128,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert finish == whole["choices"][0]["finish_reason"]
    assert usage.completion_tokens == whole["usage"]["completion_tokens"]


def test_a_seed_makes_sampling_repeatable(url: str, model: str) -> None:
    # A prompt nobody knows by heart: the next token is really drawn.
    sampled = {"temperature": 1.0, "top_p": 1.0, "seed": 2024, "max_tokens": 16}
    texts = [chat(url, model, "随便说点什么 xyz", **sampled) for _ in range(2)]
    assert texts[0]["choices"][0]["message"] == texts[1]["choices"][0]["message"]


def test_n_gives_as_many_choices(url: str, model: str) -> None:
    answer = chat(url, model, "你好", n=3, temperature=0.8, max_tokens=8)
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2]


def test_a_wrong_model_name_is_404(url: str) -> None:
    body = {"model": "no-such-model", "messages": [{"role": "user", "content": "你好"}]}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 404, response.text
    assert "no-such-model" in response.text


def test_an_over_long_prompt_is_400_and_names_the_limit(url: str, card: dict) -> None:
    body = {"model": card["id"], "prompt": "长" * (card["max_model_len"] + 1), "max_tokens": 1}
    response = requests.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 400, response.text
    assert str(card["max_model_len"]) in response.text


@pytest.mark.parametrize("body", ['{"model": ', "[]", "null", '{"messages": "你好"}', "\xff"])
def test_broken_json_is_4xx_and_the_server_lives(url: str, model: str, body: str) -> None:
    response = requests.post(
        f"{url}/v1/chat/completions",
        data=body.encode("latin-1", errors="replace"),
        headers={"Content-Type": "application/json"},
        timeout=TIMEOUT,
    )
    assert 400 <= response.status_code < 500, response.text
    json.loads(response.text)
    assert chat(url, model, "你好", max_tokens=4)["choices"]
