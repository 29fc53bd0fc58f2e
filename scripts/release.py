"""Write the one archive that a host needs which only pulls: compose.yaml, settings, checksums."""

import argparse
import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

from scripts import errors, sums, variants, version
from scripts.plan import ROOT
from scripts.variants import Variant

_FILES = ("compose.yaml", ".env.example", "rehearsal.env", "LICENSE")


def settings(named: str, variant: Variant, published: str) -> str:
    """Return a ready .env of a variant: by digest where it is published, by its tag otherwise."""
    runtime = "" if variant.cuda else "CONTAINER_RUNTIME=runc\n"
    own = published or f"VARIANT={variant.name}\nVERSION={named}\n" + _image()
    return f"{own}{runtime}# Every other setting: .env.example.\n"


def _image() -> str:
    image = os.environ.get("IMAGE")
    return (
        f"IMAGE={image}\n" if image else "# Where it is published:\n#IMAGE=<registry>/glm4-stack\n"
    )


def contents(root: Path, named: str) -> dict[str, bytes]:
    """Return every file of the archive by its path, the sums of all others last."""
    found = {name: (root / name).read_bytes() for name in _FILES}
    for variant in variants.load().values():
        path = root / "published" / f"{named}-{variant.name}.env"
        published = path.read_text(encoding="utf-8") if path.exists() else ""
        found[f"env/{variant.name}.env"] = settings(named, variant, published).encode()
    pairs = {name: sums.of_bytes(content) for name, content in found.items()}
    return {**found, sums.NAME: sums.text(pairs).encode()}


def write(path: Path, files: dict[str, bytes], seconds: int) -> None:
    """Write a tar.gz below a folder of the archive's own name; the same files, the same bytes."""
    folder = path.name.removesuffix(".tar.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    with (
        draft.open("wb") as stream,
        gzip.GzipFile(fileobj=stream, filename="", mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime, member.mode = len(content), seconds, 0o644
            archive.addfile(member, io.BytesIO(content))
    draft.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Write dist/glm4-stack-<version>.tar.gz, and its sum beside it."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    named = version.of_commit(ROOT)
    path = ROOT / "dist" / f"glm4-stack-{named}.tar.gz"
    files = contents(ROOT, named)
    write(path, files, version.seconds(ROOT))
    digest = sums.of_file(path)
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    print(f"release: {path.relative_to(ROOT)}, {path.stat().st_size / 1e3:.0f} kB, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
