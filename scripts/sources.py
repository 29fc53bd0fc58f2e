"""Where a model comes from: each source lists its files and fetches one of them, resuming it.

A source raises Again for what may pass (a lost connection, a busy hub) and Refused for what will
not (it lacks the model, or denies it). What is wrong with this machine (a full disk, a volume that
cannot be written to) is no source's fault and ends the download: a StackError.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scripts import errors, snapshot
from scripts.settings import Settings

HF_MIRROR = "https://hf-mirror.com"
# Seconds without a byte after which a connection counts as lost.
_STALL_SECONDS = 20
# What huggingface_hub collects before it writes, and so loses when a connection breaks; its own ten
# megabytes make no progress at all on a line that breaks sooner.
_HF_CHUNK = 256 << 10


class Again(Exception):
    """What may pass: try again, after so many seconds if the source says so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Refused(Exception):
    """This source cannot give it; `error` is for the user, if no other source can."""

    def __init__(self, error: errors.StackError) -> None:
        super().__init__(str(error).splitlines()[0])
        self.error = error


@dataclass(frozen=True)
class Listed:
    """A file as a source lists it; where it has no sha256, git's own hash of the content."""

    path: str
    size: int
    sha256: str
    git_blob: str = ""

    def is_good(self, where: Path, found: snapshot.ModelFile) -> bool:
        """Whether a file that was hashed from disk is this one."""
        if self.sha256:
            return (found.size, found.sha256) == (self.size, self.sha256)
        # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects; small files only have this one.
        content = (where / self.path).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return found.size == self.size and blob.hexdigest() == self.git_blob


class Source(Protocol):
    """One place that models come from."""

    name: str

    def listing(self) -> tuple[Listed, ...]:
        """Return the files of the model's revision."""

    def fetch(self, file: Listed, where: Path) -> None:
        """Bring one file to its place below `where`, going on with what `incomplete` has."""


def incomplete(where: Path, path: str) -> Path:
    """Where the beginning of a file lies while it is fetched: the ModelScope SDK's own place."""
    target = where / path
    return target.with_name(f"{target.name}.incomplete")


def arrived(where: Path, file: Listed) -> int:
    """Return how many bytes of a file are on the disk, in its place or on the way."""
    target = where / file.path
    ways = [target, incomplete(where, file.path), *_parts(target), _merged(target)]
    sizes = 0
    for path in ways:
        try:
            sizes += path.stat().st_size
        except OSError:
            continue
    return min(sizes, file.size)


def choose(settings: Settings) -> list[Source]:
    """Return the sources that the settings name, in their order."""
    return [_source(settings, name) for name in settings.model_sources]


def _source(settings: Settings, name: str) -> Source:
    if name == "modelscope":
        token = os.environ.get("MODELSCOPE_API_TOKEN", "")
        return ModelScope(name, settings, settings.modelscope_endpoint, token)
    if name == "huggingface":
        return HuggingFace(name, settings, settings.hf_endpoint, os.environ.get("HF_TOKEN") or None)
    # A token goes to the hub it is meant for, and to no other.
    if name == "hf-mirror":
        return HuggingFace(name, settings, HF_MIRROR, None)
    if name == "folder":
        return Folder(name, settings)
    return ModelScope(name, settings, name, "")


class ModelScope:
    """A hub that speaks ModelScope's protocol, through its SDK: modelscope.cn or one in the LAN."""

    def __init__(self, name: str, settings: Settings, endpoint: str, token: str) -> None:
        self.name = name
        self._id, self._revision = settings.model_id, settings.model_revision
        self._endpoint = endpoint
        # Read once, at the SDK's import. One attempt each: the caller has the patience, and its
        # budget knows when bytes have arrived, and scripts/follow.py that a file only grows. The
        # volume's lock stands for the SDK's, which lie in a home that containers do not share.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["MODELSCOPE_DOWNLOAD_MAX_RETRIES"] = "0"
        os.environ["MODELSCOPE_ENDPOINT"] = endpoint
        os.environ["MODELSCOPE_DOWNLOAD_FILE_LOCK"] = "false"
        for variable, value in {
            "MODELSCOPE_LOG_LEVEL": "CRITICAL",
            "MODELSCOPE_CACHE": str(settings.caches / "modelscope"),
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "MODELSCOPE_DOWNLOAD_TIMEOUT": str(_STALL_SECONDS),
            "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "86400",
        }.items():
            os.environ.setdefault(variable, value)
        from modelscope_hub import HubApi

        # Empty, not None: for None the SDK takes the environment's token, whatever hub it is.
        self._api = HubApi(endpoint=endpoint, token=token)

    def listing(self) -> tuple[Listed, ...]:
        """Ask the hub for every file of the revision."""
        with self._translated(f"{self._id} at revision {self._revision}"):
            entries = self._api.list_repo_files(self._id, "model", revision=self._revision)
        return tuple(
            Listed(entry.path, entry.size, (entry.sha256 or "").lower())
            for entry in entries
            if not entry.is_dir
        )

    def fetch(self, file: Listed, where: Path) -> None:
        """Let the SDK fetch one file; it goes on with what has arrived."""
        _finish_merge(where, file)
        with self._translated(file.path, file):
            self._api.download_file(
                self._id,
                "model",
                file.path,
                revision=self._revision,
                local_dir=where,
                file_size=file.size,
            )

    @contextmanager
    def _translated(self, what: str, file: Listed | None = None) -> Iterator[None]:
        from modelscope_hub import errors as sdk

        try:
            yield
        except (sdk.AuthenticationError, sdk.PermissionDeniedError) as error:
            raise Refused(_denied(self._endpoint, what, error, "MODELSCOPE_API_TOKEN")) from error
        except sdk.NotExistError as error:
            lacking = _lacks_file(self._endpoint, file) if file else self._absent(error)
            raise Refused(lacking) from error
        except sdk.FileSizeMismatchError as error:
            raise Refused(_wrong(self._endpoint, what, _first_line(error))) from error
        except (sdk.NetworkError, sdk.ServerError, sdk.RateLimitError, sdk.StorageError) as error:
            check_disk(error, where=what)
            raise Again(_first_line(error.__cause__ or error), _after(error)) from error
        except (sdk.HubError, ValueError) as error:
            # ValueError: what came is no JSON.
            raise Refused(_no_hub(self._endpoint, error)) from error
        except OSError as error:
            check_disk(error, where=what)
            raise Again(_first_line(error)) from error

    def _absent(self, error: Exception) -> errors.StackError:
        """Tell a model that is not there from a revision that is not there."""
        from modelscope_hub import errors as sdk

        try:
            known = self._api.repo_exists(self._id, "model")
        except (sdk.HubError, OSError, ValueError):
            known = False
        if known:
            return _lacks_revision(self._endpoint, self._id, self._revision)
        return _lacks_model(self._endpoint, self._id, _first_line(error))


