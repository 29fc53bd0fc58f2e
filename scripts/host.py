"""The host runtime: the same locks, programs and supervision without a Docker engine."""

import contextlib
import ctypes.util
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO

import psutil

from scripts import errors, foreground, keys, plan
from scripts.plan import ROOT, Plan
from scripts.settings import MOST_REPLICAS, Settings
from scripts.variants import IMAGES

# A path of a Unix socket holds 107 bytes; supervisor adds a suffix while it creates one.
_SOCKET_PATH = 107 - len("/supervisor.sock.12345678")
# docker/haproxy.cfg is written for it; Ubuntu 22.04 has it.
_LEAST_HAPROXY = (2, 4)
_DOTTED = ".".join(map(str, _LEAST_HAPROXY))
# What HAProxy loads that a small system may lack, as Debian and Ubuntu call it.
_OF_HAPROXY = re.compile(r"lib(lua|opentracing)[\w.-]*")


def state_folder() -> Path:
    """Return the one folder that holds everything this runtime makes."""
    return Path(os.environ.get("STATE_DIR") or ROOT / ".state").resolve()


def _run_folder(state: Path) -> Path:
    run = state / "run"
    if len(str(run)) <= _SOCKET_PATH:
        return run
    name = hashlib.sha256(str(state).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"glm4-stack-{os.getuid()}-{name}"


def supervisord() -> psutil.Process | None:
    """Return this runtime's running supervisord, if there is one."""
    pidfile = _run_folder(state_folder()) / "supervisord.pid"
    try:
        process = psutil.Process(int(pidfile.read_text()))
        # A pid file outlives a crash, and its number may be another process's by now.
        ours = str(ROOT / "docker" / "supervisord.conf") in process.cmdline()
        return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, psutil.Error):
        return None


def started_with() -> dict[str, str]:
    """Return the settings that the running server was started with, as environment variables."""
    try:
        text = (_run_folder(state_folder()) / "started-with.json").read_text(encoding="utf-8")
        return json.loads(text)["environ"]
    except (OSError, ValueError, KeyError):
        return {}


