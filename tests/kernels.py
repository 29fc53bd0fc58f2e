"""Compile two Triton kernels: ahead of time for cards that are not there, or to run them on a GPU.

    python kernels.py ahead | run | plain

A plain program for an image's Python, which has neither pytest nor this repository.
"""

import os
import subprocess
import sys

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, length, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    total = tl.load(x + places, mask=inside) + tl.load(y + places, mask=inside)
    tl.store(out + places, total, mask=inside)


@triton.jit
def multiply(a, b, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    left, right = tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)
    tl.store(out + rows * SIZE + columns, tl.dot(left, right).to(tl.float16))


KERNELS = (
    (add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "length": "i32"}, {"BLOCK": 1024}),
    (multiply, {"a": "*fp16", "b": "*fp16", "out": "*fp16"}, {"SIZE": 64}),
)


def ahead() -> None:
    """Compile both for each generation; this needs the assembler and no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, signature, constants in KERNELS:
        # Newer releases want the constants in the signature too.
        if triton.__version__ >= "3.2":
            signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        for capability in (80, 86, 89, 90):
            source = ASTSource(kernel, signature, constants)
            cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
            assert len(cubin) > 1000
            print(f"sm_{capability} {kernel.fn.__name__}: {len(cubin)} bytes")


def run() -> None:
    """Run both on this GPU, and compare what they compute with torch's result."""
    import torch

    x, y = (torch.randn(100_003, device="cuda") for _ in range(2))
    out = torch.full_like(x, float("nan"))
    compiled = add[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), BLOCK=1024)
    assert torch.equal(out, x + y)
    ptx = next(line for line in compiled.asm["ptx"].splitlines() if line.startswith(".version"))
    print(f"triton {triton.__version__}, PTX {ptx}: add is right", flush=True)
    ptxas = os.environ.get("TRITON_PTXAS_PATH")
    if ptxas:
        done = subprocess.run([ptxas, "--version"], check=True, capture_output=True, text=True)
        print("TRITON_PTXAS_PATH:", done.stdout.splitlines()[3], flush=True)

    a, b = (torch.randn(64, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.full_like(a, float("nan"))
    multiply[(1,)](a, b, out, SIZE=64)
    error = ((out.double() - a.double() @ b.double()).norm() / out.double().norm()).item()
    assert error < 1e-2, error
    print(f"multiply is right (relative error {error:.1e})", flush=True)


def plain() -> None:
    """Run both as for sm_80, assembled for a Hopper card without its "a" instructions.

    For an assembler that knows sm_90 and not sm_90a, such as CUDA 11.8's, where no older card is.
    """
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.active.get_current_target = lambda: GPUTarget("cuda", 80, 32)
    # Triton loads its backends under names of its own, so an import would give another module.
    module = backends["nvidia"].compiler.make_cubin.__globals__
    module["sm_arch_from_capability"] = lambda capability: "sm_90"
    run()


if __name__ == "__main__":
    {"ahead": ahead, "run": run, "plain": plain}[sys.argv[1]]()
