"""The table and the figure of theorem1.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from theorem1_problem import DIMENSION

from robust_accel.files import written_whole
from robust_accel.reporting.figures import COLORS, saved_figure, tidy

if TYPE_CHECKING:
    from theorem1 import Curve

BEGIN, END = "<!-- written by examples/theorem1.py -->", "<!-- end -->"
PANELS = {  # title, label of x, slopes of the dashed and of the dotted guide
    "T": ("1  Steps", "T", [(-0.5, "slope -1/2: (4)")]),
    "MB": ("2  Samples a step", "M B", [(-0.5, "slope -1/2: (4)"), (-1.0, "slope -1")]),
    "variance": ("3a  Quantiser: its variance", "bits b", []),
    "bits": ("3b  Quantiser: the floor", "bits b", [(-1.0, "slope -1: (A25)"), (-2.0, "-2: (4)")]),
    "tolerance": ("4  Inner accuracy", "norm of the inner gradient",
                  [(1.0, "slope 1: (4)"), (2.0, "slope 2")]),
}  # fmt: skip
GRADIENT = "||grad Psi||^2"
Y_LABELS = {"variance": "||Q(g) - g||^2 / ||g||^2", "tolerance": "squared norm"}


def table(curves: Sequence["Curve"], facts: dict[str, float]) -> str:
    """In Markdown: slopes that were measured beside those of (4) and of (A25), and the facts."""
    lines = ["| against | of | (4) | (A25) | measured [95%] |", "|---|---|---|---|---|"]
    for curve in curves:
        slope = curve.slope()
        expected = ["" if p is None else f"{p:+g}" for p in (curve.paper, curve.proof)]
        where = {"variance": "b (variance)", "bits": "b (floor)"}.get(curve.panel, curve.panel)
        measured = f"{slope.mean:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]"
        lines.append(f"| {where} | {curve.name} | {expected[0]} | {expected[1]} | {measured} |")
    values = ", ".join(f"{name} {value:.3g}" for name, value in facts.items())
    return "\n".join([*lines, "", f"Also measured: {values}."])


def write(curves: Sequence["Curve"], facts: dict[str, float], folder: Path) -> None:
    """Write theorem1.png and .svg, and put the table into theorem1.md, between its marks.

    Raises:
        ValueError: The page does not have both marks.
    """
    page = folder / "theorem1.md"
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, foot = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r}")
    draw(curves, folder / "theorem1.png")
    with written_whole(page) as temporary:
        text = f"{head}{BEGIN}\n\n{table(curves, facts)}\n\n{END}{foot}"
        temporary.write_text(text, encoding="utf-8")


def draw(curves: Sequence["Curve"], path: Path) -> None:
    """One panel under another, which a telephone shows at its full width."""
    title = "Theorem 1 in numbers: each term of equation (4)"
    with saved_figure(path, title, 4.8, 16.5, nrows=len(PANELS)) as axes:
        for axis, (panel, (name, x_label, guides)) in zip(axes[:, 0], PANELS.items(), strict=True):
            chosen = [curve for curve in curves if curve.panel == panel]
            _draw_panel(axis, chosen, guides, bits=panel in ("variance", "bits"))
            axis.set_title(name, fontsize=10, loc="left")
            axis.set(xlabel=x_label, ylabel=Y_LABELS.get(panel, GRADIENT))


def _draw_panel(
    axis: Any, curves: Sequence["Curve"], guides: list[tuple[float, str]], bits: bool
) -> None:
    drawn: set[tuple[float, ...]] = set()
    for number, curve in enumerate(curves):
        x, y = np.array(curve.x), curve.y.numpy()
        name = curve.name.split(", b ")[0] if bits else curve.name
        if (key := (*curve.x, float(y.sum()))) in drawn:
            continue  # one curve with two slopes
        drawn.add(key)
        low, high = y.min(axis=0), y.max(axis=0)
        color = COLORS[number % len(COLORS)]
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        middle = np.exp(np.log(y).mean(axis=0))
        axis.plot(x, middle, "o-", color=color, markersize=4, linewidth=1.5, label=name)
    first = curves[0]
    x = np.array(first.x)
    at = len(x) // 2
    middle = float(np.exp(np.log(first.y.numpy()).mean(axis=0))[at])
    for style, (slope, label) in zip(("--", ":"), guides, strict=False):
        line = 2.0 ** (slope * (x - x[at])) if bits else (x / x[at]) ** slope
        axis.plot(x, 1.6 * middle * line, style, color="black", linewidth=1, label=label)
    if bits and not guides:
        s = 2.0**x
        line = np.minimum(DIMENSION / s**2, DIMENSION**0.5 / s)
        axis.plot(x, line, "--", color="black", linewidth=1, label="min{d/4^b, sqrt(d)/2^b}: (4)")
    axis.set_yscale("log")
    if not bits:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.xaxis.set_minor_formatter(lambda v, _: "")
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.yaxis.set_minor_formatter(lambda v, _: "")
    tidy(axis)
    axis.legend(fontsize=8, frameon=False)
