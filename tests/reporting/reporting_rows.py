"""Run folders as evaluation writes them, made by hand: one helper a kind of row."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robust_accel.files import append_line
from robust_accel.run_folder import RunFolder
from robust_accel.statistics import wilson_interval

FUNCTION = "f" * 64
LINF = {"norm": "linf", "eps": 8 / 255}
L2 = {"norm": "l2", "eps": 0.5}
DIGITS = {"path": "sklearn:digits", "split": "test"}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MODEL: dict[str, Any] = {
    "function": FUNCTION,
    "name": "quickstart",
    "architecture": "wide_resnet10_1",
    "parameters": 77850,
    "class_names": NAMES,
    "size": None,
    "mean": [0.5],
    "std": [0.25],
    "dtype": "float32",
    "randomized": False,
}
RECIPE: dict[str, Any] = {
    "model": {"name": "wide_resnet10_1", "pretrained": False},
    "data": {"path": "sklearn:digits"},
    "attack": {"name": "pgd", "norm": "linf", "eps": 8 / 255, "num_steps": 7},
    "train": {"epochs": 16, "seed": 0},
    "evaluate": {"norm": "linf", "eps": 8 / 255},
    "output": "runs/quickstart",
}


def row(
    attack: dict[str, Any],
    threat: dict[str, Any] | None = None,
    accuracy: float | None = None,
    n: int = 200,
    purpose: str = "accuracy",
    **about: Any,
) -> dict[str, Any]:
    """A row with all that each measurement has; keys of ``about`` replace and add."""
    identity = json.dumps([attack, threat, n, purpose, about.get("point"), about.get("source")])
    found: dict[str, Any] = {
        "key": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "purpose": purpose,
        "attack": attack,
        "threat_model": threat,
        "images": {
            "n": n,
            "kind": "first",
            "selection": about.pop("selection", f"first {n}"),
            "source": about.pop("source", DIGITS),
            "digest": "d" * 64,
        },
        "seed": 0,
        "seconds": 12.34,
        "forward_passes": 123456,
        "device": "cpu",
        "hardware": "Some CPU @ 2.20GHz, 2 threads",
        "num_processes": 2,
        "versions": {"torch": "2.6.0"},
        "time": "2026-11-26T02:00:00+00:00",
    }
    if accuracy is not None:
        found |= {"accuracy": accuracy, "interval": list(wilson_interval(accuracy, n))}
    return found | about


def clean(accuracy: float = 0.975, n: int = 360, **about: Any) -> dict[str, Any]:
    return row({"name": "none"}, None, accuracy, n, clean_accuracy=accuracy, **about)


def pgd(
    accuracy: float = 0.75,
    n: int = 360,
    threat: dict[str, Any] = LINF,
    steps: int = 20,
    restarts: int = 1,
    **about: Any,
) -> dict[str, Any]:
    attack = {"name": "pgd", "num_steps": steps, "step_size": threat["eps"] / 4}
    attack |= {"restarts": restarts}
    return row(attack, threat, accuracy, n, **({"clean_accuracy": 0.975} | about))


def autoattack(
    shares: tuple[float, ...] = (0.98, 0.73, 0.71, 0.71, 0.705),
    n: int = 200,
    threat: dict[str, Any] = LINF,
    version: str = "standard",
    **about: Any,
) -> dict[str, Any]:
    """Shares: clean, and after each attack."""
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"][: len(shares) - 1]
    after = [
        {"attack": name, "accuracy": share, "broken": round(n * (before - share))}
        for name, before, share in zip(attacks, shares, shares[1:], strict=False)
    ]
    attack = {"name": "autoattack", "version": version, "attacks": attacks, "search": "fp32"}
    found = {"clean_accuracy": shares[0], "after": after}
    return row(attack, threat, shares[-1], n, **(found | about))


def certificate(sigma: float = 0.25, n: int = 100, **about: Any) -> dict[str, Any]:
    radii = [round(0.02 * i, 2) for i in range(41)]
    shares = [round(0.9 - 0.9 * (radius / 1.1) ** 2, 2) for radius in radii]
    points = [
        {"radius": radius, "accuracy": share, "interval": list(wilson_interval(share, n))}
        for radius, share in zip(radii, shares, strict=True)
        if radius in (0.0, 0.2, 0.5, 0.7)
    ]
    attack = {"name": "certify", "method": "cohen", "sigma": sigma, "n0": 100, "n": 100000}
    attack |= {"alpha": 0.001, "precision": "fp32"}
    found = {"radii": points, "curve": {"radius": radii, "accuracy": shares}, "abstained": 0.05}
    found |= {"samples_per_image": 100100.0}
    return row(attack, None, None, n, "certificate", **(found | about))


def sweep(threat: dict[str, Any] = LINF) -> list[dict[str, Any]]:
    rows = []
    for i, share in enumerate((0.93, 0.86, 0.75, 0.5, 0.21)):
        point = {"key": "eps", "value": threat["eps"] * (i + 1) / 4}
        about = {"point": point, "purpose": "sweep"}
        rows.append(pgd(share, 200, threat | {"eps": point["value"]}, **about))
    for steps, share in ((1, 0.88), (5, 0.79), (10, 0.76), (20, 0.75), (50, 0.745)):
        point = {"key": "num_steps", "value": steps}
        about = {"point": point, "purpose": "sweep"}
        # one step size for all numbers of steps
        rows.append(pgd(share, 200, threat, steps, **about))
    return rows


def sanity(**about: Any) -> dict[str, Any]:
    axis = [i / 5 - 2 for i in range(21)]
    loss = [[0.2 + 0.1 * (a + 2) ** 2 + 0.02 * b * b for b in axis] for a in axis]
    checks = [
        {
            "name": "more steps never help the defender",
            "status": "pass",
            "value": {"pgd_1": 0.88},
            "sentence": "accuracy is 88.0% after 1, 76.0% after 10 steps of PGD.",
        },
        {
            "name": "images made for another model are no stronger",
            "status": "not run",
            "value": {},
            "sentence": "no other model was given (sanity.transfer_from).",
        },
    ]
    found = {"checks": checks, "surface": {"axis": axis, "loss": loss}}
    return row({"name": "sanity"}, LINF, None, 200, "sanity", **(found | about))


def by_class(accuracy: float, classes: int = 10, names: list[str] = NAMES) -> dict[str, Any]:
    """``per_class`` and ``confusion`` of about that accuracy, 36 images a class."""
    matrix, per_class = [], []
    for label in range(classes):
        right = round(36 * min(1.0, accuracy + 0.02 * (label - classes / 2)))
        line = [0] * classes
        line[label] = right
        line[(label + 3) % classes] += 36 - right
        matrix.append(line)
        name = names[label] if label < len(names) else None
        per_class.append({"class": label, "name": name, "n": 36, "accuracy": right / 36})
    return {"confusion": matrix, "per_class": per_class}


def everything() -> list[dict[str, Any]]:
    """Rows of all kinds, against two threat models."""
    rand = ("apgd-ce", "apgd-dlr")
    return [
        clean(**by_class(0.975)),
        pgd(**by_class(0.75)),
        pgd(0.76, 200, restarts=5),
        autoattack(**by_class(0.705)),
        pgd(0.61, 360, L2, non_finite={"logits": [3, 17], "gradients": [5, 17]}),
        autoattack(
            (0.98, 0.60, 0.59),
            100,
            L2,
            "rand",
            draws=20,
            majority_accuracy=0.62,
            warnings=["it seems to be a randomized defense: " + " and ".join(rand)],
        ),
        clean(1.0, 300, purpose="train", source=DIGITS | {"split": "train"}),
        pgd(0.93, 300, purpose="train", source=DIGITS | {"split": "train"}),
        *sweep(),
        sanity(),
        certificate(),
    ]


def write_run(
    path: Path, rows: list[dict[str, Any]] | None = None, *, trained: bool = True, **changes: Any
) -> RunFolder:
    """A run folder with ``report.json`` and, of a trained one, ``metrics.jsonl``."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    report: dict[str, Any] = {}
    if trained:
        report = {
            "recipe": RECIPE,
            "steps": 320,
            "epochs": 16.0,
            "train_seconds_per_epoch": 12.34,
            "versions": {"python": "3.11", "torch": "2.6.0"},
            "normalization": {"where": "inside the model", "mean": [0.5], "std": [0.25]},
            "selection": {"weights": "last"},
        }
    report |= {"model": MODEL, "measurements": everything() if rows is None else rows}
    folder.write_report({k: v for k, v in (report | changes).items() if v is not None})
    return folder


