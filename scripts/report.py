"""Write what a measurement found: a JSON document, and a table for people."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TextIO

from scripts import errors, gpu, variants
from scripts.settings import Settings

_PACKAGES = ("vllm", "torch", "transformers")


def claim_output() -> TextIO:
    """Return standard output for the result alone; what else prints goes to standard error.

    vLLM logs to standard output, and so do its processes: call this before it is imported.
    """
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return result


def document(job: str, settings: Settings, /, **values: object) -> dict[str, object]:
    """Return the document of one measurement: when, where, with what, and what it found."""
    return {
        "job": job,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "variant": settings.variant,
        "machine": machine(settings),
        "versions": versions(),
        "model": {"id": settings.model_id, "revision": settings.model_revision},
        **values,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes, as installed here."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        # The CPU build of vLLM has a name of its own.
        for spelled in (name, f"{name}-cpu"):
            try:
                found[name] = importlib.metadata.version(spelled)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def machine(settings: Settings) -> dict[str, object]:
    """Return the processor, and for a CUDA variant the driver and the cards."""
    found: dict[str, object] = {"cpu": _cpu(), "cpus": len(os.sched_getaffinity(0))}
    if variants.load()[settings.variant].cuda:
        try:
            driver, cards = gpu.look()
        except errors.DriverMissing:
            return found
        found["driver"] = driver
        found["gpus"] = [
            {
                "name": card.name,
                "capability": variants.dotted(card.capability),
                "memory_bytes": card.total,
            }
            for card in cards
        ]
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model na")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def title(found: dict) -> str:
    """Return what a document measured, in one line: card, driver, variant, versions."""
    about = found["machine"]
    cards = about.get("gpus") or []
    where = f"{len(cards)} × {cards[0]['name']}" if len(cards) > 1 else None
    where = where or (cards[0]["name"] if cards else f"{about['cpus']} × {about['cpu']}")
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    packages = ", ".join(f"{name} {found['versions'].get(name, '?')}" for name in _PACKAGES)
    return f"{where}{driver}; {found['variant']}: {packages}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown, its columns as wide as their cells."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def write(stream: TextIO, found: dict) -> None:
    """Write a document as JSON."""
    json.dump(found, stream, indent=2, ensure_ascii=False)
    stream.write("\n")
    stream.flush()
