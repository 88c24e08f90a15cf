"""The README.md of a model folder: what it withstands, how that was measured, how to load it."""

from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

import robust_accel.models  # noqa: F401  registers the package's own architectures
from robust_accel.models import beyond_timm
from robust_accel.reporting.sections import certified_tables
from robust_accel.reporting.tables import Table, escaped, fenced
from robust_accel.reporting.views import (
    Row,
    Run,
    accuracy_text,
    attack_text,
    attack_title,
    finding,
    known_points,
    settings_text,
    source_text,
    threat_text,
)
from robust_accel.settings import eps_text


def model_card(run: Run, config: dict[str, Any]) -> str:
    """A Hugging Face model card in Markdown.

    Args:
        config: The folder's ``config.json``: timm's architecture and its arguments, mean and std.

    Returns:
        Metadata for the hub with each result, the threat model of each number with its images and
        attack, how to load the model and what that leaves out, and where the weights come from.
    """
    lines = ["---", _metadata(run, config).to_yaml().strip(), "---", f"# {escaped(run.name)}", ""]
    lines += [escaped(f"{_architecture(config)}, trained by robust-accel."), ""]
    lines += _measured(run) + _smoothed(run) + _how_measured(run.report)
    lines += _use(run, config)
    if "recipe" in run.report:
        recipe = yaml.safe_dump(run.report["recipe"], sort_keys=False).strip()
        lines += ["", "## Recipe", "", fenced(recipe)]
    return "\n".join(lines) + "\n"


def _metadata(run: Run, config: dict[str, Any]) -> ModelCardData:
    recipe = run.report.get("recipe", {})
    model, data = recipe.get("model") or {}, recipe.get("data") or {}
    results = [_result(row) for row in _quotable(run)]
    for row in run.of("certificate"):
        results += [_certified_result(row, point) for point in known_points(row)]
    hub_id = _hub_id(str(data.get("path", "")))
    about: dict[str, Any] = {
        "license": config["pretrained_cfg"].get("license") if model.get("pretrained") else None,
        "library_name": "robust-accel" if _beyond_timm(config) else "timm",
        "pipeline_tag": "image-classification",
        "datasets": [hub_id] if hub_id else None,
        "metrics": ["accuracy"],
        "tags": ["adversarial-robustness", "robust-accel"],
    }
    if results:
        about |= {"model_name": run.name, "eval_results": results}
    return ModelCardData(**about)


def _quotable(run: Run) -> list[Row]:
    return [row for row in run.of("accuracy") if row.get("accuracy") is not None]


def _result(row: Row) -> EvalResult:
    threat = threat_text(row.get("threat_model")).replace(",", "")
    name = ", ".join(filter(None, [f"{attack_title(row)} accuracy", threat]))
    return _eval_result(row, name, row["accuracy"], row.get("interval"))


def _certified_result(row: Row, point: dict[str, Any]) -> EvalResult:
    name = f"certified accuracy, l2 radius {eps_text(point['radius'])}"
    name += f", sigma {row['attack']['sigma']:.4g}"
    return _eval_result(row, name, point["accuracy"], point.get("interval"))


def _eval_result(row: Row, name: str, share: float, interval: Any) -> EvalResult:
    source = row["images"].get("source", {})
    path = str(source.get("path", "unknown"))
    args = {"images": row["images"]["n"], "selection": row["images"].get("selection")}
    args |= {"interval_95": list(interval) if interval else None}
    return EvalResult(
        task_type="image-classification",
        dataset_type=_hub_id(path) or "other",
        # a path tells where somebody's files are, and nobody else what they hold
        dataset_name=Path(path).name,
        dataset_config=source.get("config"),
        dataset_split=source.get("split"),
        metric_type="accuracy",
        metric_name=name,
        metric_value=share,
        metric_args={key: value for key, value in args.items() if value is not None},
    )


