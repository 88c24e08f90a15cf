"""Command line: train, wrap, evaluate, certify, pseudo-label, report."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; faults of the user's go to standard error, one line each, with status 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops taking settings at the first flag: take those behind one, too
    if rest and (not hasattr(options, "settings") or not all(map(_is_setting, rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest
    try:
        return options.run(options)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # once, not once a process
            print(f"robust-accel: {error}", file=sys.stderr)
        return 2


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _train(options: argparse.Namespace) -> int:
    from robust_accel.recipe import load_recipe
    from robust_accel.reporting.report import comparison_table
    from robust_accel.training.run import train

    recipe = load_recipe(options.recipe, options.settings)
    train(recipe, resume=options.resume, quiet=options.quiet)
    if os.environ.get("RANK", "0") == "0":
        print(comparison_table([recipe.output]))
    return 0


def _wrap(options: argparse.Namespace) -> int:
    from robust_accel.commands.wrap import wrap_script
    from robust_accel.recipe import load_recipe

    words = options.script
    start = next((i for i, word in enumerate(words) if not _is_setting(word)), len(words))
    if start == len(words):
        raise ValueError("wrap: no script given, only settings of the recipe")
    recipe = load_recipe(options.recipe, words[:start], required=["attack"])
    script, *arguments = words[start:]
    return wrap_script(script, arguments, recipe, mean=options.mean, std=options.std)


def _evaluate(options: argparse.Namespace) -> int:
    from robust_accel.commands.evaluate import evaluate_model
    from robust_accel.reporting.report import comparison_table

    folder = evaluate_model(options.model, options.settings)
    if os.environ.get("RANK", "0") == "0":
        print(comparison_table([folder.path]))
    return 0


def _certify(options: argparse.Namespace) -> int:
    from robust_accel.commands.certify import certify_model
    from robust_accel.reporting.report import certified_table

    folder = certify_model(options.model, options.settings)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(certified_table(folder.read_report())))
    return 0


def _pseudo_label(options: argparse.Namespace) -> int:
    from robust_accel.commands.pseudo_label import pseudo_label

    result = pseudo_label(options.model, options.out, options.data, options.settings)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{options.out}: {result['n']} images, mean confidence {result['mean_confidence']:.3f}"
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from robust_accel.reporting.report import comparison_table, write_report
    from robust_accel.run_folder import RunFolder

    for run in options.runs:
        write_report(RunFolder(run))
    print(comparison_table(options.runs))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="robust-accel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    settings_help = "settings that replace the recipe's, as section.key=value"

    train = commands.add_parser("train", help="train a robust model by a recipe")
    train.add_argument("recipe", help="a YAML file, or a packaged recipe's name (quickstart)")
    train.add_argument("settings", nargs="*", help=settings_help)
    train.add_argument("--resume", action="store_true", help="continue the run, if there is one")
    train.add_argument("--quiet", action="store_true", help="lines instead of a progress bar")
    train.set_defaults(run=_train)

    wrap = commands.add_parser("wrap", help="run a training script, its model made robust")
    wrap.add_argument("--recipe", required=True, help="its attack, objective and communication")
    for name in ("mean", "std"):
        wrap.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="A,B,C",
            help="by which the script normalises its images, if it does",
        )
    wrap.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="[SETTING ...] SCRIPT [ARGUMENT ...]",
        help=f"{settings_help}; the script; its own arguments",
    )
    wrap.set_defaults(run=_wrap)

    evaluate = commands.add_parser("evaluate", help="measure a run or any timm checkpoint")
    evaluate.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    evaluate.add_argument("settings", nargs="*", help=settings_help)
    evaluate.set_defaults(run=_evaluate)

    certify = commands.add_parser("certify", help="certify L2 radii under Gaussian noise")
    certify.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    certify.add_argument("settings", nargs="*", help=settings_help)
    certify.set_defaults(run=_certify)

    label = commands.add_parser("pseudo-label", help="label images by a trained model")
    label.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    label.add_argument("settings", nargs="*", help=settings_help)
    label.add_argument("--data", help="what to label; if not given, what the run left out")
    label.add_argument("--out", required=True, help="the parquet file to write")
    label.set_defaults(run=_pseudo_label)

    report = commands.add_parser("report", help="write reports, and compare runs side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
