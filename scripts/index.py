"""Where this host's Python packages come from, as its pip is configured."""

import os
import subprocess
import sys
from pathlib import Path


def _configured(option: str) -> str:
    name = "PIP_" + option.upper().replace("-", "_")
    if os.environ.get(name):
        return os.environ[name]
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{option}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """Return PIP_INDEX_URL, CA_BUNDLE and WHEELS for a build, where this host sets them.

    A user who set a mirror, a private authority or a folder of wheels for pip needs no second
    setting for our builds.
    """
    found = {
        "PIP_INDEX_URL": _configured("index-url"),
        "CA_BUNDLE": os.environ.get("CA_BUNDLE") or _configured("cert"),
        "WHEELS": os.environ.get("WHEELS") or _first_folder(_configured("find-links")),
    }
    return {name: value for name, value in found.items() if value}


def _first_folder(links: str) -> str:
    return next((link for link in links.split() if Path(link).is_dir()), "")
