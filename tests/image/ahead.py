"""Compile two Triton kernels ahead of time, for cards that are not there; prints each that is done.

A plain program for an image's Python: it needs the assembler and no GPU.
"""

import inspect

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


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
for kernel, signature, constants in KERNELS:
    # Newer releases want the constants in the signature too.
    if triton.__version__ >= "3.2":
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    assert set(signature) | set(constants) == set(inspect.signature(kernel.fn).parameters)
    for capability in (80, 86, 89, 90):
        compiled = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
        )
        assert len(compiled.asm["cubin"]) > 1000
        print(f"sm_{capability} {kernel.fn.__name__}: {len(compiled.asm['cubin'])} bytes")
