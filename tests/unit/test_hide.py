"""The assembly that hides what a row does not see, evaluated line by line: its operands are numbered by hand."""

from __future__ import annotations

import re

import pytest

from weft_attn.kernels.hopper import tiles

LINE = re.compile(r"and\.b32 bit, \$(\d+), (\d+); setp\.ne\.u32 seen, bit, 0; selp\.f32 \$(\d+), \$(\d+), (\w+), seen;")
OTHER = tiles.MINUS_INFINITY.value


def evaluate(assembly: str, operands: list[object]) -> list[object]:
    """The operands after it ran."""
    lines = LINE.findall(assembly)
    assert LINE.sub("", assembly).split() == ["{", ".reg", ".b32", "bit;", ".reg", ".pred", "seen;", "}"], (
        "no line that is not evaluated"
    )
    for word, mask, into, value, other in lines:
        given = operands[int(word)]
        assert isinstance(given, int), "a word, not a score"
        operands[int(into)] = operands[int(value)] if given & int(mask) else other
    return operands


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("seen", [[(0, 128), (0, 128)], [(3, 40), (17, 18)], [(60, 60), (0, 1)], [(5, 128), (0, 64)]])
def test_a_threads_values_stay_where_their_row_sees_their_column(columns: int, seen: list[tuple[int, int]]) -> None:
    """A thread of a product has two rows and of every 8 columns two: both of a row, both of the other, then those of the next 8."""
    for first_column in (0, 2, 4, 6):
        places = [(row, 8 * j + first_column + b) for j in range(columns // 8) for row in (0, 1) for b in (0, 1)]
        values = len(places)

        def word(row: int, columns: list[int]) -> int:
            # Bit 2 j + b is of the column 8 j + b from the thread's first one.
            first, stop = seen[row]
            return sum(1 << at for at, column in enumerate(columns) if first <= column < stop)

        words = [word(row, [c for r, c in places if r == row]) for row, _ in places]
        # Results first, then what they are tied to, then the second operands.
        operands = evaluate(tiles._select(values, OTHER), [*range(values), *range(values), *words])
        expected = [i if seen[row][0] <= column < seen[row][1] else OTHER for i, (row, column) in enumerate(places)]
        assert operands[:values] == expected


def test_results_are_tied_to_the_first_operands() -> None:
    assert tiles._in_place(4, "r") == "=f,=f,=f,=f,0,1,2,3,r,r,r,r"
