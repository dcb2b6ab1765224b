"""Barriers that a compiled kernel sets up and does not use are found, and no others."""

from __future__ import annotations

import pytest

from weft_attn.kernels.offline import idle_barriers

ONE = "!ttg.memdesc<1xi64, #shared, #smem, mutable>"
TWO = "!ttg.memdesc<2x1xi64, #shared, #smem, mutable>"
SETUP = f"""
    %tiles = ttg.local_alloc : () -> !ttg.memdesc<2x64x256xbf16, #shared1, #smem, mutable> loc(#loc1)
    %full = ttg.local_alloc : () -> {TWO} loc(#loc2)
    %first = ttg.memdesc_index %full[%c0] : {TWO} -> {ONE} loc(#loc3)
    ttng.init_barrier %first, 1 : {ONE} loc(#loc4)
    %second = ttg.memdesc_index %full[%c1] : {TWO} -> {ONE} loc(#loc3)
    ttng.init_barrier %second, 1 : {ONE} loc(#loc4)
    %cleaned = ttg.local_alloc : () -> {ONE} loc(#loc5)
    ttng.init_barrier %cleaned, 2 : {ONE} loc(#loc6)
"""


@pytest.mark.parametrize(
    ("use", "idle"),
    [
        ("", ["%full", "%cleaned"]),
        (f"    ttng.arrive_barrier %cleaned, 1 : {ONE}", ["%full"]),
        (f"    ttng.wait_barrier %second, %phase : {ONE}", ["%cleaned"]),
        ("    ttg.warp_specialize(%tiles, %full, %cleaned)", []),
        ("    ttg.warp_specialize(%tiles, %full_1, %cleaned_2)", ["%full", "%cleaned"]),
    ],
    ids=["none", "one", "one of several", "handed on", "others of like names"],
)
def test_barriers_that_are_only_set_up_are_idle(use: str, idle: list[str]) -> None:
    assert idle_barriers(SETUP + use) == idle


def test_barriers_in_a_buffer_that_was_another_are_seen() -> None:
    """Those whose address is known (kernels/hopper/addresses.py)."""
    text = f"""
    %box = ttg.local_alloc : () -> !ttg.memdesc<8x64xbf16, #shared1, #smem, mutable> loc(#loc1)
    %words = ttg.memdesc_reinterpret %box : !ttg.memdesc<8x64xbf16, #shared1, #smem, mutable> -> {TWO} loc(#loc2)
    %first = ttg.memdesc_index %words[%c0] : {TWO} -> {ONE} loc(#loc3)
    ttng.init_barrier %first, 4 : {ONE} loc(#loc4)
"""
    assert idle_barriers(text) == ["%words"]
    assert idle_barriers(text + f"    ttng.wait_barrier %first, %phase : {ONE}") == []
