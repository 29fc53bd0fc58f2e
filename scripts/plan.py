"""Decide what this host runs: variant, runtime, model, and the environment for them."""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
from dotenv import dotenv_values

from scripts import errors, gpu, index, variants
from scripts.settings import DEFAULT_MODEL_ID, Settings
from scripts.variants import Variant

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = ROOT / "rehearsal.env"


@dataclass(frozen=True)
class Plan:
    """What to run; `environ` is the process environment with the env files and choices applied."""

    variant: Variant
    runtime: str
    rehearsal: bool
    reasons: tuple[str, ...]
    env_files: tuple[Path, ...]
    environ: dict[str, str]
    settings: Settings

    @property
    def endpoint(self) -> str:
        """Base URL of the served API, as this host reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def scheme(self) -> str:
        """What a client says before the address."""
        return "https" if self.settings.tls_cert else "http"


def gpus() -> tuple[str, list[tuple[int, ...]]]:
    """Return the NVIDIA driver's version, empty for none, and each GPU's compute capability."""
    try:
        driver, found = gpu.look()
    except errors.DriverMissing:
        return "", []
    return driver, [card.capability for card in found]


def _choose_variant(cuda: str, wanted: str) -> tuple[Variant, str]:
    """Return the variant and the reason, from CUDA=, VARIANT in .env, or the GPUs found."""
    if cuda:
        return variants.named(cuda), f"variant {variants.named(cuda).name}: CUDA={cuda}"
    if wanted:
        return variants.named(wanted), f"variant {wanted}: VARIANT in .env"
    cpu = variants.named("cpu")
    driver, capabilities = gpus()
    if not driver:
        return cpu, "variant cpu: no NVIDIA GPU on this host"
    shown = ", ".join(sorted(set(map(variants.dotted, capabilities))))
    host = f"NVIDIA driver {driver}" + (f" and compute capability {shown}" if shown else "")
    fitting = variants.fitting(driver, capabilities)
    if not fitting:
        return cpu, f"variant cpu: no image here runs on {host}"
    return fitting[0], f"variant {fitting[0].name}: the newest for {host}"


def _engine_answers() -> bool:
    if not shutil.which("docker"):
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=30)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def make(cuda: str = "", runtime: str = "") -> Plan:
    """Look at the host and decide; changes nothing.

    Raises:
        SettingInvalid: CUDA=, RUNTIME= or a setting has a value that is not allowed.
        EngineMissing: RUNTIME=docker, and no engine answers.
    """
    if runtime not in ("", "docker", "host"):
        raise errors.SettingInvalid(
            f"RUNTIME={runtime!r}", "docker or host", "choose one of these, or leave RUNTIME= out"
        )
    own = ROOT / ".env"
    env_files = (own,) if own.exists() else ()
    environ = {**_values(env_files), **os.environ}

    variant, reason = _choose_variant(cuda, environ.get("VARIANT", ""))
    reasons = [reason]
    if variant.name == "cpu" and not (environ.get("MODEL_ID") or environ.get("MODEL")):
        env_files = (*env_files, REHEARSAL)
        environ = {**_values(env_files), **os.environ}
    rehearsal = environ.get("MODEL_ID") == _values((REHEARSAL,))["MODEL_ID"]
    if rehearsal:
        reasons.append(
            f"model {environ['MODEL_ID']}: a rehearsal with a tiny model. The real one, given a"
            f" GPU or 24 GB of memory and patience: make up MODEL_ID={DEFAULT_MODEL_ID}"
        )

    if runtime:
        reasons.append(f"runtime {runtime}: RUNTIME={runtime}")
    elif _engine_answers():
        runtime = "docker"
        reasons.append("runtime docker: a Docker engine answers")
    else:
        runtime = "host"
        reasons.append("runtime host: no Docker engine answers (`make engine` brings one up)")

    _check_version(variant, environ.get("VLLM_VERSION", ""))
    environ["VARIANT"] = variant.name
    environ.update(CUDA_LINE=variant.cuda, VLLM_RELEASE=variant.vllm)
    if not variant.cuda:
        environ["CONTAINER_RUNTIME"] = "runc"
    environ.update(index.environment())
    settings = Settings.from_environ(environ)
    variants.require_model(variant, settings.model_id)
    return Plan(
        variant=variant,
        runtime=runtime,
        rehearsal=rehearsal,
        reasons=tuple(reasons),
        env_files=env_files,
        environ=environ,
        settings=settings,
    )


def _check_version(variant: Variant, wanted: str) -> None:
    """Raise SettingInvalid when another vLLM is asked for than the lock has."""
    if wanted and wanted != variant.vllm:
        raise errors.SettingInvalid(
            f"VLLM_VERSION={wanted!r}",
            f"{variant.vllm}, which images/{variant.lock.name} has",
            f"make lock CUDA={variant.short} VLLM_VERSION={wanted}, then build again",
        )


def _values(env_files: tuple[Path, ...]) -> dict[str, str]:
    """Return the variables of env files as compose reads them: a later file wins."""
    return {name: value or "" for file in env_files for name, value in dotenv_values(file).items()}


def check_port(plan: Plan) -> None:
    """Raise PortTaken when something listens where the endpoint would."""
    host, port = plan.settings.host, plan.settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise errors.PortTaken(
                f"cannot listen on {host}:{port}: {error.strerror}{_listener(port)}",
                "a free port of this host",
                f"end that process, or take another port: make up PORT={port + 1}",
            ) from None


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            taken = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if taken and connection.pid:
                return f" (by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
    except (psutil.Error, OSError):
        pass  # Only root may see whose it is.
    return ""


def check_room(where: Path, gigabytes: float, purpose: str) -> None:
    """Raise DiskFull when fewer than `gigabytes` (10^9 bytes) are free where `where` lies."""
    existing = next(path for path in (where, *where.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise errors.DiskFull(
            f"{free:.1f} GB free in {where}",
            f"{gigabytes:.1f} GB for {purpose}",
            "make room there, then run the same command again",
        )
