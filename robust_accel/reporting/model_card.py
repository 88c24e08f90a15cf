"""The README.md of a model folder: what it withstands, how that was measured, how to load it."""

from collections.abc import Callable
from typing import Any

import yaml


def _pgd(found: dict[str, Any]) -> str:
    starts = found.get("restarts", 1)
    return (
        f"{found['num_steps']} steps of {found['step_size']:.4g}, "
        f"{starts} random start{'s' if starts > 1 else ''}"
    )


_HOW: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "clean_accuracy": ("none", lambda found: "images as they are"),
    "pgd_accuracy": ("PGD", _pgd),
    "autoattack_accuracy": (
        "AutoAttack",
        lambda found: f"{found['version']}: {', '.join(found.get('attacks', ()))}",
    ),
}


def model_card(report: dict[str, Any], name: str, config: dict[str, Any]) -> str:
    """A Hugging Face model card in Markdown.

    Args:
        report: A run's ``report.json``.
        name: Title.
        config: The folder's ``config.json``: timm's architecture, and mean and std.

    Returns:
        Metadata for the hub, the threat model, each accuracy with its images and its attack, and
        where the weights come from.
    """
    architecture, statistics = config["architecture"], config["pretrained_cfg"]
    metadata = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "robust-accel"],
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", f"# {name}", ""]
    lines += [f"`{architecture}` of timm, trained by robust-accel.", ""]
    lines += _threat_model(report)
    lines += ["| accuracy (%) | images | attack | how |", "|---|---|---|---|"]
    for key, (attack, how) in _HOW.items():
        if found := report.get(key):
            accuracy = f"{100 * found['accuracy']:.2f}"
            lines.append(f"| {accuracy} | {found['n']} | {attack} | {how(found)} |")
    lines += ["", *_how_measured(report), "## Use", "", "```python", "import timm"]
    lines += ["import robust_accel  # registers its CIFAR models"] * architecture.startswith(
        ("preact_resnet", "wide_resnet")
    )
    lines += [
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:NAME"',
        "```",
        "",
        "Images in [0, 1] are normalised before: "
        f"mean {_rounded(statistics['mean'])}, std {_rounded(statistics['std'])}.",
    ]
    if "recipe" in report:
        recipe = yaml.safe_dump(report["recipe"], sort_keys=False).strip()
        lines += ["", "## Recipe", "", "```yaml", recipe, "```"]
    return "\n".join(lines) + "\n"


def _threat_model(report: dict[str, Any]) -> list[str]:
    threat = report.get("threat_model")
    if threat is None:
        return []
    ball = {"linf": "L-infinity", "l2": "L2"}[threat["norm"]]
    return [
        f"**Threat model:** {ball}, eps = {threat['eps']:.4g} ({255 * threat['eps']:.4g}/255) on "
        "pixels in [0, 1], at the size of the data's images, before normalisation. The attacker "
        "knows the model. Nothing is claimed of larger or other perturbations.",
        "",
    ]


def _how_measured(report: dict[str, Any]) -> list[str]:
    """What an auditor asks next."""
    selection = report.get("selection", {})
    chosen = selection.get("weights")
    facts = {
        "weights": {
            "last": "of the last step; no image was used to choose them",
            "best": f"of epoch {selection.get('epoch')}, by {selection.get('metric')} on "
            f"{selection.get('n')} images {selection.get('split')}",
        }.get(chosen, chosen),
        "digest of the weights (SHA-256)": report.get("parameters_digest"),
        "BatchNorm during the attack": report.get("batchnorm_mode"),
        "seed of the attacks": report.get("evaluation_seed"),
        "versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
    }
    return [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "")] + [""]


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
