"""What the gateway adds: the same requests to a replica directly and through it, in turns.

    python -m tests.gateway.latency http://127.0.0.1:8600 http://127.0.0.1:<a replica's port>

Prints milliseconds. Where the two go to different processes only their difference means something.
"""

import http.client
import json
import statistics
import sys
import threading
import time
from urllib.parse import urlsplit

ROUNDS, REQUESTS = 10, 200


def times(url: str, connections: int) -> list[float]:
    """Return how long each of REQUESTS took on each of so many connections, in ms."""
    found: list[float] = []

    def ask() -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        for _ in range(REQUESTS // connections + 1):
            began = time.perf_counter()
            connection.request("GET", "/v1/models")
            connection.getresponse().read()
            found.append((time.perf_counter() - began) * 1000)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def stream(url: str) -> tuple[float, list[float]]:
    """Return ms to the first token of a stream, and the ms between the pieces after it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": "glm-4-9b-chat", "prompt": "你好", "max_tokens": 64}
    body |= {"stream": True, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response, last, gaps, first = connection.getresponse(), 0.0, [], 0.0
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        if first:
            gaps.append((now - last) * 1000)
        else:
            first = (now - began) * 1000
        last = now
    connection.close()
    return first, gaps


def percentiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]


def main() -> None:
    gateway, direct = sys.argv[1:3]
    for connections in (1, 32):
        found: dict[str, list[tuple[float, float]]] = {gateway: [], direct: []}
        for _ in range(ROUNDS):
            for url in (direct, gateway):
                found[url].append(percentiles(times(url, connections)))
        medians = {
            url: [statistics.median(row[place] for row in rows) for place in (0, 1)]
            for url, rows in found.items()
        }
        print(
            f"{connections} connections: p50 {medians[direct][0]:.2f} direct, "
            f"{medians[gateway][0]:.2f} through the gateway;"
            f" p99 {medians[direct][1]:.2f}, {medians[gateway][1]:.2f}"
        )
    firsts: dict[str, list[float]] = {gateway: [], direct: []}
    gaps: dict[str, list[float]] = {gateway: [], direct: []}
    for _ in range(20):
        for url in (direct, gateway):
            first, between = stream(url)
            firsts[url].append(first)
            gaps[url] += between
    for what, kind in (("first token", firsts), ("between tokens", gaps)):
        told = [f"{statistics.median(kind[url]):.2f}" for url in (direct, gateway)]
        worst = [f"{percentiles(kind[url])[1]:.2f}" for url in (direct, gateway)]
        print(f"{what}: p50 {told[0]} direct, {told[1]} gateway; p99 {worst[0]}, {worst[1]}")


if __name__ == "__main__":
    main()
