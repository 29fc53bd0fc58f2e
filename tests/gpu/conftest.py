"""Which image to test on this GPU, and a server of it for each number type."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu.root import environment
from tests.gpu.servers import Server, in_root, run_file, served, write_model
from tests.stacks import Done


@dataclass
class Subject:
    """The image under test: an unpacked root, or a name for Docker; and its models folder."""

    root: Path | None
    image: str
    variant: str
    models: Path

    def serve(self, log: Path, **more: str):
        return served(self.root, self.image, self.models, log, **more)

    def run_file(self, file: Path, *arguments: str) -> Done:
        return run_file(self.root, self.image, file, *arguments)


@pytest.fixture(scope="session")
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    """What --image-root or --gpu-variant names."""
    root = request.config.getoption("--image-root")
    if root:
        found = Subject(root, "", environment(root)["VARIANT"], root / "models")
        write_model(found.models)
        for folder in ("caches", "run/stack", "models"):
            os.chown(root / folder, 10001, 10001)
        with in_root(root):
            yield found
        return
    variant = request.config.getoption("--gpu-variant")
    models = tmp_path_factory.mktemp("models")
    models.chmod(0o755)
    write_model(models)
    yield Subject(None, f"glm4-stack:dev-{variant}", variant, models)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def server(
    request: pytest.FixtureRequest, subject: Subject, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The entry point, ready, with weights of one number type."""
    log = tmp_path_factory.mktemp("log") / f"{subject.variant}-{request.param}.log"
    with subject.serve(log, DTYPE=request.param) as started:
        started.wait()
        print(f"\n{subject.variant} {request.param}: ready after {started.seconds:.1f} s")
        yield started
