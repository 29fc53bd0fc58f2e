"""Load from Locust: chats, half of them streamed; a line of JSON for what became of each.

    locust -f tests/gateway/load.py --headless --users 8 --run-time 30s --host http://…

Variables: OUTCOMES, the file to write; KEY, what to send as key.
"""

import json
import os
import random
import time
from pathlib import Path

from locust import HttpUser, constant, events, task

_OUTCOMES = Path(os.environ["OUTCOMES"]).open("w", buffering=1)  # noqa: SIM115
_TOKENS = int(os.environ.get("TOKENS", "16"))


@events.quitting.add_listener
def close(**_: object) -> None:
    """Write what is left."""
    _OUTCOMES.close()


class Client(HttpUser):
    """Asks again and again, on a connection of its own for each request, and never retries."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.client.headers["Connection"] = "close"
        if os.environ.get("KEY"):
            self.client.headers["Authorization"] = f"Bearer {os.environ['KEY']}"

    @task
    def whole(self) -> None:
        self.chat(stream=False)

    @task
    def streamed(self) -> None:
        self.chat(stream=True)

    def chat(self, stream: bool) -> None:
        """Send one request and note how it ended."""
        body = {
            "model": "glm-4-9b-chat",
            "messages": [{"role": "user", "content": f"你好 {random.random()}"}],
            "max_tokens": _TOKENS,
            "ignore_eos": True,
            "stream": stream,
        }
        outcome = {"stream": stream, "at": time.time(), "status": 0, "begun": False, "done": False}
        name = "stream" if stream else "whole"
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            stream=stream,
            timeout=90,
            catch_response=True,
            name=name,
        ) as response:
            outcome["status"] = response.status_code
            outcome["id"] = (response.headers or {}).get("x-request-id", "")
            try:
                if response.status_code == 0:
                    raise response.error or OSError("no answer")
                if response.status_code != 200:
                    raise OSError(f"status {response.status_code}: {response.text[:200]}")
                if stream:
                    for line in response.iter_lines():
                        outcome["begun"] = outcome["begun"] or bool(line)
                        if line.startswith(b'data: {"error"'):
                            raise OSError(line[:200].decode())
                        outcome["done"] = outcome["done"] or line == b"data: [DONE]"
                    if not outcome["done"]:
                        raise OSError("the stream broke off")
                else:
                    response.json()["choices"][0]["message"]["content"]
                    outcome["done"] = True
                response.success()
            except Exception as error:
                outcome["error"] = f"{type(error).__name__}: {error}"[:300]
                response.failure(outcome["error"])
        outcome["seconds"] = time.time() - outcome["at"]
        _OUTCOMES.write(json.dumps(outcome) + "\n")
