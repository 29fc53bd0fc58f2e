"""Checksums of files, as `sha256sum --check` reads them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

NAME = "SHA256SUMS"
# The last line of a list that is not cut off; for sha256sum it is a comment.
END = "# complete\n"


def of_bytes(content: bytes) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def of_file(path: Path) -> str:
    """Return the sha256 of a file in hex, read from disk."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text(pairs: Mapping[str, str]) -> str:
    """Return the lines for these paths and sums, by path."""
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(pairs.items()))
