"""Robust image models by adversarial training: recipes, training, evaluation, certificates."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from robust_accel.commands import say
from robust_accel.console import LEVELS, shown
from robust_accel.exit_codes import (
    INTERRUPTED,
    NO_MEMORY,
    NOT_FINITE,
    OF_THE_DISK,
    STOPPED,
    UNAVAILABLE,
    UNWRITABLE,
    USAGE,
    Stopped,
    Unavailable,
    Unwritable,
    is_out_of_memory,
)
from robust_accel.files import check_path
from robust_accel.messages import close_to, is_setting, one_line
from robust_accel.messages import shown as value_shown
from robust_accel.training.stopping import (
    Stop,
    end_without_launcher,
    is_launched,
    leave,
    refuse_restart,
    tell_launcher,
)

EXIT_CODES = (
    f"Exit codes: {NOT_FINITE} numbers that are not finite ended a training, or a fault of ours; "
    f"{USAGE} a setting, an argument or the data are refused; {UNAVAILABLE} another "
    f"process hangs or is gone; {NO_MEMORY} there is too little memory; "
    f"{UNWRITABLE} the disk is full, or a file or folder cannot be used; "
    f"{STOPPED} stopped by a signal or train.max_time, {INTERRUPTED} by Ctrl-C: train --resume "
    "goes on."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what ends it early goes to standard error, with a code of ``exit_codes``."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops taking settings at the first flag: take those behind one, too
    if rest and (not hasattr(options, "settings") or not all(map(is_setting, rest))):
        is_flag = any(word.startswith("--") for word in rest)
        hint = "; settings are written section.key=value: train.epochs=3" if is_flag else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.settings += rest
    end_without_launcher(UNAVAILABLE)
    try:
        with ExitStack() as stack:
            if not options.command.endswith(".wrap"):  # a script has its own way
                stack.enter_context(Stop())
            stack.enter_context(shown("warning" if options.quiet else options.log_level))
            try:
                # late: a command imports what only it needs
                module, _, name = options.command.partition(":")
                return getattr(importlib.import_module(module), name or "run")(options)
            except Stopped as stopped:
                if not stopped.is_told:
                    said = f"stopped ({stopped.reason}): the same command goes on"
                    say(f"\nrobust-accel: {said}", file=sys.stderr)
                if is_launched():
                    leave(stopped.code)  # while further signals are still caught
                raise
    except ValueError as error:
        _tell(f"{error}", by_any=getattr(error, "of_one_process", False))
        refuse_restart()
        return USAGE
    except FloatingPointError as error:  # a training met NaN: nobody's fault in the settings
        _tell(f"{error}")
        refuse_restart()
        return NOT_FINITE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        keys = "train.gradient_accumulation (more), evaluate.batch_size, certify.batch_size (less)"
        said = f"too little memory ({one_line(str(error), 300)}): what changes that: {keys}"
        _tell(said, by_any=True)
        refuse_restart()
        return NO_MEMORY
    except Unavailable as error:
        _tell(f"{error}", by_any=True)
        os._exit(UNAVAILABLE)  # what torch still has open would wait for those that are gone
    except Unwritable as error:
        _tell(f"{error}", by_any=True)
        return UNWRITABLE
    except OSError as error:
        said = f"{error.filename}: {error.strerror}"  # a folder that is not ours to read or write
        if error.errno in OF_THE_DISK:
            place = f"{error.filename or 'a file'} cannot be written"
            said = f"{place}: {error.strerror}; what was there before is there still"
        elif error.filename is None:
            raise
        _tell(one_line(said), by_any=True)
        return UNWRITABLE


def _tell(text: str, *, by_any: bool = False) -> None:
    """The last sentence, of the first process or of any; a launcher repeats it below its own."""
    if by_any:
        print(f"\nrobust-accel: {text}", file=sys.stderr, flush=True)  # maybe after a bar
    else:
        say(f"robust-accel: {text}", file=sys.stderr)
    tell_launcher(f"robust-accel: {text}")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number < 2**31:
        wanted = "a whole number from 1 to 2^31 - 1 is wanted"
        raise argparse.ArgumentTypeError(f"{wanted}, got {value_shown(text)}")
    return number


def _rate(text: str) -> float:
    """Bytes a second of ``25gbit``."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmg])bit", text.lower().removesuffix("/s"))
    rate = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8 if found else 0.0
    if rate <= 0:
        wanted = "a rate as 100mbit, 1gbit or 25gbit is wanted"
        raise argparse.ArgumentTypeError(f"{wanted}, got {value_shown(text)}")
    return rate


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        wanted = "a number above 0, at most 1, is wanted"
        raise argparse.ArgumentTypeError(f"{wanted}, got {value_shown(text)}")
    return share


