"""Hash a file from disk while it is being written, so that nothing is left to do at its end."""

import hashlib
import os
import threading
from pathlib import Path

_BLOCK = 1 << 20
# Bytes after which what was written so far is sent to the disk, and seconds between two looks.
_FLUSH, _POLL = 64 << 20, 0.02


class Follower:
    """Reads a file behind its only writer, who begins with an empty one and appends.

    Its hash is of what the file system gives back, as a hash after the end would be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._read = 0
        self._done = threading.Event()
        self._file: int | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while self._file is None:
            last = self._done.is_set()
            try:
                self._file = os.open(self._path, os.O_RDONLY)
            except OSError:
                if last or self._done.wait(_POLL):
                    return
        flushed = 0
        while True:
            last = self._done.is_set()
            try:
                block = os.read(self._file, _BLOCK)
            except OSError:
                return
            self._digest.update(block)
            self._read += len(block)
            if self._read - flushed >= _FLUSH:
                os.fdatasync(self._file)
                flushed = self._read
            if not block:
                if last:
                    return
                self._done.wait(_POLL)

    def finish(self, target: Path) -> str | None:
        """Return the sha256 of `target` once nobody writes any more.

        None where it is not the file that was followed, or was begun anew: then nothing is known.
        """
        self._done.set()
        self._thread.join()
        if self._file is None:
            return None
        try:
            followed, found = os.fstat(self._file), target.stat()
        except OSError:
            return None
        finally:
            os.close(self._file)
        same = (followed.st_dev, followed.st_ino) == (found.st_dev, found.st_ino)
        return self._digest.hexdigest() if same and self._read == found.st_size else None
