"""Write all that a host without any network needs into one folder, with an installer."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from scripts import errors, plan, snapshot, sums, variants, version
from scripts.compose import ComposeRuntime
from scripts.plan import ROOT, Plan
from scripts.progress import Progress
from scripts.snapshot import Snapshot

_INSTALLER = ROOT / "bundle"
# What the model needs to be served; where it came from and who may come in is each host's own.
_SETTINGS = (
    *("MODEL", "MODEL_ID", "MODEL_REVISION", "SERVED_MODEL_NAME", "MAX_MODEL_LEN", "DTYPE"),
    *("GPU_MEMORY_UTILIZATION", "TENSOR_PARALLEL_SIZE", "QUANTIZATION", "CHAT_TEMPLATE"),
    *("TRUST_REMOTE_CODE", "VLLM_ARGS"),
)
# Packed images have about half of their size.
_PACKED = 0.6
# Of the other images: what serve's lacks. Its Python environment is serve's own.
_ONE_ENVIRONMENT = PurePosixPath("opt")
_BLOCK = 1 << 20


class _Pump:
    """Copies a stream in blocks and counts what has passed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, source: IO[bytes], target: IO[bytes], *more) -> None:
        while block := source.read(_BLOCK):
            target.write(block)
            for watcher in more:
                watcher(block)
            self.count += len(block)


@contextlib.contextmanager
def _output_of(*command: str) -> Iterator[IO[bytes]]:
    """Give what a command prints.

    Raises:
        BuildFailed: it ends with an error.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        _expect(process.wait(), command)


@contextlib.contextmanager
def _packed(path: Path, level: int) -> Iterator[IO[bytes]]:
    """Give a stream whose content is compressed into a file, which is there whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    command = ("zstd", "--quiet", "--force", "-T0", f"-{level}", "-o", str(draft))
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield process.stdin
            process.stdin.close()
        except BaseException:
            process.kill()
            raise
        _expect(process.wait(), command)
    draft.replace(path)


def _expect(code: int, command: tuple[str, ...]) -> None:
    if code:
        words = " ".join(command[:3])
        raise errors.BuildFailed(f"`{words} …` ended with code {code}", "code 0", "see above")


class Bundle:
    """One folder in the making, and what goes into it."""

    def __init__(self, runtime: ComposeRuntime, where: Path, level: int) -> None:
        self._runtime, self._where, self._level = runtime, where, level
        self._progress = Progress("bundle", "lines")
        self._sums: dict[str, str] = {}
        services = runtime.docker.compose.config().services
        names = ("serve", "gateway", "download")
        found = {name: runtime.docker.image.inspect(services[name].image) for name in names}
        self.images = {services[name].image: found[name].id for name in names}
        self.size = sum(image.size for image in found.values())

    def _model_output(self, program: str, *arguments: str):
        """Give what a program of the download image prints about the models volume."""
        run = ("run", "--rm", "--no-deps", "--no-TTY", "--entrypoint", program, "download")
        return _output_of(*self._runtime.docker.client_config.docker_compose_cmd, *run, *arguments)

    def marker(self, model_id: str) -> tuple[Snapshot, dict]:
        """Return the snapshot on the volume, and its marker as it is."""
        path = snapshot.folder(Path("/models"), model_id) / snapshot.MARKER
        with self._model_output("cat", str(path)) as stream:
            told = json.loads(stream.read())
        return Snapshot.parse(told), told

    def add_images(self) -> None:
        """Write the images as `docker load` takes them."""
        pump = _Pump()
        with (
            self._progress.follow("images", self.size, lambda: pump.count),
            _packed(self._where / "images.tar.zst", self._level) as target,
            _output_of("docker", "image", "save", *self.images) as source,
        ):
            pump(source, target)

    def add_root(self) -> None:
        """Write one root file system, serve's with what it lacks of the other images."""
        seen: set[str] = set()
        pump = _Pump()
        with (
            self._progress.follow("programs", self.size, lambda: pump.count),
            _packed(self._where / "root.tar.zst", self._level) as target,
            tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for number, name in enumerate(self.images):
                with (
                    _exported(name) as source,
                    tarfile.open(fileobj=source, mode="r|") as image,
                ):
                    for member in image:
                        path = PurePosixPath(member.name)
                        foreign = number and _ONE_ENVIRONMENT in (path, *path.parents)
                        if member.name in seen or foreign or member.ischr() or member.isblk():
                            continue
                        seen.add(member.name)
                        archive.addfile(
                            member, image.extractfile(member) if member.isreg() else None
                        )
                        pump.count += member.size

    def add_model(self, told: Snapshot, marker: dict) -> None:
        """Copy the snapshot from the volume, each file hashed on its way.

        Raises:
            SnapshotMissing: a file is not what the manifest says.
        """
        folder = self._where / "model"
        folder.mkdir()
        expected = {file.path: file for file in told.files}
        pump = _Pump()
        origin = snapshot.folder(Path("/models"), told.model_id)
        with (
            self._progress.follow("model", told.size, lambda: pump.count),
            self._model_output(
                "tar", "--create", "--dereference", f"--directory={origin}", *expected
            ) as source,
            tarfile.open(fileobj=source, mode="r|") as archive,
        ):
            for member in archive:
                file, path = expected.pop(member.name), folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with path.open("wb") as target:
                    pump(archive.extractfile(member), target, digest.update)
                if (path.stat().st_size, digest.hexdigest()) != (file.size, file.sha256):
                    raise errors.SnapshotMissing(
                        f"{file.path} on the volume is not what its manifest says",
                        "a verified snapshot",
                        "make download VERIFY=full, then run the same command again",
                    )
                # Or each file would be hashed once more before it is copied.
                when = marker["written"][file.path]
                os.utime(path, ns=(when, when))
                self._sums[f"model/{file.path}"] = file.sha256
        if expected:
            raise errors.SnapshotMissing(
                f"{', '.join(expected)} cannot be read from the volume", "them", "make download"
            )
        text = json.dumps(marker, indent=1)
        (folder / snapshot.MARKER).write_text(text, encoding="utf-8")

    def add_text(self, name: str, text: str) -> None:
        """Write a small file."""
        (self._where / name).write_text(text, encoding="utf-8")

    def seal(self) -> None:
        """Write the sum of every file; those of the model were taken while it was copied."""
        for path in sorted(self._where.rglob("*")):
            name = path.relative_to(self._where).as_posix()
            if path.is_dir():
                path.chmod(0o755)
            elif name not in self._sums:
                self._sums[name] = sums.of_file(path)
        self.add_text(sums.NAME, sums.text(self._sums) + sums.END)
        # The containers' user must be able to read the model.
        for path in self._where.rglob("*"):
            if path.is_file():
                path.chmod(0o755 if path.suffix == ".sh" else 0o644)


@contextlib.contextmanager
def _exported(image: str) -> Iterator[IO[bytes]]:
    """Give the root file system of an image as a tar."""
    create = ["docker", "create", "--runtime=runc", "--network=none", image]
    done = subprocess.run(create, capture_output=True, text=True, timeout=120)
    _expect(done.returncode, tuple(create))
    name = done.stdout.strip()
    try:
        with _output_of("docker", "export", name) as source:
            yield source
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, timeout=120)


