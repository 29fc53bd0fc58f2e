"""Readiness of the server: supervisor says RUNNING, /health is 200 and a real completion worked."""

import json
import os
import urllib.request
import xmlrpc.client
from pathlib import Path

from supervisor.xmlrpc import SupervisorTransport

from scripts import errors
from scripts.settings import Settings


def _vllm_state(run: Path) -> tuple[str, int]:
    """Return supervisor's state name and the process id of vLLM."""
    transport = SupervisorTransport(None, None, f"unix://{run / 'supervisor.sock'}")
    with xmlrpc.client.ServerProxy("http://localhost", transport) as proxy:
        info = proxy.supervisor.getProcessInfo("vllm")
    return info["statename"], info["pid"]


def _request(settings: Settings, path: str, body: dict | None, timeout: float) -> bytes:
    # HOST may be an address of one interface, or all of them.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    request = urllib.request.Request(f"http://{host}:{settings.port}{path}")
    request.add_header("Authorization", f"Bearer {settings.vllm_api_key}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    # A proxy of the environment is never the way to this very machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as response:
        return response.read()


def check(settings: Settings) -> str:
    """Return why the server is not ready, or an empty string when it is.

    The completion runs once for each start of vLLM: a wrong engine passes /health and dies at the
    first request. Its mark in the run folder names the process that answered.
    """
    try:
        state, pid = _vllm_state(settings.run)
    except (OSError, xmlrpc.client.Error) as error:
        return f"supervisor does not answer: {error}"
    if state != "RUNNING":
        return f"vLLM is {state}"
    mark = settings.run / "answered"
    try:
        _request(settings, "/health", None, timeout=5)
        if not (mark.exists() and mark.read_text() == str(pid)):
            body = {"model": settings.served_model_name, "prompt": "Hi", "max_tokens": 1}
            answer = json.loads(_request(settings, "/v1/completions", body, timeout=60))
            if answer["usage"]["completion_tokens"] != 1:
                return f"one token was asked for, the usage is {answer['usage']}"
            mark.write_text(str(pid))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            return "vLLM is loading; it does not listen yet"
        return f"vLLM does not answer: {error}"
    return ""


def main() -> int:
    """Print the state; 0 when ready."""
    reason = check(Settings.from_environ(os.environ))
    print(reason or "ready")
    return 1 if reason else 0


if __name__ == "__main__":
    errors.run(main)
