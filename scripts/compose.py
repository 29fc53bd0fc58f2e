"""The docker runtime: build, download, start and stop through Docker Compose."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from python_on_whales import Container, DockerClient
from python_on_whales.components.system.models import SystemInfo
from python_on_whales.exceptions import DockerException

from scripts import errors, foreground, pins, plan, version
from scripts.plan import ROOT, Plan

# The base image of every variant, and what `make engine` makes where no registry answers.
BASE = "python:3.11-slim-bookworm"
LOCAL_BASE = "glm4-stack-base:bookworm"
# start_interval of a healthcheck, and `required: false` of a dependency.
_LEAST_ENGINE, _LEAST_COMPOSE = (25, 0), (2, 24)
_PULL_SECONDS = 60


class ComposeRuntime:
    """The services of compose.yaml under the plan's environment."""

    def __init__(self, chosen: Plan) -> None:
        self.plan = chosen
        self._opened = False
        # The command line client takes its settings from our environment, as a user's shell would.
        os.environ.update(chosen.environ)
        self.docker = DockerClient(
            compose_files=[ROOT / "compose.yaml"],
            compose_env_files=[str(file) for file in chosen.env_files],
        )

    def check_tools(self) -> None:
        """Raise when the engine or compose is missing or too old; changes nothing."""
        info = self._info()
        self._check_version("Docker engine", info.server_version or "", _LEAST_ENGINE)
        self._check_version("Docker Compose", self._compose_version(), _LEAST_COMPOSE)

    def check_room(self) -> None:
        """Raise when there is no room to build the images."""
        if not self.is_built():
            # The installed environment, its copy in the layer, and the cache of wheels.
            room = 3 * self.plan.variant.size_gb
            root = Path(self._info().docker_root_dir or "/")
            plan.check_room(root, room, "building the images")

    def check_gpu(self) -> None:
        """Raise when the engine cannot give a container the GPU."""
        runtimes = self._info().runtimes or {}
        runtime = self.plan.environ.get("CONTAINER_RUNTIME") or "nvidia"
        if runtime not in runtimes:
            raise errors.HostUnfit(
                f"the Docker engine has no runtime {runtime!r}, only {', '.join(runtimes)}",
                "the NVIDIA Container Toolkit, for a container to see the GPU",
                "install nvidia-container-toolkit, run `nvidia-ctk runtime configure"
                " --runtime=docker`, and restart Docker",
            )

    def check_port(self) -> None:
        """Raise when another process listens where the endpoint would."""
        if not self._gateway():
            plan.check_port(self.plan)

    def _info(self) -> SystemInfo:
        try:
            return self.docker.system.info()
        except (DockerException, OSError) as error:
            raise errors.EngineMissing(
                f"no Docker engine answers: {_last_line(error)}",
                "a running engine that this user may use",
                "start Docker; or `make engine` on Debian as root; or make up RUNTIME=host",
            ) from error

    @staticmethod
    def _check_version(what: str, found: str, least: tuple[int, int]) -> None:
        number = tuple(int(part) for part in found.lstrip("v").split(".")[:2] if part.isdigit())
        if number < least:
            raise errors.EngineMissing(
                f"{what} {found or 'is missing'}",
                f"{what} {least[0]}.{least[1]} or newer",
                "update Docker (docs.docker.com/engine/install); or make up RUNTIME=host",
            )

    def _compose_version(self) -> str:
        command = [*self.docker.client_config.docker_cmd, "compose", "version", "--short"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    def _images(self) -> list[str]:
        services = self.docker.compose.config().services
        return [services[name].image for name in ("download", "serve", "gateway")]

    def is_built(self) -> bool:
        """Whether the images are there."""
        return all(self.docker.image.exists(image) for image in self._images())

    def _gateway(self) -> Container | None:
        found = self.docker.compose.ps(services=["gateway"], all=True)
        running = [container for container in found if container.state.status == "running"]
        return running[0] if running else None

    def _run(self, *arguments: str, timeout: float | None = None) -> int:
        """Run `docker compose ...` on this terminal, so that its progress is seen live."""
        command = [*self.docker.client_config.docker_compose_cmd, *arguments]
        return subprocess.run(command, timeout=timeout).returncode

    def _base(self) -> str:
        """Return the base image: the one named, or the local one when that cannot be had."""
        named = os.environ.get("BASE_IMAGE") or BASE
        if self.docker.image.exists(named):
            return named
        print(f"build: pulling the base image {named}", flush=True)
        command = [*self.docker.client_config.docker_cmd, "pull", "--quiet", named]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PULL_SECONDS)
            failure = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            failure = [f"no answer in {_PULL_SECONDS} s"]
        if not failure:
            return named
        if self.docker.image.exists(LOCAL_BASE):
            print(
                f"build: {named} cannot be pulled ({failure[0]});"
                f" using the local base image {LOCAL_BASE}",
                flush=True,
            )
            return LOCAL_BASE
        raise errors.BuildFailed(
            f"the base image {named} cannot be pulled: {failure[0]}",
            "a base image with Python 3.11 on Debian 12",
            "set BASE_IMAGE in .env to a copy on a registry that you reach, or run `make engine`"
            " on a Debian host, which makes one from Debian's own packages",
        )

    def build(self) -> None:
        """Build the images of the plan; what is unchanged comes from the cache.

        Those that .env names by digest are fetched instead.
        """
        if all("@" in image for image in self._images()):
            self._fetch()
            return
        os.environ["BASE_IMAGE"] = self._base()
        base = self.docker.image.inspect(os.environ["BASE_IMAGE"]).repo_digests or [""]
        for name, value in version.provenance(ROOT).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("BASE_DIGEST", base[0].rpartition("@")[2])
        if self._run("build", "download", "serve", "gateway"):
            # The commonest cause, said last and by name: the build's own log is long.
            lock = self.plan.variant.lock.read_text(encoding="utf-8")
            wheels = ROOT / (os.environ.get("WHEELS") or "docker/wheels")
            pins.require_reach(pins.read(lock), [wheels])
            raise errors.BuildFailed(
                "the build ended with an error",
                "an index that has every wheel of the lock",
                "read the build's own error above; PIP_INDEX_URL names a mirror, WHEELS a folder"
                " of wheels",
            )
        self._check_size()

    def _fetch(self) -> None:
        """Fetch the images, and raise SettingInvalid when serve's is another variant's."""
        if not self.is_built() and self._run("pull", "download", "serve", "gateway"):
            raise errors.BuildFailed(
                "the images that .env names by digest could not be fetched",
                "the registry that it names",
                "`docker login` if it asks who you are; or take SERVE_IMAGE, DOWNLOAD_IMAGE and"
                " GATEWAY_IMAGE out of .env to build them here",
            )
        labels = self.docker.image.inspect(self._images()[1]).config.labels or {}
        if labels.get("variant") != self.plan.variant.name:
            raise errors.SettingInvalid(
                f"SERVE_IMAGE is an image of {labels.get('variant')}",
                f"one of {self.plan.variant.name}",
                "take the three images of that variant, or take them out of .env",
            )

    def _check_size(self) -> None:
        """Raise BuildFailed when the serve image is over its budget in images/variants.toml."""
        size = (self.docker.image.inspect(self._images()[1]).size or 0) / 1e9
        budget = self.plan.variant.size_gb
        if size > budget:
            raise errors.BuildFailed(
                f"the image of {self.plan.variant.name} has {size:.2f} GB unpacked",
                f"at most {budget} GB, its budget in images/variants.toml",
                "find out what grew (the build prints what it prunes); prune it in"
                " images/prune.toml, or omit its package",
            )
        print(f"build: {self._images()[1]}, {size:.2f} of at most {budget} GB unpacked", flush=True)

    def download(self) -> None:
        """Run the one-shots that bring the model into the volume."""
        terminal = [] if sys.stdout.isatty() else ["--no-TTY"]
        services = ["rehearsal", "download"] if self.plan.rehearsal else ["download"]
        for service in services:
            code = self._run("run", "--rm", *terminal, service)
            if code:
                raise _ended(service, code)

    def job(self, name: str, *arguments: str) -> str:
        """Run a job of the download image on the models volume, and return what it prints."""
        self._info()
        if not self.docker.image.exists(self._images()[0]):
            self.build()
        run = ["run", "--rm", "--no-deps", "--no-TTY", "download", f"scripts.{name}", *arguments]
        command = [*self.docker.client_config.docker_compose_cmd, *run]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
        if done.returncode:
            raise _ended(name, done.returncode)
        return done.stdout

    def tool(
        self,
        service: str,
        *arguments: str,
        shown: Mapping[str, Path] | None = None,
        **streams: IO | None,
    ) -> int:
        """Run a one-shot on the images and volumes, and return its code.

        `shown` are further arguments that name files, which it may read. `streams` are its `stdin`
        and `stdout`; without them it reads nothing.
        """
        container = f"{service}-{os.getpid()}-{time.time_ns():x}"
        run = ["run", "--rm", "--no-deps", "--no-TTY", "--name", container]
        for number, (name, path) in enumerate((shown or {}).items()):
            run += ["--volume", f"{path.resolve()}:/shown/{number}:ro"]
            arguments += (name, f"/shown/{number}")
        run += [service, *arguments]

        def tell(number: int) -> bool:
            # Without a terminal the client ends at a signal, and leaves its container running.
            kill = ["docker", "kill", "--signal", str(number), container]
            return subprocess.run(kill, capture_output=True, timeout=60).returncode == 0

        command = [*self.docker.client_config.docker_compose_cmd, *run]
        return foreground.run(command, tell=tell, **streams)

    def start(self) -> None:
        """Create and start the services; those that run unchanged stay as they are."""
        self._up("serve")

    def open(self) -> None:
        """Start the gateway, now that there is something behind it."""
        self._opened = True
        more = ["metrics"] if self.plan.environ.get("METRICS_BIND") else []
        self._up("gateway", *more)

    def _up(self, *services: str) -> None:
        if self._run("--profile", "metrics", "up", "--detach", *services):
            raise errors.ServeFailed(
                "`docker compose up` ended with an error", "a started server", "see above"
            )

    def state(self) -> tuple[str, str]:
        """Return (ready, starting or ended; what is known about it)."""
        told = []
        for service in ("serve", "gateway") if self._opened else ("serve",):
            found = self.docker.compose.ps(services=[service], all=True)
            if not found:
                return "ended", f"there is no container of {service}"
            state = found[0].state
            if state.status in ("exited", "dead"):
                return "ended", f"the container of {service} ended with code {state.exit_code}"
            told.append(state.health.status if state.health else "unknown")
        ready = all(health == "healthy" for health in told)
        return ("ready" if ready else "starting"), f"server and gateway: {', '.join(told)}"

    def tail(self, lines: int) -> str:
        """Return the last lines of the server's log, and of the gateway's if it has ended."""
        services = ["serve"] if self._gateway() else ["serve", "gateway"]
        return self.docker.compose.logs(services=services, tail=str(lines), no_log_prefix=True)

    def url(self) -> str:
        """Return the endpoint's base URL, from the port that the engine publishes."""
        container = self._gateway()
        ports = (container.network_settings.ports or {}).get("8000/tcp") if container else None
        if not ports:
            return self.plan.endpoint
        host = ports[0]["HostIp"].replace("0.0.0.0", "127.0.0.1")
        return f"{self.plan.scheme}://{host}:{ports[0]['HostPort']}"

    def restart(self) -> int:
        """Restart the replicas one by one, and return the code of that."""
        return self._run("exec", "--no-TTY", "serve", "python", "-m", "scripts.restart")

    def key(self, *arguments: str) -> int:
        """Run scripts/key.py where the gateway's keys are, and return its code."""
        if not self.docker.image.exists(self._images()[2]):
            self.build()
        return self._run("run", "--rm", "--no-deps", "--no-TTY", "key", *arguments)

    def logs_hint(self) -> str:
        """Return the command that shows the logs."""
        return "make logs   (docker compose logs -f serve gateway)"

    def logs(self) -> int:
        """Follow the logs until Ctrl-C."""
        return self._run("logs", "--follow", "--tail", "100")

    def stop(self) -> None:
        """Remove the containers and networks; the volumes stay."""
        self._run("--profile", "*", "down")

    def status(self) -> None:
        """Print the containers."""
        self._run("--profile", "*", "ps", "--all")


def _ended(service: str, code: int) -> errors.StackError:
    error = errors.StackError(f"`{service}` ended with code {code}", "code 0", "see above")
    error.exit_code = code if code > 0 else 1
    return error


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def is_up(seconds: float = 20) -> bool:
    """Whether an engine answers and has containers of this project."""
    command = ["docker", "compose", "--project-directory", str(ROOT), "ps", "--all", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())
