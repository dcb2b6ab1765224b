"""Pictures show a plan's cells, whatever its size."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from weft_attn.errors import InvalidInput, Unsupported
from weft_attn.plan import Plan, Slice
from weft_attn.plan.draw import EXACT_ROWS, Header, Panel, Span, documents_of, draw_plans, outline, require_picture

bounds = st.none() | st.integers(-30, 30)
slices = st.builds(Slice, st.integers(0, 5), st.integers(1, 24), st.integers(0, 5), st.integers(1, 24), bounds, bounds)


def area(polygon: NDArray[np.float64]) -> float:
    """Shoelace formula."""
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@settings(max_examples=60, deadline=None)
@given(slices)
def test_an_outline_encloses_exactly_the_visible_cells(piece: Slice) -> None:
    plan = Plan([piece], 40, 40)
    cells = np.stack(np.meshgrid(np.arange(40) + 0.5, np.arange(40) + 0.5), axis=-1).reshape(-1, 2)
    drawn = np.zeros(len(cells), dtype=bool)
    for row in plan.rows:
        drawn |= Outline(outline(row), closed=False).contains_points(cells)
    assert (drawn.reshape(40, 40) == plan.to_mask().numpy()).all()


@pytest.mark.parametrize(
    "piece",
    [
        Slice(0, 60_000, 0, 60_000, hi=0),
        Slice(5_000, 40_000, 100, 60_000, lo=-3_000, hi=2_000),
        Slice(0, 50_000, 0, 9_000, lo=-30_000, hi=-10_000),
        Slice(0, 4_000, 0, 64_000),
    ],
)
def test_a_long_slice_is_a_polygon_of_few_corners_and_the_right_area(piece: Slice) -> None:
    plan = Plan([piece], 65_536, 65_536)
    polygon = outline(plan.rows[0])
    assert len(polygon) < 64
    assert area(polygon) == pytest.approx(plan.pairs, rel=1e-3)


def test_exact_and_straight_outlines_agree_where_they_meet() -> None:
    areas = {}
    for rows in (EXACT_ROWS, EXACT_ROWS + 1):
        plan = Plan.dense(1, rows, rows, causal=True)
        areas[rows] = area(outline(plan.rows[0])) / plan.pairs
    assert areas[EXACT_ROWS] == 1
    assert areas[EXACT_ROWS + 1] == pytest.approx(1, rel=1e-2)


def test_slices_of_one_document_share_a_number_and_documents_do_not() -> None:
    plan = Plan.zigzag([0, 40, 40, 100, 130], rank=1, world_size=3)
    chunk = np.searchsorted(np.cumsum([40 // 3, 60 // 3, 30 // 3]), plan.rows[:, 0], side="right")
    numbers = documents_of(plan.rows)
    assert len(set(numbers.tolist())) == 3
    assert len(set(zip(chunk.tolist(), numbers.tolist(), strict=True))) == 3


def test_64k_tokens_on_eight_ranks_draw_in_seconds(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(7, 1, size=40).astype(int)
    cu = np.concatenate([[0], np.cumsum(lengths * 65_536 // lengths.sum())])
    begin = time.monotonic()
    draw_plans([(f"rank {rank}", Plan.zigzag(cu, rank, 8)) for rank in range(8)], tmp_path / "plan.png")
    assert time.monotonic() - begin < 30
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_names_its_documents_ranks_and_axes(tmp_path: Path) -> None:
    panel = Panel(
        "rank 0 of two",
        Plan.dense(1, 10, 20, causal=True),
        row_spans=[Span(0, 4, 0), Span(4, 10, 0, late=True)],
        key_spans=[Span(0, 20, 0)],
        key_marks=[(0, "keys of rank 0"), (10, "keys of rank 1")],
    )
    path = draw_plans([panel], tmp_path / "new" / "plan.svg", documents=["first.py", "second.py"])
    text = path.read_text()
    for words in ("rank 0 of two", "keys of rank 0", "keys of rank 1", "first.py", "second.py", "early", "late", "tokens"):
        assert words in text, words


def test_early_and_late_chunks_have_colours_of_their_own(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plan = Plan.dense(1, 100, 100)
    pictures = []
    for late in (False, True):
        panel = Panel("", plan, row_spans=[Span(0, 100, 0, late)])
        pictures.append(imread(draw_plans([panel], tmp_path / f"{late}.png")))
    middle = [picture[picture.shape[0] // 2, picture.shape[1] // 2, :3] for picture in pictures]
    assert np.abs(middle[0] - middle[1]).max() > 0.1


@pytest.mark.parametrize("plan", [Plan([], 0, 0), Plan([], 3, 7), Plan.dense(1, 1, 1)])
def test_plans_with_little_or_nothing_in_them_draw(plan: Plan, tmp_path: Path) -> None:
    assert plan.draw(tmp_path / "plan.png").stat().st_size > 0


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Unsupported, match=r"weft-attn\[draw\]"):
        Plan.dense(1, 4, 4).draw(tmp_path / "plan.png")


@pytest.mark.parametrize("name", ["plan", "plan.foo", ".png", "plan.png.", "plan.txt"])
def test_a_suffix_that_is_no_format_is_refused_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"expected one of .*\.pdf.*\.png.*, given"):
        Plan.dense(1, 4, 4).draw(tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["plan.png", "plan.PDF", "plan.svg", "plan.jpg"])
def test_formats_are_written(name: str, tmp_path: Path) -> None:
    assert Plan.dense(1, 4, 4).draw(tmp_path / name).stat().st_size > 0


def test_latex_pictures_need_latex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidInput, match="expected one of"):
        require_picture(tmp_path / "plan.pgf")


def test_a_header_gets_room_of_its_own_above_the_plans(tmp_path: Path) -> None:
    found = []

    def draw(left: Axes, right: Axes) -> None:
        found.extend([left, right])

    plan = Plan.zigzag([0, 40], 0, 2)
    draw_plans([("plain", plan)], tmp_path / "plain.png")
    draw_plans([("headed", plan)], tmp_path / "headed.png", header=Header(2.0, draw))
    left, right = (axes.get_position() for axes in found)
    assert left.x1 < right.x0
    assert left.y0 == right.y0
    (panel,) = [axes.get_position() for axes in found[0].figure.axes if axes not in found]
    assert panel.y1 < left.y0 < left.y1 < 1
    assert left.height * found[0].figure.get_figheight() == pytest.approx(2.0)
