"""The hub (scripts/hub.py) with a layer of faults before it, and a count of the bytes it sends.

    python -m tests.download.faulty --models FOLDER --port PORT

Faults come by POST /faults, a list of objects: `on` is listing or file, `kind` is below, `path` is
a pattern of file names, `times` how often it happens (always, without it), the rest belongs to the
kind. GET /sent returns what was sent for each file: a list of (from, to) bytes, one a request.
"""

import argparse
import asyncio
import fnmatch
import json
import re
import socket
from pathlib import Path

from aiohttp import web

from scripts import hub, snapshot

CHUNK = 64 << 10


class Faults:
    """Which faults are on, and what was sent."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.faults: list[dict] = []
        self.sent: dict[str, list[list[int]]] = {}
        self.requests: list[str] = []

    def next(self, on: str, path: str = "") -> dict:
        """Return the first fault that applies, and count it down."""
        for fault in self.faults:
            # A listing's own `path` is the entry that it is wrong about.
            meant = on == "listing" or fnmatch.fnmatch(path, fault.get("path", "*"))
            if fault["on"] == on and meant and fault.get("times", 1) > 0:
                if "times" in fault:
                    fault["times"] -= 1
                return fault
        return {"kind": ""}

    @web.middleware
    async def layer(self, request: web.Request, handler) -> web.StreamResponse:
        self.requests.append(request.path_qs)
        path = request.query.get("FilePath") or request.match_info.get("path", "")
        if request.path.endswith("/repo/files") or "/revision/" in request.path:
            return await self.listing(request, handler)
        if path:
            return await self.file(request, path, handler)
        return await handler(request)

    async def listing(self, request: web.Request, handler) -> web.StreamResponse:
        fault = self.next("listing")
        if fault["kind"] == "status":
            return refuse(fault)
        if fault["kind"] == "html":
            return web.Response(text="<html>Please log in</html>", content_type="text/html")
        if fault["kind"] == "success false":
            return web.json_response({"Code": 10010205001, "Success": False, "Message": "no"})
        response = await handler(request)
        body = json.loads(response.text)
        files = body["Data"]["Files"] if "Data" in body else body["siblings"]
        if fault["kind"] == "empty":
            files.clear()
        for file in list(files):
            if fnmatch.fnmatch(file.get("Path", ""), fault.get("path", "*")):
                if fault["kind"] == "no sha256":
                    file["Sha256"] = ""
                elif fault["kind"] == "size 0":
                    file["Size"] = 0
                elif fault["kind"] == "omit":
                    files.remove(file)
                elif fault["kind"] == "another sha256":
                    file["Sha256"] = "0" * 64
        return web.json_response(body)

    async def file(self, request: web.Request, path: str, handler) -> web.StreamResponse:
        fault = self.next("file", path)
        kind = fault["kind"]
        if kind == "status":
            return refuse(fault)
        answer = await handler(request)
        if not isinstance(answer, web.FileResponse) or request.method == "HEAD":
            return answer
        content = bytearray(answer._path.read_bytes())
        if kind == "short":
            del content[-fault["bytes"] :]
        if kind == "corrupt":
            content[fault.get("at", len(content) // 2)] ^= 1
        return await self.stream(request, path, content, fault)

    async def stream(
        self, request: web.Request, path: str, content: bytearray, fault: dict
    ) -> web.StreamResponse:
        kind = fault["kind"]
        # What a socket holds was not received by anybody who is killed now.
        opened = request.transport.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
        begin, end, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and not fault.get("no_range"):
            begin, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1 if asked[2] else end)
            if begin >= len(content):
                headers = {"Content-Range": f"bytes */{len(content)}"}
                return web.Response(status=416, headers=headers)
        headers = {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        span = [begin, begin]
        self.sent.setdefault(path, []).append(span)
        limit = fault.get("after", end - begin)
        rate = fault.get("rate", 0)
        while span[1] < end:
            if span[1] - begin >= limit:
                if kind == "stall":
                    await asyncio.sleep(fault.get("seconds", 3600))
                    return response
                if kind == "reset":
                    linger = b"\x01\0\0\0\0\0\0\0"
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    request.transport.abort()
                if kind == "drop":
                    request.transport.close()
                if kind in ("reset", "drop"):
                    return response
            piece = bytes(content[span[1] : min(span[1] + CHUNK, end, begin + max(limit, 1))])
            await response.write(piece)
            span[1] += len(piece)
            if rate:
                await asyncio.sleep(len(piece) / rate)
        return response

    async def set(self, request: web.Request) -> web.Response:
        self.faults = await request.json()
        self.sent.clear()
        self.requests.clear()
        return web.json_response({})

    async def get_sent(self, _: web.Request) -> web.Response:
        return web.json_response({"sent": self.sent, "requests": self.requests})

    async def mark_again(self, request: web.Request) -> web.Response:
        """Record a model's folder anew, after the test has changed it."""
        body = await request.json()
        where = snapshot.folder(self.models, body["model_id"])
        await asyncio.to_thread(snapshot.record, where, body["model_id"], body["revision"], "test")
        return web.json_response({})


def refuse(fault: dict) -> web.Response:
    headers = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
    body = {"Code": fault["status"], "Success": False, "Message": f"fault {fault['status']}"}
    return web.json_response(body, status=fault["status"], headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    faults = Faults(options.models)
    app = hub.application(options.models)
    app.middlewares.append(faults.layer)
    app.router.add_post("/faults", faults.set)
    app.router.add_get("/sent", faults.get_sent)
    app.router.add_post("/mark", faults.mark_again)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
