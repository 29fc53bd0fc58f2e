"""List the models of the volume, remove one, or print what another job asks of one."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from scripts import errors, snapshot
from scripts.settings import Settings

_GB = 1e9


def _folders(models: Path) -> list[Path]:
    """Return every folder owner/name below the models root that has something in it."""
    found = []
    for owner in sorted(models.glob("[!.]*")):
        if owner.is_dir():
            found += [path for path in sorted(owner.glob("[!.]*")) if path.is_dir()]
    return [path for path in found if any(path.iterdir())]


def _size(where: Path) -> int:
    return sum(path.stat().st_size for path in where.rglob("*") if path.is_file())


def _state(where: Path) -> tuple[str, str, str]:
    """Return (revision, source, state) of a folder."""
    try:
        found = snapshot.read(where)
    except errors.SnapshotMissing:
        return "", "", "incomplete: `make download` goes on with it"
    changed = snapshot.changed(where, found)
    state = "complete"
    if changed:
        path, what = next(iter(changed.items()))
        state = f"{path} {what}: `make download` checks it"
    return found.revision, found.source, state


def show(models: Path) -> None:
    """Print a line for each model."""
    rows = [("MODEL", "REVISION", "GB", "SOURCE", "STATE")]
    for where in _folders(models):
        revision, source, state = _state(where)
        name = where.relative_to(models).as_posix()
        rows.append((name, revision, f"{_size(where) / _GB:.2f}", source, state))
    if len(rows) == 1:
        print(f"no model in {models}; `make download` brings one")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"{shutil.disk_usage(models).free / _GB:.2f} GB free")


def remove(models: Path, model_id: str) -> None:
    """Remove one model.

    Raises:
        ModelNotFound: it is not there.
        StackError: a download works on the volume.
    """
    from filelock import Timeout

    known = {where.relative_to(models).as_posix(): where for where in _folders(models)}
    if model_id not in known:
        raise errors.ModelNotFound(
            f"no model {model_id!r} in {models}",
            " or ".join(known) or "a model",
            "see `make models`",
        )
    try:
        with snapshot.lock(models).acquire(timeout=0):
            size = _size(known[model_id])
            # First, so that what is left of an interrupted removal is no snapshot.
            snapshot.unmark(known[model_id])
            shutil.rmtree(known[model_id])
    except Timeout as error:
        raise errors.StackError(
            "a download works on this volume",
            "a volume at rest",
            "wait for its end, or stop it; then run the same command again",
        ) from error
    except OSError as error:
        raise errors.VolumeUnwritable(
            f"{model_id} cannot be removed: {error}",
            f"a models volume that user {os.getuid()} may write to",
            "correct its owner or mount",
        ) from error
    print(f"removed {model_id}, {size / _GB:.2f} GB")


def main(argv: list[str] | None = None) -> int:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--remove", metavar="OWNER/NAME", help="remove this model")
    group.add_argument("--config", action="store_true", help="print MODEL_ID's config and weights")
    group.add_argument("--pin", action="store_true", help="print MODEL_ID's manifest")
    options = parser.parse_args(argv)
    settings = Settings.from_environ()
    if options.remove:
        remove(settings.models, options.remove)
    elif options.pin:
        where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
        json.dump(asdict(snapshot.read(where)), sys.stdout, indent=1)
        print()
    elif options.config:
        where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
        config = json.loads((where / "config.json").read_text(encoding="utf-8"))
        print(json.dumps({"config": config, "weights": snapshot.read(where).weights}))
    else:
        show(settings.models)
    return 0


if __name__ == "__main__":
    errors.run(main)
