"""Tell how far a long work is: a live bar in a terminal, lines in a log, or JSON lines."""

import contextlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

# Returns the bytes that are done.
Done = Callable[[], int]

# Seconds between two lines in a log, and over which the rate is taken.
_LOG_EVERY, _WINDOW = 5.0, 30.0
_GB = 1e9


class Progress:
    """Where a job reports to; `form` is auto, lines or json."""

    def __init__(self, job: str, form: str) -> None:
        self.job = job
        self.json = form == "json"
        self._live = form == "auto" and sys.stderr.isatty()
        self._bar = None

    def say(self, text: str) -> None:
        """Print one line for people."""
        self.event("message", text, text=text)

    def event(self, kind: str, line: str, **values: object) -> None:
        """Print what happened, as a line or as JSON."""
        text = json.dumps({"event": kind, **values}) if self.json else f"{self.job}: {line}"
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    @contextlib.contextmanager
    def follow(self, phase: str, total: int, done: Done) -> Iterator[None]:
        """Show `done()` of `total` bytes until the block ends; nothing where there is nothing."""
        if not total:
            yield
            return
        stop = threading.Event()
        loop = self._draw if self._live else self._write
        thread = threading.Thread(target=loop, args=(phase, total, done, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)

    def _write(self, phase: str, total: int, done: Done, stop: threading.Event) -> None:
        seen = deque([(time.monotonic(), done())])
        while not stop.wait(1 if self.json else _LOG_EVERY):
            seen.append((time.monotonic(), done()))
            while seen[-1][0] - seen[0][0] > _WINDOW and len(seen) > 2:
                seen.popleft()
            (then, before), (now, have) = seen[0], seen[-1]
            rate = max(have - before, 0) / (now - then)
            left = (total - have) / rate if rate else None
            self.event(
                "progress",
                f"{phase} {have / max(total, 1):4.0%}  {have / _GB:.2f} of {total / _GB:.2f} GB"
                f"  {rate / 1e6:.1f} MB/s  " + (_clock(left) + " left" if left else "waiting"),
                phase=phase,
                bytes=have,
                total=total,
                bytes_per_second=round(rate),
                seconds_left=None if left is None else round(left),
            )

    def _draw(self, phase: str, total: int, done: Done, stop: threading.Event) -> None:
        from tqdm import tqdm

        # The SDK's own bars are off by a variable that would turn this one off as well.
        shown = {"unit": "B", "unit_scale": True, "desc": phase, "disable": False}
        with tqdm(total=total, initial=done(), **shown) as self._bar:
            while not stop.wait(0.5):
                self._bar.update(done() - self._bar.n)
            self._bar.update(done() - self._bar.n)
        self._bar = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
