"""Look at everything that a stack on this host depends on, and say how to mend what is wrong.

It changes nothing. What `make up` refuses is found by the very same checks.
"""

import argparse
import email.utils
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from scripts import errors, gpu, pins, plan, presets, sources, variants
from scripts.compose import BASE, LOCAL_BASE, ComposeRuntime
from scripts.host import HostRuntime, state_folder
from scripts.plan import Plan

OK, WARNING, FAILURE = "ok", "warning", "failure"
_NET_SECONDS = 3
_SKEW_SECONDS = 60
_GIB = 1 << 30
# What a person in mainland China sets where the usual host is out of reach.
_MIRRORS = {
    "huggingface": "HF_ENDPOINT=https://hf-mirror.com",
    "modelscope": "MODEL_SOURCES=modelscope,hf-mirror, or the URL of a hub in your LAN",
}


@dataclass(frozen=True)
class Check:
    """One line of the table: what was looked at, how it is, what was found, needed and to do."""

    name: str
    state: str
    found: str
    needed: str = ""
    action: str = ""
    exit_code: int = 0

    @classmethod
    def of(cls, name: str, error: errors.StackError, state: str = FAILURE) -> "Check":
        return cls(name, state, error.found, error.needed, error.action, error.exit_code)

    def error(self) -> errors.StackError:
        """Return it as the error that ends a command."""
        error = errors.StackError(self.found, self.needed, self.action)
        error.exit_code = self.exit_code
        return error


def _tried(name: str, found: str, check: Callable[[], object]) -> Check:
    """Run a check that raises a StackError; return it as a line."""
    try:
        check()
    except errors.StackError as error:
        return Check.of(name, error)
    return Check(name, OK, found)


def runtime_of(chosen: Plan) -> ComposeRuntime | HostRuntime:
    """Return what runs the plan."""
    return ComposeRuntime(chosen) if chosen.runtime == "docker" else HostRuntime(chosen)


def required(chosen: Plan) -> Iterator[Callable[[], Check]]:
    """Yield the checks without which `make up` does not begin, each quick."""
    runtime = runtime_of(chosen)
    yield lambda: _variant(chosen)
    tools = "engine and compose" if chosen.runtime == "docker" else "Python and compiler"
    yield lambda: _tried(f"runtime {chosen.runtime}", f"{tools} are there", runtime.check_tools)
    if chosen.runtime == "docker":
        yield lambda: _tried("container runtime", "the engine has it", runtime.check_gpu)
    yield lambda: _tried("disk for the images", "enough, or not needed", runtime.check_room)
    port = f"{chosen.settings.host}:{chosen.settings.port}"
    yield lambda: _tried("port", f"{port} is free, or ours", runtime.check_port)
    yield lambda: _index(chosen, runtime)


def _variant(chosen: Plan) -> Check:
    settings = chosen.settings

    def check() -> None:
        if chosen.variant.cuda:
            gpu.require(settings, quiet=True)

    return _tried(f"variant {chosen.variant.name}", chosen.reasons[0], check)


def _index(chosen: Plan, runtime: ComposeRuntime | HostRuntime) -> Check:
    if runtime.is_built():
        return Check("Python index", OK, "not needed: what it gives is installed")
    folders = [plan.ROOT / (chosen.environ.get("WHEELS") or "docker/wheels")]
    folders.append(plan.ROOT / "docker" / "wheels")
    wanted = pins.read(chosen.variant.lock.read_text(encoding="utf-8"))

    def check() -> None:
        pins.require_reach(wanted, folders, chosen.environ, seconds=_NET_SECONDS)

    began = time.monotonic()
    found = _tried("Python index", "", check)
    if found.state == OK:
        return Check("Python index", OK, f"answers in {time.monotonic() - began:.1f} s")
    return found


def _driver(_: Plan) -> list[Check]:
    try:
        driver, gpus = gpu.look()
    except errors.DriverMissing as error:
        return [Check.of("NVIDIA driver", error, WARNING)]
    lines = [Check("NVIDIA driver", OK, f"{driver}, runs CUDA {gpu.cuda_of_driver()} and older")]
    for card in gpus:
        used = gpu.users(card.index)
        names = ", ".join(f"{_process(pid)} ({pid})" for pid in used)
        found = f"{card.name}, compute capability {variants.dotted(card.capability)}, {card.room}"
        if card.total and card.free < 0.9 * card.total:
            found += f", used by {names or 'a process that is not shown here'}"
            action = "end what is not needed, or let GPU_MEMORY_UTILIZATION=auto take what is free"
            lines.append(Check(f"GPU {card.index}", WARNING, found, "a free card", action))
        else:
            lines.append(Check(f"GPU {card.index}", OK, found))
    return lines