class HuggingFace:
    """A hub that speaks Hugging Face's protocol, through huggingface_hub: theirs or a mirror."""

    def __init__(self, name: str, settings: Settings, endpoint: str, token: str | None) -> None:
        self.name = name
        self._id, self._revision = settings.hf_model_id, settings.hf_model_revision
        self._endpoint, self._token = endpoint, token or False
        # Read once, at the import. Mirrors do not have Xet, the storage that needs another client.
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_STALL_SECONDS))

    def listing(self) -> tuple[Listed, ...]:
        """Ask the hub for every file of the revision; small files have git's hash only."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token)
        with self._translated(self._id):
            info = api.model_info(
                self._id, revision=self._revision, files_metadata=True, timeout=_STALL_SECONDS
            )
        return tuple(
            Listed(
                entry.rfilename,
                entry.size or 0,
                entry.lfs.sha256 if entry.lfs else "",
                entry.blob_id or "",
            )
            for entry in info.siblings or ()
        )

    def fetch(self, file: Listed, where: Path) -> None:
        """Let huggingface_hub fetch one file to where the ModelScope SDK would go on with it."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        constants.DOWNLOAD_CHUNK_SIZE = _HF_CHUNK
        way = incomplete(where, file.path)
        way.parent.mkdir(parents=True, exist_ok=True)
        with self._translated(file.path, file), way.open("ab") as stream:
            if stream.tell() > file.size:
                stream.truncate(0)
            http_get(
                hf_hub_url(self._id, file.path, revision=self._revision, endpoint=self._endpoint),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(token=self._token),
                expected_size=file.size,
                _nb_retries=0,
            )
        way.replace(where / file.path)

    @contextmanager
    def _translated(self, what: str, file: Listed | None = None) -> Iterator[None]:
        from httpx2 import HTTPError
        from huggingface_hub import errors as sdk

        try:
            yield
        except sdk.GatedRepoError as error:
            raise Refused(_denied(self._endpoint, what, error, "HF_TOKEN")) from error
        except sdk.RepositoryNotFoundError as error:
            raise Refused(_lacks_model(self._endpoint, self._id, _first_line(error))) from error
        except sdk.RevisionNotFoundError as error:
            raise Refused(_lacks_revision(self._endpoint, self._id, self._revision)) from error
        except sdk.EntryNotFoundError as error:
            raise Refused(_lacks_file(self._endpoint, file or Listed(what, 0, ""))) from error
        except sdk.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise Refused(_denied(self._endpoint, what, error, "HF_TOKEN")) from error
            if status == 404 and file:
                raise Refused(_lacks_file(self._endpoint, file)) from error
            if status == 416:
                raise Refused(_wrong(self._endpoint, what, "fewer bytes than listed")) from error
            raise Again(_first_line(error), _after(error)) from error
        except HTTPError as error:
            raise Again(_first_line(error) or type(error).__name__) from error
        except ValueError as error:
            raise Refused(_no_hub(self._endpoint, error)) from error
        except OSError as error:
            check_disk(error, where=what)
            raise Again(_first_line(error)) from error


