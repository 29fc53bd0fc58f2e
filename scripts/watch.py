"""Supervisor's event listener: ends what outlives vLLM, and gives up on a crash loop."""

import os
import signal
import sys
import time
from pathlib import Path

from supervisor import childutils

# A vLLM that ends this often in a row, each time within so many seconds of the end before,
# is not going to stay up. One that served for longer starts the count anew.
_MOST_ENDS = 4
_WITHIN_SECONDS = 600


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


def _give_up(reason: str) -> None:
    _say(f"giving up: {reason}")
    Path(os.environ["RUN_DIR"], "given-up").write_text(f"{reason}\n", encoding="utf-8")
    # supervisord is the parent; it stops the other programs and ends.
    os.kill(os.getppid(), signal.SIGTERM)


def main() -> int:
    """Serve events until supervisord ends."""
    ends: list[float] = []
    while True:
        headers, payload = childutils.listener.wait()
        event = childutils.get_headers(payload)
        if headers["eventname"] == "PROCESS_STATE_FATAL":
            _give_up(f"{event['processname']} ended within seconds of each of its starts")
        elif event["processname"] == "vllm":
            _end_group(int(event["pid"]))
            if headers["eventname"] == "PROCESS_STATE_EXITED":
                now = time.monotonic()
                ends = [*ends, now] if ends and now - ends[-1] < _WITHIN_SECONDS else [now]
                _say(f"vLLM ended by itself; {len(ends)} of at most {_MOST_ENDS} times in a row")
            if len(ends) == _MOST_ENDS:
                _give_up(f"vLLM ended {len(ends)} times in a row")
        childutils.listener.ok()


if __name__ == "__main__":
    sys.exit(main())
