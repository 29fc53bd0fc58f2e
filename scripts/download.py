"""Bring a model's snapshot into the models volume, unless it is there already, and verify it."""

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from scripts import errors, keys, snapshot, sources
from scripts.fetch import Fetch, pinned_manifest, side_by_side
from scripts.progress import Progress
from scripts.settings import Settings
from scripts.snapshot import Journal, ModelFile, Snapshot

_GB = 1e9


@contextlib.contextmanager
def _alone(models: Path, progress: Progress) -> Iterator[None]:
    """Hold the volume's lock, after waiting for whoever has it."""
    from filelock import Timeout

    lock = snapshot.lock(models)
    said = False
    while True:
        try:
            lock.acquire(timeout=30 if said else 0)
            break
        except Timeout:
            progress.say("another download works on this volume; waiting for it")
            said = True
    with lock:
        yield


def _complete(
    settings: Settings, where: Path, progress: Progress, hash_again: bool
) -> Snapshot | None:
    """Return the snapshot if the folder has it as it must be; asks no network.

    A file that was written to since it was verified, and with VERIFY=full every file, counts only
    after it is hashed again.
    """
    try:
        found = snapshot.read(where)
    except errors.SnapshotMissing:
        return None
    if (found.model_id, found.revision) != (settings.model_id, settings.model_revision):
        return None
    pinned = pinned_manifest(settings, progress)
    if pinned and set(pinned.files) != set(found.files):
        return None
    changed = snapshot.changed(where, found)
    doubtful = [f for f in found.files if settings.verify == "full" or f.path in changed]
    if not doubtful:
        return found
    whole = all((where / file.path).is_file() for file in doubtful)
    if hash_again and whole and _hash_again(where, found, doubtful, settings, progress):
        return found
    return None


def _hash_again(
    where: Path,
    found: Snapshot,
    files: list[ModelFile],
    settings: Settings,
    progress: Progress,
) -> bool:
    """Hash files of a complete folder; False, and no snapshot any more, if one differs."""
    journal, bad, read = Journal.read(where), [], 0

    def advance(count: int) -> None:
        nonlocal read
        read += count

    def check(file: ModelFile) -> None:
        again, when = snapshot.hashed(where, file.path, advance)
        if again == file:
            journal.known[file.path] = (file, when)
        else:
            progress.say(f"{file.path} has been damaged since it was verified")
            # Its time no longer vouches for it.
            journal.known.pop(file.path, None)
            bad.append(file)

    with progress.follow("verifying", sum(file.size for file in files), lambda: read):
        side_by_side(check, files, os.cpu_count() or 1, threading.Event())
    if bad:
        snapshot.unmark(where)
        journal.save()
        return False
    # A volume that is read-only stays as it is, and its files are hashed again next time.
    with contextlib.suppress(OSError):
        snapshot.mark(where, found, journal)
    return True


def _bring(settings: Settings, where: Path, refresh: bool, progress: Progress) -> Snapshot:
    good = None if refresh else _complete(settings, where, progress, hash_again=False)
    try:
        if not good:
            where.mkdir(parents=True, exist_ok=True)
            with _alone(settings.models, progress):
                if not refresh:
                    good = _complete(settings, where, progress, hash_again=True)
                if not good:
                    return Fetch(settings, where, progress).run()
    except OSError as error:
        sources.check_disk(error, str(where))
        raise errors.VolumeUnwritable(
            f"{where} cannot be used: {error}", "a models volume", "look at what lies there"
        ) from error
    progress.say("nothing to do")
    return good


def main(argv: list[str] | None = None) -> int:
    """Download unless the volume has the complete snapshot already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--refresh", action="store_true", help="ask the source again: its branch may have moved"
    )
    options = parser.parse_args(argv)
    errors.end_on_sigterm()
    # All settings, also those of the server: a wrong one must not cost an hour of download first.
    settings = Settings.from_environ()
    keys.require(settings, bool(keys.load(settings.keys)))
    progress = Progress("download", settings.progress)
    where = snapshot.folder(settings.models, settings.model_id)
    try:
        good = _bring(settings, where, options.refresh, progress)
    except errors.StackError as error:
        if progress.json:
            progress.event("error", "", text=str(error), exit_code=error.exit_code)
        raise
    progress.event(
        "complete",
        f"{good.model_id} at {good.revision} is complete and verified: {len(good.files)} files,"
        f" {good.size / _GB:.2f} GB in {where}",
        model_id=good.model_id,
        revision=good.revision,
        source=good.source,
        files=len(good.files),
        bytes=good.size,
    )
    return 0


if __name__ == "__main__":
    errors.run(main, end=os._exit)
