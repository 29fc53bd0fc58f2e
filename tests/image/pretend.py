"""Import what serving on a GPU imports, where there is none; prints the modules that are missing.

    python pretend.py [--parse WORD…] MODULE…

A plain program for an image's Python. vLLM's extensions link the driver's library and its modules
ask for the card while they are imported: an empty library takes the driver's place, and constants
the card's. What functions import when they run is imported too. This shows that nothing needed was
pruned or omitted; it shows nothing about computing.
"""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

CAPABILITY = (9, 0)
# Parts of a module's name that say it is another accelerator's.
FOREIGN = re.compile("rocm|aiter|xpu|tpu|hpu|neuron|openvino|ipex|cpu_")
WHERE = Path("/tmp/pretend")


def symbols(kind: str, files: list[Path]) -> set[str]:
    nm = subprocess.run(
        ["nm", "-D", f"--{kind}-only", *map(str, files)], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r" [UTWDBi] (cu[A-Z]\w+)", nm))


def pretend_driver(site: Path) -> None:
    """Build a libcuda.so.1 of empty functions, and start this program again with it."""
    libraries = [*site.glob("vllm/**/*.so"), *site.glob("torch/lib/*.so")]
    others = [path for path in site.glob("nvidia/**/lib*.so*") if path.is_file()]
    wanted = symbols("undefined", libraries) - symbols("defined", others)
    for source in site.glob("triton/backends/nvidia/driver.*"):
        wanted |= set(re.findall(r"\b(cu[A-Z][A-Za-z0-9_]+)\b", source.read_text()))
    WHERE.mkdir()
    functions = "".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(wanted))
    (WHERE / "stub.c").write_text(functions)
    library = str(WHERE / "libcuda.so.1")
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
    subprocess.run([*command, str(WHERE / "stub.c")], check=True)
    (WHERE / "libcuda.so").symlink_to("libcuda.so.1")
    more = {name: str(WHERE) for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH", "HOME")}
    # Triton compiles its launcher against the library while some modules are imported.
    more["TRITON_LIBCUDA_PATH"] = str(WHERE)
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **more})


def pretend_card() -> None:
    import torch

    card = types.SimpleNamespace(
        name="NVIDIA H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=80 << 30,
        multi_processor_count=132,
        warp_size=32,
    )
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_, **__: card.name
    torch.cuda.get_device_capability = lambda *_, **__: CAPABILITY
    torch.cuda.get_device_properties = lambda *_, **__: card
    import vllm.platforms

    if hasattr(vllm.platforms, "_current_platform"):
        from vllm.platforms.cuda import NonNvmlCudaPlatform

        vllm.platforms._current_platform = NonNvmlCudaPlatform()


def imports(module: str) -> set[str]:
    """Return every module that a module's source imports, at its top or in a function."""
    found: set[str] = set()
    origin = importlib.util.find_spec(module).origin
    for node in ast.walk(ast.parse(Path(origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def parse(words: list[str]) -> None:
    """Let the real parser of the server read a command line."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
        from vllm.utils import FlexibleArgumentParser
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    print("parsed", parsed.max_model_len)


def main() -> None:
    site = Path(importlib.util.find_spec("vllm").origin).parent.parent
    gpu = (site / "triton").exists()
    if gpu and not WHERE.exists():
        pretend_driver(site)
    if gpu:
        pretend_card()
    if sys.argv[1] == "--parse":
        parse(sys.argv[2:])
        return
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for module in sorted(set().union(*map(imports, sys.argv[1:]))):
        if FOREIGN.search(module):
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print("missing", error.name)
    print("imported all")


if __name__ == "__main__":
    main()
