"""Pictures of plans: query rows down, keys across, each slice the polygon of the cells it shows.

A slice is one polygon however many tokens it spans, so that a plan of 64K tokens draws as quickly, and reads as well, as one of
64. Needs matplotlib.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft_attn.errors import Unsupported, require
from weft_attn.outputs import require_writable
from weft_attn.plan.slices import HI, K_LEN, K_START, LO, Q_LEN, Q_START, Plan, visible_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IntArray = NDArray[np.int64]
Colour = tuple[float, float, float]

# Slices of up to this many rows are drawn cell by cell; on longer ones a step is thinner than a pixel.
EXACT_ROWS = 256
# Documents that the legend names; the others are counted.
NAMED_DOCUMENTS = 12

WIDTH = 13.0  # inches
PANEL_WIDTH = 11.4
PANEL_HEIGHTS = (0.9, 11.0)
STRIP = 0.09
HEADER_TITLE = 0.45  # above a header's axes
HEADER_MARGIN = HEADER_TITLE + 0.75  # and below, for their labels
MAX_RULES = 12  # document boundaries an inch; more would be a grey wall, and the strip beside the axis shows them
MAX_EDGED = 64
DOTS_PER_INCH = 150

# Eight hues that differ in lightness too, so that they stay apart in grey and for colour-blind readers.
HUES = ("#2a5fa5", "#c8562b", "#2e8b6f", "#8b3f8f", "#a8820f", "#3c9cc4", "#b83a5b", "#5b6b3a")
INK, MUTED, PAPER, RULE = "#222222", "#666666", "#f6f5f1", "#b9b6ad"


class Span(NamedTuple):
    """Consecutive rows, or keys, of one document: what gives a slice its colour."""

    start: int
    stop: int
    document: int
    late: bool = False


class Panel(NamedTuple):
    """One plan of a picture.

    Attributes:
        title: a line above the plan.
        plan: what to draw.
        row_spans: which document the query rows belong to, in order; empty: slices that share rows or keys share a colour.
        key_spans: the same of the keys.
        key_marks: (first key, label) of parts of the key axis, such as the ranks of a gather.
    """

    title: str
    plan: Plan
    row_spans: Sequence[Span] = ()
    key_spans: Sequence[Span] = ()
    key_marks: Sequence[tuple[int, str]] = ()


class Header(NamedTuple):
    """Something else above the plans, such as the run that they are of.

    Attributes:
        height: in inches.
        draw: fills a wide and a narrow pair of axes, left and right.
    """

    height: float
    draw: Callable[[Axes, Axes], None]


def draw_plans(
    panels: Sequence[Panel | tuple[str, Plan]],
    path: str | Path,
    documents: Sequence[str] = (),
    *,
    header: Header | None = None,
) -> Path:
    """Write a picture of plans, one above the other.

    Args:
        panels: the plans; a pair (title, plan) is a `Panel` without spans.
        path: where to; the suffix chooses the format, missing folders are made.
        documents: names for the legend, by the spans' document numbers; empty: no legend.
        header: what stands above the plans; None: nothing.

    Returns:
        The path.

    Raises:
        Unsupported, InvalidInput: as `require_picture`.
    """
    path = Path(path)
    require_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [Panel(*panel) for panel in panels]
    heights = [_height(panel.plan) for panel in shown]
    above = 0.7 if any(panel.key_marks for panel in shown) else 0.45
    gap, below = 0.55, 0.55 + (_legend_rows(documents) * 0.22 + 0.12 if documents else 0.0)
    headed = 0.0 if header is None else header.height + HEADER_MARGIN
    total = headed + above + sum(heights) + gap * (len(shown) - 1) + below
    figure = Figure(figsize=(WIDTH, total), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    if header is not None:
        foot, tall = (total - header.height - HEADER_TITLE) / total, header.height / total
        header.draw(
            figure.add_axes((1.1 / WIDTH, foot, 0.6 * PANEL_WIDTH / WIDTH, tall)),
            figure.add_axes(((1.1 + 0.7 * PANEL_WIDTH) / WIDTH, foot, 0.3 * PANEL_WIDTH / WIDTH, tall)),
        )
    top = total - headed - above
    for index, (panel, height) in enumerate(zip(shown, heights, strict=True)):
        axes = figure.add_axes((1.1 / WIDTH, (top - height) / total, PANEL_WIDTH / WIDTH, height / total))
        _draw_panel(axes, panel, height, is_first=index == 0, is_last=index == len(shown) - 1)
        top -= height + gap
    if documents:
        _draw_legend(figure, documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def require_picture(path: Path) -> None:
    """Refuse a path that no picture could be written to.

    Raises:
        Unsupported: matplotlib is not installed.
        InvalidInput: a suffix that is no format, or a place that takes no file.
    """
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise Unsupported("drawing a plan needs matplotlib: expected the extra weft-attn[draw], given none") from None
    require_writable(path, makes_folders=True)
    formats = set(FigureCanvasAgg.get_supported_filetypes())
    if shutil.which(matplotlib.rcParams["pgf.texsystem"]) is None:
        formats.discard("pgf")
    require(
        # Without a suffix, matplotlib would choose another name.
        path.suffix[1:].lower() in formats,
        "a picture's suffix is its format",
        expected=f"one of {', '.join(f'.{each}' for each in sorted(formats))}",
        given=repr(str(path)),
    )


def outline(piece: IntArray) -> NDArray[np.float64]:
    """The polygon of a canonical slice's visible cells, (n, 2) of (key, row); cell (i, j) is the unit square at (j, i).

    Exact up to EXACT_ROWS rows; beyond that, straight lines between the rows where the band meets the slice's sides.
    """
    q_len, k_len, lo, hi = (int(piece[column]) for column in (Q_LEN, K_LEN, LO, HI))
    if q_len <= EXACT_ROWS:
        rows = np.arange(q_len)
    else:
        bends = np.array([0, -lo, k_len - lo, -hi - 1, k_len - hi - 1, q_len - 1])
        rows = np.unique(np.clip((bends[:, None] + np.arange(-1, 2)).ravel(), 0, q_len - 1))
    first, stop = visible_interval(rows, k_len, lo, hi)
    seen = stop > first
    rows, first, stop = rows[seen], first[seen], stop[seen]
    sides = np.stack([rows, rows + 1], axis=1).ravel()
    left = np.stack([np.repeat(first, 2), sides], axis=1)
    right = np.stack([np.repeat(stop, 2), sides], axis=1)[::-1]
    return np.concatenate([left, right]) + np.array([float(piece[K_START]), float(piece[Q_START])])


def documents_of(table: IntArray) -> IntArray:
    """A document number for each slice where nobody said which: slices that share rows or keys, directly or not, are one."""
    parent = list(range(len(table)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start, length in ((Q_START, Q_LEN), (K_START, K_LEN)):
        order = np.argsort(table[:, start], kind="stable").tolist()
        reach, holder = -1, -1
        for index in order:
            if table[index, start] < reach:
                parent[root(index)] = root(holder)
            stop = int(table[index, start] + table[index, length])
            if stop > reach:
                reach, holder = stop, index
    _, numbers = np.unique([root(index) for index in range(len(table))], return_inverse=True)
    return numbers.astype(np.int64)


def _height(plan: Plan) -> float:
    """Inches of a panel: rows and keys to one scale, within reason."""
    return float(np.clip(PANEL_WIDTH * plan.total_q / max(1, plan.total_k), *PANEL_HEIGHTS))


def _colour(document: int, late: bool) -> Colour:
    """A document's hue; its early chunk is a tint of it."""
    hue = HUES[document % len(HUES)]
    red, green, blue = (int(hue[at : at + 2], 16) / 255 for at in (1, 3, 5))
    tint = 0.0 if late else 0.5
    return red + (1 - red) * tint, green + (1 - green) * tint, blue + (1 - blue) * tint


