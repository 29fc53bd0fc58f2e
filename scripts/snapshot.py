"""What makes a model folder a good snapshot: a manifest of its files and a completion marker.

The marker also has each file's time of last change as it was when the file was hashed. A file whose
size and time are as then has not been written to since; any other is hashed again before it counts.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.errors import SnapshotMissing

MARKER = ".snapshot.json"
# What has been verified so far in a folder that is not complete.
_JOURNAL = ".snapshot.partial.json"
# Folders the ModelScope SDK and git keep beside the files; they are no part of the model.
_FOREIGN = {".git", "._____temp", ".cache", ".msc", ".mv", ".mdl"}
# What `MODEL_REVISION` may be pinned to: one manifest a model, written by `make pin`.
PINS = Path(__file__).resolve().parent.parent / "images" / "models"

_NEEDED = "a complete snapshot, which `download` writes"
_ACTION = "run `docker compose run --rm download` (or `make download`)"


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

    @classmethod
    def parse(cls, data: dict) -> "Snapshot":
        """Return the snapshot in a marker's or a manifest's JSON; anything else is a ValueError."""
        try:
            files = tuple(ModelFile(**file) for file in data["files"])
            named = (data["model_id"], data["revision"], data["source"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"no manifest: {error!r}") from error
        return cls(*named, files)


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


def hashed(
    where: Path, path: str, advance: Callable[[int], None] = lambda _: None
) -> tuple[ModelFile, int]:
    """Hash a file of a folder from disk; return it, and its time of last change before that."""
    before = (where / path).stat()
    return ModelFile(path, before.st_size, sha256(where / path, advance)), before.st_mtime_ns


def paths(where: Path) -> Iterator[Path]:
    """Yield the model's own files below a folder, sorted."""
    for path in sorted(where.rglob("*")):
        relative = path.relative_to(where)
        own = path.name in (MARKER, _JOURNAL)
        if path.is_file() and relative.parts[0] not in _FOREIGN and not own:
            yield path


def record(where: Path, model_id: str, revision: str, source: str) -> Snapshot:
    """Hash every file of a folder from disk and mark the folder complete.

    For a folder whose files are the origin (the rehearsal model): there is nothing to compare with.
    """
    journal = Journal(where)
    for path in list(paths(where)):
        journal.add(*hashed(where, path.relative_to(where).as_posix()))
    files = tuple(file for file, _ in journal.known.values())
    snapshot = Snapshot(model_id, revision, source, files)
    mark(where, snapshot, journal)
    return snapshot


@dataclass
class Journal:
    """Which files of a folder have been hashed from disk, and their times of last change then.

    It is written after each file, so that a run that was killed is not asked to hash again.
    """

    where: Path
    known: dict[str, tuple[ModelFile, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, where: Path) -> "Journal":
        """Return what the folder's journal or marker knows; nothing when neither can be read."""
        journal = cls(where)
        for name in (_JOURNAL, MARKER):
            try:
                data = json.loads((where / name).read_text(encoding="utf-8"))
                files = {file["path"]: ModelFile(**file) for file in data["files"]}
                times = data["written"].items()
                journal.known |= {path: (files[path], int(time)) for path, time in times}
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
        return journal

    def has(self, file: ModelFile) -> bool:
        """Whether this very content was hashed and has not been written to since."""
        noted, time = self.known.get(file.path, (None, 0))
        try:
            found = (self.where / file.path).stat()
        except OSError:
            return False
        return noted == file and (found.st_size, found.st_mtime_ns) == (file.size, time)

    def add(self, file: ModelFile, time: int) -> None:
        """Note what `hashed` found, and make the file outlive a loss of power."""
        _sync(self.where / file.path)
        with self._lock:
            self.known[file.path] = (file, time)
            self.save()

    def save(self) -> None:
        """Write it beside the files."""
        files = [asdict(file) for file, _ in self.known.values()]
        written = {path: time for path, (_, time) in self.known.items()}
        _write(self.where / _JOURNAL, {"files": files, "written": written})


def mark(where: Path, snapshot: Snapshot, journal: Journal) -> None:
    """Write the completion marker, last and atomically: it is there whole or not at all.

    Every file must have been added to the journal.
    """
    times = {file.path: journal.known[file.path][1] for file in snapshot.files}
    # The names, too, must reach the disk before the marker that vouches for them.
    for folder in {(where / file.path).parent for file in snapshot.files}:
        _sync(folder)
    _write(where / MARKER, {**asdict(snapshot), "written": times})
    (where / _JOURNAL).unlink(missing_ok=True)


def unmark(where: Path) -> None:
    """Take the marker away, before anything in the folder changes; what it knows stays known."""
    if (where / MARKER).exists():
        (where / MARKER).replace(where / _JOURNAL)
        _sync(where)


def _write(path: Path, document: dict) -> None:
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(where: Path, snapshot: Snapshot) -> list[str]:
    """Remove what lies in a complete folder and is not in its manifest; return what that was."""
    wanted = {where / file.path for file in snapshot.files} | {where / MARKER}
    removed = []
    # Deepest first, so that a folder is empty when its turn comes.
    for path in sorted(where.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in wanted:
            path.unlink()
            removed.append(path.relative_to(where).as_posix())
    return sorted(removed)


def read(where: Path) -> Snapshot:
    """Read a folder's marker, without a look at the files.

    Raises:
        SnapshotMissing: no marker, or an unreadable one.
    """
    try:
        return Snapshot.parse(json.loads((where / MARKER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        state = "is incomplete" if where.is_dir() and any(where.iterdir()) else "is not there"
        raise SnapshotMissing(f"the model in {where} {state}", _NEEDED, _ACTION) from None
    except (OSError, ValueError) as error:
        found = f"{where / MARKER} is unreadable: {error}"
        raise SnapshotMissing(found, _NEEDED, _ACTION) from error


def changed(where: Path, snapshot: Snapshot) -> dict[str, str]:
    """Return the files that are not as they were when they were hashed, each with what it is."""
    journal = Journal.read(where)
    found = {}
    for file in snapshot.files:
        path = where / file.path
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found[file.path] = "is missing"
        elif size != file.size:
            found[file.path] = f"has {size} bytes instead of {file.size}"
        elif not journal.has(file):
            found[file.path] = "was written to since it was verified"
    return found


def load(where: Path) -> Snapshot:
    """Read a folder's marker and check that every file is as it was when it was hashed.

    Raises:
        SnapshotMissing: no marker, an unreadable one, or files missing or written to.
    """
    snapshot = read(where)
    for path, state in changed(where, snapshot).items():
        raise SnapshotMissing(f"{where / path} {state}", _NEEDED, _ACTION)
    return snapshot


def lock(models: Path):
    """Return the lock of a models root, a FileLock: who changes a model holds it.

    It lies on the volume itself: two containers share nothing else.
    """
    from filelock import FileLock

    return FileLock(models / ".download.lock")


def pin(model_id: str) -> Path:
    """Return where a model's pinned manifest lies, if it has one."""
    return PINS / f"{model_id.replace('/', '--')}.manifest"


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
