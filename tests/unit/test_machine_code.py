"""Reads of registers that a path leaves unwritten are found in machine code, and waits that nobody asked for, and nothing else is."""

from __future__ import annotations

import pytest

from weft_attn.kernels.machine_code import added_waits, undefined_reads


def code(*lines: str) -> str:
    """nvdisasm's form: labels as they are, instructions with an address."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;" for at, line in enumerate(lines)
    )


def test_a_register_written_on_one_path_only_is_found_where_the_paths_meet() -> None:
    text = code(
        "ISETP.GE.AND P1, PT, R6, 0x1, PT",
        "@!P1 BRA `(.L_x_1)",
        "UIADD3 UR52, UP0, UR7, 0x2, URZ",
        ".L_x_1:",
        "UIADD3 UR48, UP6, UR52, 0x1fe, URZ",
        "EXIT",
    )
    assert undefined_reads(text) == ["UIADD3 UR52, UP0, UR7, 0x2, URZ", "UIADD3 UR48, UP6, UR52, 0x1fe, URZ"]
    assert undefined_reads(text.replace("UR7", "URZ")) == ["UIADD3 UR48, UP6, UR52, 0x1fe, URZ"]


@pytest.mark.parametrize(
    "lines",
    [
        ("UMOV UR4, 0x1", "UIADD3 UR5, UR4, 0x1, URZ"),
        ("UMOV UR4, 0x1", ".L_x_0:", "UIADD3 UR4, UR4, 0x1, URZ", "@P0 BRA `(.L_x_0)", "EXIT"),
        ("UIADD3.64 UR4, URZ, 0x2, URZ", "UMOV UR6, UR5"),
        ("BRA `(.L_x_0)", "UMOV UR5, UR4", ".L_x_0:", "EXIT"),
        ("UMOV UR6, 0x1", "UMOV UR7, 0x1", "HGMMA.64x128x16.F32.BF16 R24, R196, gdesc[UR4], R24"),
    ],
    ids=["in a row", "in a loop", "two registers", "never reached", "left operand in registers"],
)
def test_what_every_path_writes_may_be_read(lines: tuple[str, ...]) -> None:
    assert undefined_reads(code(*lines)) == []


def test_both_descriptors_of_a_product_count() -> None:
    written = [f"UMOV UR{register}, 0x1" for register in (4, 5, 6)]
    product = "HGMMA.64x64x16.F32.BF16 R184, gdesc[UR4], RZ, !UPT"
    assert undefined_reads(code(*written, product)) == [product]
    assert undefined_reads(code(*written, "UMOV UR7, 0x1", product)) == []


def test_waits_for_products_that_the_assembler_added_are_counted() -> None:
    assembly = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; wgmma.wait_group.sync.aligned 0;"
    lines = (
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    )
    assert added_waits(assembly, code(*lines)) == 0
    assert added_waits(assembly, code(*lines, *lines)) == 2
