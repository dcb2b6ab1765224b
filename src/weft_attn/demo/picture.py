"""The demo's picture: both runs' losses, and below them who attends to whom on each rank of the first batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weft_attn.demo.options import Setup
from weft_attn.demo.panels import names_of, zigzag_panels
from weft_attn.demo.report import LOSS_BOUND, Outcome
from weft_attn.plan.draw import INK, MUTED, RULE, Header, draw_plans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a larger group the first ranks are drawn.
MOST_PANELS = 8
CURVES_HEIGHT = 3.2  # inches
ALONE, TOGETHER = "#c9a24a", "#2a5fa5"
# Equal losses have no place on a logarithmic axis.
SMALLEST_GAP = 1e-9


def draw_run(setup: Setup, outcome: Outcome) -> Path:
    """Losses of every step and the first batch's plans, in one file."""
    from matplotlib.ticker import MaxNLocator

    def curves(left: Axes, right: Axes) -> None:
        steps = np.arange(1, len(outcome.steps) + 1)
        left.plot(steps, [step.loss_alone for step in outcome.steps], color=ALONE, linewidth=5, label="one process")
        group = f"{setup.world_size} zigzag ranks"
        left.plot(steps, [step.loss_together for step in outcome.steps], color=TOGETHER, linewidth=1.4, label=group)
        left.set_title("training loss (nats per byte)", loc="left", fontsize=11, color=INK)
        left.legend(frameon=False, fontsize=9, labelcolor=INK)
        right.plot(steps, [max(step.loss_gap, SMALLEST_GAP) for step in outcome.steps], ".", color=TOGETHER)
        right.axhline(LOSS_BOUND, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        right.annotate("bound", (1, LOSS_BOUND), (0, -10), textcoords="offset points", fontsize=9, color=MUTED)
        right.set_yscale("log")
        right.set_title("difference of the two losses", loc="left", fontsize=11, color=INK)
        for axes in (left, right):
            axes.set_xlabel("step", fontsize=10, color=INK)
            axes.tick_params(labelsize=9, colors=MUTED, length=3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            for spine in axes.spines.values():
                spine.set_color(RULE)

    batch = setup.batches[0]
    panels = zigzag_panels(batch.cu_seqlens, setup.world_size)[:MOST_PANELS]
    return draw_plans(panels, setup.picture, names_of(batch), header=Header(CURVES_HEIGHT, curves))
