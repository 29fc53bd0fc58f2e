"""Run supervisord over the programs of docker/supervisord.conf; end non-zero if it gave up."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts import errors, fit, gpu, snapshot, variants
from scripts.settings import Settings

CONF = Path(__file__).resolve().parent.parent / "docker" / "supervisord.conf"
# What vLLM may take for its hard end beyond the drain time, in seconds.
_MARGIN_SECONDS = 10


def main(argv: list[str] | None = None) -> int:
    """Supervise until told to stop (code 0) or until a program is given up (ServeFailed)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, help="let vLLM log to this file, rotated")
    parser.add_argument("--gateway", action="store_true", help="run the gateway here, too")
    options = parser.parse_args(argv)
    log, gateway = options.log, options.gateway

    settings = Settings.from_environ()
    # A wrong setting, a missing model or an unfit GPU stays wrong however often it is
    # retried: end here.
    settings.check_files()
    variants.require_model(variants.load()[settings.variant], settings.model_id)
    # Before the model is asked for: nobody should fetch it for a GPU that cannot serve it.
    gpus = gpu.require(settings)
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    weights = snapshot.load(where).weights
    fitted, lines = fit.of_folder(settings, gpus, where, weights)
    print("\n".join(f"fit: {line}" for line in lines), flush=True)
    size = fitted.tensor_parallel_size
    replicas = settings.replicas or max(len(gpus) // size, 1)
    if gpus and replicas * size > len(gpus):
        raise errors.GpuUnsupported(
            f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}",
            f"{replicas * size}: REPLICAS={replicas} times TENSOR_PARALLEL_SIZE={size}",
            "lower REPLICAS, or set it to auto",
        )
    gpu.require_memory(fitted, gpus[: replicas * size], weights * replicas)
    if replicas > 1:
        print(f"fit: {replicas} replicas of {size} GPU{'s' if size > 1 else ''} each", flush=True)
    settings.run.mkdir(parents=True, exist_ok=True)
    given_up = settings.run / "given-up"
    for mark in (
        given_up,
        *settings.run.glob("answered-*"),
        *settings.run.glob("starts-*"),
        *settings.run.glob("failed-*"),
    ):
        mark.unlink(missing_ok=True)

    output = str(log or "/dev/fd/1")
    try:
        # As supervisord will: if it cannot, it gives up vLLM and its listener both, and stays.
        os.close(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
    except OSError as error:
        raise errors.ServeFailed(
            f"{output} cannot be opened to write: {error.strerror}",
            "a standard output that this user may open (a pipe or a terminal of its own)",
            "give the output to a pipe: … | cat",
        ) from None

    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "RUN_DIR": str(settings.run),
        "STOP_SECONDS": str(settings.drain_seconds + _MARGIN_SECONDS),
        "VLLM_LOG": output,
        # Supervisor cannot rotate a pipe.
        "LOG_MAXBYTES": "20MB" if log else "0",
        "GATEWAY_LOG": str(log.with_name("gateway.log")) if log else output,
        "GATEWAY": "true" if gateway else "false",
        "REPLICAS": str(replicas),
        # Every start takes the same number of GPUs, or one would take another's.
        "TENSOR_PARALLEL_SIZE": str(size),
    }
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(CONF)]
    # A group of its own: Ctrl-C in a terminal must reach vLLM by way of supervisord only.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    code = process.wait()
    if given_up.exists():
        number, reason = given_up.read_text(encoding="utf-8").strip().split("\n", 1)
        error = errors.StackError(
            reason, "a vLLM that stays up", "read the log above for vLLM's own error (`make logs`)"
        )
        error.exit_code = int(number)
        raise error
    if code != 0:
        raise errors.ServeFailed(
            f"supervisord ended with code {code}", "code 0", "read the log above (`make logs`)"
        )
    return 0


if __name__ == "__main__":
    errors.run(main)
