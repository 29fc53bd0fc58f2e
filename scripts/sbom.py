"""Write what an image contains, as a CycloneDX document and as a list of licences.

Standard library only: it runs in the image's own system while that is built. The same content gives
the same bytes.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import quote

FOLDER = Path("usr/share/glm4-stack")
DOCUMENT, LICENCES = "sbom.cdx.json", "licences.txt"
# As scripts/install.py does it, for the same reason.
_EPOCH = 1700000000
# A licence's name; what is longer is its text.
_LONGEST_NAME = 100
_OSI = "License :: OSI Approved :: "


@dataclass(frozen=True, order=True)
class Part:
    """One thing that is inside: its kind of package, name, version, URL and licence."""

    kind: str
    name: str
    version: str
    purl: str
    licence: str = ""
    expression: bool = False

    def component(self) -> dict:
        """Return it as CycloneDX has it."""
        found: dict = {
            "type": "application" if self.kind == "generic" else "library",
            "bom-ref": self.purl,
            "name": self.name,
            "version": self.version,
            "purl": self.purl,
        }
        if self.expression:
            found["licenses"] = [{"expression": self.licence}]
        elif self.licence:
            found["licenses"] = [{"license": {"name": self.licence}}]
        return found


def _licence(distribution: Distribution) -> tuple[str, bool]:
    """Return the licence that the metadata names, and whether it is an SPDX expression."""
    metadata = distribution.metadata
    expression = metadata["License-Expression"]
    if expression:
        return expression, True
    text = (metadata["License"] or "").strip()
    # Some have the whole text there, which begins with its name.
    named = text.partition("\n")[0].strip()
    short = named == text or "licen" in named.lower()
    if named and named.upper() != "UNKNOWN" and len(named) <= _LONGEST_NAME and short:
        return named, False
    kinds = [kind for kind in metadata.get_all("Classifier") or () if kind.startswith("License ::")]
    return ", ".join(kind.removeprefix(_OSI).removeprefix("License :: ") for kind in kinds), False


def of_python(folders: Iterable[Path]) -> set[Part]:
    """Return the distributions that are installed in these folders."""
    found = set()
    for distribution in distributions(path=[str(folder) for folder in folders]):
        name, version = distribution.metadata["Name"], distribution.version
        plain = re.sub(r"[-_.]+", "-", name).lower()
        purl = f"pkg:pypi/{plain}@{quote(version, safe='')}"
        found.add(Part("pypi", name, version, purl, *_licence(distribution)))
    return found


def of_debian(text: str, release: str, docs: Path) -> set[Part]:
    """Return the packages of dpkg's list, a line each of name, version and architecture."""
    found = set()
    for line in text.splitlines():
        name, version, architecture = line.split("\t")
        where = f"arch={architecture}&distro=debian-{release}"
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?{where}"
        found.add(Part("deb", name, version, purl, _copyright(docs / name / "copyright")))
    return found


def _copyright(file: Path) -> str:
    """Return the licences that a machine-readable copyright file of Debian names."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    return ", ".join(sorted({name.strip() for name in names}))


def document(name: str, parts: Iterable[Part]) -> dict:
    """Return the CycloneDX document; its serial number follows from its content."""
    components = [part.component() for part in sorted(parts)]
    content = json.dumps([name, components], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": name, "name": name}},
        "components": components,
    }


def licences(parts: Iterable[Part]) -> str:
    """Return a line for each part: kind, name, version and licence, with tabs between."""
    rows = [(part.kind, part.name, part.version, part.licence or "-") for part in sorted(parts)]
    return "".join("\t".join(row) + "\n" for row in rows)


def _places(venv: Path) -> list[Path]:
    """Return where distributions lie: in the environment, and in the system's own Python."""
    system = sysconfig.get_path("purelib", "posix_prefix", {"base": sys.base_prefix})
    found = [*venv.glob("lib/python3*/site-packages"), Path(system)]
    return [path for path in (*found, Path("/usr/lib/python3/dist-packages")) if path.is_dir()]


def _write(root: Path, files: dict[str, str]) -> None:
    folder = root / FOLDER
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in [*root.rglob("*"), root]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (_EPOCH, _EPOCH))


def main(argv: list[str] | None = None) -> int:
    """Look at the system that this runs in, and write both files below a new root."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the image's")
    parser.add_argument("root", type=Path, help="where to write; the image's root")
    parser.add_argument("--venv", type=Path, default=Path("/opt/venv"))
    options = parser.parse_args(argv)
    query = ["dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n"]
    packages = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    release = platform.freedesktop_os_release().get("VERSION_ID", "")
    version = platform.python_version()
    parts = {Part("generic", "python", version, f"pkg:generic/python@{version}", "PSF-2.0", True)}
    parts |= of_python(_places(options.venv))
    parts |= of_debian(packages, release, Path("/usr/share/doc"))
    text = json.dumps(document(options.name, parts), indent=1, ensure_ascii=False) + "\n"
    _write(options.root, {DOCUMENT: text, LICENCES: licences(parts)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
