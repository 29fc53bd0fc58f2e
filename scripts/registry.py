"""One registry: what it has under a tag, pushing an image to it, and moving a tag in it."""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.errors import PushFailed, SettingInvalid

_NAME = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*")
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3})(:\d+)?/")
# What makes two images the same to whoever runs them.
_CONFIG = ("User", "Env", "Entrypoint", "Cmd", "WorkingDir", "Labels")
_ABSENT = re.compile(r"not found|manifest unknown|name unknown", re.IGNORECASE)
_TRIES = 3


def content(layers: list[str], config: dict) -> str:
    """Return a sum of what an image is: its layers before compression, and how it is run."""
    told = {name: config.get(name) or None for name in _CONFIG}
    return hashlib.sha256(json.dumps([layers, told], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Local:
    """An image of this host's engine; `size` in bytes, unpacked."""

    name: str
    id: str
    content: str
    size: int

    @classmethod
    def read(cls, name: str) -> "Local":
        """Look at it; it must be there."""
        known = json.loads(_docker("image", "inspect", name))[0]
        layers, config = known["RootFS"]["Layers"], known["Config"]
        return cls(name, known["Id"], content(layers, config), known["Size"])


@dataclass(frozen=True)
class Remote:
    """An image of a registry; `size` in bytes, as it is sent."""

    digest: str
    content: str
    version: str
    size: int
    compression: str


class _Absent(Exception):
    """The registry answers that it has no such thing."""


def _run(*command: str, timeout: float = 7200) -> bytes:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )
    if done.returncode:
        text = (done.stderr or done.stdout).decode(errors="replace").strip()
        last = (
            text.splitlines()[-1].removeprefix("ERROR: ")
            if text
            else f"`{command[0]}` ended with {done.returncode}"
        )
        raise _Absent(last) if _ABSENT.search(last) else OSError(last)
    return done.stdout


def _docker(*arguments: str) -> bytes:
    return _run("docker", *arguments)


def parse(value: str) -> list[str]:
    """Return the registries of a setting: host[:port][/path], with commas between.

    Raises:
        SettingInvalid: there is none, or one is not of this form.
    """
    found = [name.strip().rstrip("/") for name in value.split(",") if name.strip()]
    wrong = [name for name in found if not _NAME.fullmatch(name)]
    if wrong or not found:
        raise SettingInvalid(
            f"REGISTRY={','.join(wrong)!r}",
            "host/path of a registry, several with commas between",
            "such as REGISTRY=registry.example.org/team; sign in with `docker login`",
        )
    return list(dict.fromkeys(found))


class Registry:
    """A registry that this host may push to; `pause` are the seconds before the second try."""

    def __init__(self, name: str, pause: float, level: int) -> None:
        self.name, self.pause, self.level = name, pause, level
        # The same rule as the engine's: no TLS is asked for on this host itself.
        self._plain = bool(_LOOPBACK.match(f"{name}/"))

    def reference(self, tag: str) -> str:
        """Return the reference of a local image, `<repository>:<tag>`, in this registry."""
        return f"{self.name}/{tag.rpartition('/')[2]}"

    def pinned(self, tag: str, digest: str) -> str:
        """Return the reference of what has this digest, whatever happens to its tags."""
        return f"{self.reference(tag).rpartition(':')[0]}@{digest}"

    def look(self, tag: str) -> Remote | None:
        """Return what the registry has under a tag, or None.

        Raises:
            PushFailed: it does not answer, or not us.
        """
        inspect = ["buildx", "imagetools", "inspect", self.reference(tag)]
        what = f"looking for {self.reference(tag)}"
        try:
            manifest = self._try(what, _docker, *inspect, "--raw")
            image = json.loads(self._try(what, _docker, *inspect, "--format", "{{json .Image}}"))
        except _Absent:
            return None
        layers = json.loads(manifest).get("layers", [])
        config = image.get("config", {})
        kinds = {layer["mediaType"].rpartition("+")[2].rpartition(".")[2] for layer in layers}
        return Remote(
            digest=f"sha256:{hashlib.sha256(manifest).hexdigest()}",
            content=content(image.get("rootfs", {}).get("diff_ids", []), config),
            version=config.get("Labels", {}).get("org.opencontainers.image.version", ""),
            size=sum(layer["size"] for layer in layers),
            compression=", ".join(sorted(kinds)),
        )

    def push(self, local: Local) -> Remote:
        """Push an image under its own tag, and return what the registry then has.

        Raises:
            PushFailed: it was not taken in three tries, or what is there now is something else.
        """
        what = f"pushing {self.reference(local.name)}"
        if shutil.which("skopeo"):
            # Debian's skopeo speaks an older language than the engine, so the two share a file.
            with tempfile.TemporaryDirectory(prefix="glm4-publish-") as folder:
                archive = Path(folder) / "image.tar"
                self._try(what, _docker, "image", "save", f"--output={archive}", local.name)
                self._try(what, self._zstd, archive, local)
        else:
            self._try(what, self._gzip, local)
        return self._expect(local.name, lambda there: there.content == local.content)

    def _gzip(self, local: Local) -> None:
        target = self.reference(local.name)
        _docker("tag", local.name, target)
        try:
            _docker("push", "--quiet", target)
        finally:
            _docker("image", "rm", "--no-prune", target)

    def _zstd(self, archive: Path, local: Local) -> None:
        # Of what others made, a policy might ask for signatures.
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--format=oci"]
        command += ["--dest-compress-format=zstd", f"--dest-compress-level={self.level}"]
        # Compressed first and asked for second, so that a layer which is there is not sent.
        command += ["--dest-precompute-digests"]
        command += ["--dest-tls-verify=false"] if self._plain else []
        _run(*command, f"docker-archive:{archive}", f"docker://{self.reference(local.name)}")

    def move(self, tag: str, source: str, digest: str) -> None:
        """Let a moving tag of the repository name a digest that is there under the tag `source`.

        Raises:
            PushFailed: it does not afterwards.
        """
        create = ["buildx", "imagetools", "create", "--prefer-index=false"]
        create += [f"--tag={self.reference(tag)}", self.pinned(source, digest)]
        self._try(f"moving {self.reference(tag)}", _docker, *create)
        self._expect(tag, lambda there: there.digest == digest)

    def _expect(self, tag: str, holds: Callable[[Remote], bool]) -> Remote:
        there = self.look(tag)
        if there and holds(there):
            return there
        raise PushFailed(
            f"{self.reference(tag)} is {there.digest if there else 'not there'} after its push",
            "what was pushed",
            "see who else pushes to this registry, then run the same command again",
        )

    def _try(self, what: str, call: Callable, *arguments: object) -> Any:
        """Call up to three times, with growing pauses.

        Raises:
            PushFailed: the third try has failed too.
        """
        for number in range(1, _TRIES + 1):
            try:
                return call(*arguments)
            except (OSError, subprocess.TimeoutExpired) as error:
                wait = self.pause * 4 ** (number - 1)
                if number == _TRIES:
                    raise PushFailed(
                        f"{what}: {error}",
                        f"a registry {self.name} that answers and lets us in",
                        "`docker login` if it asks who you are, then run the same command again:"
                        " it goes on with what is missing",
                    ) from error
                print(f"publish: {what}: {error}; again in {wait:.0f} s", flush=True)
                time.sleep(wait)
        return None
