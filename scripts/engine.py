"""Bring up a Docker engine on a Debian host, and a base image where no registry answers."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts import errors
from scripts.compose import BASE, LOCAL_BASE
from scripts.host import state_folder

# Debian 12's own docker.io lacks compose and buildx; sid's packages run on it. Names only from
# sid: everything else, runc above all, comes from the host's release.
_FROM_SID = ["docker.io/sid", "docker-cli/sid", "docker-compose/sid", "docker-buildx/sid"]
_PACKAGES = [*_FROM_SID, "iptables", "mmdebstrap"]
_BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


def _say(text: str) -> None:
    print(f"engine: {text}", flush=True)


def _answers() -> str:
    """Return the version of the engine that answers, or an empty string."""
    if not shutil.which("docker"):
        return ""
    command = ["docker", "info", "--format", "{{json .ServerVersion}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return json.loads(done.stdout) if done.returncode == 0 else ""


def _check() -> None:
    """Raise EngineMissing where this job cannot help."""
    release = Path("/etc/os-release")
    text = release.read_text(encoding="utf-8") if release.exists() else "an unknown system"
    if not re.search(r"^ID=debian$", text, re.MULTILINE) or not shutil.which("apt-get"):
        raise errors.EngineMissing(
            f"no engine answers, and this is not Debian ({text.splitlines()[0]})",
            "Docker engine 25 or newer with compose and buildx",
            "install it as docs.docker.com/engine/install says, or use make up RUNTIME=host",
        )
    if os.getuid() != 0:
        raise errors.EngineMissing(
            "no engine answers, and this user is not root",
            "root, to install and start one",
            "sudo make engine; or make up RUNTIME=host, which needs no engine",
        )


def _mirror() -> str:
    """Return the Debian mirror that this host's apt uses already."""
    files = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for uri in re.findall(r"^(?:URIs:|deb(?:\s+\[.*?\])?)\s+(\S+)", text, re.MULTILINE):
            if uri.rstrip("/").endswith("/debian"):
                return uri
    raise errors.EngineMissing(
        "no Debian mirror in /etc/apt", "one `deb` source", "add your mirror to /etc/apt"
    )


def _run(command: list[str], what: str, log: Path, timeout: float) -> None:
    with log.open("a") as stream:
        done = subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            timeout=timeout,
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise errors.EngineMissing(
            f"{what} ended with code {done.returncode}:\n{tail}",
            "its success",
            f"the whole log is {log}; correct the cause and run `make engine` again",
        )


def _install(log: Path) -> None:
    """Install the engine through an apt state of its own: the host's sources do not change."""
    apt = state_folder() / "apt"
    for folder in ("sources", "preferences", "lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    for source in Path("/etc/apt/sources.list.d").glob("debian*"):
        shutil.copy(source, apt / "sources" / source.name)
    if Path("/etc/apt/sources.list").exists():
        shutil.copy("/etc/apt/sources.list", apt / "sources" / "host.list")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources" / "sid.sources").write_text(
        f"Types: deb\nURIs: {_mirror()}\nSuites: sid\nComponents: main\nSigned-By: {keyring}\n"
    )
    (apt / "preferences" / "sid").write_text("Package: *\nPin: release n=sid\nPin-Priority: 50\n")
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": apt / "sources",
        "Dir::Etc::preferencesparts": apt / "preferences",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache::archives": apt / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Acquire::Retries": "3",
    }
    get = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in options.items())]
    _say(f"installing {', '.join(_PACKAGES)} (log: {log})")
    _run([*get, "update"], "apt-get update", log, timeout=600)
    install = [*get, "--no-install-recommends", "install", *_PACKAGES]
    _run(install, "apt-get install", log, timeout=1200)


def _start(log: Path) -> str:
    """Start the daemon and return its version when it answers."""
    if Path("/run/systemd/system").is_dir():
        _say("starting docker.service")
        _run(["systemctl", "enable", "--now", "docker"], "systemctl", log, timeout=120)
    else:
        _say(f"starting dockerd by hand: no systemd here (log: {log})")
        with log.open("a") as stream:
            # A session of its own: it outlives this command, as a service would.
            subprocess.Popen(
                ["dockerd"],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    deadline = time.monotonic() + 90
    while not (version := _answers()):
        if time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise errors.EngineMissing(
                f"the engine does not answer after 90 s:\n{tail}",
                "a kernel and rights that dockerd can work with (inside a container: --privileged)",
                f"the whole log is {log}; or use make up RUNTIME=host",
            )
        time.sleep(0.5)
    return version


def _has_image(name: str) -> bool:
    command = ["docker", "image", "inspect", name]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def _base_image(named: str, log: Path) -> None:
    """Make a local base image from Debian's packages when the named one cannot be pulled."""
    if _has_image(named) or _has_image(LOCAL_BASE):
        return
    try:
        pull = subprocess.run(["docker", "pull", "-q", named], capture_output=True, timeout=90)
        if pull.returncode == 0:
            return
    except subprocess.TimeoutExpired:
        pass
    if not shutil.which("mmdebstrap"):
        _say(f"{named} cannot be pulled; `apt-get install mmdebstrap` lets me make a base image")
        return
    _say(f"{named} cannot be pulled; making {LOCAL_BASE} from Debian's packages (half a minute)")
    archive = state_folder() / "base.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    command = ["mmdebstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}"]
    # What a base image of Docker leaves out too.
    for path in ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"):
        command.append(f"--dpkgopt=path-exclude={path}")
    mirror = _mirror().rstrip("/")
    command += ["bookworm", str(archive), f"deb {mirror} bookworm main"]
    command += [f"deb {mirror} bookworm-updates main"]
    command += [f"deb {mirror}-security bookworm-security main"]
    try:
        _run(command, "mmdebstrap", log, timeout=900)
        change = ["--change", 'CMD ["python3"]']
        _run(["docker", "import", *change, str(archive), LOCAL_BASE], "import", log, timeout=300)
    finally:
        archive.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Do what is missing; nothing where an engine answers."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    log = state_folder() / "log" / "engine.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    version = _answers()
    if version:
        _say(f"Docker engine {version} answers")
    else:
        _check()
        if not (shutil.which("dockerd") and shutil.which("mmdebstrap")):
            _install(log)
        version = _start(log)
        _say(f"Docker engine {version} is up")
    _base_image(os.environ.get("BASE_IMAGE") or BASE, log)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
