"""Run a child in the foreground, which ends by itself when this process is told to end."""

import signal
import subprocess
from collections.abc import Callable
from typing import IO


def run(
    command: list[str],
    stdin: IO | None = None,
    stdout: IO | None = None,
    tell: Callable[[int], bool] = lambda number: False,
    **more: object,
) -> int:
    """Return the child's code; a SIGINT or SIGTERM that arrives is passed on, and waited for.

    `tell` passes a signal on by another way, and returns whether it could. Python's own
    subprocess.run kills the child a quarter of a second after Ctrl-C.
    """
    process = subprocess.Popen(
        command,
        stdin=stdin or subprocess.DEVNULL,
        stdout=stdout,
        # Ctrl-C in a terminal must not reach it by two ways.
        start_new_session=True,
        **more,
    )

    def pass_on(number: int, _: object) -> None:
        if not tell(number):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
