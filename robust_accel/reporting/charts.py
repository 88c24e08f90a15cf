"""What the pictures of a run show, before anything is drawn: figures.py and page.py draw it."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robust_accel.files import opened
from robust_accel.reporting.views import (
    Row,
    Run,
    about,
    attack_text,
    images_text,
    settings_text,
    threat_text,
    tidy,
    which_images,
)
from robust_accel.statistics import wilson_interval

_SHOWN = 8  # examples
_CLASSES = 200  # of a matrix: of more, none is kept


@dataclass(frozen=True)
class Line:
    """A curve; y, low and high (a band) in percent where its chart is of shares."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    markers: bool = False
    faint: bool = False
    dashed: bool = False
    color: int = 0


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    percent: bool = True
    log: bool = False  # of the x axis


@dataclass(frozen=True)
class Waterfall:
    """Accuracy in percent, clean and after each attack of AutoAttack."""

    name: str
    title: str
    labels: Sequence[str]
    values: Sequence[float]


@dataclass(frozen=True)
class Matrix:
    """Counts of predictions: [label][prediction]."""

    name: str
    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Surface:
    """Loss at axis[i] along the gradient's direction and axis[j] along a random one."""

    name: str
    title: str
    axis: Sequence[float]
    loss: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Examples:
    """Images [n, C, H, W] in [0, 1] before and after the attack, and classes by name."""

    name: str
    title: str
    x: Tensor
    x_adv: Tensor
    labels: Sequence[str]
    clean: Sequence[str]
    adversarial: Sequence[str]
    magnification: int

    @property
    def perturbation(self) -> Tensor:
        """Magnified, about grey."""
        return (0.5 + self.magnification * (self.x_adv - self.x)).clamp(0, 1)


Chart = Lines | Waterfall | Matrix | Surface | Examples


def training_charts(run: Run) -> list[Chart]:
    """Loss and accuracies over training; nothing where nothing was trained."""
    metrics = tidy(run.folder.read_metrics())
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "validation_robust_accuracy" in line]
    if not steps:
        return []
    epochs = [line["epoch"] for line in steps]
    loss = Line("loss", epochs, _values(steps, "loss", 1))
    lines = []
    for color, kind in enumerate(("clean", "robust")):
        batch = _values(steps, f"{kind}_batch_accuracy")
        lines.append(Line(f"{kind}, training batch", epochs, batch, faint=True, color=color))
        if validations:
            at = [line["epoch"] for line in validations]
            held_out = _values(validations, f"validation_{kind}_accuracy")
            name = f"{kind}, held-out split"
            lines.append(Line(name, at, held_out, markers=True, color=color))
    title = f"{run.name}: {{}} over training"
    attack = _training_attack(run)
    return [
        Lines(
            "training_loss", title.format("loss"), "epoch", "training loss (nats)", [loss], False
        ),
        Lines(
            "training_accuracy",
            title.format("accuracy") + (f", {attack}" if attack else ""),
            "epoch",
            "accuracy (%)",
            lines,
        ),
    ]


def _values(lines: Sequence[dict[str, Any]], key: str, scale: float = 100) -> list[float]:
    """A gap (NaN) where a line has no number."""
    found = [line.get(key) for line in lines]
    return [math.nan if value is None else scale * value for value in found]


def _training_attack(run: Run) -> str:
    """The recipe's attack in short, as far as it tells."""
    attack = run.report.get("recipe", {}).get("attack") or {}
    words = [attack.get("name", ""), attack.get("norm", "")]
    if isinstance(attack.get("eps"), float | int) and attack.get("norm"):
        words = [attack["name"], threat_text(attack)]
    return ", ".join(filter(None, words))


@dataclass(frozen=True)
class SweepCurve:
    """Rows of one sweep: the same images, and the same attack but for the point.

    Attributes:
        name: What all points have in common.
    """

    key: str
    name: str
    rows: Sequence[Row]

    @property
    def axis(self) -> str:
        return {"num_steps": "steps"}.get(self.key, self.key)

    @property
    def points(self) -> list[tuple[float, Row]]:
        return [(row["point"]["value"], row) for row in self.rows]


