"""Fetch the files of a snapshot side by side, each from the first source that gives it."""

import contextlib
import json
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scripts import errors, snapshot, sources
from scripts.follow import Follower
from scripts.progress import Progress
from scripts.settings import Settings
from scripts.snapshot import Journal, ModelFile, Snapshot
from scripts.sources import Again, Listed, Refused, Source

# Room that must stay free beyond the model, in bytes.
_MARGIN = 64 << 20
# Files up to this size come first: the index among them says whether the rest is whole.
_SMALL = 32 << 20
# Seconds without a byte after which the next source is tried, where there is one.
_SHORT_PATIENCE = 20
# Copies of a file with the wrong content that a source may give before it is believed.
_BAD_COPIES = 2
# The sha256 of no bytes, and the files that may be empty by their nature.
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_MAY_BE_EMPTY = ("__init__.py", ".gitkeep", ".gitattributes", ".gitignore")
_GB = 1e9


def _check_listing(files: tuple[Listed, ...], source: Source, model_id: str) -> None:
    """Raise Refused when a listing is empty or lacks what a verification needs."""
    wrong = [f"{file.path} ({why})" for file in files if (why := _why_refused(file))]
    if not files:
        wrong = ["it is empty"]
    if wrong:
        raise Refused(
            errors.DownloadFailed(
                f"the listing of {model_id} by {source.name} cannot be used: {', '.join(wrong)}",
                "path, size and sha256 of every file",
                "check MODEL_ID and MODEL_REVISION; try again later, or name another source in"
                " MODEL_SOURCES",
            )
        )


def _why_refused(file: Listed) -> str:
    path = Path(file.path)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return "it leads out of the folder"
    if len(file.sha256) != 64 and not (file.git_blob and not file.sha256):
        return "it has no sha256"
    if file.size <= 0 and not (path.name in _MAY_BE_EMPTY and file.sha256 in ("", _EMPTY)):
        return "its size is 0"
    return ""


