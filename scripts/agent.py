"""Watch the replicas: which one may take requests, which one hangs; restart them one by one.

HAProxy asks it over TCP (docs.haproxy.org/2.6/configuration.html, "agent-check"): a line with a
replica's number is answered with `ready up`, `maint` or `down#reason`. On a Unix socket
scripts/health.py asks for `all`, and scripts/restart.py for `restart`.
"""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import time
import urllib.request
import xmlrpc.client
from dataclasses import dataclass
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from scripts import errors
from scripts.settings import Settings

_POLL_SECONDS = 1.0
_FIRST_ANSWER_SECONDS = 120
_RESTART_SECONDS = 1800
# The gateway asks twice a second; one that has not asked for so long is not there.
_GATEWAY_SECONDS = 3
_PROGRESS = re.compile(
    r"^vllm:(?:prompt_tokens|generation_tokens|request_success)_total(?:\{.*\})? (\S+)$", re.M
)
_RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$", re.M)


@dataclass
class Replica:
    """What is known of one vLLM; `state` is up, down or maint."""

    number: int
    port: int
    state: str = "down"
    reason: str = "it has not been looked at yet"
    pid: int = 0
    answered: bool = False
    # Sum of vLLM's counters, and when it last grew.
    progress: float = -1.0
    progressed: float = 0.0
    asked: float = 0.0

    @property
    def name(self) -> str:
        """Its name for supervisor."""
        return f"vllm:vllm_{self.number}"

    def say(self, text: str) -> None:
        print(f"agent: replica {self.number}: {text}", flush=True)


