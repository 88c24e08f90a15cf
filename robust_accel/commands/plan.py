"""The plan command: what a recipe's step would take on so many machines, and what pays there."""

import argparse
import logging

import torch

from robust_accel.comm.traffic import Machines
from robust_accel.commands import say
from robust_accel.plain_yaml import RecipeError
from robust_accel.planning.cost import Cost, measure
from robust_accel.planning.estimate import (
    BASELINE,
    DEVICES,
    PAYS,
    PROTOCOLS,
    Engine,
    Estimate,
    at_speed,
    engines,
    estimates,
)
from robust_accel.recipe import Recipe, load_recipe
from robust_accel.reporting.tables import Table
from robust_accel.settings import listed
from robust_accel.training.accelerator import choose_precision
from robust_accel.training.launcher import Sharding
from robust_accel.training.parts import read_data
from robust_accel.training.shards import check_recipe

logger = logging.getLogger(__name__)
_MB, _GIB = 1e6, 2**30


def run(options: argparse.Namespace) -> int:
    """Measure a step of one worker here, count what protocols send there, print both together."""
    recipe = load_recipe(options.recipe, options.settings)
    assert recipe.train is not None
    machines = Machines(options.nodes, options.gpus)
    images = _share(recipe, machines)
    shape, num_classes = _images(recipe, options)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("measuring a few steps of one worker on %s", here)
    kind, is_named = recipe.train.precision, options.device != "this"
    if is_named:  # what its tensors take; the other half precision is as long
        flops = DEVICES[options.device].flops
        if kind == "auto":
            kind = "bf16" if flops["bf16"] > flops["fp32"] else "fp32"
        precision = "no" if kind == "fp32" else "bf16"
    else:
        precision = recipe.checked("train", lambda: choose_precision(kind))
    if recipe.train.compile:
        logger.warning("train.compile: a step is measured as it is without")
    cost = measure(recipe, shape, num_classes, images, here, precision)
    space: float | None = None
    timed_on: torch.device | None = here
    how = f"{here} here, {cost.images} images at a time"
    if is_named:
        device = DEVICES[options.device]
        rates = [r * options.efficiency for r in (flops[kind], device.of_convolutions(kind))]
        cost, space, timed_on = at_speed(cost, *rates), device.memory, None
        at = f"{rates[0] / 1e12:.3g}"
        if rates[1] != rates[0]:
            at += f", of convolutions {rates[1] / 1e12:.3g}"
        how = f"{options.device} at {at} TFLOPS ({options.efficiency:.0%} of published)"
        how += ", where neither the optimizer nor a quantiser takes time"
    elif here.type == "cuda":
        space = float(torch.cuda.get_device_properties(here).total_memory)
    own = (
        {} if recipe.communication in PROTOCOLS.values() else {"the recipe's": recipe.communication}
    )
    accumulation = recipe.train.gradient_accumulation
    found = estimates(
        cost, machines, options.link, images, accumulation, {**PROTOCOLS, **own}, timed_on
    )
    say(_heading(options.recipe, recipe, cost, machines, images))
    say(_steps(found, recipe.train.batch_size).markdown())
    half = precision != "no"
    held = engines(cost, machines, images, accumulation, recipe.communication, half=half)
    refusal = _refusal(recipe, cost, "fp16" if kind == "fp16" else precision)
    fits = [_fits(one, space, bool(refusal)) for one in held]
    say(_engines(held, fits, cost.kept * images, images, options.link).markdown())
    if refusal:
        say(f"FSDP2 and HSDP refuse this recipe: {refusal}.")
    for line in _advice(found, held, fits, machines, space):
        say(line)
    say(f"Assumed: {how}; every machine's link at {options.link * 8 / 1e9:g} Gbit/s both ways, and")
    hides = "a CPU hides nothing" if timed_on == torch.device("cpu") else "the backward hides it"
    say(f"no latency; while gradients are sent {hides}; no worker slower than another.")
    return 0


