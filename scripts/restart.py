"""Restart the replicas one by one; where there are two, no request fails."""

import socket
import sys

from scripts import errors
from scripts.settings import Settings


def main() -> int:
    """Ask the agent for it, and show how it goes."""
    settings = Settings.from_environ()
    last = ""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(3600)
        try:
            connection.connect(str(settings.agent_socket))
            connection.sendall(b"restart\n")
            for line in connection.makefile():
                last = line.strip()
                print(f"restart: {last}", flush=True)
        except OSError as error:
            last = f"the agent does not answer: {error}"
    if last == "ok":
        return 0
    raise errors.ServeFailed(
        last or "the restart was broken off",
        "replicas that come back",
        "see `make logs`",
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
