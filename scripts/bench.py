"""Measure vLLM against transformers on this machine, in turns, and both against the memory's limit.

The test of the original recipe: 25 prompts of 64 tokens, 128 new tokens each, all at once.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scripts import errors, fit, gpu, measure, report, roofline, snapshot
from scripts.settings import Settings


@dataclass
class Row:
    """One way to generate, and what was measured of it; times in seconds."""

    name: str
    backend: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    load_seconds: list[float] = field(default_factory=list)
    warmup_seconds: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    failed: str = ""


def _rows(options: argparse.Namespace, settings: Settings) -> list[Row]:
    """Return what is measured, vLLM as it is set up here first."""
    arguments = " ".join(settings.vllm_args)
    rows = [Row("vllm", "vllm")]
    if options.fp8:
        rows.append(Row("vllm fp8", "vllm", environment={"QUANTIZATION": "fp8"}))
    for text in options.row or ():
        name, _, more = text.partition("=")
        changed = {"VLLM_ARGS": f"{arguments} {more}"}
        rows.append(Row(name, "vllm", (f"--checked={more}",), changed))
    if not options.no_hf:
        rows.append(Row("hf", "hf"))
    if options.hf_compile:
        rows.append(Row("hf compiled", "hf", ("--compile",)))
    return rows


@contextlib.contextmanager
def _child(words: list[str], environment: dict[str, str], log: Any) -> Iterator[subprocess.Popen]:
    """Run scripts/measure.py in a group of its own; nothing of it is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.measure", *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def _lines(words: list[str], environment: dict[str, str], limit: float) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of one child.

    Raises:
        ServeFailed: it ended with an error, or took longer than `limit` seconds.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with _child(words, environment, log) as process:
            timer = _Timer(process, limit)
            with timer:
                for line in process.stdout:
                    yield json.loads(line)
                code = process.wait()
        if code:
            log.seek(0)
            tail = log.read().splitlines()[-40:]
            why = f"took longer than {limit:.0f} s" if timer.fired else f"ended with code {code}"
            raise errors.ServeFailed(
                "\n".join([*tail, f"{' '.join(words[:1])} {why}"]),
                "a measurement",
                "read its own words above",
            )


