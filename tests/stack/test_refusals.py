"""What cannot work ends with one clear message and a code, before anything is started."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.stacks import Done, free_port, run

CONTAINER = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none"]


def up(tmp_path: Path, **environ: str) -> Done:
    environ = {"STATE_DIR": str(tmp_path / "state"), "PORT": str(free_port()), **environ}
    return run(sys.executable, "-m", "scripts.stack", "up", *CHOICE, timeout=120, **environ)


CHOICE = ["--cuda", "cpu", "--runtime", "host"]


def refused(done: Done, code: int, *texts: str) -> None:
    done.check(code).says("error: ", "needed: ", "to do: ", *texts)
    assert done.output.count("error: ") == 1, done.output
    assert "Traceback" not in done.output, done.output


def test_a_wrong_setting(tmp_path: Path) -> None:
    done = up(tmp_path, MAX_MODEL_LEN="lots")
    refused(done, 2, "MAX_MODEL_LEN='lots'", "whole number", ".env")
    assert not (tmp_path / "state").exists()


def test_an_unknown_variant() -> None:
    done = run(sys.executable, "-m", "scripts.stack", "up", "--cuda", "99")
    refused(done, 2, "CUDA='99'", "cpu")


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = up(tmp_path, PORT=str(port))
    refused(done, 8, f"127.0.0.1:{port}", str(os.getpid()), f"PORT={port + 1}")
    assert not (tmp_path / "state").exists()


def test_a_full_disk_before_the_build(tmp_path: Path, small_disk) -> None:
    disk = small_disk(40)
    done = up(tmp_path, STATE_DIR=str(disk / "state"))
    refused(done, 7, "GB free", "4.4 GB", "make room")
    assert not (disk / "state").exists()


def test_a_missing_engine(tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/no.sock"
    done = run(
        sys.executable, "-m", "scripts.stack", "up", "--runtime", "docker", DOCKER_HOST=nowhere
    )
    refused(done, 9, "no Docker engine answers", "make engine", "RUNTIME=host")


@pytest.mark.docker
def test_a_build_whose_index_does_not_answer_ends_within_a_minute_and_names_it() -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    mirrors = {"PYTORCH_INDEX_URL": f"{closed}/whl", "GITHUB_URL": closed}
    run("make", "build", CUDA="cpu", RUNTIME="docker").check()  # The stages before it.
    begin = time.monotonic()
    done = run("make", "build", CUDA="118", RUNTIME="docker", **mirrors)
    assert time.monotonic() - begin < 60, done.explain("an end within a minute")
    # GNU make ends with 2 whatever the recipe's code was.
    done.check(2).says("Error 11", f"{closed}/whl/cu118/torch-2.7.1", "PYTORCH_INDEX_URL", "WHEELS")
    last = done.output[done.output.rindex("error: ") :]
    assert "does not answer" in last and "Traceback" not in done.output, last


@pytest.mark.docker
def test_a_taken_port_under_docker(images: Done) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(
            sys.executable, "-m", "scripts.stack", "up", "--cuda", "cpu", "--runtime", "docker",
            PORT=str(port), COMPOSE_PROJECT_NAME="glm4-test-port",
        )  # fmt: skip
    refused(done, 8, f"127.0.0.1:{port}")


@pytest.mark.docker
def test_a_missing_model(images: Done) -> None:
    done = run(*CONTAINER, "--tmpfs", "/models", "--env", "MODEL_ID=a/b", "glm4-stack:dev-cpu")
    refused(done, 3, "/models/a/b is not there", "docker compose run --rm download")


@pytest.mark.docker
def test_a_wrong_setting_in_a_container(images: Done) -> None:
    for image in ("glm4-stack:dev-cpu", "glm4-stack:dev-download"):
        done = run(*CONTAINER, "--env", "DTYPE=int3", image)
        refused(done, 2, "DTYPE='int3'", "auto or bfloat16 or float16 or float32")