class HostRuntime:
    """Virtual environments and processes of this user, below one folder."""

    def __init__(self, chosen: Plan) -> None:
        self.plan = chosen
        self.state_dir = state_folder()
        self.run_dir = _run_folder(self.state_dir)
        self.log = self.state_dir / "log" / "vllm.log"
        self.environ = {
            **chosen.environ,
            "MODELS_DIR": str(self.state_dir / "models"),
            "CACHES_DIR": str(self.state_dir / "caches"),
            "KEYS_DIR": str(self.state_dir / "keys"),
            "RUN_DIR": str(self.run_dir),
            "PYTHONUNBUFFERED": "1",
        }
        self._program: str | None = None
        # The environments keep their bytecode, which saves half of vLLM's start.
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def _venv(self, name: str) -> Path:
        """Return the environment's folder: its name changes with all that decides its content."""
        parts = [(IMAGES / f"{name}.lock").read_bytes(), Path(self._python()).resolve()]
        parts.append((ROOT / "scripts" / "install.py").read_bytes())
        digest = hashlib.sha256(b"".join(os.fsencode(part) for part in parts)).hexdigest()
        return self.state_dir / "venvs" / f"{name}-{digest[:12]}"

    def _venv_python(self, name: str) -> str:
        return str(self._venv(name) / "bin" / "python")

    @staticmethod
    def _python() -> str:
        """Return a Python 3.11: the locks' wheels are built for it."""
        if sys.version_info[:2] == (3, 11):
            return sys.executable
        found = shutil.which("python3.11")
        if found:
            return found
        raise errors.HostUnfit(
            f"Python {sys.version_info[0]}.{sys.version_info[1]}",
            "Python 3.11, which the locks are made for",
            "install python3.11 (apt, conda create python=3.11, or `uv python install 3.11`)",
        )

    def check_tools(self) -> None:
        """Raise when this host lacks Python or a compiler; changes nothing."""
        python = self._python()
        if self.plan.variant.cuda:
            _require_compiler(python)

    def check_room(self) -> None:
        """Raise when there is no room for the environments."""
        if not self._complete(self.plan.variant.name):
            # The environment, and the cache of wheels it is installed from.
            plan.check_room(self.state_dir, 2 * self.plan.variant.size_gb, "the environment")

    def check_gpu(self) -> None:
        """Nothing stands between this host's processes and its GPU."""

    def check_port(self) -> None:
        """Raise when another process listens where the endpoint would."""
        if not supervisord():
            plan.check_port(self.plan)

    def _complete(self, name: str) -> bool:
        return (self._venv(name) / "complete").exists()

    def is_built(self) -> bool:
        """Whether the environments are there."""
        return all(self._complete(name) for name in ("download", self.plan.variant.name))

    def build(self) -> None:
        """Install the environments of the locks, each once."""
        for name in ("download", self.plan.variant.name):
            if self._complete(name):
                continue
            venv = self._venv(name)
            print(f"build: installing images/{name}.lock into {venv}", flush=True)
            for stale in venv.parent.glob(f"{name}-*"):
                shutil.rmtree(stale)
            venv.parent.mkdir(parents=True, exist_ok=True)
            lock = str(IMAGES / f"{name}.lock")
            command = [self._python(), "-m", "scripts.install", lock, str(venv)]
            for folder in (str(ROOT / "docker" / "wheels"), self.environ.get("WHEELS")):
                command += ["--wheels", folder] if folder else []
            environ = dict(self.environ)
            if "CA_BUNDLE" in environ:
                environ["PIP_CERT"] = environ["CA_BUNDLE"]
            # uv lies beside the Python of the project's own environment.
            environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
            code = subprocess.run(command, cwd=ROOT, env=environ).returncode
            if code:
                raise _ended("the installation", code)
            (venv / "complete").touch()
        self._libraries()
        self._haproxy()

    def _libraries(self) -> None:
        """Bring the variant's Debian packages that this host lacks, without being root.

        Raises:
            HostUnfit: apt cannot fetch them.
        """
        target = self.state_dir / "lib"
        # LD_LIBRARY_PATH is read at the start of a process, so of those that we start.
        known = [str(target), self.environ.get("LD_LIBRARY_PATH", "")]
        self.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, known))
        packages = (IMAGES / f"{self.plan.variant.name}.apt").read_text().split()
        # What is no shared library (a compiler) is asked for in check_build.
        for package in filter(re.compile(r"lib[a-z]+\d+$").match, packages):
            stem = package.removeprefix("lib").rstrip("0123456789")
            if ctypes.util.find_library(stem) or any(target.glob(f"lib{stem}.so*")):
                continue
            print(f"build: fetching Debian's {package} into {target}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                if not _fetch([package], Path(folder)):
                    raise errors.HostUnfit(
                        f"this host lacks {package}",
                        f"its library, which vLLM's {self.plan.variant.name} build loads",
                        f"as root: apt-get update && apt-get install {package}"
                        " (elsewhere: your system's package of that library)",
                    )
                target.mkdir(parents=True, exist_ok=True)
                for library in Path(folder, "root").rglob(f"lib{stem}.so.*"):
                    shutil.copy(library, target / library.name)

    def _haproxy(self) -> str:
        """Return the HAProxy to run, or nothing where this host has none and none can be had."""
        if self._program is None:
            self._program = self._find_haproxy()
        return self._program

    def _find_haproxy(self) -> str:
        own = self.state_dir / "haproxy"
        path = f"{self.environ.get('PATH', '')}:/usr/sbin:{own}/usr/sbin"
        if not shutil.which("haproxy", path=path) and not own.exists():
            print(f"build: fetching Debian's haproxy into {own}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                if _fetch(["haproxy"], Path(folder), _OF_HAPROXY):
                    shutil.copytree(Path(folder, "root"), own, symlinks=True)
        program = shutil.which("haproxy", path=path)
        if not program:
            return ""
        self.environ["PATH"] = path
        libraries = [str(found.parent) for found in own.glob("usr/lib/*/liblua5*.so.0")]
        if program.startswith(str(own)):
            known = [*libraries[:1], self.environ.get("LD_LIBRARY_PATH", "")]
            self.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, known))
        done = subprocess.run(
            [program, "-v"], env=self.environ, capture_output=True, text=True, timeout=30
        )
        version = re.search(r"version (\d+)\.(\d+)", done.stdout)
        good = version and (int(version[1]), int(version[2])) >= _LEAST_HAPROXY
        return program if good else ""

    def _require_gateway(self) -> None:
        """Raise where something is asked for that a gateway must do, and there is none."""
        settings = self.plan.settings
        if self._haproxy():
            return
        wanted = {
            f"HOST={settings.host}": settings.open_to_others,
            "TLS_CERT": settings.tls_cert,
            "REPLICAS": settings.replicas > 1,
            "a key": keys.load(self.state_dir / "keys"),
        }
        for name in (name for name, given in wanted.items() if given):
            raise errors.HostUnfit(
                f"{name} is asked for, and this host has no HAProxy {_DOTTED} or newer",
                "HAProxy, which is the gateway",
                "as root: apt-get install haproxy; or without a gateway: HOST=127.0.0.1, one"
                " replica, no TLS and no keys",
            )
        print(
            "up: this host has no HAProxy, so vLLM itself answers on 127.0.0.1: without keys, TLS,"
            " replicas and the list of routes. As root: apt-get install haproxy",
            flush=True,
        )

    def key(self, *arguments: str) -> int:
        """Run scripts/key.py on this runtime's keys, and return its code."""
        command = [sys.executable, "-m", "scripts.key", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environ).returncode

    def restart(self) -> int:
        """Restart the replicas one by one, and return the code of that."""
        command = [self._venv_python(self.plan.variant.name), "-m", "scripts.restart"]
        return subprocess.run(command, cwd=ROOT, env=self.environ).returncode

    def download(self) -> None:
        """Bring the model into the state folder; in a rehearsal from a hub of our own."""
        self._require_gateway()
        (self.state_dir / "models").mkdir(parents=True, exist_ok=True)
        environ = dict(self.environ)
        with contextlib.ExitStack() as stack:
            if self.plan.rehearsal:
                origin = str(self.state_dir / "rehearsal")
                python = self._venv_python(self.plan.variant.name)
                self._job([python, "-m", "scripts.rehearsal", "--output", origin], environ)
                environ["MODELSCOPE_ENDPOINT"] = stack.enter_context(self._hub(origin))
            self._job([self._venv_python("download"), "-m", "scripts.download"], environ)

    def job(self, name: str, *arguments: str) -> str:
        """Run a job of the download environment on the models folder; return what it prints."""
        if not self._complete("download"):
            self.build()
        (self.state_dir / "models").mkdir(parents=True, exist_ok=True)
        command = [self._venv_python("download"), "-m", f"scripts.{name}", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ, stdout=subprocess.PIPE, text=True, timeout=600
        )
        if done.returncode:
            raise _ended(f"`scripts.{name}`", done.returncode)
        return done.stdout

    def tool(
        self,
        service: str,
        *arguments: str,
        shown: Mapping[str, Path] | None = None,
        **streams: IO | None,
    ) -> int:
        """Run a one-shot of the variant's environment, and return its code.

        `shown` are further arguments that name files. `streams` are its `stdin` and `stdout`;
        without them it reads nothing.
        """
        for name, path in (shown or {}).items():
            arguments += (name, str(path.resolve()))
        python = self._venv_python(self.plan.variant.name)
        module = f"scripts.{service.replace('-', '_')}"
        run = {"cwd": ROOT, "env": self.environ}
        return foreground.run([python, "-m", module, *arguments], **streams, **run)

    def _job(self, command: list[str], environ: dict[str, str]) -> None:
        code = subprocess.run(command, cwd=ROOT, env=environ).returncode
        if code:
            raise _ended(f"`{command[2]}`", code)

    @contextlib.contextmanager
    def _hub(self, folder: str) -> Iterator[str]:
        """Serve a folder of models on a free port of this host for as long as it is needed."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [self._venv_python("download"), "-m", "scripts.hub", "--models", folder]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        log = self.state_dir / "log" / "hub.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            hub = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=stream, stderr=subprocess.STDOUT
            )
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            deadline = time.monotonic() + 30
            while True:
                try:
                    direct.open(f"{url}/health", timeout=2).close()
                    break
                except OSError:
                    if hub.poll() is not None or time.monotonic() > deadline:
                        text = log.read_text()[-2000:]
                        raise errors.HubUnreachable(
                            f"the hub of the rehearsal did not start:\n{text}", "a hub", "see above"
                        ) from None
                    time.sleep(0.2)
            yield url
        finally:
            hub.terminate()
            hub.wait(timeout=30)

    def start(self) -> None:
        """Start the supervisor in the background, unless it runs already with these settings."""
        wanted = self._started_with()
        record = self.run_dir / "started-with.json"
        if supervisord():
            if record.exists() and record.read_text(encoding="utf-8") == wanted:
                return
            print("up: the settings have changed; restarting the server", flush=True)
            self.stop()
            plan.check_port(self.plan)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Only for this user: the settings may hold a key.
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        record.write_text(wanted, encoding="utf-8")
        command = [self._venv_python(self.plan.variant.name), "-m", "scripts.supervise"]
        if self._haproxy():
            command += ["--gateway"]
            count = self.plan.settings.replicas or MOST_REPLICAS
            # One port for the agent, and one for each replica, behind the gateway.
            first = _free_ports(count + 1)
            own = {"REPLICA_HOST": "127.0.0.1", "AGENT_PORT": first, "REPLICA_PORT": first + 1}
            self.environ.update({name: str(value) for name, value in own.items()})
            self.environ["METRICS_BIND_INSIDE"] = (
                self.plan.environ.get("METRICS_BIND") or f"{self.run_dir}/metrics.sock"
            )
        with self.log.with_name("supervise.log").open("w") as stream:
            # A session of its own: it goes on when this terminal closes.
            self._supervise = subprocess.Popen(
                [*command, "--log", str(self.log)],
                cwd=ROOT,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def open(self) -> None:
        """Nothing more to start: the gateway runs under the same supervisor."""

    def _started_with(self) -> str:
        names = ["MODEL", *(field.name.upper() for field in fields(Settings))]
        environ = {name: self.plan.environ[name] for name in names if name in self.plan.environ}
        content = {"environ": environ, "venv": str(self._venv(self.plan.variant.name))}
        return json.dumps(content, sort_keys=True)

    def state(self) -> tuple[str, str]:
        """Return (ready, starting or ended; what is known about it)."""
        process = getattr(self, "_supervise", None)
        code = process.poll() if process else None
        if code is not None:
            return "ended", f"the supervisor ended with code {code}"
        if not process and not supervisord():
            return "ended", "no supervisor runs"
        command = [self._venv_python(self.plan.variant.name), "-m", "scripts.health"]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            return "starting", done.stdout.strip()
        # The gateway believes it a moment later.
        context = ssl._create_unverified_context()
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        try:
            urllib.request.build_opener(*handlers).open(f"{self.url()}/health", timeout=5).close()
        except OSError as error:
            return "starting", f"the gateway says {error}"
        return "ready", done.stdout.strip()

    def tail(self, lines: int) -> str:
        """Return the last lines of the server's logs."""
        found = []
        names = ("supervise.log", "gateway.log", self.log.name)
        for path in (self.log.with_name(name) for name in names):
            with contextlib.suppress(OSError):
                found += path.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(found)

    def url(self) -> str:
        """Return the endpoint's base URL."""
        return self.plan.endpoint

    def logs_hint(self) -> str:
        """Return the command that shows the logs."""
        return f"make logs   ({self.log})"

    def logs(self) -> int:
        """Follow the logs until Ctrl-C."""
        names = ("supervise.log", "gateway.log")
        files = [str(self.log), *(str(self.log.with_name(name)) for name in names)]
        return subprocess.run(["tail", "-n", "100", "-F", *files]).returncode

    def stop(self) -> None:
        """Stop what `start` started, and wait for its end."""
        process = supervisord()
        if not process:
            return
        process.send_signal(signal.SIGTERM)
        # Supervisor ends the gateway and then vLLM the hard way after DRAIN_SECONDS and a margin.
        limit = 2 * self.plan.settings.drain_seconds + 40
        try:
            process.wait(timeout=limit)
        except psutil.TimeoutExpired:
            raise errors.ServeFailed(
                f"supervisord (pid {process.pid}) did not end in {limit} s",
                "its end",
                f"look at {self.log}, then end it: kill -9 {process.pid}",
            ) from None

    def status(self) -> None:
        """Print the state of the server."""
        name, detail = self.state()
        print(f"host runtime in {self.state_dir}: {name} ({detail})")


