"""The download image alone: as PID 1, on volumes that it may and may not write to."""

import time
import uuid
from collections.abc import Iterator

import pytest

from tests.download.conftest import MB, MODEL_ID, REVISION, Hub
from tests.download.test_faults import MODEL, quick
from tests.stacks import Done, run, wait_for

pytestmark = pytest.mark.docker
IMAGE = "glm4-stack:dev-download"


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"glm4-test-{uuid.uuid4().hex[:8]}"
    run("docker", "volume", "create", name).check()
    yield name
    run("docker", "rm", "-f", name)
    run("docker", "volume", "rm", name).check()


def command(volume: str, hub: Hub, *options: str, mode: str = "") -> list[str]:
    environ = {"MODEL_ID": MODEL_ID, "MODEL_REVISION": REVISION, "MODEL_SOURCES": hub.url}
    pairs = [f"--env={name}={value}" for name, value in environ.items()]
    places = ["--read-only", "--tmpfs=/tmp", f"--volume={volume}:/models{mode}"]
    return ["docker", "run", *options, "--network=host", *places, *pairs, IMAGE]


def test_docker_stop_ends_it_as_pid_1_and_it_goes_on(images: Done, hub: Hub, volume: str) -> None:
    hub.fail(quick(kind="slow", rate=10 * MB))
    run(*command(volume, hub, "--detach", f"--name={volume}")).check()

    def logs() -> str:
        return run("docker", "logs", volume).output

    wait_for(lambda: hub.sent() > 15 * MB, 60, "15 MB", logs)
    begin = time.monotonic()
    run("docker", "stop", "--time=30", volume).check()
    assert time.monotonic() - begin < 5, logs()
    code = run("docker", "inspect", "--format={{.State.ExitCode}}", volume).output.strip()
    assert code == "143", logs()
    hub_sent = hub.sent()
    hub.fail()
    run(*command(volume, hub, "--rm")).check().says("complete and verified")
    assert hub_sent + hub.sent() < MODEL + 12 * MB


def test_a_volume_mounted_read_only(images: Done, hub: Hub, volume: str) -> None:
    hub.fail()
    done = run(*command(volume, hub, "--rm", mode=":ro"))
    done.check(20).says("Read-only file system", "to do: ")
    run(*command(volume, hub, "--rm")).check()
    # A complete one needs no writing.
    run(*command(volume, hub, "--rm", mode=":ro")).check().says("nothing to do")
