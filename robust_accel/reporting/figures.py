"""Pictures of a run: training, accuracy against eps and steps, loss surface, adversarial images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from robust_accel.run_folder import RunFolder


@contextmanager
def _figure(path: Path, *shape: int, **options: Any) -> Iterator[Any]:
    """Axes to draw into, then saved to the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield axes
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def draw_training(folder: RunFolder) -> Path | None:
    """Loss and accuracies over training; None where nothing was trained."""
    metrics = folder.read_metrics()
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "validation_robust_accuracy" in line]
    if not steps:
        return None
    path = folder.path / "training.png"
    with _figure(path, 1, 2, figsize=(10, 3.6)) as (left, right):
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color="tab:blue")
        left.set(xlabel="epoch", ylabel="training loss")
        for kind, color in (("clean", "tab:green"), ("robust", "tab:red")):
            right.plot(
                [s["epoch"] for s in steps],
                [100 * s[f"{kind}_batch_accuracy"] for s in steps],
                color=color,
                alpha=0.35,
                label=f"{kind}, training batch",
            )
            if validations:
                right.plot(
                    [v["epoch"] for v in validations],
                    [100 * v[f"validation_{kind}_accuracy"] for v in validations],
                    color=color,
                    marker="o",
                    markersize=3,
                    label=f"{kind}, held-out split",
                )
        right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
        right.legend(fontsize=8)
    return path


def draw_sweep(folder: RunFolder, report: dict[str, Any]) -> Path | None:
    """PGD accuracy against eps and against the number of steps (Figure 3 of DAT)."""
    curves = {key: curve for key, curve in report.get("sweep", {}).items() if curve}
    if not curves:
        return None
    path, norm = folder.path / "sweep.png", report["threat_model"]["norm"]
    clean = report["clean_accuracy"]["accuracy"]
    with _figure(path, 1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False) as axes:
        for axis, (key, curve) in zip(axes[0], curves.items(), strict=True):
            points = [(p[key], p["accuracy"]) for p in curve]
            scale = 255 if key == "eps" and norm == "linf" else 1
            if key == "eps":
                points.insert(0, (0.0, clean))
            axis.plot(
                [scale * x for x, _ in points], [100 * y for _, y in points], "o-", markersize=4
            )
            unit = f"eps ({norm}{', / 255' if scale > 1 else ''})"
            axis.set(
                xlabel=unit if key == "eps" else "PGD steps", ylabel="accuracy (%)", ylim=(0, 100)
            )
            if key == "num_steps":
                axis.set_xticks([x for x, _ in points])
            axis.grid(alpha=0.3)
    return path


def draw_surface(folder: RunFolder, report: dict[str, Any]) -> Path | None:
    """Loss on the plane of the gradient's and a random direction."""
    surface = report.get("sanity", {}).get("surface")
    if surface is None:
        return None
    path = folder.path / "loss_surface.png"
    along, aside = np.meshgrid(surface["axis"], surface["axis"], indexing="ij")
    options = {"subplot_kw": {"projection": "3d"}, "figsize": (5.6, 4.6)}
    with _figure(path, 1, 1, **options) as axis:
        axis.plot_surface(along, aside, np.array(surface["loss"]), cmap="viridis", linewidth=0)
        axis.set(
            xlabel="gradient's direction (eps)",
            ylabel="random direction (eps)",
            zlabel="loss",
            xticks=(-2, -1, 0, 1, 2),
            yticks=(-2, -1, 0, 1, 2),
        )
    return path


def draw_certified(folder: RunFolder, report: dict[str, Any]) -> Path | None:
    """Certified accuracy against the radius."""
    if "certified" not in report:
        return None
    path, found = folder.path / "certified.png", report["certified"]
    with _figure(path, 1, 1, figsize=(5, 3.6)) as axis:
        curve = found["curve"]
        axis.plot(curve["radius"], [100 * a for a in curve["accuracy"]])
        axis.set(
            xlabel="L2 radius (pixel units)",
            ylabel="certified accuracy (%)",
            ylim=(0, 100),
            title=f"sigma {found['sigma']:.4g}, {found['images']} images",
        )
        axis.grid(alpha=0.3)
    return path


def draw_examples(folder: RunFolder) -> Path | None:
    """Images as they are, perturbed, and the perturbation by itself, with predictions."""
    if not folder.examples.exists():
        return None
    path, found = folder.path / "examples.png", load_file(folder.examples)
    number = len(found["labels"])
    delta = found["x_adv"] - found["x"]
    # grey is nothing, black and white the largest change
    magnified = 0.5 + delta / (2 * delta.abs().max().clamp(min=1e-12))
    rows = [
        ("clean", found["x"], found["clean_predictions"]),
        ("perturbed", found["x_adv"], found["adversarial_predictions"]),
        ("perturbation, magnified", magnified, None),
    ]
    with _figure(path, 3, number, figsize=(1.5 * number, 5.2), squeeze=False) as axes:
        for line, (name, pixels, predictions) in zip(axes, rows, strict=True):
            line[0].set_ylabel(name, fontsize=8)
            for index, axis in enumerate(line):
                image = pixels[index].permute(1, 2, 0).clamp(0, 1).numpy()
                grey = image.shape[2] == 1
                axis.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
                if predictions is not None:
                    label, own = int(found["labels"][index]), int(predictions[index])
                    color = "tab:green" if own == label else "tab:red"
                    axis.set_title(f"{own} (is {label})", fontsize=8, color=color)
    return path