def _check_index(where: Path, files: tuple[Listed, ...]) -> None:
    """Raise DownloadFailed when an index names a shard that the listing does not have."""
    listed = {file.path for file in files}
    for name in sorted(path for path in listed if path.endswith(".index.json")):
        try:
            weights = json.loads((where / name).read_text(encoding="utf-8"))["weight_map"]
            named = {(Path(name).parent / shard).as_posix() for shard in weights.values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # Another kind of index.
        if named - listed:
            raise errors.DownloadFailed(
                f"{name} names {', '.join(sorted(named - listed))}, which the listing lacks",
                "every shard of the index",
                "the model is incomplete at its source: try again later, or name another source"
                " in MODEL_SOURCES",
            )


def side_by_side(
    work: Callable[[Any], object], files: Iterable[Any], workers: int, stop: threading.Event
) -> None:
    """Do the work for every file, some at once; the first failure sets `stop` and is raised.

    Not by an executor: at the end Python would wait for its threads, which may wait for a hub.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for file in files:
        waiting.put(file)
    failures: list[BaseException] = []

    def loop() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                file = waiting.get_nowait()
                try:
                    work(file)
                except BaseException as error:
                    failures.append(error)
                    stop.set()

    count = min(workers, waiting.qsize())
    threads = [threading.Thread(target=loop, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    while not failures and any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=0.1)
    if failures:
        raise failures[0]


class Fetch:
    """One run: the settings, the folder, what is known to be good in it, and where it comes from.

    `files` are the files of the snapshot, as the source that answered first lists them.
    """

    def __init__(self, settings: Settings, where: Path, progress: Progress) -> None:
        self.settings, self.where, self.progress = settings, where, progress
        self.journal = Journal.read(where)
        self.files: tuple[Listed, ...] = ()
        self._good: dict[str, ModelFile] = {}
        self._sources = sources.choose(settings)
        # Sources that gave nothing for too long; the others' turn comes at once.
        self._lost: set[str] = set()
        self._stop = threading.Event()
        self._read = 0

    def run(self) -> Snapshot:
        """Make the folder a good snapshot.

        Raises:
            StackError: it cannot be; what has arrived stays, and the next run goes on with it.
        """
        pinned = pinned_manifest(self.settings, self.progress)
        source = self._list(pinned)
        total = sum(file.size for file in self.files)
        self._keep_what_is_good()
        remaining = total - self._arrived()
        self.progress.say(
            f"{len(self.files)} files, {total / _GB:.2f} GB, {remaining / _GB:.2f} GB to fetch"
        )
        self._check_room(remaining)
        began = time.monotonic()
        missing = sorted(
            (file for file in self.files if file.path not in self._good), key=lambda f: f.size
        )
        with self.progress.follow("fetching", total, self._arrived):
            self._each(self._bring, [file for file in missing if file.size <= _SMALL])
            _check_index(self.where, self.files)
            self._each(self._bring, [file for file in missing if file.size > _SMALL])
        seconds = max(time.monotonic() - began, 1e-3)
        rate = remaining / seconds / 1e6
        self.progress.say(f"fetched and verified in {seconds:.1f} s, {rate:.1f} MB/s")
        files = tuple(self._good[file.path] for file in self.files)
        good = Snapshot(self.settings.model_id, self.settings.model_revision, source, files)
        snapshot.mark(self.where, good, self.journal)
        for path in snapshot.sweep(self.where, good):
            self.progress.say(f"removed {path}, which is not part of the snapshot")
        return good

    def _list(self, pinned: Snapshot | None) -> str:
        """Take the files from the first source that lists them as they must be; return its name."""
        reasons: list[errors.StackError] = []
        for source in self._sources:
            self.progress.say(f"asking {source.name} for {self.settings.model_id}")
            try:
                files = self._listing(source)
                _check_listing(files, source, self.settings.model_id)
                if pinned:
                    files = _check_pinned(files, pinned, source)
            except Refused as refused:
                reasons.append(refused.error)
                self._lost.add(source.name)
                if source is not self._sources[-1]:
                    self.progress.say(f"{refused}; trying the next source")
                continue
            self.files = files
            return source.name
        raise _none_of(reasons)

    def _listing(self, source: Source) -> tuple[Listed, ...]:
        began, tries = time.monotonic(), 0
        while True:
            try:
                return source.listing()
            except Again as again:
                tries += 1
                delay = _delay(tries, again.after)
                # A hub that says when to come back is worth waiting for.
                patience = self.settings.download_patience
                patience = patience if again.after else min(patience, _SHORT_PATIENCE)
                if time.monotonic() + delay - began > patience:
                    raise Refused(
                        errors.HubUnreachable(
                            f"{source.name} does not list {self.settings.model_id}: {again}",
                            "a hub that answers",
                            "check the network and the endpoint in .env (MODELSCOPE_ENDPOINT,"
                            " MODEL_SOURCES), then run the same command again",
                        )
                    ) from again
                self.progress.say(f"{source.name}: {again}; trying again in {delay:.0f} s")
                time.sleep(delay)

    def _keep_what_is_good(self) -> None:
        """Take over the files that are there already; hash those that are not known to be good."""
        unknown = []
        for file in self.files:
            noted, _ = self.journal.known.get(file.path, (None, 0))
            if noted and self.journal.has(noted) and file.is_good(self.where, noted):
                self._good[file.path] = noted
            elif (self.where / file.path).is_file():
                unknown.append(file)
        # Before any file changes: a snapshot that is being replaced is no snapshot.
        snapshot.unmark(self.where)
        total = sum(file.size for file in unknown)
        with self.progress.follow("verifying", total, lambda: self._read):
            self._each(self._verify_what_is_there, unknown)

    def _verify_what_is_there(self, file: Listed) -> None:
        wrong = self._verify(file)
        if wrong:
            self.progress.say(f"{file.path} is not good ({wrong}) and is fetched again")

    def _each(self, work: Callable[[Listed], object], files: list[Listed]) -> None:
        side_by_side(work, files, self.settings.download_workers, self._stop)

    def _advance(self, count: int) -> None:
        self._read += count

    def _verify(self, file: Listed, digest: str | None = None) -> str:
        """Hash a file from disk; return "" and note it, or remove it and return what it was.

        `digest` is its sha256 where a Follower has read it already.
        """
        path = self.where / file.path
        if digest:
            was = path.stat()
            found, when = ModelFile(file.path, was.st_size, digest), was.st_mtime_ns
        else:
            found, when = snapshot.hashed(self.where, file.path, self._advance)
        if not file.is_good(self.where, found):
            path.unlink()
            needed = file.sha256 or file.git_blob
            return (
                f"sha256 {found.sha256[:12]}… and {found.size} bytes instead of {needed[:12]}… and"
                f" {file.size}"
            )
        self.journal.add(found, when)
        self._good[file.path] = found
        return ""

    def _arrived(self) -> int:
        return sum(sources.arrived(self.where, file) for file in self.files)

    def _check_room(self, remaining: int) -> None:
        free = shutil.disk_usage(self.where).free
        if remaining and free < remaining + _MARGIN:
            raise errors.DiskFull(
                f"{free / _GB:.2f} GB free in the models volume ({self.settings.models})",
                f"{(remaining + _MARGIN) / _GB:.2f} GB for what is left to download",
                "make room there (`make models` lists the models, and removes one), then run the"
                " same command again: what has arrived is kept",
            )

    def _bring(self, file: Listed) -> None:
        """Fetch and verify one file, from the first source that gives it.

        Raises:
            StackError: no source does.
        """
        began = time.monotonic()
        before = sources.arrived(self.where, file)
        reasons = []
        for source in self._sources:
            if source.name in self._lost:
                continue
            last = source is [s for s in self._sources if s.name not in self._lost][-1]
            error = self._bring_from(source, file, last)
            if not error:
                seconds = max(time.monotonic() - began, 1e-3)
                rate = (file.size - before) / seconds / 1e6
                self.progress.event(
                    "file",
                    f"{file.path}  {file.size / _GB:.2f} GB  {rate:.1f} MB/s  verified"
                    f"  ({len(self._good)} of {len(self.files)})",
                    path=file.path,
                    bytes=file.size,
                    seconds=round(seconds, 3),
                    source=source.name,
                )
                return
            reasons.append(error)
            if not last:
                found = str(error).splitlines()[0]
                self.progress.say(f"{found}; going on with the next source")
        raise _none_of(reasons)

    def _bring_from(self, source: Source, file: Listed, last: bool) -> errors.StackError | None:
        """Return None when the file has come from this source and is good, or else why not.

        The budget is the time without a new byte: a line that breaks every few megabytes is
        resumed without end.
        """
        patience = self.settings.download_patience
        if not last:
            patience = min(patience, _SHORT_PATIENCE)
        quiet_since, most, tries, bad = time.monotonic(), 0, 0, 0
        while True:
            there = sources.arrived(self.where, file)
            most = max(most, there)
            follower = None
            if file.size > _SMALL and not there:
                follower = Follower(sources.incomplete(self.where, file.path))
            digest = None
            try:
                source.fetch(file, self.where)
            except Refused as refused:
                return refused.error
            except Again as again:
                tries += 1
                if sources.arrived(self.where, file) > most:
                    quiet_since, tries = time.monotonic(), 0
                delay = _delay(tries, again.after)
                quiet = time.monotonic() - quiet_since
                if quiet + delay > patience:
                    if not last:
                        self._lost.add(source.name)
                    return errors.HubUnreachable(
                        f"{source.name} gave no byte of {file.path} in {quiet:.0f} s: {again}",
                        "a hub that goes on answering",
                        "run the same command again: what has arrived is kept; DOWNLOAD_PATIENCE"
                        " is the time to wait for",
                    )
                if tries > 1 or again.after:
                    self.progress.say(f"{file.path}: {again}; trying again in {delay:.0f} s")
                if self._stop.wait(delay):
                    return errors.StackError("stopped", "", "")
                continue
            finally:
                if follower:
                    digest = follower.finish(self.where / file.path)
            wrong = self._verify(file, digest)
            if not wrong:
                return None
            bad += 1
            self.progress.say(f"{file.path} from {source.name} is not good: {wrong}")
            if bad == _BAD_COPIES:
                return errors.DownloadFailed(
                    f"{file.path} from {source.name} is not good, {bad} times: {wrong}",
                    "the content that the listing names",
                    "try again later, or name another source in MODEL_SOURCES",
                )


def _delay(tries: int, asked: float | None) -> float:
    """Return the seconds to wait: what the hub asks for, or else longer each time, with jitter."""
    return asked if asked is not None else min(30.0, 0.25 * 2**tries) * random.uniform(0.5, 1.5)


def _none_of(reasons: list[errors.StackError]) -> errors.StackError:
    """Return the one reason, or all of them under the first one's exit code."""
    if len(reasons) == 1:
        return reasons[0]
    found = "; ".join(str(reason).splitlines()[0] for reason in reasons)
    error = errors.DownloadFailed(
        f"no source gives it: {found}",
        "one of MODEL_SOURCES that does",
        "see each reason above; what has arrived is kept",
    )
    error.exit_code = reasons[0].exit_code if reasons else error.exit_code
    return error


def pinned_manifest(settings: Settings, progress: Progress) -> Snapshot | None:
    """Return the manifest that this model and revision must match, if there is one."""
    path = snapshot.pin(settings.model_id)
    if not path.is_file():
        return None
    try:
        pinned = Snapshot.parse(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise errors.PinMismatch(
            f"{path} is unreadable: {error}", "a manifest of `make pin`", "write it again"
        ) from error
    if pinned.revision != settings.model_revision:
        progress.say(
            f"not pinned: {path.name} is for revision {pinned.revision}, not"
            f" {settings.model_revision}"
        )
        return None
    return pinned


def _check_pinned(
    files: tuple[Listed, ...], pinned: Snapshot, source: Source
) -> tuple[Listed, ...]:
    """Return the pinned files; raise Refused when the source lists others."""
    found = {file.path: file for file in files}
    wrong = []
    for file in pinned.files:
        listed = found.pop(file.path, None)
        if not listed:
            wrong.append(f"{file.path} is missing")
        elif listed.size != file.size or listed.sha256 not in ("", file.sha256):
            wrong.append(
                f"{file.path}: expected {file.size} bytes, sha256 {file.sha256},"
                f" found {listed.size} bytes, sha256 {listed.sha256}"
            )
    wrong += [f"{path} is new" for path in found]
    if wrong:
        raise Refused(
            errors.PinMismatch(
                f"{source.name} does not have what is pinned: {'; '.join(wrong)}",
                f"the files of {snapshot.pin(pinned.model_id).name}",
                "set MODEL_REVISION to the pinned commit, or look at what changed and pin anew"
                " (remove the pin, `make download`, `make pin`)",
            )
        )
    return tuple(Listed(file.path, file.size, file.sha256) for file in pinned.files)