def sweep_curves(run: Run) -> list[SweepCurve]:
    """Sweeps, each in rising order of its points."""
    groups: dict[str, list[Row]] = {}
    for row in run.of("sweep"):
        key = row["point"]["key"]
        threat = {k: v for k, v in row["threat_model"].items() if k != key}
        others = [row["images"].get("digest"), row["point"].get("of"), row.get("seed")]
        group = json.dumps([key, _common_attack(row), threat, others], sort_keys=True)
        groups.setdefault(group, []).append(row)
    curves = [sorted(rows, key=lambda row: row["point"]["value"]) for rows in groups.values()]
    names = Counter((rows[0]["point"]["key"], _sweep_name(run, rows[0])) for rows in curves)
    found = []
    for rows in curves:
        key, name = rows[0]["point"]["key"], _sweep_name(run, rows[0])
        if names[key, name] > 1:
            name += f" ({settings_text(_common_attack(rows[0]))}; seed {rows[0].get('seed')})"
        found.append(SweepCurve(key, name, rows))
    return found


def _common_attack(row: Row) -> dict[str, Any]:
    """The attack of a sweep, but for what follows from the point itself."""
    varies = {"eps": ("step_size",), "num_steps": ("num_steps", "step_size")}
    own = varies.get(row["point"]["key"], ())
    return {key: value for key, value in row["attack"].items() if key not in own}


def _sweep_name(run: Run, row: Row) -> str:
    threat = row["threat_model"]
    ball = threat["norm"] if row["point"]["key"] == "eps" else threat_text(threat)
    return f"{attack_text(_common_attack(row))}, {ball}, {images_text(run, row)}"


def sweep_charts(run: Run) -> list[Chart]:
    """Accuracy against eps, a chart a norm, and against steps or whatever else was varied."""
    groups: dict[tuple[str, str], list[SweepCurve]] = {}
    for curve in sweep_curves(run):
        norm = curve.rows[0]["threat_model"]["norm"] if curve.key == "eps" else ""
        groups.setdefault((curve.key, norm), []).append(curve)
    charts: list[Chart] = []
    for (key, norm), curves in groups.items():
        scale = 255 if norm == "linf" and all(map(_in_levels, curves)) else 1
        axis = label = curves[0].axis
        if key == "eps":
            label = f"eps, {norm} ({'1/255 of' if scale > 1 else 'of'} the pixels' range)"
        lines = [_sweep_line(curve, scale, number) for number, curve in enumerate(curves)]
        name = {"eps": f"sweep_eps_{norm}", "num_steps": "sweep_steps"}.get(key, f"sweep_{key}")
        title = f"{run.name}: accuracy against {axis}"
        if len(lines) == 1:
            title += f", {lines[0].name}"
        charts.append(Lines(name, title, label, "accuracy (%)", lines))
    return charts


def _in_levels(curve: SweepCurve) -> bool:
    return all("/255" in threat_text(row["threat_model"]) for row in curve.rows)


def _sweep_line(curve: SweepCurve, scale: float, color: int) -> Line:
    points = [(scale * x, row["accuracy"], row["interval"]) for x, row in curve.points]
    clean, n = curve.rows[0].get("clean_accuracy"), curve.rows[0]["images"]["n"]
    if clean is not None and curve.key in ("eps", "num_steps"):
        points.insert(0, (0.0, clean, wilson_interval(clean, n)))
    x, y, bands = zip(*points, strict=True)
    return Line(
        curve.name,
        x,
        [100 * share for share in y],
        [100 * band[0] for band in bands],
        [100 * band[1] for band in bands],
        markers=True,
        color=color,
    )


