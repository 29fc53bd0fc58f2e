"""Write what the built images say they contain, their SBOMs and lists of licences, into dist/."""

import argparse
import subprocess
import sys

from scripts import errors, plan, variants
from scripts.compose import ComposeRuntime
from scripts.plan import ROOT

# As scripts/sbom.py has written them into the image.
_FOLDER = "/usr/share/glm4-stack"
_FILES = {"sbom.cdx.json": "cdx.json", "licences.txt": "licences.txt"}


def of_image(image: str, file: str) -> str:
    """Return one of the two files of an image.

    Raises:
        BuildFailed: there is no such image, or it is older than these files.
    """
    command = ["docker", "run", "--rm", "--pull=never", "--network=none", "--runtime=runc"]
    command += ["--entrypoint=cat", image, f"{_FOLDER}/{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise errors.BuildFailed(
            f"{image} cannot be read: {(done.stderr.strip().splitlines() or ['?'])[0]}",
            f"an image with {_FOLDER}/{file}",
            "make build, then run the same command again",
        )
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    """Write two files for each image of a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", default="", help="118, 121, 130 or cpu")
    options = parser.parse_args(argv)
    variant = variants.named(options.cuda).short if options.cuda else ""
    services = ComposeRuntime(plan.make(variant, "docker")).docker.compose.config().services
    folder = ROOT / "dist" / "sbom"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("serve", "download", "gateway"):
        image = services[name].image
        for file, ending in _FILES.items():
            path = folder / f"{image.rpartition('/')[2].replace(':', '-')}.{ending}"
            path.write_text(of_image(image, file), encoding="utf-8")
            print(f"sbom: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