def _share(recipe: Recipe, machines: Machines) -> int:
    """Images of a worker in a micro-batch."""
    assert recipe.train is not None
    batch, parts = recipe.train.batch_size, machines.workers * recipe.train.gradient_accumulation
    if batch % parts:
        near = sorted({max(1, batch // parts) * parts, -(-batch // parts) * parts})
        number = recipe.train.gradient_accumulation
        deal = f"{machines.workers} workers" + (f" x {number} micro-batches" if number > 1 else "")
        raise RecipeError(
            f"train.batch_size: {batch} is no multiple of {deal}: {listed(map(str, near))} are"
        )
    return batch // parts


def _images(recipe: Recipe, options: argparse.Namespace) -> tuple[tuple[int, ...], int]:
    """Shape and classes: as given, or the data's."""
    classes = options.classes or recipe.model.num_classes
    if options.image is not None and classes is not None:
        return options.image, classes
    data = read_data(recipe)
    return options.image or tuple(data.shape), classes or data.num_classes


def _heading(name: str, recipe: Recipe, cost: Cost, machines: Machines, images: int) -> str:
    assert recipe.train is not None
    deal = f"{machines.nodes} x {machines.per_node} workers x {images} images"
    if recipe.train.gradient_accumulation > 1:
        deal += f" x {recipe.train.gradient_accumulation} micro-batches"
    return (
        f"{name}: {recipe.model.name}, {cost.parameters:,} parameters, {cost.flops / 1e9:.3g} "
        f"GFLOP an image and step; batch {recipe.train.batch_size:,} = {deal}"
    )


def _steps(found: list[Estimate], batch: int) -> Table:
    head = [
        "gradients",
        "a worker sends (MB)",
        "a machine sends (MB)",
        "link (s)",
        "not hidden (s)",
    ]
    head += ["step (s)", "images/s", f"beside {BASELINE}"]
    (base,) = (one for one in found if one.protocol == BASELINE)
    rows = [
        [
            one.protocol,
            f"{one.traffic.sent / _MB:.2f}",
            f"{one.traffic.leaving / _MB:.2f}",
            f"{one.wire:.3g}",
            f"{one.exposed:.3g}",
            f"{one.step:.3g}",
            f"{batch / one.step:,.0f}",
            f"{base.step / one.step:.2f}",
        ]
        for one in found
    ]
    return Table(head, rows)


def _refusal(recipe: Recipe, cost: Cost, precision: str) -> str:
    """Why the recipe cannot be trained in pieces; empty where it can."""
    try:
        check_recipe(recipe, Sharding((), True, False), precision)
    except RecipeError as error:
        return str(error)
    if precision == "bf16" and cost.has_batch_norm:
        return "train.precision: bf16 is not possible with FSDP2 and BatchNorm; allowed: fp32"
    return ""


def _fits(engine: Engine, space: float | None, refused: bool) -> str:
    if refused and engine.is_in_pieces:
        return "refused"
    return "" if space is None else "yes" if engine.memory < space else "no"


def _engines(
    held: list[Engine], fits: list[str], of_images: float, images: int, rate: float
) -> Table:
    head = ["engine", "memory of a worker (GiB), at least", f"of it for {images} images", "fits"]
    head += ["weights a machine sends (MB)", "link (s)"]
    rows = [
        [
            one.name,
            f"{one.memory / _GIB:.2f}",
            f"{of_images / _GIB:.2f}",
            fit,
            f"{one.leaving / _MB:.2f}",
            f"{one.leaving / rate:.3g}",
        ]
        for one, fit in zip(held, fits, strict=True)
    ]
    return Table(head, rows)


def _advice(
    found: list[Estimate],
    held: list[Engine],
    fits: list[str],
    machines: Machines,
    space: float | None,
) -> list[str]:
    """What to choose, in words."""
    by_name = {one.protocol: one for one in found}
    base, best = by_name[BASELINE], min(found, key=lambda one: one.step)
    gain = base.step / best.step
    lines = [f"Fastest: {best.protocol}, {gain:.2f} times as fast as {BASELINE}."]
    if gain < PAYS:
        why = (
            "nothing leaves a machine" if machines.nodes == 1 else "the backward hides the exchange"
        )
        lines = [f"Compressing gradients does not pay here: {why}, or the step is longer by far."]
    if space is not None:
        fitting = [one.name for one, fit in zip(held, fits, strict=True) if fit == "yes"]
        said = f"{fitting[0]} fits into {space / _GIB:.0f} GiB" if fitting else "no engine fits"
        more = "" if fitting else ": fewer images a micro-batch (train.gradient_accumulation)"
        lines.append(f"{said}{more}.")
    return lines
