"""Supervisor's event listener: ends what outlives vLLM, and gives up where a retry is no use."""

import collections
import os
import re
import signal
import sys
import time
import xmlrpc.client
from pathlib import Path

from supervisor import childutils

from scripts import errors

# A vLLM that ends this often in a row, each time within so many seconds of the end before,
# is not going to stay up. One that served for longer starts the count anew.
_MOST_ENDS = 4
_WITHIN_SECONDS = 600
# Starts that run out of memory are tried again with less (scripts/fit.py), so often.
_MOST_SHORT = 3
_TAIL_CHARACTERS = 20_000
# What vLLM of any line prints when it cannot start, and what that means; the first match counts.
_CAUSES = (
    (
        errors.GpuMemoryShort,
        r"out of memory|OutOfMemoryError|No available memory for the cache blocks"
        r"|available KV cache memory|can be stored in KV cache|desired GPU memory utilization",
    ),
    (errors.DriverMissing, r"No CUDA GPUs are available|CUDA driver version is insufficient"),
    (
        errors.SettingInvalid,
        r"^(?:vllm|bound\.py|api_server\.py)(?: serve)?: error: "
        r"|ValidationError|^(?:\(.*?\) )?\S*ValueError: ",
    ),
)


def _say(text: str) -> None:
    # Standard output belongs to supervisor's event protocol.
    print(f"watch: {text}", file=sys.stderr, flush=True)


def _end_group(group: int) -> None:
    """Kill what is left of a process group: EngineCore and workers outlive a killed API server."""
    try:
        os.killpg(group, signal.SIGKILL)
        _say(f"ended the processes that outlived vLLM (group {group})")
    except ProcessLookupError:
        pass


def cause(text: str) -> type[errors.StackError]:
    """Return what an end at start means, from what the process had printed."""
    for error, pattern in _CAUSES:
        if re.search(pattern, text, re.M):
            return error
    return errors.ServeFailed


class Watch:
    """What has ended how often; gives up a replica, and all of them when none is left."""

    def __init__(self, run: Path, replicas: int) -> None:
        self.run, self.replicas = run, replicas
        self.given_up: set[str] = set()
        self.ends: dict[str, list[float]] = collections.defaultdict(list)
        self.short: dict[str, int] = collections.defaultdict(int)
        self.tails: dict[str, str] = collections.defaultdict(str)

    def printed(self, name: str, text: str) -> None:
        """Keep the last of what a process prints."""
        self.tails[name] = (self.tails[name] + text)[-_TAIL_CHARACTERS:]

    def ended(self, name: str, pid: int) -> None:
        """Decide after a vLLM has ended by itself whether another start makes sense."""
        now = time.monotonic()
        last = self.ends[name][-1:]
        recent = bool(last) and now - last[0] < _WITHIN_SECONDS
        self.ends[name] = [*(self.ends[name] if recent else []), now]
        count = len(self.ends[name])
        answered = self.run / f"answered-{name.removeprefix('vllm_')}"
        served = answered.exists() and answered.read_text() == str(pid)
        found = errors.ServeFailed if served else self._cause(name)
        self.tails[name] = ""
        _say(f"{name} ended by itself; {count} of at most {_MOST_ENDS} times in a row")
        if found is errors.GpuMemoryShort:
            self.short[name] += 1
            if self.short[name] >= _MOST_SHORT:
                self.give_up(name, f"{name} found too little memory, also with less", found)
        elif found is not errors.ServeFailed:
            self.give_up(name, f"{name} cannot start so, however often it is tried", found)
        elif count >= _MOST_ENDS:
            self.give_up(name, f"{name} ended {count} times in a row", found)

    def _cause(self, name: str) -> type[errors.StackError]:
        """Return our own error that scripts/serve.py has noted, or what vLLM's last words mean."""
        note = self.run / f"failed-{name.removeprefix('vllm_')}"
        if note.exists():
            code = int(note.read_text())
            note.unlink()
            own = [error for error in errors.StackError.__subclasses__() if error.exit_code == code]
            return own[0] if own else errors.ServeFailed
        return cause(self.tails[name])

    def fatal(self, name: str) -> None:
        """Give up what has ended within seconds of each of its starts."""
        found = self._cause(name) if name.startswith("vllm_") else errors.ServeFailed
        self.give_up(name, f"{name} ended within seconds of each of its starts", found)

    def give_up(self, name: str, reason: str, error: type[errors.StackError]) -> None:
        """Leave a replica stopped; end everything when it was the last one."""
        _say(f"giving up: {reason}")
        if name.startswith("vllm_") and name not in self.given_up:
            self.given_up.add(name)
            if len(self.given_up) < self.replicas:
                try:
                    rpc = childutils.getRPCInterface(os.environ)
                    rpc.supervisor.stopProcess(f"vllm:{name}", False)
                except (OSError, xmlrpc.client.Error) as failed:
                    _say(f"{name} could not be stopped: {failed}")
                return
        text = f"{error.exit_code}\n{reason}\n"
        (self.run / "given-up").write_text(text, encoding="utf-8")
        # supervisord is the parent; it stops the other programs and ends.
        os.kill(os.getppid(), signal.SIGTERM)


def main() -> int:
    """Serve events until supervisord ends."""
    watch = Watch(Path(os.environ["RUN_DIR"]), int(os.environ["REPLICAS"]))
    while True:
        headers, payload = childutils.listener.wait()
        event, text = childutils.eventdata(f"{payload}\n" if "\n" not in payload else payload)
        name, kind = event["processname"], headers["eventname"]
        if kind == "PROCESS_LOG_STDOUT":
            watch.printed(name, text)
        elif kind == "PROCESS_STATE_FATAL":
            watch.fatal(name)
        elif event.get("groupname") == "vllm":
            _end_group(int(event["pid"]))
            if kind == "PROCESS_STATE_EXITED":
                watch.ended(name, int(event["pid"]))
        childutils.listener.ok()


if __name__ == "__main__":
    sys.exit(main())
