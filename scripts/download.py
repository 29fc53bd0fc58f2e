"""Bring a model's snapshot from a ModelScope hub into the models volume, and verify it."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from scripts import errors, snapshot
from scripts.settings import Settings
from scripts.snapshot import ModelFile, Snapshot

# Room that must stay free beyond the model, in bytes.
_MARGIN = 64 << 20
# Seconds between two lines of progress in a log.
_LOG_EVERY = 5.0
_GB = 1e9


def _say(text: str) -> None:
    print(f"download: {text}", flush=True)


def _hub(settings: Settings):
    # Set before the import: the SDK reads them once, and a missing endpoint makes it try another
    # domain by itself. Its own bars would mix with our progress.
    os.environ["MODELSCOPE_ENDPOINT"] = settings.modelscope_endpoint
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MODELSCOPE_CACHE", str(settings.caches / "modelscope"))
    from modelscope_hub import HubApi

    return HubApi(
        endpoint=settings.modelscope_endpoint, token=os.environ.get("MODELSCOPE_API_TOKEN") or None
    )


@contextlib.contextmanager
def _hub_errors(settings: Settings) -> Iterator[None]:
    """Translate what the SDK raises into errors that say what to do."""
    from modelscope_hub import errors as sdk

    model = f"{settings.model_id} at revision {settings.model_revision}"
    endpoint = settings.modelscope_endpoint
    try:
        yield
    except (sdk.NotExistError, sdk.AuthenticationError, sdk.PermissionDeniedError) as error:
        raise errors.ModelNotFound(
            f"{endpoint} does not give {model}: {_first_line(error)}",
            "a model id and revision that this hub has and you may read",
            "check MODEL_ID and MODEL_REVISION in .env; for a private model set"
            " MODELSCOPE_API_TOKEN",
        ) from error
    except sdk.FileDownloadError as error:
        causes = list(error.failed_files.values())
        if any(_is_full(cause) for cause in causes):
            raise _disk_full(settings.models, 0) from error
        failed = ", ".join(f"{path} ({_first_line(e)})" for path, e in error.failed_files.items())
        raise errors.DownloadFailed(
            f"{len(causes)} files of {model} did not arrive: {failed}",
            "every file of the snapshot",
            "run the same command again: what has arrived is kept",
        ) from error
    except (sdk.HubError, OSError, ValueError) as error:
        if _is_full(error):
            raise _disk_full(settings.models, 0) from error
        raise errors.HubUnreachable(
            f"the hub {endpoint} does not answer as a hub does: {_first_line(error)}",
            "a ModelScope hub that this machine reaches",
            "check the network and MODELSCOPE_ENDPOINT in .env, then run the same command again",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_full(error: BaseException | None) -> bool:
    """Whether ENOSPC or EDQUOT stands anywhere in the chain of causes."""
    while error is not None:
        if "No space left" in str(error) or getattr(error, "errno", None) in (28, 122):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(models: Path, remaining: int) -> errors.DiskFull:
    free = shutil.disk_usage(models).free
    needed = f"{(remaining + _MARGIN) / _GB:.2f} GB" if remaining else "more room"
    return errors.DiskFull(
        f"{free / _GB:.2f} GB free in the models volume ({models})",
        f"{needed} for what is left to download",
        "make room there, then run the same command again: what has arrived is kept",
    )


def _listing(api, settings: Settings) -> tuple[ModelFile, ...]:
    """Ask the hub for the snapshot's files.

    Raises:
        DownloadFailed: the listing is empty, or lacks what a verification needs.
    """
    with _hub_errors(settings):
        entries = api.list_repo_files(
            settings.model_id, "model", revision=settings.model_revision, recursive=True
        )
    files = tuple(
        ModelFile(entry.path, entry.size, entry.sha256 or "")
        for entry in entries
        if not entry.is_dir
    )
    bad = [file.path for file in files if len(file.sha256) != 64 or _escapes(file.path)]
    if bad or not files:
        raise errors.DownloadFailed(
            f"the hub's listing of {settings.model_id} "
            + (f"has no sha256 for {', '.join(bad)}" if bad else "is empty"),
            "path, size and sha256 of every file",
            "check MODEL_ID and MODEL_REVISION; try again later or another MODELSCOPE_ENDPOINT",
        )
    return files


def _escapes(path: str) -> bool:
    parts = Path(path).parts
    return Path(path).is_absolute() or ".." in parts or not parts


def _arrived(where: Path, file: ModelFile) -> int:
    """Return how many bytes of a file are on the disk, in its place or on the way."""
    target = where / file.path
    for path in (target, target.with_name(f"{target.name}.incomplete")):
        with contextlib.suppress(OSError):
            return min(path.stat().st_size, file.size)
    return 0


@contextlib.contextmanager
def _progress(verb: str, total: int, done) -> Iterator[None]:
    """Show `done()` of `total` bytes: a live bar in a terminal, a line now and then in a log."""
    stop = threading.Event()
    start, before = time.monotonic(), done()

    def lines() -> None:
        while not stop.wait(_LOG_EVERY):
            now = done()
            rate = (now - before) / (time.monotonic() - start)
            left = f"{(total - now) / rate:.0f} s left" if rate > 0 else "waiting for the hub"
            _say(
                f"{verb} {now / total:4.0%}  {now / _GB:.2f} of {total / _GB:.2f} GB"
                f"  {rate / 1e6:.1f} MB/s  {left}"
            )

    def bar() -> None:
        from tqdm import tqdm

        with tqdm(
            total=total, initial=before, unit="B", unit_scale=True, desc=verb, disable=False
        ) as live:
            while not stop.wait(0.5):
                live.update(done() - live.n)
            live.update(done() - live.n)

    thread = threading.Thread(target=bar if sys.stderr.isatty() else lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _verify(where: Path, files: tuple[ModelFile, ...]) -> None:
    """Hash every file from the disk; a bad one is removed, so that the next run fetches it."""
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        read += count

    bad = []
    with _progress("verifying", sum(file.size for file in files), lambda: read):
        for file in files:
            path = where / file.path
            found = snapshot.sha256(path, advance) if path.is_file() else "no file"
            if found != file.sha256:
                bad.append(f"{file.path} (found {found[:12]}, needed {file.sha256[:12]})")
                path.unlink(missing_ok=True)
    for index in where.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        listed = {file.path for file in files}
        bad += [f"{shard} (named by {index.name}, not listed)" for shard in named - listed]
    if bad:
        raise errors.DownloadFailed(
            f"the snapshot is not good: {', '.join(bad)}",
            "files whose sha256 on the disk is the hub's, and every shard of the index",
            "run the same command again: only these are fetched",
        )


def _download(settings: Settings, where: Path) -> Snapshot:
    api = _hub(settings)
    _say(f"asking {settings.modelscope_endpoint} for {settings.model_id}")
    files = _listing(api, settings)
    total = sum(file.size for file in files)

    def done() -> int:
        return sum(_arrived(where, file) for file in files)

    remaining = total - done()
    _say(f"{len(files)} files, {total / _GB:.2f} GB, {remaining / _GB:.2f} GB to fetch")
    if shutil.disk_usage(settings.models).free < remaining + _MARGIN:
        raise _disk_full(settings.models, remaining)
    snapshot.unmark(where)
    start = time.monotonic()
    with _hub_errors(settings), _progress("fetching", total, done):
        api.download_repo(
            settings.model_id,
            "model",
            revision=settings.model_revision,
            local_dir=where,
            file_list=[{"Path": f.path, "Size": f.size, "Sha256": f.sha256} for f in files],
        )
    seconds = max(time.monotonic() - start, 1e-3)
    _say(f"fetched in {seconds:.1f} s, {remaining / seconds / 1e6:.1f} MB/s")
    _verify(where, files)
    good = Snapshot(settings.model_id, settings.model_revision, settings.modelscope_endpoint, files)
    snapshot.mark(where, good)
    return good


@contextlib.contextmanager
def _alone(models: Path) -> Iterator[None]:
    """Hold the volume's download lock, after waiting for whoever has it."""
    from filelock import FileLock, Timeout

    # On the volume itself: two containers share nothing else.
    lock = FileLock(models / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another download works on this volume; waiting for it")
        lock.acquire()
    with lock:
        yield


def _complete(settings: Settings, where: Path) -> Snapshot | None:
    try:
        snapshot.require(settings.models, settings.model_id, settings.model_revision)
    except errors.SnapshotMissing:
        return None
    return snapshot.load(where)


def main(argv: list[str] | None = None) -> int:
    """Download unless the volume has the complete snapshot already."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    # All settings, also those of the server: a wrong one must not cost an hour of download first.
    settings = Settings.from_environ()
    where = snapshot.folder(settings.models, settings.model_id)
    good = _complete(settings, where)
    if good:
        _say("nothing to do")
    else:
        try:
            where.mkdir(parents=True, exist_ok=True)
            with _alone(settings.models):
                good = _complete(settings, where) or _download(settings, where)
        except OSError as error:
            if _is_full(error):
                raise _disk_full(settings.models, 0) from error
            raise errors.DownloadFailed(
                f"cannot write to the models volume {settings.models}: {error}",
                f"a folder that user {os.getuid()} may write to",
                "correct its owner, or remove the volume (`docker volume rm`) to start anew",
            ) from error
    _say(
        f"{good.model_id} at {good.revision} is complete and verified:"
        f" {len(good.files)} files, {good.size / _GB:.2f} GB in {where}"
    )
    return 0


if __name__ == "__main__":
    errors.run(main)