class Agent:
    """Looks at every replica once a second."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings = settings
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        self.host = host.get(settings.replica_host, settings.replica_host)
        self.replicas = [Replica(k, settings.replica_port + k) for k in range(count)]
        self.restarting = asyncio.Lock()

    def _supervisor(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.settings.run}/supervisor.sock")
        with xmlrpc.client.ServerProxy("http://localhost", transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def _request(self, replica: Replica, path: str, body: dict | None, timeout: float) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        request = urllib.request.Request(f"http://{host}:{replica.port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        # A proxy of the environment is never the way to this very machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            return response.read()

    async def _metrics(self, replica: Replica) -> tuple[float, float] | None:
        """Return (what has been done so far, requests that run or wait), or None without answer."""
        try:
            raw = await asyncio.to_thread(self._request, replica, "/metrics", None, 5)
        except (OSError, http.client.HTTPException):
            return None
        text = raw.decode(errors="replace")
        done, now = (sum(map(float, found.findall(text))) for found in (_PROGRESS, _RUNNING))
        return done, now

    async def _generate(self, replica: Replica, timeout: float) -> str:
        """Let one token be generated; return why that failed, or an empty string."""
        body = {"model": self.settings.served_model_name, "prompt": "Hi", "max_tokens": 1}
        try:
            raw = await asyncio.to_thread(self._request, replica, "/v1/completions", body, timeout)
            usage = json.loads(raw)["usage"]
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            return f"vLLM does not answer: {error}"
        if usage["completion_tokens"] != 1:
            return f"one token was asked for, the usage is {usage}"
        return ""

    async def _first_answer(self, replica: Replica) -> str:
        """Return why a replica that starts is not ready.

        A wrong engine passes /health and dies at the first request, so one is made.
        """
        try:
            await asyncio.to_thread(self._request, replica, "/health", None, 5)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                return "vLLM is loading; it does not listen yet"
            return f"vLLM does not answer: {error}"
        return await self._generate(replica, _FIRST_ANSWER_SECONDS)

    async def look(self, replica: Replica) -> None:
        """Find out how one replica is, and end it if it hangs."""
        info = await asyncio.to_thread(self._supervisor, "getProcessInfo", replica.name)
        if info["statename"] not in ("RUNNING", "STARTING"):
            replica.pid, replica.answered = 0, False
            self._set(replica, "down", f"vLLM is {info['statename']}")
            return
        if info["pid"] != replica.pid:
            replica.pid, replica.answered, replica.progress = info["pid"], False, -1.0
        if not replica.answered:
            reason = await self._first_answer(replica)
            if not reason:
                replica.answered, replica.progressed = True, time.monotonic()
                mark = self.settings.run / f"answered-{replica.number}"
                mark.write_text(str(replica.pid))
                replica.say("ready")
            self._set(replica, "down" if reason else "up", reason)
            return
        self._set(replica, "up", "")
        if await self._moves(replica):
            return
        reason = await self._generate(replica, self.settings.hang_seconds)
        if reason and not await self._moves(replica) and info["pid"] == replica.pid:
            self._set(replica, "down", "it hangs")
            replica.say(f"hangs, it is ended ({reason})")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(replica.pid, signal.SIGKILL)

    async def _moves(self, replica: Replica) -> bool:
        """Whether it has done anything within HANG_SECONDS."""
        found = await self._metrics(replica)
        if found and found[0] != replica.progress:
            replica.progress, replica.progressed = found[0], time.monotonic()
        return time.monotonic() - replica.progressed < self.settings.hang_seconds

    def _set(self, replica: Replica, state: str, reason: str) -> None:
        # A replica that is taken out stays out until `restart` takes it in again.
        if replica.state != "maint":
            replica.state, replica.reason = state, reason

    async def follow(self, replica: Replica) -> None:
        """Look at one replica for ever."""
        while True:
            try:
                await self.look(replica)
            except (OSError, xmlrpc.client.Error, http.client.HTTPException) as error:
                self._set(replica, "down", f"supervisor does not answer: {error}")
            await asyncio.sleep(_POLL_SECONDS)

    async def restart(self, tell: asyncio.StreamWriter) -> None:
        """Restart every replica, one at a time: out of the gateway, drained, stopped, ready."""

        async def say(text: str) -> None:
            tell.write(f"{text}\n".encode())
            await tell.drain()

        async with self.restarting:
            for replica in self.replicas:
                replica.state, replica.reason = "maint", "it is being restarted"
                try:
                    await say(f"replica {replica.number}: draining")
                    await self._drained(replica)
                    await say(f"replica {replica.number}: restarting")
                    with contextlib.suppress(xmlrpc.client.Fault):
                        await asyncio.to_thread(self._supervisor, "stopProcess", replica.name)
                    replica.answered = False
                    await asyncio.to_thread(self._supervisor, "startProcess", replica.name, False)
                    began = time.monotonic()
                    while not replica.answered:
                        if time.monotonic() - began > _RESTART_SECONDS:
                            await say(f"error: replica {replica.number} is not ready")
                            return
                        await asyncio.sleep(0.2)
                    seconds = time.monotonic() - began
                    await say(f"replica {replica.number}: ready after {seconds:.0f} s")
                finally:
                    replica.state, replica.reason = "down", "it has been restarted"
                    if replica.answered:
                        replica.state, replica.reason = "up", ""
                await self._known(replica)
        await say("ok")

    async def _known(self, replica: Replica) -> None:
        """Wait until the gateway, if there is one, has asked for the state as it is now."""
        since = time.monotonic()
        while replica.asked < since and time.monotonic() - since < _GATEWAY_SECONDS:
            await asyncio.sleep(0.05)
        # What it has sent on in the same instant is on its way.
        await asyncio.sleep(0.2)

    async def _drained(self, replica: Replica) -> None:
        """Wait until no request runs there, for DRAIN_SECONDS at most."""
        await self._known(replica)
        deadline = time.monotonic() + self.settings.drain_seconds
        idle = 0
        while idle < 2 and time.monotonic() < deadline:
            found = await self._metrics(replica)
            idle = idle + 1 if found is None or not found[1] else 0
            await asyncio.sleep(0.3)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection, which asks one thing."""
        try:
            line = (await asyncio.wait_for(reader.readline(), 10)).decode().strip()
            if line.isdecimal():
                writer.write(f"{self._told(int(line))}\n".encode())
            elif line == "all":
                states = [[replica.state, replica.reason] for replica in self.replicas]
                writer.write(json.dumps(states).encode() + b"\n")
            elif line == "restart" and writer.get_extra_info("sockname") == str(
                self.settings.agent_socket
            ):
                await self.restart(writer)
            await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass
        finally:
            writer.close()

    def _told(self, number: int) -> str:
        if number >= len(self.replicas):
            return "maint"
        replica = self.replicas[number]
        replica.asked = time.monotonic()
        # One line of plain words: HAProxy shows them.
        reason = re.sub(r"[^\w ;:.,()\[\]/-]", " ", replica.reason)[:80]
        return {"up": "ready up", "maint": "maint"}.get(replica.state, f"ready down#{reason}")

    async def serve(self) -> None:
        """Watch and answer until told to stop."""
        socket = self.settings.agent_socket
        socket.unlink(missing_ok=True)
        await asyncio.start_unix_server(self.answer, socket)
        socket.chmod(0o600)
        if self.settings.agent_port:
            host, port = self.settings.replica_host, self.settings.agent_port
            await asyncio.start_server(self.answer, host, port)
        await asyncio.gather(*(self.follow(replica) for replica in self.replicas))


def main() -> int:
    """Run until ended by supervisor."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    settings = Settings.from_environ()
    asyncio.run(Agent(settings, settings.replicas or 1).serve())
    return 0


if __name__ == "__main__":
    errors.run(main)
