"""Run vLLM's command line with its port bound to --host, which vLLM before 0.6.4 does not do."""

import socket
import sys


def _keep_to(host: str, port: int) -> None:
    """Make a bind of `port` on every interface a bind on `host`.

    Those releases open the port ahead of the engine with an empty address and hand the open socket
    to the web server, which then never looks at --host
    (vllm/entrypoints/openai/api_server.py, run_server).
    """
    plain = socket.socket.bind

    def bind(self: socket.socket, address: object) -> None:
        plain(self, (host, port) if address == ("", port) else address)

    socket.socket.bind = bind


def main() -> int:
    """Become `vllm` with the arguments given."""
    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
    _keep_to(host, int(port))
    from vllm import scripts

    return scripts.main() or 0


if __name__ == "__main__":
    sys.exit(main())
