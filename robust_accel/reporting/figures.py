"""Pictures of a run: each chart as PNG and SVG, by matplotlib."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from robust_accel.files import written_whole
from robust_accel.reporting.charts import (
    Chart,
    Examples,
    Lines,
    Matrix,
    Surface,
    Waterfall,
    pixels,
)

# Okabe and Ito's, which the colour-blind tell apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_ANNOTATED = 20  # classes of a matrix whose cells show their numbers


def draw(chart: Chart, folder: Path) -> Path:
    """Write ``folder/NAME.png`` and ``folder/NAME.svg``; returns the first.

    Of a name, which may be a stranger's, letters, digits, ``-`` and ``_`` are left.
    """
    path = folder / (re.sub(r"[^A-Za-z0-9_-]", "_", chart.name)[:100] + ".png")
    if isinstance(chart, Lines):
        _draw_lines(chart, path)
    elif isinstance(chart, Waterfall):
        _draw_waterfall(chart, path)
    elif isinstance(chart, Matrix):
        _draw_matrix(chart, path)
    elif isinstance(chart, Surface):
        _draw_surface(chart, path)
    else:
        _draw_examples(chart, path)
    return path


@contextmanager
def saved_figure(
    path: Path, title: str, width: float, height: float, **options: Any
) -> Iterator[Any]:
    """Axes to draw into, then saved under the title, broken to the figure's width."""
    import matplotlib
    from matplotlib.figure import Figure

    # names from data sets may hold dollars: nothing is set as mathematics
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "robust-accel"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(squeeze=False, **options)
        figure.suptitle("\n".join(wrap(title, int(13 * width))), fontsize=10)
        yield axes
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=150, facecolor="white")
        # all has its place: to find it anew takes half the time
        figure.set_layout_engine("none")
        with written_whole(path.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, facecolor="white", metadata={"Date": None})


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, linewidth=0.6)


def _draw_lines(chart: Lines, path: Path) -> None:
    with saved_figure(path, chart.title, 6.4, 4.2) as axes:
        axis = axes[0, 0]
        for line in chart.lines:
            color = COLORS[line.color % len(COLORS)]
            if len(line.low):
                axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
            axis.plot(
                line.x,
                line.y,
                color=color,
                alpha=0.4 if line.faint else 1,
                linewidth=1.2 if line.faint else 1.8,
                marker="o" if line.markers else None,
                markersize=4,
                label=line.name,
            )
        axis.set(xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.percent:
            axis.set(ylim=(0, 102), yticks=range(0, 101, 20))
        points = sorted({x for line in chart.lines for x in line.x})
        if chart.log:
            axis.set_xscale("log", base=2)
            axis.set_xticks(points, [f"{x:g}" for x in points])
            axis.minorticks_off()
        elif all(float(x).is_integer() for x in points):
            axis.locator_params(axis="x", integer=True)
        if len(chart.lines) > 1:
            axis.figure.legend(
                loc="outside lower center",
                ncols=2 if max(len(line.name) for line in chart.lines) < 36 else 1,
                fontsize=8,
                frameon=False,
            )
        tidy(axis)


def _draw_waterfall(chart: Waterfall, path: Path) -> None:
    values = np.asarray(chart.values)
    broken = np.concatenate([[0], values[:-1] - values[1:]])
    with saved_figure(path, chart.title, max(4.8, 1.1 * len(values) + 1.2), 3.8) as axes:
        axis = axes[0, 0]
        bars = axis.bar(range(len(values)), values, color=COLORS[0], label="still right")
        axis.bar(
            range(len(values)), broken, bottom=values, color=COLORS[1], alpha=0.45, label="broken"
        )
        axis.bar_label(bars, [f"{v:.1f}" for v in values], label_type="center", color="white")
        axis.set(ylabel="accuracy (%)", ylim=(0, 102), yticks=range(0, 101, 20))
        axis.set_xticks(range(len(values)), chart.labels)
        axis.set_xlabel("after the attack")
        axis.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        tidy(axis)
        axis.grid(axis="x", visible=False)


def shares(chart: Matrix) -> np.ndarray:
    """Each row of counts as shares of its label's images, 0 where there are none."""
    counts = np.asarray(chart.counts, dtype=float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _draw_matrix(chart: Matrix, path: Path) -> None:
    number, found = len(chart.classes), shares(chart)
    size = min(max(4.6, 0.42 * number + 2.2), 12)
    with saved_figure(path, chart.title, size, 0.88 * size) as axes:
        axis = axes[0, 0]
        image = axis.imshow(100 * found, cmap="Blues", vmin=0, vmax=100)
        axis.figure.colorbar(image, ax=axis, shrink=0.75, label="of the label's images (%)")
        axis.set(xlabel="prediction", ylabel="label")
        every = 1 if number <= 50 else -(-number // 25)  # names that still fit
        ticks, font = range(0, number, every), 8 if number <= 25 else 6
        names = [chart.classes[i] for i in ticks]
        short = [name if len(name) <= 24 else name[:23] + "…" for name in names]
        axis.set_xticks(ticks, short, fontsize=font, rotation=90 if max(map(len, short)) > 2 else 0)
        axis.set_yticks(ticks, short, fontsize=font)
        if number <= _ANNOTATED:
            for (i, j), share in np.ndenumerate(found):
                if chart.counts[i][j]:
                    color = "white" if share > 0.55 else "black"
                    text = str(chart.counts[i][j])
                    axis.text(j, i, text, ha="center", va="center", color=color, fontsize=8)


def _draw_surface(chart: Surface, path: Path) -> None:
    along, aside = np.meshgrid(chart.axis, chart.axis, indexing="ij")
    options = {"subplot_kw": {"projection": "3d"}}
    with saved_figure(path, chart.title, 6.0, 5.0, **options) as axes:
        axis = axes[0, 0]
        axis.plot_surface(along, aside, np.asarray(chart.loss), cmap="viridis", linewidth=0)
        axis.set(
            xlabel="gradient's direction (eps)",
            ylabel="random direction (eps)",
            xticks=(-2, -1, 0, 1, 2),
            yticks=(-2, -1, 0, 1, 2),
        )
        axis.set_zlabel("loss (nats)", labelpad=6)
        axis.set_box_aspect(None, zoom=0.85)  # or the label of z is cut off


def _draw_examples(chart: Examples, path: Path) -> None:
    rows = [
        ("as they are", chart.x, chart.clean),
        ("perturbed", chart.x_adv, chart.adversarial),
        (f"perturbation\nx {chart.magnification}", chart.perturbation, None),
    ]
    number = len(chart.labels)
    with saved_figure(
        path, chart.title, max(4.0, 1.5 * number + 0.6), 5.6, nrows=3, ncols=number
    ) as axes:
        for line, (name, images, predictions) in zip(axes, rows, strict=True):
            line[0].set_ylabel(name, fontsize=9)
            for index, (axis, image) in enumerate(zip(line, pixels(images), strict=True)):
                axis.imshow(image, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if predictions is not None:
                    own, label = predictions[index], chart.labels[index]
                    text = own if own == label else f"{own}\n(is {label})"
                    color = COLORS[2] if own == label else COLORS[1]
                    axis.set_title("\n".join(_short(text)), fontsize=8, color=color)


def _short(text: str) -> list[str]:
    """Lines that fit over an image."""
    return [part for line in text.split("\n") for part in wrap(line, 16)[:2]]
