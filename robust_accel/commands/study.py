"""The study command: many runs by one file, and what they come to."""

import argparse
import logging
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

from robust_accel.commands import say
from robust_accel.exit_codes import Stopped
from robust_accel.files import read_json
from robust_accel.locks import locked
from robust_accel.plain_yaml import MOST_LEVELS, RecipeError
from robust_accel.recipe_file import RECIPES
from robust_accel.studies.execution import CHANGED, Done, Line, Runner
from robust_accel.studies.page import has_more, table, write_overview, write_page
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results
from robust_accel.studies.study_file import FILE, find_study, read_study
from robust_accel.training.disk import check_writable

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    if options.write is not None:
        check_writable(options.write, "--write")
    check_writable(options.output, "--output")
    asked = find_study(options.study)
    paths = _studies(asked, options.scale)
    plans = [_plan(path, options) for path in paths]  # all are read before one is started
    broken: list[str] = []
    is_whole = True
    for path, plan in zip(paths, plans, strict=True):
        with nullcontext() if options.table else locked(plan.root):
            failed, missing = _run(path, plan, options)
        broken += failed
        is_whole = is_whole and (options.table or not missing)
    if paths != [asked]:
        title, names = read_study(asked, None)[0].title, [_name(path) for path in paths]
        for folder in _folders(plans[0], options):
            counted = write_overview(folder, _name(asked), title, names)
        print(counted.markdown())
        say(f"{folder / _name(asked)}.md")
    for text in broken:
        say(f"failed: {text}", file=sys.stderr)
    return 0 if is_whole and not broken else 1


def _studies(path: Path, scale: str | None, above: tuple[Path, ...] = ()) -> list[Path]:
    """The study itself; or those that it names, as far as they have the scale.

    Args:
        above: Those by which it is named, resolved.
    """
    study, _ = read_study(path, None)
    if not study.studies:
        return [path]
    above += (path.resolve(),)
    if len(above) > MOST_LEVELS or above[-1] in above[:-1]:
        raise RecipeError(f"{path}: studies: it names itself, or others deeper than {MOST_LEVELS}")
    inner = [_inner(path, name) for name in study.studies]
    known = [
        found for found in inner if scale is None or scale in read_study(found, None)[0].scales
    ]
    if not known:
        read_study(inner[0], scale)  # says which scales there are
    for found in inner:
        if found not in known:
            logger.warning(f"{_name(found)}: left out, for it has no scale {scale}")
    every = (more for found in known for more in _studies(found, scale, above))
    return list(dict.fromkeys(every))


def _inner(path: Path, name: str) -> Path:
    inner = path.parent / name
    return inner / FILE if (inner / FILE).is_file() else find_study(name)


def _plan(path: Path, options: argparse.Namespace) -> Plan:
    study, scale = read_study(path, options.scale)
    number = options.seeds or scale.seeds
    root = options.output.resolve() / (options.scale or next(iter(study.scales)))
    return Plan(
        path,
        study,
        scale,
        root,
        overrides=options.settings,
        seeds=range(number),
        launcher=options.launcher,
    )


def _run(path: Path, plan: Plan, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Which trainings failed, and which rows are missing."""
    name = _name(path)
    logger.info(f"{plan.study.title}: {plan.number} trainings")
    done = Done(plan.root, _earlier(plan, name))
    results = Results(plan, done)
    runner = Runner(plan, done, jobs=options.jobs, launcher=options.launcher)
    try:
        if not options.table:
            runner.run(results.chosen)
    except Stopped as stopped:
        logger.warning("stopped (%s): the same command goes on", stopped.reason)
        stopped.is_told = True
        raise
    finally:
        kept = []
        for folder in _folders(plan, options):
            more = None if folder == plan.root else has_more(results, folder, name)
            if more is None:
                page = write_page(results, folder, name, _command(path, options))
            else:
                kept.append(more)
    print(table(results).markdown())
    say(f"{page}")
    missing = results.missing()
    if options.table:
        for trial in done.stale(plan.known(results.chosen)):
            logger.warning(f"{trial.name}: {CHANGED}: the table has no number of it yet")
    elif missing:
        logger.warning(f"not finished: {'; '.join(missing)}")
    return [*runner.broken.values(), *kept], missing


def _folders(plan: Plan, options: argparse.Namespace) -> list[Path]:
    """Where pages are written."""
    return [*filter(None, dict.fromkeys((plan.root, options.write)))]


def _earlier(plan: Plan, name: str) -> dict[str, Line]:
    """The finished trainings of the last table, and of earlier ones what it lacked, by name."""
    summary = plan.root / f"{name}.json"
    found = read_json(summary) if summary.exists() else {}
    if found.get("title", plan.study.title) != plan.study.title:
        logger.warning(f"{summary} was of {found['title']!r}: its page is written over")
    lines = [*found.get("earlier", []), *found.get("trainings", [])]
    return {str(line.get("name")): line for line in lines}


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.name == FILE else path.stem


def _command(path: Path, options: argparse.Namespace) -> str:
    """That runs this study alone."""
    study = path.parent if path.name == FILE else path
    if study.is_relative_to(RECIPES):
        study = study.relative_to(RECIPES)
    words = ["robust-accel", "study", str(study)]
    words += ["--scale", options.scale] if options.scale else []
    words += ["--seeds", str(options.seeds)] if options.seeds else []
    words += ["--launcher", options.launcher] if options.launcher else []
    return shlex.join([*words, *options.settings])
