"""Turn Settings into vLLM's command line, print it and become vLLM."""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from scripts import dialect, errors, fit, gpu, middleware, snapshot, variants
from scripts.settings import Settings

_SECRET_WORDS = ("key", "token", "secret", "password")
# Seconds before another start: 2, 4, 8, … after starts without an answer.
_MOST_BACKOFF = 30


def arguments(settings: Settings, where: Path, replica: int = 0) -> list[str]:
    """Return vLLM's argument list for the model in folder `where`, and a replica's number."""
    spoken = dialect.of(settings)
    result = [*spoken.program, "serve", str(where)]
    result += ["--served-model-name", settings.served_model_name]
    result += ["--host", settings.replica_host, "--port", str(settings.replica_port + replica)]
    # Bounds on requests, and the line a request that takes the place of uvicorn's.
    result += ["--middleware", "scripts.middleware.Middleware", "--uvicorn-log-level", "warning"]
    if spoken.drain:
        result += [spoken.drain, str(settings.drain_seconds)]
    if settings.chat_template:
        result += ["--chat-template", settings.chat_template]
    result += dialect.engine_arguments(settings)
    return [*result, *spoken.server, *settings.vllm_args]


def masked(command: list[str]) -> str:
    """Return the command as a shell line, with the values of secret arguments replaced."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("-") and any(
            part in _SECRET_WORDS for part in flag.lstrip("-").replace("_", "-").split("-")
        )
        if hide_next and not word.startswith("--"):
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if secret and equals else shlex.quote(word))
        hide_next = secret and not equals
    return " ".join(shown)


def _failed_starts(run: Path, replica: int) -> int:
    """Return how many starts before this one ended without an answer, and note this one.

    vLLM keeps this process's id, and agent.py notes the one that answered.
    """
    starts, answered = run / f"starts-{replica}", run / f"answered-{replica}"
    before = starts.read_text().split() if starts.exists() else []
    if answered.exists() and answered.read_text() in before:
        before = []
    starts.write_text(" ".join([*before, str(os.getpid())]))
    return len(before)


def _share_of(replica: int, settings: Settings, gpus: list[gpu.Gpu]) -> dict[str, str]:
    """Return the environment that gives a replica its own part of the GPUs, or of the CPUs."""
    size = settings.tensor_parallel_size
    if gpus:
        own = gpus[replica * size : (replica + 1) * size]
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(card.index) for card in own)}
    count = settings.replicas or 1
    cpus = sorted(os.sched_getaffinity(0))
    if count == 1 or len(cpus) < count or size > 1:
        return {}
    each = len(cpus) // count
    own = cpus[replica * each : (replica + 1) * each]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own))}


def _log_config(settings: Settings) -> dict[str, str]:
    """Return the environment that makes vLLM log in JSON, where that is asked for."""
    if settings.log_format != "json":
        return {}
    path = settings.run / "logging.json"
    path.write_text(json.dumps(middleware.log_config()), encoding="utf-8")
    return {"VLLM_LOGGING_CONFIG_PATH": str(path)}


def main(argv: list[str] | None = None) -> int:
    """Become vLLM; returns only when that is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("replica", type=int, nargs="?", default=0, help="its number, from 0")
    replica = parser.parse_args(argv).replica
    settings = Settings.from_environ()
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    failed = _failed_starts(settings.run, replica)
    gpus = gpu.look()[1] if variants.load()[settings.variant].cuda else []
    share = _share_of(replica, settings, gpus) if settings.replicas > 1 else {}
    own = [
        card for card in gpus if str(card.index) in share.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ]
    weights = snapshot.load(where).weights
    fitted, lines = fit.of_folder(settings, own or gpus, where, weights, min(failed, 2))
    if failed:
        pause = min(2**failed, _MOST_BACKOFF)
        less = f"; {lines[-1]}" if gpus else ""
        print(f"serve: {failed} starts without an answer, waiting {pause} s{less}", flush=True)
        time.sleep(pause)
    command = arguments(fitted, where, replica)
    print(f"serve: {masked(command)}", flush=True)
    program = Path(sys.executable).with_name(command[0])
    environ = dialect.environment(fitted, os.environ, fit.vocabulary(where))
    os.execve(program, command, {**environ, **share, **_log_config(settings)})


def _noted(argv: list[str] | None = None) -> int:
    """Run `main`; leave the exit code of an error of ours for scripts/watch.py."""
    try:
        return main(argv)
    except errors.StackError as error:
        run = Path(os.environ.get("RUN_DIR") or "/run/stack")
        replica = sys.argv[1] if len(sys.argv) > 1 else "0"
        (run / f"failed-{replica}").write_text(str(error.exit_code))
        raise


if __name__ == "__main__":
    errors.run(_noted)
