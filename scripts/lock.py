"""Compile the hashed lock files from their direct requirements, with uv."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from scripts import errors, index

ROOT = Path(__file__).resolve().parent.parent
# Debian 12 has glibc 2.36; every lock is for the image's own Python.
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]
_HOST = [
    ("pyproject.toml", "scripts/host.lock", []),
    ("pyproject.toml", "tests/dev.lock", ["--extra", "dev"]),
]
TARGETS = {"host": _HOST}


def _jobs(name: str) -> list[tuple[str, str, list[str]]]:
    """Return (source, lock, extra arguments) for a value of CUDA=.

    Raises:
        SettingInvalid: there is no such lock.
    """
    if name in TARGETS:
        return TARGETS[name]
    for stem in (name, f"cu{name}"):
        if (ROOT / "images" / f"{stem}.in").exists():
            omit = ROOT / "images" / f"{stem}.omit"
            extra = ["--excludes", f"images/{omit.name}"] if omit.exists() else []
            return [(f"images/{stem}.in", f"images/{stem}.lock", extra)]
    known = sorted(path.stem for path in (ROOT / "images").glob("*.in"))
    raise errors.SettingInvalid(
        f"CUDA={name!r}", ", ".join([*known, *TARGETS]), "choose one of these"
    )


def main(argv: list[str] | None = None) -> int:
    """Write the locks; existing pins stay unless --upgrade is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a variant, download, uv, or host")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    options = parser.parse_args(argv)

    sources = index.environment()
    arguments = [*PLATFORM, "--only-binary", ":all:", "--generate-hashes"]
    arguments += ["--custom-compile-command", f"make lock CUDA={options.name}"]
    if "WHEELS" in sources:
        arguments += ["--find-links", sources["WHEELS"]]
    if "PIP_INDEX_URL" in sources:
        arguments += ["--default-index", sources["PIP_INDEX_URL"]]
    if options.upgrade:
        arguments += ["--upgrade"]
    environment = {**os.environ, "UV_NO_CONFIG": "1"}
    if "CA_BUNDLE" in sources:
        environment["SSL_CERT_FILE"] = sources["CA_BUNDLE"]
    uv = Path(sys.executable).with_name("uv")
    for source, lock, extra in _jobs(options.name):
        command = [uv, "pip", "compile", "--quiet", *arguments, *extra, "-o", lock, source]
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=600)
        if done.returncode != 0:
            raise errors.BuildFailed(
                f"{source} could not be resolved",
                "an index that has every requirement",
                "read uv's error above; set PIP_INDEX_URL or WHEELS if an index is out of reach",
            )
        print(f"lock: wrote {lock}")
    return 0


if __name__ == "__main__":
    errors.run(main)
