"""Pictures of what was measured, as SVG; the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, RIVALS = "#0b6e4f", ("#c1440e", "#8a6d3b", "#5b5b8c", "#777777")


@dataclass(frozen=True)
class Line:
    """One line of a picture; ours is drawn thick and green."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ours: bool = False


def lines(
    path: Path,
    title: str,
    axes_names: tuple[str, str],
    drawn: Sequence[Line],
    *,
    log: tuple[bool, bool] = (False, False),
    ticks: Sequence[float] = (),
    marked: Mapping[str, tuple[float, float]] | None = None,
    level: tuple[str, float] | None = None,
) -> None:
    """Lines over an axis.

    log     whether each axis is logarithmic.
    ticks   labelled places of the first axis.
    marked  stretches of the first axis to shade, by what happened then.
    level   a height to draw a thin line at, and its name.
    """

    def draw(axes: Axes) -> None:
        others = iter(RIVALS * 3)
        for line in drawn:
            colour, width = (OURS, 2.6) if line.ours else (next(others), 1.6)
            axes.plot(line.x, line.y, color=colour, linewidth=width, label=line.name,
                      marker="o" if len(line.x) < 20 else None, markersize=4)  # fmt: skip
        for name, (start, end) in (marked or {}).items():
            axes.axvspan(start, end, color="#f2c14e", alpha=0.35, linewidth=0, label=name)
        if level:
            axes.axhline(level[1], color="#999999", linewidth=1, linestyle="--", label=level[0])
        axes.set_xscale("log" if log[0] else "linear")
        axes.set_yscale("log" if log[1] else "linear")
        if not log[1]:
            axes.set_ylim(bottom=0)
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)

    _save(path, title, axes_names, draw)


def bars(path: Path, title: str, unit: str, values: Mapping[str, float], ours: Sequence[str]) -> None:
    """Bars with their figures, the longest first."""

    def draw(axes: Axes) -> None:
        ordered = sorted(values.items(), key=lambda one: one[1])
        names = [name for name, _ in ordered]
        drawn = axes.barh(names, [value for _, value in ordered],
                          color=[OURS if name in ours else RIVALS[0] for name in names])  # fmt: skip
        axes.bar_label(drawn, labels=[f"{value:,.0f}" for _, value in ordered], padding=4, fontsize=9)
        axes.set_xlim(right=ordered[-1][1] * 1.12)

    _save(path, title, (unit, ""), draw)


def _save(path: Path, title: str, axes_names: tuple[str, str], draw: Callable[[Axes], None]) -> None:
    # Here, not above: half a second that a run without pictures need not pay.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Fixed ids and no date: a picture changes only when its data do. Text as paths, so that no font is needed.
    with rc_context({"svg.hashsalt": "loanmesh", "font.size": 10}):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        axes.grid(axis="both", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