def write_metrics(folder: RunFolder, epochs: int = 16) -> None:
    for step in range(1, 4 * epochs + 1):
        share = 1 - 0.9 * 0.93**step
        accuracies = {"clean_batch_accuracy": share, "robust_batch_accuracy": 0.8 * share}
        line = {"step": step, "epoch": step / 4, "loss": 2.3 * 0.97**step}
        append_line(folder.metrics, line | accuracies)
        if step % 16 == 0:
            held_out = {"validation_clean_accuracy": 0.98 * share}
            held_out |= {"validation_robust_accuracy": 0.75 * share}
            append_line(folder.metrics, {"step": step, "epoch": step / 4} | held_out)


def write_examples(folder: RunFolder, shape: tuple[int, ...] = (1, 8, 8), **metadata: str) -> None:
    """Eight images of digits (or noise in another shape), perturbed by at most 8/255."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, *shape, generator=generator)
    if shape == (1, 8, 8):
        x = torch.tensor(load_digits().images[:8] / 16, dtype=torch.float32).unsqueeze(1)
    noise = (torch.rand(x.shape, generator=generator) - 0.5).sign() * 8 / 255
    labels = torch.arange(8)
    adversarial = torch.tensor([0, 1, 8, 3, 4, 9, 6, 1])
    about = {
        "function": FUNCTION,
        "attack": json.dumps({"name": "pgd", "num_steps": 20, "step_size": 0.01, "restarts": 1}),
        "threat_model": json.dumps(LINF),
        "selection": "first 8",
    }
    found = {
        "x": x,
        "x_adv": (x + noise).clamp(0, 1),
        "labels": labels,
        "clean_predictions": torch.tensor([0, 1, 2, 3, 4, 9, 6, 7]),
        "adversarial_predictions": adversarial,
    }
    save_file(found, folder.examples, about | metadata)


def write_config(folder: RunFolder, **changes: Any) -> None:
    folder.model.mkdir(exist_ok=True)
    config = {
        "architecture": "wide_resnet10_1",
        "model_args": {"in_chans": 1, "depth": 16, "width": 4},
        "pretrained_cfg": {"mean": [0.5], "std": [0.25], "license": "apache-2.0"},
    }
    (folder.model / "config.json").write_text(json.dumps(config | changes))


def write_whole(path: Path, **changes: Any) -> RunFolder:
    """A run folder with everything that a report can show."""
    found = {
        "doubts": ["trained against l2, eps 1; measured against linf, eps 8/255 (evaluate.norm)"],
        "best_against_last": {
            "split": "held out of train",
            "n": 144,
            "attack": "PGD-10",
            "best": 0.71,
            "best_epoch": 12,
            "last": 0.69,
        },
    }
    folder = write_run(path, **(found | changes))
    write_metrics(folder)
    write_examples(folder)
    write_config(folder)
    return folder
