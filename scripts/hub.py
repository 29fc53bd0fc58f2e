"""Serve the verified snapshots of a folder over the ModelScope REST protocol, with Range.

One host downloads, the others in the LAN fetch from it with MODELSCOPE_ENDPOINT=http://<host>:8100.
"""

import argparse
import os
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from scripts import errors, snapshot


def _refuse(status: int, message: str) -> JSONResponse:
    # The hub's own error shape: the SDK shows `Message` to the user.
    return JSONResponse({"Code": status, "Success": False, "Message": message}, status)


def application(models: Path) -> Starlette:
    """Return the web application over the snapshots below `models`.

    Only folders with a complete marker are served, and of those only the files of the manifest, so
    that no path leads anywhere else.
    """

    def find(request: Request) -> tuple[Path, snapshot.Snapshot] | JSONResponse:
        owner, name = request.path_params["owner"], request.path_params["name"]
        if owner.startswith(".") or name.startswith("."):
            return _refuse(404, "no such model")
        where = models / owner / name
        try:
            found = snapshot.load(where)
        except errors.SnapshotMissing:
            return _refuse(404, f"{owner}/{name} is not complete on this hub")
        wanted = request.query_params.get("Revision") or found.revision
        if wanted != found.revision:
            return _refuse(404, f"this hub has {owner}/{name} at {found.revision}, not {wanted}")
        return where, found

    def files(request: Request) -> Response:
        found = find(request)
        if isinstance(found, Response):
            return found
        entries = [
            {
                "Path": file.path,
                "Name": Path(file.path).name,
                "Type": "blob",
                "Size": file.size,
                "Sha256": file.sha256,
                "Revision": found[1].revision,
            }
            for file in found[1].files
        ]
        return JSONResponse({"Code": 200, "Success": True, "Data": {"Files": entries}})

    def file(request: Request) -> Response:
        found = find(request)
        if isinstance(found, Response):
            return found
        wanted = request.query_params.get("FilePath", "")
        if wanted not in {file.path for file in found[1].files}:
            return _refuse(404, f"no file {wanted!r} in this snapshot")
        return FileResponse(found[0] / wanted, media_type="application/octet-stream")

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    model = "/api/v1/models/{owner}/{name}"
    return Starlette(
        routes=[
            Route(f"{model}/repo/files", files),
            Route(f"{model}/repo", file),
            Route("/health", health),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=os.environ.get("MODELS_DIR", "/models"))
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args(argv)
    uvicorn.run(application(options.models), host=options.host, port=options.port, log_level="info")
    return 0


if __name__ == "__main__":
    errors.run(main)