class Folder:
    """A folder of this machine (MODEL_FOLDER) with the model's files in it."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._folder = settings.model_folder

    def listing(self) -> tuple[Listed, ...]:
        """List the folder's files: as its marker says, or else as they are."""
        if not self._folder.is_dir():
            raise Refused(
                errors.HubUnreachable(
                    f"MODEL_FOLDER ({self._folder}) is no folder here",
                    "a folder with the model's files",
                    "correct MODEL_FOLDER in .env, or take `folder` out of MODEL_SOURCES",
                )
            )
        try:
            files = snapshot.load(self._folder).files
        except errors.SnapshotMissing:
            names = [path.relative_to(self._folder) for path in snapshot.paths(self._folder)]
            files = tuple(snapshot.hashed(self._folder, n.as_posix())[0] for n in names)
        return tuple(Listed(file.path, file.size, file.sha256) for file in files)

    def fetch(self, file: Listed, where: Path) -> None:
        """Copy one file."""
        origin, way = self._folder / file.path, incomplete(where, file.path)
        if not origin.is_file():
            raise Refused(_lacks_file(str(self._folder), file))
        way.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(origin, way)
        except OSError as error:
            check_disk(error, where=file.path)
            raise Refused(_wrong(str(self._folder), file.path, _first_line(error))) from error
        way.replace(where / file.path)


def _parts(target: Path) -> list[Path]:
    """Return the parts in which the SDK fetches a large file, where it is told to, in order."""
    if os.environ.get("MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS", "1") == "1":
        return []
    found = {}
    for path in target.parent.glob(f"{target.name}_*_*"):
        start, _, end = path.name.removeprefix(f"{target.name}_").partition("_")
        if start.isdigit() and end.isdigit():
            found[int(start)] = path
    return [found[start] for start in sorted(found)]


def _merged(target: Path) -> Path:
    return target.with_name(f"{target.name}.parallel_tmp")


def _finish_merge(where: Path, file: Listed) -> None:
    """Go on where the SDK was ended while it joined the parts of a file.

    It has removed the parts that it joined, and would fetch them again.
    """
    target = where / file.path
    merged, parts = _merged(target), _parts(target)
    if not merged.exists():
        return
    starts = [int(part.name.removeprefix(f"{target.name}_").partition("_")[0]) for part in parts]
    with merged.open("r+b") as stream:
        stream.seek(min([merged.stat().st_size, *starts]))
        stream.truncate()
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, stream, 16 << 20)
            part.unlink()
    if merged.stat().st_size == file.size:
        merged.replace(target)
    else:
        merged.unlink()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _after(error: BaseException) -> float | None:
    """Return the seconds that a hub asks to wait, if it does."""
    known = getattr(error, "retry_after", None)
    response = getattr(error, "response", None)
    if known is None and response is not None:
        known = response.headers.get("Retry-After")
    try:
        return None if known is None else max(0.0, float(known))
    except ValueError:
        return None


def check_disk(error: BaseException | None, where: str) -> None:
    """Raise a StackError when this machine's disk stands anywhere in the chain of causes."""
    # A firewall's "not permitted" is no disk's.
    network = ("requests", "urllib3", "httpx2", "httpcore2")
    while error is not None and not type(error).__module__.startswith(network):
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise errors.DiskFull(
                f"the models volume is full ({where} could not be written)",
                "room for the rest of the model",
                "make room there, then run the same command again: what has arrived is kept",
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise errors.VolumeUnwritable(
                f"{where} cannot be written: {error.strerror}",
                f"a models volume that user {os.getuid()} may write to",
                "correct its owner or mount, then run the same command again",
            ) from error
        error = error.__cause__ or error.__context__


def _denied(endpoint: str, what: str, error: Exception, token: str) -> errors.StackError:
    return errors.AccessDenied(
        f"{endpoint} does not let us have {what}: {_first_line(error)}",
        "the right to read it",
        f"set {token} in .env to a token that has it (and accept the model's terms on its page)",
    )


def _lacks_model(endpoint: str, model_id: str, reason: str) -> errors.StackError:
    return errors.ModelNotFound(
        f"{endpoint} does not have {model_id}: {reason}",
        "a model id that this hub has, and that you may see",
        "check MODEL_ID in .env as the hub spells it; a private model needs a token",
    )


def _lacks_revision(endpoint: str, model_id: str, revision: str) -> errors.StackError:
    return errors.RevisionNotFound(
        f"{endpoint} has {model_id}, but not at revision {revision!r}",
        "a branch, tag or commit of this model",
        "check MODEL_REVISION in .env; the model's page on the hub lists them",
    )


def _lacks_file(endpoint: str, file: Listed) -> errors.StackError:
    return errors.DownloadFailed(
        f"{endpoint} does not have {file.path}",
        "every file of the snapshot",
        "try again later, or name another source in MODEL_SOURCES",
    )


def _wrong(endpoint: str, path: str, reason: str) -> errors.StackError:
    return errors.DownloadFailed(
        f"{endpoint} gives another {path} than it lists: {reason}",
        "files as the listing has them",
        "try again later, or name another source in MODEL_SOURCES",
    )


def _no_hub(endpoint: str, error: Exception) -> errors.StackError:
    return errors.HubUnreachable(
        f"{endpoint} does not answer as a hub does: {_first_line(error)}",
        "a hub that this machine reaches",
        "check the network (a portal or a proxy may answer in its place) and the endpoint in .env",
    )