class _Timer:
    """Ends a process after so many seconds."""

    def __init__(self, process: subprocess.Popen, limit: float) -> None:
        self.fired = False
        self._process = process
        self._timer = threading.Timer(limit, self._fire)
        self._timer.daemon = True

    def _fire(self) -> None:
        self.fired = True
        self._process.kill()

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _measure(row: Row, options: argparse.Namespace, number: int) -> None:
    """Measure one row once more; a row that fails says so and is left out from then on."""
    if row.failed:
        return
    began = time.monotonic()
    words = [row.backend, *row.arguments]
    for name in ("input_len", "output_len", "num_prompts", "seed", "hf_max_batch_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    words += ["--runs", str(options.runs), "--warmups", str(options.warmups)]
    words += ["--first-run", str(number * (options.runs + options.warmups))]
    environment = {
        "DTYPE": options.dtype,
        "MAX_MODEL_LEN": str(options.max_model_len),
        **row.environment,
    }
    try:
        for found in _lines(words, environment, options.limit):
            row.load_seconds += [found[key] for key in ("load_seconds",) if key in found]
            row.warmup_seconds += [found[key] for key in ("warmup_seconds",) if key in found]
            row.runs += [found[key] for key in ("seconds",) if key in found]
    except errors.ServeFailed as error:
        lines = error.found.splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        row.failed = (said or lines)[-1].removeprefix("error: ")[:200]
        _say(f"{row.name} failed:\n{error.found}")
        return
    rates = ", ".join(f"{options.num_prompts / one:.2f}" for one in row.runs[-options.runs :])
    _say(f"round {number + 1}, {row.name}: {rates} requests/s ({time.monotonic() - began:.0f} s)")


def _limit(
    options: argparse.Namespace, settings: Settings, row: Row, bandwidth: float
) -> dict[str, float]:
    """Return the bytes that a step of the row streams, and the requests a second at the limit."""
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    gpus = settings.tensor_parallel_size or 1
    number = 4 if options.dtype == "float32" else 2
    fp8 = (row.environment.get("QUANTIZATION") or settings.quantization) == "fp8"
    weights = roofline.streamed_weights(
        where, snapshot.load(where).weights, fp8=fp8 and row.backend == "vllm", number=number
    )
    token = fit.read(where).token_bytes(number, 1)
    sizes = options.num_prompts, options.input_len, options.output_len
    seconds = roofline.least_seconds(weights, token, *sizes, bandwidth * gpus)
    return {"step_weight_bytes": weights, "requests_per_second": options.num_prompts / seconds}


def _result(
    options: argparse.Namespace, settings: Settings, row: Row, bandwidth: float
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": row.name,
        "backend": row.backend,
        "arguments": list(row.arguments),
        "environment": row.environment,
        "load_seconds": row.load_seconds,
        "warmup_seconds": row.warmup_seconds,
        "runs": row.runs,
    }
    if row.failed:
        return {**result, "failed": row.failed}
    limit = _limit(options, settings, row, bandwidth)
    rate = options.num_prompts / statistics.median(row.runs)
    return {
        **result,
        "requests_per_second": rate,
        "tokens_per_second": rate * (options.input_len + options.output_len),
        "output_tokens_per_second": rate * options.output_len,
        "limit": limit,
        "roofline_percent": 100 * rate / limit["requests_per_second"],
    }


def table(found: dict[str, Any]) -> str:
    """Return the recipe's table of a document, with the limit beside it."""
    base = next((r for r in found["rows"] if r["name"] == "hf" and "failed" not in r), None)
    count = found["settings"]["num_prompts"]
    rows = []
    for row in found["rows"]:
        if "failed" in row:
            rows.append([row["name"], f"failed: {row['failed']}", "", "", "", ""])
            continue
        rate = row["requests_per_second"]
        times = f"{rate / base['requests_per_second']:.2f} ×" if base else "–"
        spread = f"{count / max(row['runs']):.2f} to {count / min(row['runs']):.2f}"
        rows.append(
            [
                row["name"],
                f"{rate:.2f}",
                spread,
                f"{row['tokens_per_second']:.0f}",
                times,
                f"{row['roofline_percent']:.0f} %",
            ]
        )
    head = ["", "requests/s", "all runs", "tokens/s, in and out", "to hf", "of the memory's limit"]
    limit = found["limit"]
    return "\n".join(
        [
            report.title(found),
            report.table(head, rows),
            f"limit: {limit['requests_per_second']:.1f} requests/s with the model's own numbers;"
            f" a copy moves {limit['copy_bytes_per_second'] / 1e9:.0f} GB/s",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write the document to standard output.

    Raises:
        ServeFailed: vLLM itself could not be measured.
    """
    output = report.claim_output()
    # The child has a group of its own, which must not outlive this process.
    errors.end_on_sigterm()
    made = argparse.ArgumentParser(
        prog="bench", description=__doc__.splitlines()[0], parents=[measure.parser()]
    )
    made.add_argument("--rounds", type=int, default=2, help="how often the backends take turns")
    made.add_argument("--no-hf", action="store_true", help="without transformers")
    made.add_argument("--hf-compile", action="store_true", help="also with torch.compile")
    made.add_argument("--fp8", action="store_true", help="also vLLM with weights of 8 bits")
    made.add_argument(
        "--row", action="append", metavar="NAME=ARGS", help="also vLLM with further arguments"
    )
    made.add_argument("--limit", type=float, default=1800, help="seconds that a round may take")
    options = made.parse_args(argv)
    settings = Settings.from_environ()
    snapshot.require(settings.models, settings.model_id, settings.model_revision)
    gpu.require(settings)
    rows = _rows(options, settings)
    _say(
        f"{options.rounds} rounds of {', '.join(row.name for row in rows)}: {options.num_prompts}"
        f" prompts of {options.input_len} tokens, {options.output_len} new ones each,"
        f" {options.dtype}; seed {options.seed}"
    )
    copies: list[float] = []
    for number in range(options.rounds):
        for found in _lines(["copy"], {}, options.limit):
            copies += found["bytes_per_second"]
        for row in rows:
            _measure(row, options, number)
    bandwidth = statistics.median(copies)
    given = {name: value for name, value in vars(options).items() if name != "row"}
    document = report.document(
        "bench",
        settings,
        command=shlex.join(["python", "-m", "scripts.bench", *(argv or sys.argv[1:])]),
        settings={**given, "vllm_args": list(settings.vllm_args)},
        limit={
            "copy_bytes_per_second": bandwidth,
            "copies": copies,
            **_limit(options, settings, Row("", "hf"), bandwidth),
        },
        rows=[_result(options, settings, row, bandwidth) for row in rows],
    )
    print(table(document), file=sys.stderr, flush=True)
    report.write(output, document)
    if rows[0].failed:
        raise errors.ServeFailed(rows[0].failed, "a vLLM that generates", "see its words above")
    return 0


if __name__ == "__main__":
    errors.run(main)
