"""Compile the hashed lock files from their direct requirements, with uv."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts import errors, index, variants
from scripts.variants import IMAGES, Variant

ROOT = IMAGES.parent
# Debian 12 has glibc 2.36; every lock is for the image's own Python.
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]


@dataclass(frozen=True)
class Job:
    """One lock to write: paths relative to the repository, uv's further arguments, its variant."""

    source: str
    lock: str
    extra: tuple[str, ...] = ()
    variant: Variant | None = None


_HOST = [
    Job("pyproject.toml", "scripts/host.lock"),
    Job("pyproject.toml", "tests/dev.lock", ("--extra", "dev", "--extra", "bench")),
    # The versions of the one before: both are installed into the same environment.
    Job("pyproject.toml", "scripts/bench.lock", ("--extra", "bench", "-c", "tests/dev.lock")),
]


def _jobs(name: str) -> list[Job]:
    """Return the locks that a value of CUDA= names.

    Raises:
        SettingInvalid: there is no such lock.
    """
    if name == "host":
        return _HOST
    if name in ("download", "uv"):
        return [Job(f"images/{name}.in", f"images/{name}.lock")]
    try:
        variant = variants.named(name)
    except errors.SettingInvalid:
        known = [variant.short for variant in variants.load().values()]
        raise errors.SettingInvalid(
            f"CUDA={name!r}", ", ".join([*known, "download", "uv", "host"]), "choose one of these"
        ) from None
    return [Job(f"images/{variant.name}.in", f"images/{variant.name}.lock", variant=variant)]


def _check_version(variant: Variant, version: str) -> None:
    """Raise SettingInvalid when another vLLM is asked of a line whose wheels are named by hand."""
    if variant.metadata.exists() and version != variant.vllm:
        raise errors.SettingInvalid(
            f"VLLM_VERSION={version!r} for {variant.name}",
            f"{variant.vllm}, whose wheels images/{variant.name}.in names by URL and sha256",
            f"name those of the other release there, what they require in images/"
            f"{variant.metadata.name}, the version in images/variants.toml; then lock without"
            " VLLM_VERSION",
        )


def compile_with_uv(source: Path, lock: Path, *arguments: str) -> int:
    """Compile requirements into a hashed lock, from this host's index; return uv's code."""
    sources = index.environment()
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", *PLATFORM]
    command += ["--only-binary", ":all:", "--generate-hashes"]
    if "PIP_INDEX_URL" in sources:
        command += ["--default-index", sources["PIP_INDEX_URL"]]
    environment = dict(os.environ)
    if "--config-file" not in arguments:
        environment["UV_NO_CONFIG"] = "1"
    if "CA_BUNDLE" in sources:
        environment["SSL_CERT_FILE"] = sources["CA_BUNDLE"]
    command += [*arguments, "-o", str(lock), str(source)]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=600).returncode


def _arguments(variant: Variant, version: str, before: str) -> list[str]:
    """Return what uv must know of a variant beyond its requirements."""
    result = []
    for option, file in (("--excludes", variant.omit), ("--config-file", variant.metadata)):
        if file.exists():
            result += [option, str(file.relative_to(ROOT))]
    if before:
        result += ["--exclude-newer", before]
        for package in variant.fresh:
            result += ["--exclude-newer-package", f"{package}=false"]
    if version != variant.vllm:
        result += ["--upgrade-package", "vllm"]
    return result


def _check_line(variant: Variant, text: str, version: str) -> None:
    """Raise SettingInvalid when a lock's CUDA runtime is not of the variant's line."""
    if not variant.cuda:
        return
    found = re.search(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+\.\d+)", text, re.MULTILINE)
    line = found[1] if found else "none"
    if line != variant.cuda:
        raise errors.SettingInvalid(
            f"vLLM {version} brings CUDA {line}",
            f"CUDA {variant.cuda}, which {variant.name} stands for",
            "choose a release of this line (the table in README.md has the newest), or another"
            " CUDA=",
        )


def _compile(job: Job, name: str, options: argparse.Namespace) -> None:
    """Write one lock, whole or not at all."""
    variant = job.variant
    version = (options.vllm or variant.vllm) if variant else ""
    before = (options.before or variant.resolved_before) if variant else ""
    if variant:
        _check_version(variant, version)
    arguments = ["--custom-compile-command", f"make lock CUDA={name}", *job.extra]
    wheels = index.environment().get("WHEELS")
    if wheels and not (variant and variant.cuda):
        # Its torch+cpu would pass for the torch that a CUDA line wants.
        arguments += ["--find-links", wheels]
    if options.upgrade:
        arguments += ["--upgrade"]
    if variant:
        arguments += _arguments(variant, version, before)

    with tempfile.TemporaryDirectory() as folder:
        # uv knows variables in URLs only, so it reads a copy.
        source, lock = Path(folder, Path(job.source).name), Path(folder, "lock")
        text = (ROOT / job.source).read_text(encoding="utf-8")
        source.write_text(text.replace("${VLLM_VERSION}", version), encoding="utf-8")
        if (ROOT / job.lock).exists():
            # What uv finds there it keeps, unless it must change.
            lock.write_bytes((ROOT / job.lock).read_bytes())
        if compile_with_uv(source, lock, *arguments):
            raise errors.BuildFailed(
                f"{job.source} could not be resolved"
                + (f" with packages of before {before}" if before else ""),
                "an index that has every requirement",
                "read uv's error above; set PIP_INDEX_URL or WHEELS if an index is out of reach,"
                " RESOLVED_BEFORE if what is missing is newer",
            )
        text = lock.read_text(encoding="utf-8").replace(str(source), job.source)
    if variant:
        _check_line(variant, text, version)
    draft = ROOT / f"{job.lock}.draft"
    draft.write_text(text, encoding="utf-8")
    draft.replace(ROOT / job.lock)
    if variant:
        variants.record(variant.name, vllm=version, resolved_before=before)
    print(f"lock: wrote {job.lock}")


def main(argv: list[str] | None = None) -> int:
    """Write the locks; existing pins stay unless --upgrade is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a variant, download, uv, or host")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    parser.add_argument("--vllm", default="", help="another release of vLLM for a variant")
    parser.add_argument("--before", default="", help="consider only packages of before this day")
    options = parser.parse_args(argv)
    for job in _jobs(options.name):
        _compile(job, options.name, options)
    return 0


if __name__ == "__main__":
    errors.run(main)
