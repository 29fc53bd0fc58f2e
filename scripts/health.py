"""Readiness of the server: at least one replica has answered and goes on doing so."""

import json
import socket

from scripts import errors
from scripts.settings import Settings


def check(settings: Settings) -> tuple[bool, str]:
    """Return whether it is ready, and how the replicas are."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(settings.agent_socket))
            connection.sendall(b"all\n")
            states = json.loads(connection.makefile().readline())
        except (OSError, ValueError) as error:
            return False, f"the agent does not answer: {error}"
    up = [state for state, _ in states if state == "up"]
    reasons = sorted({reason for state, reason in states if state != "up"})
    if len(states) == 1:
        return bool(up), reasons[0] if reasons else "ready"
    return bool(up), "; ".join([f"{len(up)} of {len(states)} replicas are ready", *reasons])


def main() -> int:
    """Print the state; 0 when ready."""
    ready, text = check(Settings.from_environ())
    print(text)
    return 0 if ready else 1


if __name__ == "__main__":
    errors.run(main)
