"""Take an image to a GPU machine that has no Docker engine: pack its root into parts, unpack them.

    python -m tests.gpu.root pack glm4-stack:dev-cu121 .parts     (here: needs docker and zstd)
    python -m tests.gpu.root unpack .parts /tmp/root              (there: needs root, tar and zstd)

The parts are small enough for a courier that takes 64 MB at a time.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

PART = "60m"
CONFIG = "image-config.json"
# The driver's libraries, which a container runtime would bring in.
DRIVER = ("libcuda.so*", "libnvidia-ml.so*", "libnvidia-ptxjitcompiler.so*", "libnvidia-nvvm*.so*")


def pack(image: str, folder: Path) -> None:
    """Write the image's root file system as zstd parts, and its configuration beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    inspect = ["docker", "image", "inspect", "--format", "{{json .Config}}", image]
    config = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout
    (folder / CONFIG).write_text(config, encoding="utf-8")
    create = ["docker", "create", "--runtime", "runc", image]
    name = subprocess.run(create, check=True, capture_output=True, text=True).stdout.strip()
    try:
        script = 'docker export "$0" | zstd -q -T0 -6 | split -b "$1" -d -a 3 - "$2/part-"'
        command = ["bash", "-o", "pipefail", "-c", script, name, PART, str(folder)]
        subprocess.run(command, check=True)
    finally:
        subprocess.run(["docker", "rm", "-f", name], check=True, capture_output=True)
    parts = list(folder.glob("part-*"))
    print(f"{len(parts)} parts, {sum(part.stat().st_size for part in parts) / 1e9:.2f} GB")


def unpack(folder: Path, root: Path) -> None:
    """Make the root file system again, with the driver's libraries of this machine in it."""
    root.mkdir(parents=True)
    parts = sorted(str(part) for part in folder.glob("part-*"))
    script = 'root=$0; cat "$@" | zstd -q -d | tar -x --numeric-owner -C "$root"'
    subprocess.run(["bash", "-o", "pipefail", "-c", script, str(root), *parts], check=True)
    shutil.copy(folder / CONFIG, root / CONFIG)
    listed = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    [cuda, *_] = [line.split()[-1] for line in listed.splitlines() if "libcuda.so.1 " in line]
    into = root / "usr/lib/x86_64-linux-gnu"
    for pattern in DRIVER:
        for library in Path(cuda).parent.glob(pattern):
            if not (into / library.name).exists():
                shutil.copy(library, into / library.name)
    subprocess.run(["chroot", str(root), "/sbin/ldconfig"], check=True)


def environment(root: Path) -> dict[str, str]:
    """Return the variables that the image sets."""
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    return dict(variable.split("=", 1) for variable in config["Env"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("source", help="the image, or the folder of its parts")
    parser.add_argument("target", type=Path, help="the folder of parts, or the new root")
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.source, options.target)
    else:
        unpack(Path(options.source), options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
