"""A bundle takes everything along: installed from a copy, with images and model from it alone."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from scripts.rehearsal import DIALOGUES, MODEL_ID
from tests.stacks import ROOT, Done, Stack, free_port, run

pytestmark = pytest.mark.docker
PARTS = ("cpu", "gateway", "download")


def ask(url: str) -> str:
    message = {"role": "user", "content": DIALOGUES[0].question}
    body = {"model": "glm-4-9b-chat", "messages": [message], "temperature": 0}
    reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    reply.raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


def packed(kind: str, place: Path) -> Iterator[Path]:
    """Make a bundle under names of its own, copy it away, and leave nothing of it behind."""
    token = uuid.uuid4().hex[:8]
    environ = {"VERSION": f"0.0.0-{token}", "IMAGE": f"glm4-bundle-{token}", "RUNTIME": kind}
    project = {"COMPOSE_PROJECT_NAME": f"glm4-bundle-{token}"}
    name = f"glm4-stack-{environ['VERSION']}-cpu" + ("-host" if kind == "host" else "")
    try:
        run("make", "bundle", "CUDA=cpu", **environ, **project, timeout=1800).check()
        # What has made it is of no use to what comes of it.
        Stack("", {**environ, **project}).compose("--profile", "*", "down", "--volumes")
        shutil.move(ROOT / "dist" / name, place / name)
        yield place / name
    finally:
        stack = Stack("", {**environ, **project})
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")
        names = [f"{environ['IMAGE']}:{environ['VERSION']}-{part}" for part in PARTS]
        run("docker", "image", "rm", "--force", *names)
        shutil.rmtree(ROOT / "dist" / name, ignore_errors=True)
        shutil.rmtree(place / name, ignore_errors=True)


@pytest.fixture(scope="module")
def bundle(images: Done, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle for hosts with Docker."""
    yield from packed("docker", tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def host_bundle(images: Done, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle for hosts without."""
    yield from packed("host", tmp_path_factory.mktemp("copy"))


def test_a_copy_with_a_changed_byte_is_refused_by_name(bundle: Path) -> None:
    weights = sorted((bundle / "model").glob("*.safetensors"))[0]
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size // 2)
        old = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([old[0] ^ 1]))
    refused = run(str(bundle / "install.sh"))
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size // 2)
        stream.write(old)
    refused.check(6).says(f"model/{weights.name}")
    assert not (bundle / ".env").exists()


def test_it_loads_its_own_images_and_model_and_answers(bundle: Path) -> None:
    names = [line.split()[0] for line in (bundle / "IMAGES").read_text().splitlines()]
    run("docker", "image", "rm", *names).check()
    project, port = f"glm4-test-{uuid.uuid4().hex[:8]}", free_port()
    # No registry and no hub: what is not in the bundle cannot be had.
    plain = {"COMPOSE_PROJECT_NAME": project, "PORT": str(port), "HTTPS_PROXY": "http://[::1]:9"}
    # And a name that many a shell has set for something else.
    plain["VERSION"] = "another"
    compose = ["docker", "compose", "--project-directory", str(bundle), "--profile", "*"]
    try:
        first = run(str(bundle / "install.sh"), **plain).check()
        first.says("loading", *names, f"{MODEL_ID} at v1 is complete and verified", "ready")
        assert ask(f"http://127.0.0.1:{port}") == DIALOGUES[0].answer
        again = run(str(bundle / "install.sh"), **plain).check()
        again.says("the images are there", "nothing to do", "ready")
    finally:
        run(*compose, "down", "--volumes", "--timeout", "5", **plain)


def test_a_host_without_docker_runs_it_as_any_user_and_without_a_network(
    host_bundle: Path, tmp_path: Path, images: Done
) -> None:
    base = run("docker", "image", "ls", "--quiet", "glm4-stack-base:bookworm").output.strip()
    target = tmp_path / "there"
    ports = {"PORT": str(free_port()), "AGENT_PORT": str(free_port())}
    ports["REPLICA_PORT"] = str(free_port())
    try:
        run(str(host_bundle / "install.sh"), "--host", str(target), **ports).check().says("ready")
        assert ask(f"http://127.0.0.1:{ports['PORT']}") == DIALOGUES[0].answer
        process = (target / "state" / "supervise.pid").read_text().strip()
        maps = Path(f"/proc/{process}/maps").read_text()
        # The image's own C library, whatever the host has.
        assert f"{target}/root/usr/lib/x86_64-linux-gnu/libc.so.6" in maps
        run(str(target / "run"), "stop", **ports).check().says("stopped")
        if not base or os.getuid():
            pytest.skip("needs root, and the base image of `make engine` as another host")
        run("chown", "-R", "1234", str(target)).check()
        # No Python of the host's is needed.
        hidden = ["--tmpfs=/usr/lib/python3.11", "--user=1234", "--network=none", "--env=HOME=/tmp"]
        script = f"{target}/run start && {target}/run status && {target}/run stop"
        command = ["docker", "run", "--rm", *hidden, f"--volume={target}:{target}"]
        done = run(*command, "--entrypoint=sh", "glm4-stack-base:bookworm", "-c", script)
        done.check().says("ready at 127.0.0.1:8000", "stopped")
    finally:
        run(str(target / "run"), "stop", **ports)
        shutil.rmtree(target, ignore_errors=True)


def test_a_folder_that_cannot_be_served_from_is_refused(host_bundle: Path, tmp_path: Path) -> None:
    done = run(str(host_bundle / "install.sh"), "--host", str(tmp_path / "a b"))
    done.check(2).says("choose another")
    done = run(str(host_bundle / "install.sh"))
    done.check(2).says("./install.sh --host DIR")
