"""Fixtures: a stack of each runtime, brought up the way the README says, and torn down."""

import functools
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stacks import Done, Stack, free_port, run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--url", help="base URL of a running endpoint for the smoke tests")
    parser.addoption(
        "--variants", default="cpu,cu121,cu130", help="the images that tests/image builds"
    )
    parser.addoption("--gpu-variant", default="cu121", help="the image that tests/gpu runs")
    parser.addoption("--image-root", type=Path, help="its unpacked root instead, without Docker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    engine = shutil.which("docker") and not run("docker", "info").returncode
    gpu = shutil.which("nvidia-smi") and not run("nvidia-smi").returncode
    for item in items:
        if item.get_closest_marker("docker") and not engine:
            item.add_marker(pytest.mark.skip(reason="needs a Docker engine: run `make engine`"))
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and its driver"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount file systems of so many MB, and take them down again."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
        if run(*options).returncode:
            pytest.skip("needs root, to mount a small file system")
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        run("umount", str(where)).check()


@pytest.fixture(scope="session")
def host_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A host runtime from nothing, by `make up RUNTIME=host`."""
    port = free_port()
    environ = {
        "STATE_DIR": str(tmp_path_factory.mktemp("host")),
        "PORT": str(port),
        "RUNTIME": "host",
        "CUDA": "cpu",
        "LOG_FORMAT": "json",
    }
    stack = Stack(f"http://127.0.0.1:{port}", environ)
    try:
        stack.notes["up"] = stack.run("make", "up").check().output
        yield stack
    finally:
        stack.run("make", "down")
        shutil.rmtree(environ["STATE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def build_images() -> Callable[[str], Done]:
    """Build the images of a variant, given as in CUDA=, by `make build`, once."""

    @functools.cache
    def build(cuda: str) -> Done:
        return run("make", "build", CUDA=cuda, RUNTIME="docker", timeout=3600).check()

    return build


@pytest.fixture(scope="session")
def images(build_images: Callable[[str], Done]) -> Done:
    """The images of the cpu variant."""
    return build_images("cpu")


@pytest.fixture(scope="session")
def compose_stack(images: Done) -> Iterator[Stack]:
    """A compose project from nothing, by the two commands of the README."""
    project = f"glm4-test-{uuid.uuid4().hex[:8]}"
    port = free_port()
    environ = {"COMPOSE_PROJECT_NAME": project, "PORT": str(port)}
    stack = Stack(f"http://127.0.0.1:{port}", environ)
    try:
        # Compose labels an image with its project, so another project's is built anew by `make up`.
        stack.run("make", "build", CUDA="cpu", RUNTIME="docker").check()
        stack.notes["download"] = stack.compose("run", "--rm", "download").check().output
        stack.notes["up"] = stack.compose("up", "-d", "--wait").check().output
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> str:
    """The endpoint under test: --url, or a host runtime brought up for it."""
    given = request.config.getoption("--url")
    return (given or request.getfixturevalue("host_stack").url).rstrip("/")
