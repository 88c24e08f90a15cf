"""report.html: one page for one run or several, with charts to point at, and no network at all."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from robust_accel.files import as_json
from robust_accel.reporting.charts import (
    Chart,
    Examples,
    Line,
    Lines,
    Matrix,
    Surface,
    Waterfall,
    pixels,
)
from robust_accel.reporting.figures import COLORS, shares
from robust_accel.reporting.sections import Section, sections
from robust_accel.reporting.tables import comparison
from robust_accel.reporting.views import Run

# one size for all: small images are drawn up, large ones are seen in 168 CSS pixels anyway
_EDGE = 448
_BLUES = [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]]


def page(runs: Sequence[Run]) -> str:
    """The HTML text.

    Charts are drawn by plotly.js, 4.8 MB that the page holds once. Whatever comes from a run folder
    is escaped, and the page's policy keeps it from loading or sending anything.
    """
    articles = [(run, sections(run)) for run in runs]
    together = _side_by_side(articles) if len(runs) > 1 else []
    plots: list[dict[str, Any]] = []

    def plot_number(chart: Chart) -> int:
        plots.append(as_json(plot(chart)))
        return len(plots) - 1

    return _template().render(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=[{"name": run.name, "model": _model(run), "sections": s} for run, s in articles],
        comparison=comparison(runs),
        together=together,
        plot_number=plot_number,
        plots=plots,
        images=_images,
        is_images=lambda chart: isinstance(chart, Examples),
        plotly=_plotly(),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _model(run: Run) -> str:
    """What was measured, in a line."""
    model = run.model
    parts = [str(model.get("architecture", ""))]
    if model.get("parameters"):
        parts.append(f"{model['parameters']:,} parameters")
    if model.get("dtype"):
        parts.append(str(model["dtype"]))
    if model.get("size"):
        parts.append(f"resized inside to {' x '.join(map(str, model['size']))}")
    return ", ".join(filter(None, parts))


def _side_by_side(parts: Sequence[tuple[Run, Sequence[Section]]]) -> list[Chart]:
    """Curves of several runs in one chart, a colour a run, where several runs have them."""
    groups: dict[str, list[tuple[str, Lines]]] = {}
    for run, found in parts:
        for chart in (chart for section in found for chart in section.charts):
            if isinstance(chart, Lines):
                key = f"{chart.name} {chart.x_label}"
                groups.setdefault(key, []).append((run.name, chart))
    return [_merged(charts) for charts in groups.values() if len(charts) > 1]


def _merged(charts: Sequence[tuple[str, Lines]]) -> Lines:
    lines = []
    for number, (run, chart) in enumerate(charts):
        firm = [line for line in chart.lines if not line.faint] or chart.lines
        for line in firm:
            name = f"{run}: {line.name}"
            lines.append(replace(line, name=name, color=number, dashed=line.color % 2 == 1))
    run, first = charts[0]
    title = first.title.removeprefix(f"{run}: ").split(",")[0]
    return replace(first, title=title, lines=lines)


def plot(chart: Chart) -> dict[str, Any]:
    """A chart as plotly's data and layout; colours of text and grid are the page's."""
    layout: dict[str, Any] = {"xaxis": {}, "yaxis": {}}
    if isinstance(chart, Lines):
        data = [trace for line in chart.lines for trace in _traces(line, chart.percent)]
        layout["xaxis"]["title"] = {"text": _plain(chart.x_label)}
        layout["yaxis"]["title"] = {"text": _plain(chart.y_label)}
        layout["showlegend"] = len(chart.lines) > 1
    elif isinstance(chart, Waterfall):
        data = _bars(chart)
        layout |= {"barmode": "stack", "showlegend": True}
        layout["xaxis"] = {"title": {"text": "after the attack"}, "type": "category"}
        layout["yaxis"]["title"] = {"text": "accuracy (%)"}
    elif isinstance(chart, Matrix):
        data = [_heat(chart)]
        ticks = list(range(len(chart.classes)))
        short = [_plain(n if len(n) <= 16 else n[:15] + "…") for n in chart.classes]
        every = max(1, len(ticks) // 20)  # names that still fit
        axis = {"tickvals": ticks[::every], "ticktext": short[::every]}
        layout["xaxis"] = axis | {"title": {"text": "prediction"}, "constrain": "domain"}
        layout["yaxis"] = axis | {
            "title": {"text": "label"},
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
        }
    elif isinstance(chart, Surface):
        data = [_contours(chart)]
        layout["xaxis"]["title"] = {"text": "random direction (eps)"}
        layout["yaxis"]["title"] = {"text": "gradient's direction (eps)"}
    else:
        raise TypeError(f"{type(chart).__name__} is no plot")
    if isinstance(chart, Waterfall) or (isinstance(chart, Lines) and chart.percent):
        layout["yaxis"] |= {"range": [0, 102], "dtick": 20}
    return {"data": data, "layout": layout}


def _plain(text: str) -> str:
    """Plotly reads tags and entities in its texts: these are none."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _traces(line: Line, percent: bool) -> list[dict[str, Any]]:
    color = COLORS[line.color % len(COLORS)]
    x, name = list(line.x), _plain(line.name)
    unit = "%{y:.2f}%" if percent else "%{y:.4g}"
    traces: list[dict[str, Any]] = []
    if len(line.low):
        edge: dict[str, Any] = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        edge |= {"showlegend": False, "legendgroup": name}
        fill = {"fill": "tonexty", "fillcolor": _faint(color)}
        traces = [edge | {"y": list(line.low)}, edge | {"y": list(line.high)} | fill]
        unit += " [%{customdata[0]:.2f}, %{customdata[1]:.2f}]"
    bands = [[low, high] for low, high in zip(line.low, line.high, strict=True)]
    return [
        *traces,
        {
            "x": x,
            "y": list(line.y),
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers" if line.markers else "lines",
            "line": {
                "color": color,
                "width": 1.2 if line.faint else 2,
                "dash": "dash" if line.dashed else "solid",
            },
            "marker": {"size": 6},
            "opacity": 0.5 if line.faint else 1,
            "customdata": bands,
            "hovertemplate": f"%{{x:.4g}}: {unit}<extra>{name}</extra>",
        },
    ]


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _bars(chart: Waterfall) -> list[dict[str, Any]]:
    values = list(chart.values)
    broken = [0.0, *(a - b for a, b in pairwise(values))]
    labels = [_plain(label) for label in chart.labels]
    bar = {"type": "bar", "x": labels}
    texts = [f"{value:.1f}" for value in values]
    return [
        bar
        | {"y": values, "name": "still right", "text": texts, "textposition": "inside"}
        | {"marker": {"color": COLORS[0]}, "hovertemplate": "%{x}: %{y:.2f}%"},
        bar
        | {"y": broken, "name": "broken", "marker": {"color": COLORS[1], "opacity": 0.5}}
        | {"hovertemplate": "%{x} broke %{y:.2f}%"},
    ]


