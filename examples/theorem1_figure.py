"""The table and the figure of theorem1.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robust_accel.files import written_whole
from robust_accel.reporting.figures import COLORS, saved_figure, tidy

if TYPE_CHECKING:
    from theorem1 import Curve

BEGIN, END = "<!-- written by examples/theorem1.py -->", "<!-- end -->"
PANELS = {  # title, label of x
    "T": ("1  Steps", "T"),
    "MB": ("2  Samples a step", "M B"),
    "b": ("3  Quantiser", "bits b"),
    "epsilon": ("4  Inner accuracy", "epsilon: norm of the inner gradient"),
}


def table(curves: Sequence["Curve"]) -> str:
    """In Markdown: the slopes that were measured beside those of (4) and of (A25)."""
    lines = ["| against | | points | (4) | (A25) | measured [95%] |", "|---|---|---|---|---|---|"]
    for curve in curves:
        slope, ends = curve.slope(), f"{curve.x[0]:g} to {curve.x[-1]:g}"
        measured = f"{slope.mean:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]"
        predicted = f"{curve.paper:+g} | {curve.proof:+g}"
        lines.append(f"| {curve.term} | {curve.name} | {ends} | {predicted} | {measured} |")
    return "\n".join(lines)


def write(curves: Sequence["Curve"], folder: Path) -> None:
    """Write theorem1.png and .svg, and put the table into theorem1.md, between its marks.

    Raises:
        ValueError: The page does not have both marks.
    """
    page = folder / "theorem1.md"
    head, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, foot = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r}")
    title = "Theorem 1 in numbers: ||grad Psi||^2 against the cause of each term of equation (4)"
    with saved_figure(folder / "theorem1.png", title, 8.4, 7.2, nrows=2, ncols=2) as axes:
        for axis, (term, (name, x_label)) in zip(axes.flat, PANELS.items(), strict=True):
            _draw(axis, [curve for curve in curves if curve.term == term])
            axis.set_title(name, fontsize=10, loc="left")
            axis.set(xlabel=x_label, ylabel="||grad Psi||^2")
    with written_whole(page) as temporary:
        text = f"{head}{BEGIN}\n\n{table(curves)}\n\n{END}{foot}"
        temporary.write_text(text, encoding="utf-8")


def _draw(axis: Any, curves: Sequence["Curve"]) -> None:
    """Means with the replicas' range, and lines that fall from each prediction's highest mean."""
    from matplotlib.ticker import LogLocator

    term, drawn = curves[0].term, set()
    for curve, color in zip(curves, COLORS, strict=False):
        x, y = np.array(curve.x, dtype=float), curve.y.numpy()
        axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, linewidth=0)
        middle = np.exp(np.log(y).mean(axis=0))
        label = f"{curve.name}: {curve.slope().mean:+.2f}"
        axis.plot(x, middle, "o-", color=color, markersize=4, linewidth=1.5, label=label)
        predicted = {"(4)": curve.paper, "(A25)": curve.proof}
        if curve.paper == curve.proof:
            predicted = {"(4), (A25)": curve.paper}
        for (source, power), style in zip(predicted.items(), ("--", ":"), strict=False):
            if (source, power) not in drawn:
                drawn.add((source, power))
                first = x[middle.argmax()]
                line = 2 ** (power * (x - first)) if term == "b" else (x / first) ** power
                label = f"{source}: {power:+g}"
                axis.plot(x, 1.5 * middle.max() * line, style, color=color, label=label)
    axis.set_yscale("log")
    if term != "b":
        axis.set_xscale("log", base=10 if term == "epsilon" else 2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if term == "epsilon":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 2)
    tidy(axis)
    axis.legend(fontsize=8, frameon=False, loc="upper left" if term == "epsilon" else "lower left")
