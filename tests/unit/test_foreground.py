"""A child in the foreground: signals reach it, and it is waited for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.stacks import ROOT, wait_for

PARENT = """
import sys
from scripts import foreground
sys.exit(foreground.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
"""
# Takes its time after the signal, as a server does.
CHILD = """
import pathlib, signal, sys, time
def end(number, frame):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text(f"ended by {number}")
    sys.exit(40 + number)
for number in (2, 15):
    signal.signal(number, end)
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""


def told(number: int, tmp_path: Path, group: bool) -> tuple[int, str]:
    note = tmp_path / "note"
    command = [sys.executable, "-c", PARENT, CHILD, str(note)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        wait_for(lambda: note.exists() and note.read_text() == "ready", 20, "a child")
        (os.killpg if group else os.kill)(process.pid, number)
        return process.wait(timeout=20), note.read_text()
    finally:
        if process.poll() is None:
            process.kill()


def test_ctrl_c_of_a_terminal_reaches_the_child_once_and_its_end_is_awaited(tmp_path: Path) -> None:
    assert told(signal.SIGINT, tmp_path, group=True) == (42, "ended by 2")


def test_sigterm_is_passed_on(tmp_path: Path) -> None:
    assert told(signal.SIGTERM, tmp_path, group=False) == (55, "ended by 15")