def _hub_id(path: str) -> str | None:
    """The path, if it can be a data set on the hub and is nothing that lies here."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    is_file = Path(path).suffix in (".parquet", ".pickle", ".csv", ".json")
    return None if not path or is_file or Path(path).exists() else path


def _is_own(architecture: str) -> bool:
    """Whether it is this package that registers an architecture with timm."""
    return timm.is_model(architecture) and timm.model_entrypoint(
        architecture
    ).__module__.startswith("robust_accel.")


def _beyond_timm(config: dict[str, Any]) -> list[str]:
    """What timm alone cannot do of this model, as sentences."""
    sentences = []
    if _is_own(config["architecture"]):
        sentences.append(
            f"`{config['architecture']}` is an architecture of robust-accel: timm knows it once "
            "`robust_accel.models` is imported."
        )
    return sentences + [f"The measured model {part}." for part in beyond_timm(config)]


def _architecture(config: dict[str, Any]) -> str:
    """The architecture with the depth, width and whatever else it was built with."""
    whose = "robust-accel" if _is_own(config["architecture"]) else "timm"
    arguments = config.get("model_args") or {}
    built = ", ".join(f"{key} {value}" for key, value in arguments.items() if value is not None)
    return f"`{config['architecture']}` of {whose}" + (f" ({built})" if built else "")


def _measured(run: Run) -> list[str]:
    """Each accuracy with its own threat model, attack and images."""
    rows = _quotable(run)
    threats = [row["threat_model"] for row in rows if row.get("threat_model")]
    balls = dict.fromkeys(_ball(threat) for threat in threats if "norm" in threat)  # no union
    lines = []
    if balls:
        lines = [
            f"**Threat model{'s' * (len(balls) > 1)}:** {escaped('; '.join(balls))}: "
            "on pixels in [0, 1], at the size of the data's images, before normalisation. "
            "The attacker knows the model. Nothing is claimed of larger or other perturbations.",
            "",
        ]
    table = [_line(row) for row in rows]
    head = ["accuracy (%)", "threat model", "attack", "images", "how"]
    text = "In brackets: 95% Wilson intervals."
    return [*lines, Table(head, table).markdown(), "", text, ""]


def _ball(threat: dict[str, Any]) -> str:
    norm = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}.get(threat["norm"], threat["norm"])
    return f"{norm}, eps = {eps_text(threat['eps'])}"


def _line(row: Row) -> list[str]:
    images, threat = row["images"], threat_text(row.get("threat_model"))
    which = [str(images["n"]), images.get("selection", ""), source_text(images), finding(row)]
    how = settings_text(row["attack"]) or "images as they are"
    if row.get("draws"):
        how += f"; mean of {row['draws']} draws of the model's noise"
    return [
        accuracy_text(row),
        threat or "none",
        attack_text(row["attack"]),
        ", ".join(filter(None, which)),
        how,
    ]


def _smoothed(run: Run) -> list[str]:
    lines = []
    for row, table in zip(run.of("certificate"), certified_tables(run), strict=True):
        sigma = f"{row['attack']['sigma']:.4g}"
        lines += [
            f"## Certified, under noise of sigma {sigma}",
            "",
            "These numbers are those of the smoothed model: of many copies of an image, each with "
            f"Gaussian noise of standard deviation {sigma} on pixels in [0, 1], the class that the "
            "model predicts most often. **The model by itself, without the noise, has no "
            "certificate.** `robust-accel certify` predicts and certifies in this way.",
            "",
            escaped(table.caption),
            "",
            table.markdown(),
            "",
        ]
    return lines


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
        "digest of the function measured (SHA-256)": (report.get("model") or {}).get("function"),
        "versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
    }
    told = [f"{key}: {value}" for key, value in facts.items() if value not in (None, "")]
    told += [f"doubt: {doubt}" for doubt in report.get("doubts", ())]
    return [*(f"- {escaped(text)}" for text in told), ""]


def _use(run: Run, config: dict[str, Any]) -> list[str]:
    statistics, beyond = config["pretrained_cfg"], _beyond_timm(config)
    lines = ["## Use", ""]
    for sentence in beyond:
        lines += [escaped(sentence), ""]
    lines += ["```python", "import timm"]
    lines += ["import robust_accel.models  # registers the architecture"] * _is_own(
        config["architecture"]
    )
    lines += [
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:NAME"',
        "```",
        "",
        "Images in [0, 1] are normalised before: "
        f"mean {_rounded(statistics['mean'])}, std {_rounded(statistics['std'])}.",
    ]
    return lines


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