def _heat(chart: Matrix) -> dict[str, Any]:
    names, found = [_plain(name) for name in chart.classes], 100 * shares(chart)
    told = [
        [f"{label} as {prediction}: {count}" for prediction, count in zip(names, row, strict=True)]
        for label, row in zip(names, chart.counts, strict=True)
    ]
    heat: dict[str, Any] = {"type": "heatmap", "z": found.round(2).tolist(), "zmin": 0}
    heat |= {"zmax": 100, "colorscale": _BLUES, "hovertext": told}
    heat |= {"hovertemplate": "%{hovertext} (%{z:.1f}%)<extra></extra>"}
    heat["colorbar"] = {"title": {"text": "% of label"}, "thickness": 12}
    if len(names) <= 20:
        heat |= {"text": [[c or "" for c in row] for row in chart.counts]}
        heat |= {"texttemplate": "%{text}"}
    return heat


def _contours(chart: Surface) -> dict[str, Any]:
    axis = list(chart.axis)
    return {
        "type": "contour",
        "x": axis,
        "y": axis,
        "z": np.asarray(chart.loss).tolist(),
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "loss"}, "thickness": 12},
        "hovertemplate": "along %{y:.2f} eps, aside %{x:.2f} eps: loss %{z:.4g}<extra></extra>",
    }


def _images(chart: Examples) -> list[dict[str, Any]]:
    """Each image before, after and the perturbation, as data URIs, with what it is taken for."""
    kinds = [_uris(images) for images in (chart.x, chart.x_adv, chart.perturbation)]
    return [
        {
            "label": label,
            "clean": clean,
            "adversarial": adversarial,
            "x": x,
            "x_adv": x_adv,
            "perturbation": perturbation,
        }
        for label, clean, adversarial, x, x_adv, perturbation in zip(
            chart.labels, chart.clean, chart.adversarial, *kinds, strict=True
        )
    ]


def _uris(images: Any) -> list[str]:
    found = []
    for array in pixels(images):
        image = Image.fromarray(array)
        image.thumbnail((_EDGE, _EDGE))
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        found.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return found