def _require_compiler(python: str) -> None:
    """Raise HostUnfit without gcc or Python's headers: Triton compiles its launchers with them."""
    script = "import sysconfig; print(sysconfig.get_path('include'))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60)
    headers = Path(done.stdout.strip(), "Python.h")
    missing = [] if shutil.which("gcc") else ["gcc"]
    missing += [] if headers.exists() else [str(headers)]
    if missing:
        raise errors.HostUnfit(
            f"this host lacks {' and '.join(missing)}",
            "a C compiler and the headers of Python, with which Triton compiles at run time",
            "as root: apt-get install gcc libc6-dev python3-dev (conda has both, too)",
        )


def _ended(what: str, code: int) -> errors.StackError:
    error = errors.StackError(f"{what} ended with code {code}", "code 0", "see its message above")
    error.exit_code = code if code > 0 else 1
    return error


def _free_ports(count: int) -> int:
    """Return the first of so many free ports of this host in a row."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first
    raise errors.PortTaken(f"no {count} free ports in a row", "so many", "end what listens here")


def _fetch(packages: list[str], folder: Path, more: re.Pattern | None = None) -> bool:
    """Unpack Debian packages into `folder`/root, with package lists of our own: needs no root.

    What they depend on comes too, where its name matches `more`.
    """
    if not shutil.which("apt-get"):
        return False
    (folder / "lists" / "partial").mkdir(parents=True)
    options = [f"-oDir::State::lists={folder}/lists", "-oDir::Cache::pkgcache="]
    options += ["-oDir::Cache::srcpkgcache=", "-oAPT::Sandbox::User=root", "-qq"]
    options += ["-oAcquire::Retries=0", "-oAcquire::http::Timeout=10"]
    if subprocess.run(["apt-get", *options, "update"], cwd=folder, timeout=300).returncode:
        return False
    if more:
        command = ["apt-cache", *options, "depends", "--recurse", "--important", *packages]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        found = {line for line in done.stdout.splitlines() if more.fullmatch(line)}
        packages = [*packages, *sorted(found)]
    download = ["apt-get", *options, "download", *packages]
    if subprocess.run(download, cwd=folder, timeout=300).returncode:
        return False
    unpack = [["dpkg", "--extract", str(deb), str(folder / "root")] for deb in folder.glob("*.deb")]
    return all(subprocess.run(words, timeout=60).returncode == 0 for words in unpack)
