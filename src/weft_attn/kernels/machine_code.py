"""Checks of NVIDIA machine code, as nvdisasm prints it (Turing and later): one instruction a line, labels between them.

A compiler's mistake has made one necessary (docs/adr/0014): uniform registers, which hold the descriptors of matrix products, that are
read where some path through the program has not written them. It errs towards silence: what an instruction writes is counted wide, and
registers that are not uniform are not followed.

Another is for what no result shows: where the assembler cannot tell who has which registers, it waits after each of Hopper's products,
and nothing runs beside them any more.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?) ;")
_PREDICATE = re.compile(r"U?P[\dT]+")
_UNIFORM = re.compile(r"\bUR(\d+)")
_DESCRIPTORS = re.compile(r"gdesc\[UR(\d+)\]")
# Instructions that write no uniform register, whatever their first operand is.
_READERS = ("ST", "BRA", "BAR", "SYNCS.ARRIVE", "UTMA", "R2P", "RED", "EXIT", "USETMAX", "WARPSYNC", "DEPBAR")
_COMPARISONS = ("ISETP", "UISETP", "FSETP", "PLOP", "UPLOP")


@dataclass(frozen=True)
class _Step:
    """An instruction: its text, the uniform registers that it writes and reads, where it may go on."""

    text: str
    writes: frozenset[int]
    reads: frozenset[int]
    target: str | None
    falls_through: bool


def disassemble(cubin: bytes) -> str:
    """nvdisasm's text of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def undefined_reads(text: str) -> list[str]:
    """Instructions of a disassembled kernel that read a uniform register which some path to them does not write."""
    steps, labels = _parse(text)
    successors = [
        [
            s
            for s in ([labels[step.target]] if step.target in labels else []) + ([at + 1] if step.falls_through else [])
            if s < len(steps)
        ]
        for at, step in enumerate(steps)
    ]
    # Registers that every path to an instruction has written.
    written: list[frozenset[int] | None] = [None] * len(steps)
    if steps:
        written[0] = frozenset()
    work = [0] if steps else []
    while work:
        at = work.pop()
        before = written[at]
        assert before is not None
        after = before | steps[at].writes
        for successor in successors[at]:
            known = written[successor]
            met = after if known is None else known & after
            if met != known:
                written[successor] = met
                work.append(successor)
    return [step.text for step, known in zip(steps, written, strict=True) if known is not None and step.reads - known]


def added_waits(assembly: str, text: str) -> int:
    """How many more waits for Hopper's products (wgmma) a disassembled kernel has than its PTX asks for: 0, unless the assembler added some."""
    return len(re.findall(r"WARPGROUP\.DEPBAR\b", text)) - len(re.findall(r"\bwgmma\.wait_group\b", assembly))


def _parse(text: str) -> tuple[list[_Step], dict[str, int]]:
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, instruction = _LABEL.match(line.strip()), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(steps)
        elif instruction:
            steps.append(_step(instruction[1]))
    return steps, labels


def _step(text: str) -> _Step:
    bare = re.sub(r"^@!?U?P\w+ ", "", text)
    name, _, rest = bare.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    destination, sources = operands[0], operands[1:]
    while _PREDICATE.fullmatch(destination) and sources and not name.startswith(_COMPARISONS):
        # A carry or a flag comes before the result.
        destination, sources = sources[0], sources[1:]
    writes: set[int] = set()
    wide = ".64" in name or "WIDE" in name
    result = re.fullmatch(r"UR(\d+)", destination)
    if result and not name.startswith(_READERS):
        first = int(result[1])
        writes = {first, first + 1} if wide else {first}
    else:
        sources = operands
    conditional = bare != text or re.match(r"BRA\S* !?U?P", bare) is not None
    jump = re.search(r"BRA.*\((\.L_x_\d+)\)", bare)
    ends = name.startswith(("BRA", "EXIT")) and not conditional
    return _Step(text, frozenset(writes), frozenset(_reads(name, sources)), jump[1] if jump else None, not ends)


def _reads(name: str, sources: list[str]) -> set[int]:
    found: set[int] = set()
    left_in_registers = name.startswith("HGMMA") and len(sources) > 1 and re.fullmatch(r"R\d+(\.\w+)?", sources[1]) is not None
    for source in sources:
        for first in map(int, _DESCRIPTORS.findall(source)):
            # Two descriptors of two registers each; the left operand's counts where it lies in shared memory.
            found |= set(range(first + 2 if left_in_registers else first, first + 4))
        for register in map(int, _UNIFORM.findall(_DESCRIPTORS.sub("", source))):
            found |= {register, register + 1} if name.startswith("U") and ".64" in name else {register}
    # UR63 is the zero register.
    return found - {63, 64}
