"""Compile and run two Triton kernels inside an image; prints which assembler made them.

A plain program: it runs in the image's Python, which has neither pytest nor this repository.
"""

import os
import subprocess

import torch
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


def main() -> None:
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


if __name__ == "__main__":
    main()