def settings(chosen: Plan, runtime: str) -> str:
    """Return the .env of the bundle."""
    environ = chosen.environ
    given = {name: environ[name] for name in _SETTINGS if environ.get(name)}
    if "MODEL" not in given:
        given["MODEL_ID"] = chosen.settings.model_id
        given["MODEL_REVISION"] = chosen.settings.model_revision
    own = {"VARIANT": chosen.variant.name}
    if runtime == "docker":
        own |= {"VERSION": environ["VERSION"], "IMAGE": environ.get("IMAGE") or "glm4-stack"}
        own |= {} if chosen.variant.cuda else {"CONTAINER_RUNTIME": "runc"}
        own |= {"MODEL_FOLDER": "./model"}
    own |= {"MODEL_SOURCES": "folder", **given}
    lines = ["# Made by `make bundle`; every other setting: .env.example."]
    return "\n".join([*lines, *(f"{name}={value}" for name, value in own.items())]) + "\n"


def make(chosen: Plan, runtime: str, level: int) -> Path:
    """Build, download, and write the folder; it has its name only when it is complete.

    Raises:
        HostUnfit: zstd is not installed.
        DiskFull: there is no room for it.
    """
    if not shutil.which("zstd"):
        raise errors.HostUnfit("zstd is not installed", "it, to pack", "apt-get install zstd")
    engine = ComposeRuntime(chosen)
    engine.check_tools()
    engine.check_room()
    engine.build()
    engine.download()

    ending = "-host" if runtime == "host" else ""
    name = f"glm4-stack-{chosen.environ['VERSION']}-{chosen.variant.name}{ending}"
    where, draft = ROOT / "dist" / name, ROOT / "dist" / f"{name}.part"
    bundle = Bundle(engine, draft, level)
    told, marker = bundle.marker(chosen.settings.model_id)
    room = (bundle.size * _PACKED + told.size) / 1e9
    plan.check_room(where.parent, room, f"dist/{name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        bundle.add_model(told, marker)
        if runtime == "host":
            bundle.add_root()
            shutil.copy(_INSTALLER / "run.sh", draft)
        else:
            bundle.add_images()
            shutil.copy(ROOT / "compose.yaml", draft)
            lines = (f"{name} {digest}\n" for name, digest in bundle.images.items())
            bundle.add_text("IMAGES", "".join(lines))
        shutil.copy(_INSTALLER / "install.sh", draft)
        shutil.copy(ROOT / ".env.example", draft)
        bundle.add_text("bundle.env", settings(chosen, runtime))
        # Unpacked: the images, what they are unpacked from on the way, and the model's copy.
        bundle.add_text("NEEDS_MB", f"{(bundle.size * 1.5 + told.size) / 1e6:.0f}\n")
        bundle.seal()
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(where, ignore_errors=True)
    draft.rename(where)
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / 1e9
    print(f"bundle: dist/{name}, {size:.2f} GB; copy it to the host, and run ./install.sh there")
    return where


def main(argv: list[str] | None = None) -> int:
    """Bundle one variant and one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", default="", help="118, 121, 130 or cpu")
    parser.add_argument("--runtime", default="docker", choices=("docker", "host"))
    parser.add_argument("--level", type=int, default=9, help="of zstd")
    options = parser.parse_args(argv)
    # The images of this commit, by its version, and not those that .env may name by digest.
    os.environ["VERSION"] = os.environ.get("VERSION") or version.of_commit(ROOT)
    for name in ("SERVE_IMAGE", "DOWNLOAD_IMAGE", "GATEWAY_IMAGE"):
        os.environ[name] = ""
    variant = variants.named(options.cuda).short if options.cuda else ""
    make(plan.make(variant, "docker"), options.runtime, options.level)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
