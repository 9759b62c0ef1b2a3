"""Compiles kernel launches for Hopper on any machine, and reads what the assembler says about them."""

import inspect
import io
import re
from contextlib import redirect_stdout
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget


HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


class Compiled(NamedTuple):
    shared: int
    registers: int
    spilled_bytes: int
    products: tuple[int, int]  # instructions of warp groups (Hopper's, which read shared memory), of single warps


def compile_launch(kernel, args, options) -> Compiled:
    """Compiles as a launch with these arguments would, alignment and ones specialised in the same way."""
    options = dict(options)
    names = list(inspect.signature(kernel.fn).parameters)
    signature, constants, attributes = {}, {}, {}

    def described(path, value):
        """Type of an argument, or of each part of a tuple."""
        if isinstance(value, tuple):
            return tuple(described((*path, i), part) for i, part in enumerate(value))
        if value is None or value is True or value is False or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return _TYPES[value.dtype]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, (name, value) in enumerate(zip(names, args)):
        signature[name] = described((i,), value)
    for name in names[len(args) :]:
        signature[name], constants[(names.index(name),)] = "constexpr", options.pop(name)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as report:
        triton.knobs.compilation.always_compile = True  # what comes out of the cache has no report
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=HOPPER, options=options)
    products = tuple(compiled.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync"))
    report = report.getvalue()
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    return Compiled(compiled.metadata.shared, registers, max(spilled, default=0), products)