def waterfalls(run: Run) -> list[Chart]:
    """Accuracy after each attack, a chart for each run of AutoAttack."""
    charts: list[Chart] = []
    for number, row in enumerate(run.of("accuracy", "autoattack")):
        after = row.get("after")
        if after:
            labels = ["clean", *(found["attack"] for found in after)]
            values = [row["clean_accuracy"], *(found["accuracy"] for found in after)]
            shares = [100 * value for value in values]
            title = f"{run.name}: {about(run, row)}"
            charts.append(Waterfall(f"autoattack_{number}", title, labels, shares))
    return charts


def certified_chart(run: Run) -> list[Chart]:
    """Certified accuracy against the radius, each curve as far as it is known, with its band."""
    lines = []
    for number, row in enumerate(run.of("certificate")):
        if curve := row.get("curve"):
            n, of = row["images"]["n"], attack_text(row["attack"]).removeprefix("certificate, ")
            bands = [wilson_interval(share, n) for share in curve["accuracy"]]
            lines.append(
                Line(
                    f"{of}, {images_text(run, row)}",
                    curve["radius"],
                    [100 * share for share in curve["accuracy"]],
                    [100 * low for low, _ in bands],
                    [100 * high for _, high in bands],
                    color=number,
                )
            )
    if not lines:
        return []
    title = f"{run.name}: certified accuracy" + (f", {lines[0].name}" if len(lines) == 1 else "")
    label = "L2 radius (of the pixels' range)"
    return [Lines("certified", title, label, "certified accuracy (%)", lines)]


def confusions(run: Run, rows: Sequence[Row]) -> list[Chart]:
    """A matrix for each row that has one."""
    return [
        Matrix(
            f"confusion_{number}",
            f"{run.name}: {about(run, row)}",
            run.class_names(len(row["confusion"])),
            row["confusion"],
        )
        for number, row in enumerate(rows)
        if row.get("confusion") and len(row["confusion"]) <= _CLASSES
    ]


def surfaces(run: Run) -> list[Chart]:
    """The loss about some images, of each sanity suite."""
    charts: list[Chart] = []
    for number, row in enumerate(run.of("sanity")):
        if surface := row.get("surface"):
            images = f"{run.name}: loss about the images{which_images(run, row['images'])}"
            title = ", ".join(filter(None, [images, threat_text(row.get("threat_model"))]))
            name = f"loss_surface_{number}"
            charts.append(Surface(name, title, surface["axis"], surface["loss"]))
    return charts


def examples(run: Run) -> list[Chart]:
    """The images that were kept, if they are of the model that the report is of."""
    if not run.folder.examples.exists():
        return []
    try:
        opened(run.folder.examples).close()
        with safe_open(run.folder.examples, "pt") as file:
            metadata = tidy(file.metadata() or {})
            found = {key: file.get_tensor(key)[:_SHOWN] for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{run.folder.examples} cannot be read: {error}") from error
    if metadata.get("function", "unknown") != run.model.get("function") or not len(found["labels"]):
        return []
    names = {
        key: [run.class_name(int(index)) for index in found[key]]
        for key in ("labels", "clean_predictions", "adversarial_predictions")
    }
    words = [attack_text(json.loads(metadata["attack"]))]
    words += [threat_text(json.loads(metadata["threat_model"]))]
    which = which_images(run, {"source": json.loads(metadata.get("source", "{}"))})
    return [
        Examples(
            "examples",
            f"{run.name}: {', '.join(words)}; {metadata['selection']} images{which}, right or not",
            found["x"],
            found["x_adv"],
            names["labels"],
            names["clean_predictions"],
            names["adversarial_predictions"],
            _magnification(found["x_adv"] - found["x"]),
        )
    ]


def _magnification(delta: Tensor) -> int:
    """The largest power of two, at least 1, that shows every change between black and white."""
    largest = float(delta.abs().max())
    factor = 1
    while largest > 0 and 2 * factor * largest <= 0.5 and factor < 1024:
        factor *= 2
    return factor


def pixels(images: Tensor) -> Any:
    """[n, C, H, W] in [0, 1] -> uint8 [n, H, W, 3]; more than three channels: the first three."""
    images = images.clamp(0, 1)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