def _process(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "process"


def _tools(_: Plan) -> list[Check]:
    lines = []
    for name, words in {
        "Docker engine": ["docker", "version", "--format", "{{.Server.Version}}"],
        "Docker Compose": ["docker", "compose", "version", "--short"],
        "buildx": ["docker", "buildx", "version"],
    }.items():
        output = _output(words)
        lines.append(
            Check(name, OK, output.split("\n")[0])
            if output
            else Check(
                name,
                WARNING,
                "does not answer",
                "for RUNTIME=docker only",
                "start or install Docker; `make engine` on Debian as root; or RUNTIME=host",
            )
        )
    return lines


def _output(words: list[str], seconds: float = 20) -> str:
    if not shutil.which(words[0]):
        return ""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _container_gpu(chosen: Plan) -> list[Check]:
    """Start a container that looks for the GPU, where there is an image to do it with."""
    if chosen.runtime != "docker" or not chosen.variant.cuda:
        return []
    image = f"glm4-stack:{chosen.environ.get('VERSION') or 'dev'}-{chosen.variant.name}"
    if not _output(["docker", "image", "inspect", "--format", "{{.Id}}", image]):
        return [Check("GPU in a container", WARNING, "not tried: the image is not built yet")]
    run = ["docker", "run", "--rm", "--runtime=nvidia", "--entrypoint=nvidia-smi", image, "-L"]
    found = _output(run, 60)
    if found:
        return [Check("GPU in a container", OK, found.split("\n")[0])]
    return [
        Check(
            "GPU in a container",
            FAILURE,
            "a container sees no GPU",
            "the NVIDIA Container Toolkit",
            "install nvidia-container-toolkit, run `nvidia-ctk runtime configure"
            " --runtime=docker`, and restart Docker",
            errors.HostUnfit.exit_code,
        )
    ]


def _registry(chosen: Plan) -> list[Check]:
    """Ask the registry of the base image for any answer, where the image is not here yet."""
    if chosen.runtime != "docker":
        return []
    named = chosen.environ.get("BASE_IMAGE") or BASE
    if any(_output(["docker", "image", "inspect", image]) for image in (named, LOCAL_BASE)):
        return [Check("container registry", OK, "not needed: a base image is here")]
    # docs.docker.com/reference/cli/docker/image/tag: a first part with a dot or port is a host.
    host = named.split("/")[0] if "/" in named else ""
    host = host if "." in host or ":" in host else "registry-1.docker.io"
    seconds, reason, _ = _ask(f"https://{host}/v2/")
    if not reason:
        return [Check("container registry", OK, f"{host} answers in {seconds:.1f} s")]
    action = (
        "set BASE_IMAGE in .env to a copy on a registry that you reach, or `make engine` on a"
        " Debian host, which makes one from Debian's own packages"
    )
    found = f"{host} does not answer: {reason}"
    return [Check("container registry", WARNING, found, "to build the images", action)]


def _memory(chosen: Plan) -> list[Check]:
    memory = psutil.virtual_memory()
    limit = _cgroup_limit() or memory.total
    available = min(memory.available, limit)
    found = f"{available / _GIB:.1f} of {min(memory.total, limit) / _GIB:.1f} GiB free"
    least = 6 if chosen.variant.cuda else 3
    lines = [Check("memory", OK, found)]
    if available < least * _GIB:
        action = "end what is not needed, or raise the container's limit"
        lines = [Check("memory", WARNING, found, f"{least} GiB beside the GPU", action)]
    if chosen.runtime == "host" and Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        found = f"{size / _GIB:.1f} GiB"
        few = size < _GIB and (chosen.settings.tensor_parallel_size or 1) > 1
        action = "enlarge /dev/shm (docker run --shm-size, or mount -o remount,size=2g /dev/shm)"
        state = WARNING if few else OK
        lines.append(Check("shared memory", state, found, *(["1 GiB", action] if few else [])))
    return lines


def _cgroup_limit() -> int:
    """Return this control group's memory limit in bytes, or 0 for none."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            value = int(Path(name).read_text())
        except (OSError, ValueError):
            continue
        return value if value < 1 << 60 else 0
    return 0


def _room(chosen: Plan) -> list[Check]:
    """Look for room for the model; the room for images is the runtime's own check."""
    preset = presets.of(chosen.settings.model_id)
    weights = preset.weights if preset else 0
    where = state_folder()
    if chosen.runtime == "docker":
        where = Path(_output(["docker", "info", "--format", "{{.DockerRootDir}}"]) or "/")
    existing = next(path for path in (where, *where.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free where the models volume lies ({existing})"
    if free < weights * 1.02:
        action = "make room (`make models REMOVE=…`, `docker system prune`); what is there counts"
        needed = f"{weights / 1e9:.1f} GB, if the model is not there yet"
        return [Check("disk for the model", WARNING, found, needed, action)]
    return [Check("disk for the model", OK, found)]


def _hubs(chosen: Plan) -> list[Check]:
    """Ask each source of the model for any answer."""
    settings = chosen.settings
    lines = []
    for name in settings.model_sources:
        if name == "folder":
            there = settings.model_folder.is_dir()
            action = "" if there else "correct MODEL_FOLDER in .env"
            state = OK if there else FAILURE
            lines.append(Check("source folder", state, str(settings.model_folder), "", action))
            continue
        if chosen.rehearsal:
            return [Check("model hub", OK, "a rehearsal brings its own")]
        url = {
            "modelscope": settings.modelscope_endpoint,
            "huggingface": settings.hf_endpoint,
            "hf-mirror": sources.HF_MIRROR,
        }.get(name, name)
        seconds, reason, date = _ask(url)
        if reason:
            action = f"set {_MIRRORS.get(name, 'MODEL_SOURCES to another one')} in .env"
            found = f"{url} does not answer: {reason}"
            lines.append(Check(f"source {name}", WARNING, found, "to download", action))
            continue
        lines.append(Check(f"source {name}", OK, f"{url} answers in {seconds:.1f} s"))
        skew = time.time() - date if date else 0
        if abs(skew) > _SKEW_SECONDS:
            found = f"this clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
            action = "set the clock (`timedatectl set-ntp true`)"
            lines.append(Check("clock", WARNING, found, "the time, for certificates", action))
    return lines


def _ask(url: str) -> tuple[float, str, float]:
    """Return (seconds, reason of a failure, the host's own time) of one request."""
    began = time.monotonic()
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_NET_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers  # It answers.
    except (OSError, ValueError) as error:
        return 0, str(getattr(error, "reason", error)), 0
    date = email.utils.parsedate_to_datetime(headers["Date"]) if headers.get("Date") else None
    return time.monotonic() - began, "", date.timestamp() if date else 0


def _models(chosen: Plan) -> list[Check]:
    """Tell whether the model is there, where that can be seen without a container."""
    if chosen.runtime != "host":
        return []
    from scripts import snapshot

    settings = chosen.settings
    try:
        snapshot.require(state_folder() / "models", settings.model_id, settings.model_revision)
    except errors.SnapshotMissing as error:
        return [Check("model", OK, f"{error.found}; `make up` brings it")]
    return [Check("model", OK, f"{settings.model_id} is complete and verified")]


FURTHER = (_driver, _tools, _container_gpu, _registry, _memory, _room, _hubs, _models)


def examine(chosen: Plan) -> list[Check]:
    """Return every check, side by side, in the order of the table."""
    with ThreadPoolExecutor(16) as pool:
        further = [pool.submit(check, chosen) for check in FURTHER]
        first = [pool.submit(check) for check in required(chosen)]
        lines = [line for future in further for line in future.result()]
        return [*lines, *(future.result() for future in first)]


def require(chosen: Plan) -> None:
    """Raise the first thing that keeps `make up` from working; changes nothing."""
    for check in required(chosen):
        found = check()
        if found.state == FAILURE:
            raise found.error()


def show(checks: list[Check]) -> None:
    """Print the table: a line each, and below it what mends what is wrong."""
    width = max(len(check.name) for check in checks)
    marks = {OK: "ok     ", WARNING: "WARNING", FAILURE: "FAILURE"}
    for check in checks:
        needed = f"; needed: {check.needed}" if check.needed and check.state != OK else ""
        print(f"{marks[check.state]}  {check.name:<{width}}  {check.found}{needed}")
        if check.action and check.state != OK:
            print(f"{'':9}{'':<{width}}  to do: {check.action}")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when nothing fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", default="", help="118, 121, 130 or cpu")
    parser.add_argument("--runtime", default="", help="docker or host")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    chosen = plan.make(options.cuda, options.runtime)
    checks = examine(chosen)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        show(checks)
        for reason in chosen.reasons:
            print(f"so: {reason}")
    failed = [check for check in checks if check.state == FAILURE]
    return failed[0].exit_code or 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main, end=os._exit)