def _slice_colours(panel: Panel) -> list[Colour]:
    rows = panel.plan.rows
    if not panel.row_spans:
        return [_colour(number, True) for number in documents_of(rows).tolist()]
    spans = [span for span in panel.row_spans if span.stop > span.start]
    owner = np.searchsorted([span.stop for span in spans], rows[:, Q_START], side="right")
    return [_colour(spans[index].document, spans[index].late) for index in owner.tolist()]


def _draw_panel(axes: Axes, panel: Panel, height: float, *, is_first: bool, is_last: bool) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plan = panel.plan
    axes.set_facecolor(PAPER)
    axes.set_xlim(0, max(1, plan.total_k))
    axes.set_ylim(max(1, plan.total_q), 0)
    boundaries = [span.start for before, span in pairwise(panel.row_spans) if span.document != before.document]
    if len(boundaries) <= MAX_RULES * height:
        for start in boundaries:
            axes.axhline(start, color=RULE, linewidth=0.6, zorder=1)
    for start, _ in panel.key_marks[1:]:
        axes.axvline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    polygons = [outline(row) for row in plan.rows]
    # Few slices are set apart by a thin edge, which would hide many small ones.
    edges = {"edgecolors": PAPER, "linewidths": 0.6} if len(polygons) <= MAX_EDGED else {"edgecolors": "none"}
    axes.add_collection(PolyCollection(polygons, facecolors=_slice_colours(panel), zorder=2, **edges))

    across, down = STRIP / PANEL_WIDTH, STRIP / height
    _draw_strip(axes, panel.key_spans, "x", 1 + down * 0.4, down)
    _draw_strip(axes, panel.row_spans, "y", -1.4 * across, across)
    raised = 8 if panel.key_spans else 0
    axes.set_title(
        panel.title, loc="left", fontsize=11, color=INK, pad=8 + raised + (14 if is_first and panel.key_marks else 0)
    )
    if is_first:
        stops = [start for start, _ in panel.key_marks[1:]] + [plan.total_k] * bool(panel.key_marks)
        for (start, label), stop in zip(panel.key_marks, stops, strict=True):
            axes.annotate(
                label, ((start + stop) / 2, 1.0), (0, 6 + raised), axes.get_xaxis_transform(), "offset points",
                ha="center", va="bottom", fontsize=9, color=MUTED, annotation_clip=False,
            )  # fmt: skip

    with_commas = FuncFormatter(lambda value, _: f"{int(value):,}")
    for axis, bins in ((axes.xaxis, 12), (axes.yaxis, max(2, min(8, int(height * 2))))):
        axis.set_major_locator(MaxNLocator(nbins=bins, integer=True))
        axis.set_major_formatter(with_commas)
    axes.tick_params(labelsize=9, colors=MUTED, length=3)
    axes.tick_params(axis="y", pad=12 if panel.row_spans else 3)
    axes.tick_params(axis="x", labelbottom=is_last)
    axes.set_ylabel("query rows (tokens)", fontsize=10, color=INK)
    if is_last:
        axes.set_xlabel("keys (tokens)", fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_color(RULE)


def _draw_strip(axes: Axes, spans: Sequence[Span], along: str, at: float, thickness: float) -> None:
    """A ruler beside an axis that says whose tokens these are."""
    from matplotlib.collections import PolyCollection

    boxes = []
    for span in spans:
        corners = [(span.start, at), (span.stop, at), (span.stop, at + thickness), (span.start, at + thickness)]
        boxes.append(corners if along == "x" else [(across, down) for down, across in corners])
    transform = axes.get_xaxis_transform() if along == "x" else axes.get_yaxis_transform()
    colours = [_colour(span.document, span.late) for span in spans]
    strip = PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=0.4, transform=transform, clip_on=False)
    axes.add_collection(strip, autolim=False)


def _legend_rows(documents: Sequence[str]) -> int:
    return -(-(min(len(documents), NAMED_DOCUMENTS) + 1) // 4)


def _draw_legend(figure: Figure, documents: Sequence[str]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    def pair(document: int) -> tuple[Patch, Patch]:
        return Patch(color=_colour(document, False)), Patch(color=_colour(document, True))

    handles: list[Any] = [pair(index) for index in range(min(len(documents), NAMED_DOCUMENTS))]
    labels = list(documents[:NAMED_DOCUMENTS])
    more = len(documents) - NAMED_DOCUMENTS
    if more > 0:
        labels[-1] += f"  (and {more} more, in the same colours again)"
    handles.append((Patch(color="#bbbbbb"), Patch(color="#555555")))
    labels.append("early chunk (light), late chunk (dark)")
    figure.legend(
        handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.0)}, handlelength=2.6, columnspacing=1.8,
    )  # fmt: skip