def _image(text: str) -> tuple[int, ...]:
    """[C, H, W] of ``3x224x224``."""
    parts = text.split("x")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,4}", part) for part in parts):
        wanted = "channels, height and width are wanted, as 3x224x224"
        raise argparse.ArgumentTypeError(f"{wanted}, got {value_shown(text)}")
    return tuple(map(int, parts))


def _path(text: str) -> Path:
    try:
        return Path(check_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value_shown(text)} is not allowed: {error}") from None


def _launcher(text: str) -> str:
    try:
        (program, *_) = shlex.split(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value_shown(text)} is no command") from None
    if shutil.which(program) is None:
        raise argparse.ArgumentTypeError(f"there is no program {value_shown(program)}")
    return text


_GROUPS = {
    "Train and measure": ("train", "wrap", "evaluate", "certify", "pseudo-label"),
    "Compare": ("report", "study"),
    "Look up": ("recipes", "recipe", "explain", "check", "plan", "env", "schema"),
}
_EXAMPLES = {
    "train": "robust-accel train quickstart train.epochs=4 output=runs/short",
    "wrap": "accelerate launch -m robust_accel wrap --recipe cifar10/dat_pgd train.py --lr 0.1",
    "evaluate": "robust-accel evaluate runs/quickstart evaluate.autoattack=standard",
    "certify": "robust-accel certify runs/smooth certify.skip=20 certify.n=10000",
    "pseudo-label": "robust-accel pseudo-label runs/teacher --out labels.parquet",
    "report": "robust-accel report runs/seed0 runs/seed1 --html both.html",
    "study": "robust-accel study paper/table1 --scale cpu --jobs 2",
    "recipes": "robust-accel recipes cifar10",
    "recipe": "robust-accel recipe show cifar10/at attack.num_steps=20",
    "explain": "robust-accel explain train.ema_decay",
    "check": "robust-accel check my.yaml data.path=images",
    "plan": "robust-accel plan cifar10/dat_pgd --nodes 6 --gpus 6 --link 1gbit --device v100",
    "env": "robust-accel env",
    "schema": "robust-accel schema > schema.json",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Also what was meant, where a command is misspelt."""
        wrong = re.search("invalid choice: '(.*?)' ", message)
        message = message.replace("required: recipe, settings", "required: recipe")
        super().error(message + (close_to(wrong[1], _EXAMPLES) if wrong else ""))


def _overview(helps: dict[str, str]) -> str:
    """The commands by what they are for, and how they are called."""
    lines = [str(__doc__)]
    for title, names in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:13} {helps[name]}" for name in names)]
    examples = [f"  {_EXAMPLES[name]}" for name in ("train", "evaluate", "wrap", "study")]
    more = "COMMAND --help has its arguments; most settings are the recipe's: explain, recipe show."
    return "\n".join([*lines, "", "Examples:", *examples, "", more])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="robust-accel",
        usage="%(prog)s COMMAND ...",
        epilog="\n".join(textwrap.wrap(EXIT_CODES, 100)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('robust-accel')}"
    )
    parser.set_defaults(log_level="info", quiet=False)
    commands = parser.add_subparsers(
        required=True,
        prog="robust-accel",
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        parser_class=_Parser,
    )
    helps: dict[str, str] = {}

    def command(name: str, text: str, *parents: _Parser) -> argparse.ArgumentParser:
        helps[name] = text
        example = f"Example: {_EXAMPLES[name]}"
        return commands.add_parser(
            name, description=text, epilog=example, parents=parents, allow_abbrev=False
        )

    telling = _Parser(add_help=False)
    telling.add_argument("--quiet", action="store_true", help="warnings and the result only")
    telling.add_argument("--log-level", choices=LEVELS, default="info", help="what is told")
    settings_help = "settings that replace the recipe's, as section.key=value"
    trust_help = (
        "import and run the code that the run's recipe names (package.module:Class), with your "
        "rights: only for run folders whose every file you trust"
    )

    train = command("train", "train a robust model by a recipe", telling)
    train.add_argument("recipe", help="a YAML file, or a packaged recipe's name (quickstart)")
    train.add_argument("settings", nargs="*", help=settings_help)
    train.add_argument("--resume", action="store_true", help="continue the run, if there is one")
    train.set_defaults(command="robust_accel.commands.train")

    wrap = command("wrap", "run a training script, its model made robust", telling)
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
    wrap.set_defaults(command="robust_accel.commands.wrap")

    evaluate = command("evaluate", "measure a run or any timm checkpoint", telling)
    evaluate.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    evaluate.add_argument("settings", nargs="*", help=settings_help)
    evaluate.add_argument("--trust", action="store_true", help=trust_help)
    evaluate.set_defaults(command="robust_accel.commands.evaluate")

    certify = command("certify", "certify L2 radii under Gaussian noise", telling)
    certify.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    certify.add_argument("settings", nargs="*", help=settings_help)
    certify.add_argument("--trust", action="store_true", help=trust_help)
    certify.set_defaults(command="robust_accel.commands.certify")

    label = command("pseudo-label", "label images by a trained model", telling)
    label.add_argument("model", help="a run folder, a timm model, or local-dir:FOLDER")
    label.add_argument("settings", nargs="*", help=settings_help)
    label.add_argument("--data", help="what to label; if not given, what the run left out")
    label.add_argument("--out", required=True, help="the .parquet or .npz file to write")
    label.set_defaults(command="robust_accel.commands.pseudo_label")

    report = command("report", "write reports, and compare runs side by side")
    report.add_argument("runs", nargs="+", type=_path, metavar="RUN")
    report.add_argument("--csv", type=_path, metavar="FILE", help="every measurement, a line each")
    report.add_argument("--latex", type=_path, metavar="FILE", help="the comparison, for booktabs")
    report.add_argument("--html", type=_path, metavar="FILE", help="one page for all these runs")
    report.add_argument(
        "--all",
        action="store_true",
        help="also measurements that one on more images stands for",
    )
    report.set_defaults(command="robust_accel.commands.report")

    study = command("study", "many runs by one file: table, figures, claims", telling)
    study.add_argument("study", help="a study file, a folder with one, or a packaged one's name")
    study.add_argument("settings", nargs="*", help="for all its runs, as section.key=value")
    study.add_argument("--scale", help="which of the file's scales; the first when not given")
    study.add_argument("--seeds", type=_positive, metavar="N", help="0 to N - 1")
    study.add_argument("--jobs", type=_positive, default=1, metavar="N", help="trainings at a time")
    study.add_argument(
        "--output", type=_path, default=Path("runs/studies"), metavar="DIR", help="of all its runs"
    )
    study.add_argument("--write", type=_path, metavar="DIR", help="the page, written here as well")
    study.add_argument("--table", action="store_true", help="only show what is there")
    study.add_argument(
        "--launcher",
        metavar="COMMAND",
        type=_launcher,
        help='what starts a training, say "accelerate launch --num_processes {processes}"',
    )
    study.set_defaults(command="robust_accel.commands.study")

    recipes = command("recipes", "list the packaged recipes")
    recipes.add_argument("word", nargs="?", help="only those with it in their name or sentence")
    recipes.set_defaults(command="robust_accel.commands.recipes")

    recipe = command("recipe", "show one, or copy it to begin with")
    verbs = recipe.add_subparsers(required=True, metavar="VERB")
    show = verbs.add_parser("show", help="all its settings, and where each was set")
    copy = verbs.add_parser("copy", help="a file of your own, without its bases")
    for verb, name in ((show, "show"), (copy, "copy")):
        verb.add_argument("recipe", help="a YAML file, or a packaged recipe's name")
        if name == "copy":
            verb.add_argument("file", type=_path, help="where to")
        verb.add_argument("settings", nargs="*", help=settings_help)
        verb.set_defaults(command=f"robust_accel.commands.recipes:{name}")

    explain = command("explain", "what a recipe's key or section means")
    explain.add_argument("key", help="attack.eps, eps, attack, or pgd")
    explain.set_defaults(command="robust_accel.commands.explain")

    check = command("check", "all that is wrong with a recipe, its data and model", telling)
    check.add_argument("recipe", help="a YAML file, or a packaged recipe's name")
    check.add_argument("settings", nargs="*", help=settings_help)
    check.add_argument("--processes", type=_positive, metavar="N", help="that would train; 1")
    check.set_defaults(command="robust_accel.commands.check")

    plan = command("plan", "what a step would take on many machines", telling)
    plan.add_argument("recipe", help="a YAML file, or a packaged recipe's name")
    plan.add_argument("settings", nargs="*", help=settings_help)
    plan.add_argument("--nodes", type=_positive, required=True, metavar="N", help="machines")
    plan.add_argument("--gpus", type=_positive, default=1, metavar="N", help="workers of each")
    plan.add_argument(
        "--link", type=_rate, required=True, metavar="RATE", help="of a machine: 1gbit, 25gbit"
    )
    plan.add_argument(
        "--device",
        choices=("this", "v100", "a100", "h100"),
        default="this",
        help="whose seconds: of this machine, measured, or by a data sheet",
    )
    plan.add_argument(
        "--efficiency", type=_share, default=0.12, help="of the data sheet's FLOPS that are reached"
    )
    plan.add_argument("--image", type=_image, metavar="CxHxW", help="where the data are not here")
    plan.add_argument("--classes", type=_positive, metavar="N", help="where the data are not here")
    plan.set_defaults(command="robust_accel.commands.plan")

    env = command("env", "versions and devices, for reports of faults")
    env.set_defaults(command="robust_accel.commands.env")
    schema = command("schema", "the JSON schema of recipes, for editors")
    schema.set_defaults(command="robust_accel.commands.explain:print_schema")
    parser.description = _overview(helps)
    return parser


if __name__ == "__main__":
    sys.exit(main())
