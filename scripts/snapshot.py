"""What makes a model folder a good snapshot: a manifest of its files and a completion marker."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.errors import SnapshotMissing

MARKER = ".snapshot.json"
# Folders the ModelScope SDK and git keep beside the files; they are no part of the model.
_FOREIGN = {".git", "._____temp", ".cache", ".msc", ".mv", ".mdl"}


@dataclass(frozen=True)
class ModelFile:
    """One file of a snapshot: path relative to its folder, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """A verified model: id and revision on the hub, where it came from, and its manifest."""

    model_id: str
    revision: str
    source: str
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def weights(self) -> int:
        """Bytes of the weights that vLLM loads: safetensors, or where there are none, pickles."""
        sizes = [
            sum(file.size for file in self.files if file.path.endswith(suffixes))
            for suffixes in ((".safetensors",), (".bin", ".pt", ".pth"), (".gguf",))
        ]
        return next(filter(None, sizes), 0)


def folder(root: Path, model_id: str) -> Path:
    """Where `model_id` lies below the models root; the hub uses the same layout."""
    return root.joinpath(*model_id.split("/"))


def sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the sha256 of a file in hex, read from disk; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def paths(where: Path) -> Iterator[Path]:
    """Yield the model's own files below a folder, sorted."""
    for path in sorted(where.rglob("*")):
        relative = path.relative_to(where)
        if path.is_file() and relative.parts[0] not in _FOREIGN and path.name != MARKER:
            yield path


def record(where: Path, model_id: str, revision: str, source: str) -> Snapshot:
    """Hash every file of a folder from disk and mark the folder complete.

    For a folder whose files are the origin (the rehearsal model): there is nothing to compare with.
    """
    files = tuple(
        ModelFile(path.relative_to(where).as_posix(), path.stat().st_size, sha256(path))
        for path in paths(where)
    )
    snapshot = Snapshot(model_id, revision, source, files)
    mark(where, snapshot)
    return snapshot


def mark(where: Path, snapshot: Snapshot) -> None:
    """Write the completion marker, last and atomically: it is there whole or not at all."""
    # The marker must not reach the disk before the data that it vouches for.
    os.sync()
    draft = where / f"{MARKER}.draft"
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(asdict(snapshot), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(where / MARKER)
    descriptor = os.open(where, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unmark(where: Path) -> None:
    """Take the marker away, before anything in the folder changes."""
    (where / MARKER).unlink(missing_ok=True)


def load(where: Path) -> Snapshot:
    """Read a folder's marker and check that every file is there with its size.

    Raises:
        SnapshotMissing: no marker, an unreadable one, or files missing or of another size.
    """
    needed = "a complete snapshot, which `download` writes"
    action = "run `docker compose run --rm download` (or `make download`)"
    try:
        data = json.loads((where / MARKER).read_text(encoding="utf-8"))
        files = tuple(ModelFile(**file) for file in data.pop("files"))
        snapshot = Snapshot(files=files, **data)
    except FileNotFoundError:
        state = "is incomplete" if where.is_dir() and any(where.iterdir()) else "is not there"
        raise SnapshotMissing(f"the model in {where} {state}", needed, action) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SnapshotMissing(f"{where / MARKER} is unreadable: {error}", needed, action) from error
    for file in snapshot.files:
        path = where / file.path
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes instead of {file.size}"
            raise SnapshotMissing(f"{path} {found}", needed, action)
    return snapshot


def require(root: Path, model_id: str, revision: str) -> Path:
    """Return the folder of a complete snapshot of just this id and revision.

    Raises:
        SnapshotMissing: it is not there, not complete, or of another id or revision.
    """
    where = folder(root, model_id)
    found = load(where)
    if (found.model_id, found.revision) != (model_id, revision):
        raise SnapshotMissing(
            f"{where} holds {found.model_id} at revision {found.revision}",
            f"{model_id} at revision {revision}",
            "run `docker compose run --rm download` (or `make download`), or set MODEL_REVISION",
        )
    return where
