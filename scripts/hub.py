"""Serve the verified snapshots of a folder as ModelScope and as Hugging Face do, with Range.

One host downloads, the others in the LAN fetch from it with MODEL_SOURCES=http://<host>:8100. Any
program that reads HF_ENDPOINT (`hf download`, vLLM, transformers) can use it as well.
"""

import argparse
import asyncio
import hashlib
import logging
import os
from pathlib import Path

from aiohttp import web

from scripts import errors, snapshot

# Seconds that running transfers get at the end: who fetches resumes elsewhere or later.
_SHUTDOWN_SECONDS = 1


class _Refusal(web.HTTPNotFound):
    """The hub's own error shape: the SDK shows `Message` to the user."""

    def __init__(self, message: str) -> None:
        text = web.json_response({"Code": 404, "Success": False, "Message": message}).text
        super().__init__(text=text, content_type="application/json")


def _commit(found: snapshot.Snapshot) -> str:
    """Return what stands for the commit: 40 hex digits that change with the content."""
    files = "".join(f"{file.path}{file.sha256}" for file in found.files)
    return hashlib.sha256(files.encode()).hexdigest()[:40]


def application(models: Path) -> web.Application:
    """Return the web application over the snapshots below `models`.

    Only complete folders whose files are as they were when they were hashed are served, and of
    those only the files of the manifest, so that no path leads anywhere else.
    """

    def load(request: web.Request) -> tuple[Path, snapshot.Snapshot]:
        owner, name = request.match_info["owner"], request.match_info["name"]
        if owner.startswith(".") or name.startswith("."):
            raise _Refusal("no such model")
        where = models / owner / name
        try:
            return where, snapshot.load(where)
        except errors.SnapshotMissing:
            raise _Refusal(f"{owner}/{name} is not complete on this hub") from None

    async def find(request: web.Request) -> tuple[Path, snapshot.Snapshot]:
        where, found = await asyncio.to_thread(load, request)
        wanted = request.query.get("Revision") or found.revision
        if wanted != found.revision:
            raise _Refusal(f"this hub has {found.model_id} at {found.revision}, not {wanted}")
        return where, found

    async def model(request: web.Request) -> web.Response:
        _, found = await find(request)
        data = {"Id": found.model_id, "Name": found.model_id, "Revision": found.revision}
        return web.json_response({"Code": 200, "Success": True, "Data": data})

    async def files(request: web.Request) -> web.Response:
        _, found = await find(request)
        entries = [
            {
                "Path": file.path,
                "Name": Path(file.path).name,
                "Type": "blob",
                "Size": file.size,
                "Sha256": file.sha256,
                "Revision": found.revision,
            }
            for file in found.files
        ]
        return web.json_response({"Code": 200, "Success": True, "Data": {"Files": entries}})

    async def file(request: web.Request) -> web.StreamResponse:
        where, found = await find(request)
        return content(where, found, request.query.get("FilePath", ""))[1]

    def content(
        where: Path, found: snapshot.Snapshot, wanted: str
    ) -> tuple[snapshot.ModelFile, web.FileResponse]:
        known = {file.path: file for file in found.files}
        if wanted not in known:
            raise _Refusal(f"no file {wanted!r} in this snapshot")
        # aiohttp would send a compressed neighbour to who takes one, and nobody verified that.
        for suffix in (".gz", ".br"):
            if (where / f"{wanted}{suffix}").exists() and f"{wanted}{suffix}" not in known:
                raise _Refusal(f"{wanted}{suffix} is no part of this snapshot")
        return known[wanted], web.FileResponse(where / wanted)

    async def hugging_face_model(request: web.Request) -> web.Response:
        _, found = await hugging_face_find(request)
        siblings = [
            {
                "rfilename": file.path,
                "size": file.size,
                "lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 0},
            }
            for file in found.files
        ]
        body = {"id": found.model_id, "sha": _commit(found), "siblings": siblings}
        return web.json_response({**body, "private": False, "tags": [], "downloads": 0, "likes": 0})

    async def hugging_face_tree(request: web.Request) -> web.Response:
        _, found = await hugging_face_find(request)
        entries = [
            {
                "type": "file",
                "path": file.path,
                "size": file.size,
                "oid": file.sha256[:40],
                "lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 0},
            }
            for file in found.files
        ]
        return web.json_response(entries)

    async def hugging_face_file(request: web.Request) -> web.StreamResponse:
        where, found = await hugging_face_find(request)
        file, response = content(where, found, request.match_info["path"])
        # What its clients ask for with HEAD before they fetch.
        response.headers["X-Repo-Commit"] = _commit(found)
        response.headers["X-Linked-ETag"] = f'"{file.sha256}"'
        response.headers["X-Linked-Size"] = str(file.size)
        return response

    async def hugging_face_find(request: web.Request) -> tuple[Path, snapshot.Snapshot]:
        try:
            where, found = await asyncio.to_thread(load, request)
        except _Refusal as refusal:
            refusal.headers["X-Error-Code"] = "RepoNotFound"
            raise
        wanted = request.match_info.get("revision", "main")
        if wanted not in (found.revision, _commit(found)) and (wanted, found.revision) != (
            "main",
            "master",
        ):
            refusal = _Refusal(f"this hub has {found.model_id} at {found.revision}, not {wanted}")
            refusal.headers["X-Error-Code"] = "RevisionNotFound"
            raise refusal
        return where, found

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    prefix = "/api/v1/models/{owner}/{name}"
    app = web.Application()
    app.router.add_get(prefix, model)
    app.router.add_get(f"{prefix}/repo/files", files)
    app.router.add_get(f"{prefix}/repo", file)
    app.router.add_get("/health", health)
    app.router.add_get("/api/models/{owner}/{name}", hugging_face_model)
    app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", hugging_face_model)
    app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", hugging_face_tree)
    app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.+}", hugging_face_file)
    return app


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=os.environ.get("MODELS_DIR", "/models"))
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"hub: {options.models} on http://{options.host}:{options.port}", flush=True)
    web.run_app(
        application(options.models),
        host=options.host,
        port=options.port,
        print=None,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    return 0


if __name__ == "__main__":
    errors.run(main)
