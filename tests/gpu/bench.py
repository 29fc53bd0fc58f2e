"""Run a measurement of an unpacked image root on this GPU, with GLM-4-9B's shape, as root.

python -m tests.gpu.bench /tmp/root bench.json scripts.bench --rounds 3 --fp8 --hf-compile
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.servers import in_root, inside, settings, write_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", action="append", default=[], help="a setting, NAME=value")
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path, help="the document that it prints")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the module and its arguments")
    options = parser.parse_args()
    root = options.root
    if not (root / "models" / "ZhipuAI").exists():
        write_model(root / "models")
    for folder in ("caches", "run/stack", "models"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        os.chown(root / folder, 10001, 10001)
    values = settings(8000, dict(pair.split("=", 1) for pair in options.env))
    with in_root(root), options.output.open("w") as stream:
        command = inside(root, values, "python", "-m", *options.words)
        return subprocess.run(command, stdout=stream, timeout=3600).returncode


if __name__ == "__main__":
    sys.exit(main())
