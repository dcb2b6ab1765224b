"""Compile a `KernelCall` for a GPU that is not there, and read what the compiler says of it.

Tensors of the call may be on the meta device: only dtypes, alignments and strides matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from weft_attn.kernels.call import KernelCall, is_descriptor
from weft_attn.kernels.machine_code import added_waits, disassemble, undefined_reads

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs and holds.

    Attributes:
        registers: 32-bit registers a thread (VGPRs on AMD), or None where the tool chain does not say.
        spilled_bytes: bytes a thread spills to local memory.
        shared_memory: bytes of shared memory a program uses.
        atomics: atomic or reduction instructions in the machine code.
        assembly: the target's assembly text.
        undefined_reads: instructions of a warp-specialised kernel that read what a path leaves unwritten (machine_code.py).
        added_waits: waits for its matrix products in the machine code of such a kernel, over those that its assembly asks for.
        idle_barriers: barriers of such a kernel that nobody arrives at or waits for.
        dialect: such a kernel in Triton's GPU dialect.
        machine_code: such a kernel disassembled.
    """

    registers: int | None
    spilled_bytes: int
    shared_memory: int
    atomics: int
    assembly: str
    undefined_reads: tuple[str, ...] = ()
    added_waits: int = 0
    idle_barriers: tuple[str, ...] = ()
    dialect: str = ""
    machine_code: str = ""


def gpu_target(arch: str) -> GPUTarget:
    """Triton's target of "sm_90" or "gfx942" style names."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def compile_call(call: KernelCall, arch: str) -> Compiled:
    """Compile for `arch` and report. Raises what Triton or its assembler raises."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(call.kernel.arg_names):
        if name in call.constants:
            signature[name], constants[(index,)] = "constexpr", call.constants[name]
            continue
        value = call.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if call.kernel.is_gluon() else ASTSource
    source = language(fn=call.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu_target(arch), options=call.options)
    if arch.startswith("sm_"):
        report = _nvidia_report(compiled)
        if call.kernel.is_gluon():
            machine_code = disassemble(compiled.asm["cubin"])
            report = replace(
                report,
                undefined_reads=tuple(undefined_reads(machine_code)),
                added_waits=added_waits(compiled.asm["ptx"], machine_code),
                idle_barriers=tuple(idle_barriers(compiled.asm["ttgir"])),
                dialect=compiled.asm["ttgir"],
                machine_code=machine_code,
            )
        return report
    return _amd_report(compiled)


def idle_barriers(text: str) -> list[str]:
    """Barriers in Triton's GPU dialect that are set up and not used: a tile may lie on them (docs/adr/0020).

    Returns:
        the names of their allocations.
    """
    made = r"(%\w+) = ttg\.(?:local_alloc|memdesc_reinterpret)\b.* -> !ttg\.memdesc<[\dx]*xi64,"
    owners = {name: name for name in re.findall(made, text)}
    used: set[str] = set()
    for line in text.splitlines():
        names = [name for name in re.findall(r"%\w+", line) if name in owners]
        indexed = re.match(r"\s*(%\w+) = ttg\.memdesc_index (%\w+)", line)
        if indexed and indexed[2] in owners:
            # One of several.
            owners[indexed[1]] = owners[indexed[2]]
        elif not re.match(r"\s*ttng\.init_barrier\b", line):
            result = re.match(r"\s*(%\w+) = ", line)
            used.update(owners[name] for name in names if result is None or name != result[1])
    return [name for name, owner in owners.items() if name == owner and name not in used]


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if is_descriptor(value):
        element = POINTERS[value.base.dtype].removeprefix("*")
        # Gluon's descriptors say how a box lies in shared memory.
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{element}{list(value.block_shape)}{layout}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _nvidia_report(compiled: Any) -> Compiled:
    usage = _cubin_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"],
        shared_memory=compiled.metadata.shared,
        atomics=len(re.findall(r"^\s*(?:@%p\d+ )?(?:atom|red)\.", ptx, flags=re.MULTILINE)),
        assembly=ptx,
    )


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes a thread, from the cubin's own resource report."""
    import subprocess
    import tempfile

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports resource usage: expected REG and STACK, given {text!r}")
    return {"REG": int(found[1]), "STACK": int(found[2])}


def _amd_report(compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return Compiled(
        registers=number("vgpr_count"),
        spilled_bytes=4 * number("vgpr_spill_count"),
        shared_memory=compiled.metadata.shared,
        atomics=len(re.findall(r"^\s*(?:global|buffer|flat|ds)_(?:atomic|add|min|max)\w*", text, flags=re.MULTILINE)),
        assembly=text,
    )
