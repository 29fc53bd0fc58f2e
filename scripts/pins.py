"""What a lock file pins, where each wheel comes from, and whether that place answers.

Standard library only: it runs where nothing is installed yet but uv.
"""

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scripts import errors

# Places that a mirror may stand in for, by the setting that names the mirror.
MIRRORED = {
    "PYTORCH_INDEX_URL": "https://download.pytorch.org/whl",
    "GITHUB_URL": "https://github.com",
}
_PROBE_SECONDS = 15


@dataclass(frozen=True)
class Pin:
    """One entry of a lock: its text, name, version, and its wheel's URL or an empty string."""

    text: str
    name: str
    version: str
    url: str

    @property
    def local(self) -> str:
        """The local part of the version, such as cpu in 2.13.0+cpu: the PyTorch index alone has it.

        Empty for a wheel with a URL, which needs no index.
        """
        return "" if self.url else self.version.partition("+")[2]

    def wheel(self, folders: Iterable[Path]) -> Path | None:
        """Return this very wheel in one of the folders."""
        stem = f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-".lower()
        wanted = wheel_name(self.url) if self.url else ""
        for folder in folders:
            for path in sorted(folder.glob("*.whl")):
                name = unquote(path.name)
                if name == wanted or (not wanted and name.lower().startswith(stem)):
                    return path
        return None


def wheel_name(url: str) -> str:
    """Return the file name of a wheel's URL, unquoted."""
    return unquote(Path(urlsplit(url).path).name)


def read(lock: str) -> list[Pin]:
    """Return the pins of a lock's text, in its order."""
    found = []
    for entry in re.split(r"\n(?=[A-Za-z0-9])", lock):
        match = re.match(r"([\w.-]+)(?:==([^\s;]+)| @ (\S+))", entry)
        if match:
            version = match[2] or wheel_name(match[3]).split("-")[1]
            found.append(Pin(entry, match[1], version, match[3] or ""))
    return found


def mirrored(url: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a URL with its place exchanged for the mirror that the environment names."""
    for setting, place in MIRRORED.items():
        mirror = environ.get(setting)
        if mirror and url.startswith(place + "/"):
            return mirror.rstrip("/") + url.removeprefix(place)
    return url


def suffix_index(suffix: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the index of wheels with a local version: the PyTorch index has one for each."""
    return mirrored(f"{MIRRORED['PYTORCH_INDEX_URL']}/{suffix}", environ)


def _ordinary_index(environ: Mapping[str, str]) -> str:
    if environ.get("PIP_INDEX_URL"):
        return environ["PIP_INDEX_URL"]
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return ""  # Then uv says it, after its retries.
    return PyPI.simple_url


def require_reach(
    pins: Iterable[Pin],
    folders: Iterable[Path],
    environ: Mapping[str, str] = os.environ,
    seconds: float = _PROBE_SECONDS,
) -> None:
    """Ask every place from which a wheel must come, once, before anything large is fetched.

    Raises:
        BuildFailed: one does not answer; names it and the ways out.
    """
    folders = list(folders)
    missing = [pin for pin in pins if not pin.wheel(folders)]
    # Scarce places first: what all users reach says little about these.
    for pin in missing:
        if pin.url:
            setting = next((s for s, place in MIRRORED.items() if pin.url.startswith(place)), "")
            _probe(
                mirrored(pin.url, environ), f"the wheel of {pin.name}", setting, environ, seconds
            )
    for suffix in sorted({pin.local for pin in missing if pin.local}):
        where = suffix_index(suffix, environ)
        _probe(where, f"the index of +{suffix} wheels", "PYTORCH_INDEX_URL", environ, seconds)
    index = _ordinary_index(environ)
    if index and any(not pin.url and not pin.local for pin in missing):
        _probe(index, "the Python index", "PIP_INDEX_URL", environ, seconds)


def _probe(url: str, what: str, setting: str, environ: Mapping[str, str], seconds: float) -> None:
    certificates = environ.get("PIP_CERT") or environ.get("CA_BUNDLE")
    context = ssl.create_default_context(
        cafile=certificates if certificates and Path(certificates).stat().st_size else None
    )
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds, context=context).close()
        return
    except urllib.error.HTTPError as error:
        # An index may refuse HEAD or its bare root; a wheel must be there.
        if not url.endswith(".whl") or error.code < 400:
            return
        reason = f"answers with {error.code}"
    except OSError as error:
        reason = f"does not answer ({getattr(error, 'reason', error)})"
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    mirror = f"set {setting} to a mirror that this machine reaches, or " if setting else ""
    raise errors.BuildFailed(
        f"{what} cannot be fetched: {shown} {reason}",
        "that host, a mirror of it, or the wheels themselves",
        f"{mirror}put the wheels into docker/wheels/ (or a folder that WHEELS names)",
    )
