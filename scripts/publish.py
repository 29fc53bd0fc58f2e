"""Build, test and push the images of the commit that is checked out, and record their digests."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts import errors, registry, variants, version
from scripts.plan import ROOT
from scripts.registry import Local, Registry, Remote
from scripts.variants import Variant

# The services of compose.yaml whose images are published, and what names each whole there.
SETTINGS = {"serve": "SERVE_IMAGE", "download": "DOWNLOAD_IMAGE", "gateway": "GATEWAY_IMAGE"}
_SHARED = ("download", "gateway")


def _say(text: str) -> None:
    print(f"publish: {text}", flush=True)


@dataclass
class Record:
    """What is known of one version, kept in published/<version>.json from push to push.

    `tested` are ids of images that have passed; `registries` has, by registry and tag, the digest.
    """

    path: Path
    version: str
    revision: str
    tested: list[str] = field(default_factory=list)
    registries: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, named: str, revision: str) -> "Record":
        """Return what was kept, or an empty one; another commit's does not count."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path, named, revision)
        if kept["revision"] != revision:
            return cls(path, named, revision)
        return cls(path, **kept)

    def keep(self) -> None:
        """Write it; a run that is broken off leaves the old one or the new one."""
        kept = asdict(self)
        del kept["path"]
        self.path.parent.mkdir(exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        new.replace(self.path)


def _environ(named: str, variant: Variant) -> dict[str, str]:
    """Return the environment in which this variant is built, tested and named."""
    own = dict.fromkeys(SETTINGS.values(), "")
    # An image and nothing beside it, with the same digest each time it is pushed.
    own |= {"VERSION": named, "VARIANT": variant.name, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    return {**os.environ, **own}


def _build(named: str, variant: Variant) -> dict[str, Local]:
    """Build a variant in a process of its own, and return its images by service."""
    environ = _environ(named, variant)
    command = [sys.executable, "-m", "scripts.stack", "build", "--runtime=docker"]
    code = subprocess.run([*command, f"--cuda={variant.short}"], cwd=ROOT, env=environ).returncode
    if code:
        raise errors.BuildFailed(
            f"{variant.name} could not be built (code {code})",
            "every image before the first is pushed",
            "read its own error above, or leave it out with CUDA=",
        )
    config = ["docker", "compose", "--profile=*", "config", "--format=json"]
    done = subprocess.run(config, cwd=ROOT, env=environ, capture_output=True, check=True)
    services = json.loads(done.stdout)["services"]
    return {name: Local.read(services[name]["image"]) for name in SETTINGS}


def _test(named: str, chosen: list[Variant], images: dict[str, Local], record: Record) -> None:
    """Run tests/image against the images, unless they have passed already.

    Raises:
        PublishRefused: a test fails, none runs, or an image is another one afterwards.
    """
    ids = sorted(image.id for image in images.values())
    if set(ids) <= set(record.tested):
        _say("these images have passed their tests already")
        return
    names = ",".join(variant.name for variant in chosen)
    _say(f"testing {names}")
    command = [sys.executable, "-m", "pytest", "-q", "tests/image", "--variants", names]
    environ = _environ(named, chosen[0])
    # Each test chooses its own; what this host's .env says must not decide.
    del environ["VARIANT"]
    code = subprocess.run(command, cwd=ROOT, env=environ).returncode
    if code:
        raise errors.PublishRefused(
            f"the tests of the images ended with code {code}",
            "every test passed",
            "read pytest's own words above",
        )
    if ids != sorted(Local.read(image.name).id for image in images.values()):
        raise errors.PublishRefused(
            "the images are not those that were there before their tests",
            "tested images",
            "run the same command again, with nothing else that builds this version",
        )
    record.tested = sorted({*record.tested, *ids})
    record.keep()


def _bring(target: Registry, image: Local, record: Record) -> Remote:
    """Make sure that a registry has an image under its tag, which never moves.

    Raises:
        PublishRefused: the tag names something else.
        PushFailed: the registry did not take it.
    """
    known = record.registries.setdefault(target.name, {})
    tag = image.name.rpartition(":")[2]
    there = target.look(image.name)
    if there and (there.content != image.content or known.get(tag, there.digest) != there.digest):
        raise errors.PublishRefused(
            f"{target.reference(image.name)} is there already, and is {there.digest}",
            f"{known.get(tag) or 'the image built here'}: a version's tag never moves",
            "give the commit a new version; or remove the tag there, if nobody uses it",
        )
    word = "there already" if there else "pushed"
    began = time.monotonic()
    there = there or target.push(image)
    known[tag] = there.digest
    record.keep()
    took = f" in {time.monotonic() - began:.0f} s" if word == "pushed" else ""
    size = f"{there.size / 1e6:.0f} MB of {image.size / 1e6:.0f} ({there.compression})"
    _say(f"{target.reference(image.name)}  {word}{took}  {size}  {there.digest}")
    return there


def _move(target: Registry, image: Local, part: str, digest: str, named: str) -> None:
    """Move the tags that follow a release; never back to an older one."""
    repository = image.name.rpartition(":")[0]
    for tag in version.moving(named, part):
        there = target.look(f"{repository}:{tag}")
        if there and there.digest == digest:
            continue
        if not version.moves(named, there.version if there else ""):
            _say(f"{target.reference(f'{repository}:{tag}')} stays at {there.version}")
            continue
        target.move(f"{repository}:{tag}", image.name, digest)
        _say(f"{target.reference(f'{repository}:{tag}')} now names {named}")


def _publish_to(target: Registry, images: dict[str, Local], named: str, record: Record) -> None:
    """Push every image, and then move the tags that follow."""
    digests = {part: _bring(target, image, record).digest for part, image in images.items()}
    for part, image in images.items():
        _move(target, image, part, digests[part], named)


def settings(
    targets: list[Registry], images: dict[str, Local], variant: str, record: Record
) -> str:
    """Return the settings with which compose runs a variant by digest, as an env file.

    `targets` have all of it. The first one's settings count; the others' are comments.
    """
    lines = [f"# {variant} of {record.version}, commit {record.revision}: `make publish` wrote it."]
    lines += [f"VARIANT={variant}", f"VERSION={record.version}"]
    parts = {"serve": variant, **{part: part for part in _SHARED}}
    for number, target in enumerate(targets):
        mark = "#" if number else ""
        lines += ["", f"# From {target.name}:"] if number else []
        # What is not named by digest: other variants, such as bench-serve's.
        repository = target.reference(images[variant].name).rpartition(":")[0]
        lines.append(f"{mark}IMAGE={repository}")
        for service, part in parts.items():
            name = images[part].name
            digest = record.registries[target.name][name.rpartition(":")[2]]
            lines.append(f"{mark}{SETTINGS[service]}={target.pinned(name, digest)}")
    return "\n".join(lines) + "\n"


def publish(targets: list[Registry], chosen: list[Variant]) -> int:
    """Build and test everything, then push it to one registry after the other.

    Raises:
        PublishRefused: the work tree, a test, or a tag that is there forbids it.
        BuildFailed: a variant could not be built.
        PushFailed: a registry did not take everything; the others were served all the same.
    """
    version.require_clean(ROOT)
    named = version.of_commit(ROOT)
    folder = ROOT / "published"
    record = Record.read(folder / f"{named}.json", named, version.revision(ROOT))
    kind = "a release" if version.is_release(named) else "no release: moves no tag"
    _say(f"{named} ({kind}) to {', '.join(target.name for target in targets)}")

    images: dict[str, Local] = {}
    for variant in chosen:
        built = _build(named, variant)
        images[variant.name] = built["serve"]
        images |= {part: built[part] for part in _SHARED}
    _test(named, chosen, images, record)

    failed: dict[str, errors.StackError] = {}
    for target in targets:
        try:
            _publish_to(target, images, named, record)
        except (errors.PushFailed, errors.PublishRefused) as error:
            failed[target.name] = error
            _say(f"{target.name} is left as it is: {error.found}")

    done = [target for target in targets if target.name not in failed]
    for variant in chosen if done else ():
        path = folder / f"{named}-{variant.name}.env"
        path.write_text(settings(done, images, variant.name, record), encoding="utf-8")
        _say(f"{path.relative_to(ROOT)} runs {variant.name} by digest")
    for target in targets:
        word = "incomplete" if target.name in failed else f"complete, {len(images)} images"
        _say(f"{target.name}: {word}")
    if failed:
        first = next(iter(failed.values()))
        found = f"incomplete on {', '.join(failed)}: {first.found}"
        raise type(first)(found, first.needed, first.action)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Publish what CUDA= names, by default every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", default="", help="host/path, several with commas between")
    parser.add_argument("--cuda", default="all", help="118, 121, 130, cpu; several; or all")
    parser.add_argument("--pause", type=float, default=5, help="seconds before the second try")
    parser.add_argument("--level", type=int, default=20, help="of zstd")
    options = parser.parse_args(argv)
    names = registry.parse(options.registry)
    known = variants.load()
    chosen = list(known.values())
    if options.cuda != "all":
        chosen = list(dict.fromkeys(map(variants.named, options.cuda.split(","))))
    return publish([Registry(name, options.pause, options.level) for name in names], chosen)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
