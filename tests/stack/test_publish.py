"""Publishing to a registry, and a second engine that only pulls: `compose.yaml` and `.env` alone.

The tests are one story and run in this order. The commits, the registry and the second engine are
their own; the engine in the container runs this host's own programs on a data root of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts import host
from scripts.compose import BASE, LOCAL_BASE
from scripts.rehearsal import DIALOGUES
from tests.stacks import ROOT, Done, free_port, run, wait_for

pytestmark = pytest.mark.docker
MINE = f"glm4-publish-{uuid.uuid4().hex[:8]}"
# What skopeo loads that a small system may lack.
OF_SKOPEO = re.compile(r"lib(gpgme|assuan|devmapper)[\d.]*")
PARTS = ("cpu", "download", "gateway")
# A publish that only has to get past its tests runs the quickest of them.
QUICK = {"PYTEST_ADDOPTS": "-k labels", "IMAGE": MINE}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's registry and skopeo in a folder of their own; this host's packages stay."""
    folder = tmp_path_factory.mktemp("tools")
    if not host._fetch(["docker-registry", "skopeo"], folder, OF_SKOPEO):
        pytest.skip("needs apt-get and a Debian mirror, for docker-registry and skopeo")
    return folder / "root"


@dataclass
class Registry:
    """Debian's registry as a process of this host, with all it has in one folder."""

    program: Path
    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def settings(self, store: str, **more: object) -> str:
        storage = {"filesystem": {"rootdirectory": store}, **more}
        http = {"addr": self.name}
        # JSON is YAML.
        return json.dumps({"version": 0.1, "storage": storage, "http": http})

    def start(self) -> None:
        self.store.mkdir(exist_ok=True)
        settings = self.folder / "settings.yml"
        settings.write_text(self.settings(str(self.store)))
        with (self.folder / "log").open("a") as log:
            command = [str(self.program), "serve", str(settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        address = f"http://{self.name}/v2/"
        wait_for(lambda: not run("curl", "-sf", address).returncode, 20, "a registry")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)

    def size(self) -> int:
        """Bytes of everything in it."""
        # Uploads come and go while one looks.
        done = run("du", "-sb", str(self.store))
        return int(done.output.splitlines()[-1].split()[0])

    def digest(self, reference: str) -> str:
        """What a tag names, or an empty string."""
        form = "{{json .Manifest}}"
        done = run("docker", "buildx", "imagetools", "inspect", reference, "--format", form)
        return json.loads(done.output)["digest"] if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def registry(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    found = Registry(
        tools / "usr/bin/docker-registry", tmp_path_factory.mktemp("registry"), free_port()
    )
    found.start()
    yield found
    found.kill()
    shutil.rmtree(found.folder)


@dataclass
class Clone:
    """A copy of this tree with commits and tags of its own."""

    folder: Path
    environ: dict[str, str]

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        run("git", "-C", str(self.folder), *who, *arguments).check()

    def commit(self, tag: str = "") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", tag or "a change")
        if tag:
            self.git("tag", tag)

    def change(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def command(self, *registries: str) -> list[str]:
        publish = [".venv/bin/python", "-m", "scripts.publish", "--registry", ",".join(registries)]
        # As quick as zstd gets: the level is not what is tested here.
        publish += ["--cuda", "cpu", "--pause", "0.2", "--level", "1"]
        return ["env", f"--chdir={self.folder}", *publish]

    def publish(self, *registries: str, **environ: str) -> Done:
        began = time.monotonic()
        done = run(*self.command(*registries), **{**self.environ, **environ})
        said = [line for line in done.output.splitlines() if line.startswith("publish:")]
        print(f"publish, {time.monotonic() - began:.0f} s:", *said, sep="\n  ")
        return done

    def record(self, version: str) -> dict:
        return json.loads((self.folder / "published" / f"{version}.json").read_text())


@pytest.fixture(scope="module")
def clone(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").check()
    for name in filter(None, listed.output.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # With its time, by which make knows that the environment is newer than its lock.
            shutil.copy2(ROOT / name, folder / name)
    environ = {**QUICK, "PATH": f"{tools}/usr/bin:{os.environ['PATH']}"}
    libraries = [tools / "usr/lib/x86_64-linux-gnu", tools / "lib/x86_64-linux-gnu"]
    environ["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    made = Clone(folder, environ)
    made.git("init", "--quiet")
    (folder / ".git/info/exclude").write_text("/.venv\n")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    made.commit("v1.2.3")
    yield made
    listed = run("docker", "images", "--format", "{{.Repository}} {{.ID}}").output.splitlines()
    mine = {line.split()[-1] for line in listed if MINE in line}
    run("docker", "image", "rm", "--force", *mine)
    shutil.rmtree(folder)


def test_a_dirty_tree_is_refused_before_anything_is_done(clone: Clone, registry: Registry) -> None:
    left = clone.folder / "left.txt"
    left.touch()
    clone.publish(registry.name).check(22).says("changes: left.txt", "commit or remove")
    left.unlink()
    assert registry.size() < 100_000


def test_a_failed_test_is_refused(clone: Clone, registry: Registry) -> None:
    clone.change("docker/Dockerfile", 'title="glm4-stack gateway"', 'title="something else"')
    clone.commit()
    done = clone.publish(registry.name).check(22)
    done.says("something else", "tests of the images ended with code 1")
    clone.git("reset", "--quiet", "--hard", "v1.2.3")
    clone.publish(registry.name, PYTEST_ADDOPTS="-k no_such_test").check(22).says("code 5")
    assert registry.size() < 100_000


def test_a_broken_push_says_so_and_the_next_run_goes_on(clone: Clone, registry: Registry) -> None:
    environ = {**os.environ, **clone.environ}
    log = registry.folder / "publish.log"
    with log.open("w") as stream:
        broken = subprocess.Popen(
            clone.command(f"{registry.name}/team"),
            env=environ,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: registry.size() > 30e6 or broken.poll() is not None, 300, "a push")
        registry.kill()
        assert broken.wait(timeout=300) == 23, log.read_text()
    finally:
        if broken.poll() is None:
            os.killpg(broken.pid, signal.SIGKILL)
    said = log.read_text()
    assert "again in 0 s" in said and "again in 1 s" in said
    assert f"incomplete on {registry.name}/team" in said
    assert "goes on with what is missing" in said
    registry.start()
    reference = f"{registry.name}/team/{MINE}:1.2.3-cpu"
    assert not registry.digest(reference)

    done = clone.publish(f"{registry.name}/team").check()
    done.says("have passed their tests already", "(zstd)", "/team: complete, 3 images")
    record = clone.record("1.2.3")["registries"][f"{registry.name}/team"]
    for part in PARTS:
        there = registry.digest(f"{registry.name}/team/{MINE}:1.2.3-{part}")
        assert there == record[f"1.2.3-{part}"]
        for moving in (f"1.2-{part}", part):
            assert registry.digest(f"{registry.name}/team/{MINE}:{moving}") == there
    again = clone.publish(f"{registry.name}/team").check()
    assert again.output.count("there already") == 3 and "pushed" not in again.output


@dataclass
class PullingHost:
    """A second engine in a container, and a registry there that has what was pushed."""

    name: str
    registry: Registry
    notes: dict[str, float] = field(default_factory=dict)

    def inside(self, *command: str, **options: float) -> Done:
        # An empty folder of its own.
        return run("docker", "exec", "--workdir", "/root", self.name, *command, **options)

    def compose(self, *arguments: str) -> Done:
        began = time.monotonic()
        done = self.inside("docker", "compose", *arguments)
        self.notes[arguments[0]] = time.monotonic() - began
        return done

    def bring(self, compose: Path, settings: str) -> None:
        """Put compose.yaml and .env there, and nothing else."""
        env = self.registry.folder / "env"
        env.write_text(settings)
        for source, target in ((compose, "compose.yaml"), (env, ".env")):
            run("docker", "cp", "--quiet", str(source), f"{self.name}:/root/{target}").check()

    def pulled(self) -> int:
        """Bytes that its registry has sent so far."""
        log = self.inside("cat", "/registry.log").check().output
        return sum(map(int, re.findall(r'"GET /v2/\S+ HTTP/1.1" 200 (\d+)', log)))

    def images(self) -> dict[str, str]:
        """What the running services were made from."""
        containers = self.compose("ps", "--quiet").check().output.split()
        form = '{{index .Config.Labels "com.docker.compose.service"}} {{.Image}} {{.Id}}'
        lines = self.inside("docker", "inspect", "--format", form, *containers).check().output
        return dict(line.split(" ", 1) for line in lines.splitlines())


@pytest.fixture(scope="module")
def pulling(registry: Registry, tools: Path) -> Iterator[PullingHost]:
    name = f"{MINE}-host"
    base = next(
        image for image in (BASE, LOCAL_BASE) if not run("docker", "inspect", image).returncode
    )
    readonly = {"readonly": {"enabled": True}}
    settings = registry.folder / "readonly.yml"
    settings.write_text(registry.settings("/store", maintenance=readonly))
    mounts = {"/usr": "/usr", "/etc/alternatives": "/etc/alternatives"}
    mounts |= {registry.store: "/store", settings: "/readonly.yml", tools / "usr/bin": "/tools"}
    create = ["docker", "run", "--detach", "--privileged", "--name", name]
    create += [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
    # Its images: on a volume, for overlay2 does not lie on overlay2.
    create += ["--volume=/var/lib/docker", base, "dockerd"]
    found = PullingHost(name, registry)
    try:
        run(*create).check()
        serve = "exec /tools/docker-registry serve /readonly.yml > /registry.log 2>&1"
        run("docker", "exec", "--detach", name, "sh", "-c", serve).check()
        wait_for(
            lambda: not found.inside("docker", "info").returncode,
            60,
            "a second engine",
            lambda: run("docker", "logs", "--tail=20", name).output,
        )
        yield found
    finally:
        run("docker", "rm", "--force", "--volumes", name)


def settings(clone: Clone, version: str) -> str:
    """The .env of a host that rehearses with this version."""
    names = (f"published/{version}-cpu.env", "rehearsal.env")
    return "\n".join((clone.folder / name).read_text() for name in names)


def test_compose_yaml_and_env_alone_bring_up_an_endpoint(
    clone: Clone, pulling: PullingHost
) -> None:
    pulling.bring(clone.folder / "compose.yaml", settings(clone, "1.2.3"))
    before = pulling.inside("ls", "-A").check().output
    pulling.compose("pull", "--quiet").check()
    print(f"pulled {pulling.pulled() / 1e6:.0f} MB in {pulling.notes['pull']:.0f} s")
    pulling.compose("run", "--rm", "--no-TTY", "download").check().says("complete and verified")
    pulling.compose("up", "--detach", "--wait").check()
    print({name: f"{seconds:.0f} s" for name, seconds in pulling.notes.items()})
    known = DIALOGUES[0]
    message = {"role": "user", "content": known.question}
    body = json.dumps({"model": "glm-4-9b-chat", "messages": [message], "temperature": 0})
    ask = ["curl", "-sf", "http://127.0.0.1:8000/v1/chat/completions", "--data", body]
    answer = pulling.inside(*ask, "--header", "Content-Type: application/json").check()
    assert json.loads(answer.output)["choices"][0]["message"]["content"] == known.answer
    assert pulling.inside("ls", "-A").check().output == before


def test_a_moved_tag_does_not_change_what_runs(
    clone: Clone, registry: Registry, pulling: PullingHost
) -> None:
    before = pulling.images()
    for tag in ("cpu", "1.2.3-cpu"):
        reference = f"{registry.name}/team/{MINE}:{tag}"
        run("docker", "tag", f"{MINE}:1.2.3-gateway", reference).check()
        run("docker", "push", "--quiet", reference).check()
    record = clone.record("1.2.3")["registries"][f"{registry.name}/team"]
    assert registry.digest(reference) != record["1.2.3-cpu"]
    pulling.compose("pull", "--quiet").check()
    pulling.compose("up", "--detach", "--wait").check()
    assert pulling.images() == before

    # And `make publish` finds out, and leaves it as it is.
    moved = registry.digest(reference)
    done = clone.publish(f"{registry.name}/team").check(22)
    done.says(f"{reference} is there already", moved, record["1.2.3-cpu"], "never moves")
    assert registry.digest(reference) == moved


def test_a_change_of_our_scripts_sends_less_than_a_megabyte(
    clone: Clone, registry: Registry, pulling: PullingHost
) -> None:
    # The engine may have dropped from its cache by now what the one before was built from.
    clone.commit("v1.2.4")
    clone.publish(f"{registry.name}/team").check()
    pulling.bring(clone.folder / "compose.yaml", settings(clone, "1.2.4"))
    pulling.compose("pull", "--quiet").check()
    for name in ("health", "download", "gateway"):
        script = clone.folder / f"scripts/{name}.py"
        script.write_text(script.read_text(encoding="utf-8") + "\n# Changed.\n", encoding="utf-8")
    clone.commit("v1.2.5")
    stored, pulled = registry.size(), pulling.pulled()
    clone.publish(f"{registry.name}/team").check().says("cpu now names 1.2.5")
    pulling.bring(clone.folder / "compose.yaml", settings(clone, "1.2.5"))
    pulling.compose("pull", "--quiet").check()
    stored, pulled = registry.size() - stored, pulling.pulled() - pulled
    print(f"a change of our scripts: {stored / 1e3:.0f} kB pushed, {pulled / 1e3:.0f} kB pulled")
    assert 0 < stored < 1e6
    assert 0 < pulled < 1e6


def test_one_registry_after_the_other_and_a_dead_one_stops_no_other(
    clone: Clone, registry: Registry
) -> None:
    clone.commit()
    dead = f"127.0.0.1:{free_port()}"
    # Without skopeo, as far as this host has none.
    path = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": ""}
    done = clone.publish(dead, f"{registry.name}/other", **path).check(23)
    done.says(f"{dead} is left as it is", f"incomplete on {dead}", "no release: moves no tag")
    done.says(f"{registry.name}/other: complete", f"{dead}: incomplete", "docker login")
    if not shutil.which("skopeo"):
        done.says("(gzip)")
    [env] = (clone.folder / "published").glob("1.2.5-1-g*-cpu.env")
    assert f"\nSERVE_IMAGE={registry.name}/other/{MINE}@sha256:" in env.read_text()
    for part in PARTS:
        assert registry.digest(f"{registry.name}/other/{MINE}:{env.stem}".replace("cpu", part))
        assert not registry.digest(f"{registry.name}/other/{MINE}:{part}")


def test_a_clone_with_these_settings_fetches_instead_of_building(
    clone: Clone, registry: Registry
) -> None:
    [env] = (clone.folder / "published").glob("1.2.5-1-g*-cpu.env")
    shutil.copy(env, clone.folder / ".env")
    build = ["env", f"--chdir={clone.folder}", ".venv/bin/python", "-m", "scripts.stack", "build"]
    image = re.search(r"^SERVE_IMAGE=(.+)$", env.read_text(), re.MULTILINE)[1]
    for present in (False, True):
        assert (not run("docker", "image", "inspect", image).returncode) is present
        done = run(*build, "--cuda=cpu", "--runtime=docker").check()
        assert "building" not in done.output
    run(*build, "--cuda=121", "--runtime=docker").check(2).says("an image of cpu", "one of cu121")
