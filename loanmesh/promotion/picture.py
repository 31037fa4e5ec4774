"""A replayed day as a picture: arrivals and backlog, replicas that serve, time to decision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loanmesh.promotion.capacity import SERVICES
from loanmesh.promotion.file import Promotion
from loanmesh.promotion.simulate import Replayed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, ORANGE, GREY = "#0b6e4f", "#c1440e", "#999999"
COLOURS = ("#0b6e4f", "#c1440e", "#8a6d3b", "#5b5b8c", "#777777")


KINDS = (".svg", ".png", ".pdf")
"""What a picture's name may end in."""


def draw(path: Path, promotion: Promotion, replayed: Replayed, how: str) -> None:
    """Write the picture, as what its name ends in; an SVG has the same bytes for the same day. Raises OSError.

    how  under which scaling it was lived through, for the title.
    """
    # Here, not above: only a picture needs it, and it takes half a second to load.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    series = replayed.series
    minutes = [at_s / 60 for at_s in series.at_s]
    # Fixed ids and no date, text as paths: a picture changes only when its data do, and needs no font.
    with rc_context({"svg.hashsalt": "loanmesh", "font.size": 9}):
        figure = Figure(figsize=(7.6, 7.4), layout="constrained", facecolor="white")
        backlog, replicas, wait = figure.subplots(3, 1, sharex=True)
        _plot(backlog, minutes, series.backlog, GREEN, "accepted and not decided")
        _plot(backlog, minutes, series.arrivals_a_second, ORANGE, "arrivals a second")
        for name, colour in zip(SERVICES, COLOURS, strict=True):
            replicas.step(minutes, series.replicas[name], where="post", color=colour, linewidth=1.6, label=name)
        _plot(wait, minutes, series.wait_s, GREEN, "seconds to decision")
        wait.axhline(promotion.decide_within_s, color=GREY, linewidth=1, linestyle="--", label="asked for")
        verdict = "all in time" if replayed.holds else "too late"
        backlog.set_title(f"{promotion.name}, {how}: {verdict}", loc="left", fontsize=11, fontweight="bold")
        backlog.yaxis.set_major_formatter("{x:,.0f}")
        replicas.set_ylabel("replicas that serve")
        wait.set_xlabel(f"minutes from {promotion.start:%Y-%m-%d %H:%M} {promotion.timezone}")
        for axes in (backlog, replicas, wait):
            _tidy(axes, promotion.height_s / 60)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _plot(axes: Axes, x: list[float], y: list[float], colour: str, label: str) -> None:
    axes.plot(x, y, color=colour, linewidth=1.8, label=label)


def _tidy(axes: Axes, height_min: float) -> None:
    axes.axvspan(0, height_min, color="#f2c14e", alpha=0.3, linewidth=0, label="the height")
    axes.set_ylim(bottom=0)
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
