"""The plan command: what a recipe's step would take on so many machines, and what pays there."""

import argparse
import logging
import os

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
    Job,
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
    space = _space_here(here, machines)
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
    accumulation, half = recipe.train.gradient_accumulation, precision != "no"
    job = Job(cost, machines, options.link, images, accumulation, half, timed_on)
    own = (
        {} if recipe.communication in PROTOCOLS.values() else {"the recipe's": recipe.communication}
    )
    held = engines(job, recipe.communication)
    found = estimates(job, held, {**PROTOCOLS, **own})
    refusals = _refusals(recipe, cost, "fp16" if kind == "fp16" else precision)
    fits = {one.name: _fits(one, space, refusals) for one in held}
    say(_heading(options.recipe, recipe, job))
    say(_gradients(found, options.link).markdown())
    say(_engines(held, fits, found).markdown())
    for in_pieces, refusal in refusals.items():
        say(f"{'FSDP2 and HSDP' if in_pieces else 'DDP and ZeRO'} refuse this recipe: {refusal}.")
    say(_advice(found, fits, machines, space, recipe.train.batch_size))
    for line in _assumed(how, job):
        say(line)
    return 0


def _space_here(device: torch.device, machines: Machines) -> float:
    """Bytes of a worker on machines like this one."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machines.per_node


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


def _heading(name: str, recipe: Recipe, job: Job) -> str:
    assert recipe.train is not None
    cost, machines = job.cost, job.machines
    deal = f"{machines.nodes} x {machines.per_node} workers x {job.images} images"
    if job.micro_batches > 1:
        deal += f" x {job.micro_batches} micro-batches"
    return (
        f"{name}: {recipe.model.name}, {cost.parameters:,} parameters, {cost.flops / 1e9:.3g} "
        f"GFLOP an image and step; batch {recipe.train.batch_size:,} = {deal}, whose activations "
        f"take {cost.kept * job.images / _GIB:.2f} GiB"
    )


def _gradients(found: list[Estimate], rate: float) -> Table:
    """What an exchange sends, by each protocol; ZeRO's is DDP's."""
    by_name = {(one.engine, one.protocol): one.traffic for one in found}
    kinds = [kind for kind in ("DDP", "FSDP2", "HSDP") if (kind, BASELINE) in by_name]
    head = ["gradients", "a worker of DDP sends (MB)"]
    head += [f"a machine of {kind} (MB), link (s)" for kind in kinds]
    rows = []
    for protocol in {one.protocol: None for one in found}:
        leaving = [by_name[kind, protocol].leaving for kind in kinds]
        row = [protocol, f"{by_name['DDP', protocol].sent / _MB:.2f}"]
        rows.append([*row, *(f"{n / _MB:.2f}, {n / rate:.3g}" for n in leaving)])
    return Table(head, rows)


def _engines(held: list[Engine], fits: dict[str, str], found: list[Estimate]) -> Table:
    head = ["engine", "memory of a worker (GiB), at least", "needed at", "fits"]
    head += ["weights a machine sends (MB)"]
    head += [f"step (s): {one.protocol}" for one in found if one.engine == held[0].name]
    rows = [
        [
            one.name,
            f"{one.memory / _GIB:.2f}",
            one.worst,
            fits[one.name],
            f"{one.leaving / _MB:.2f}",
            *(f"{other.step:.3g}" for other in found if other.engine == one.name),
        ]
        for one in held
    ]
    return Table(head, rows)


def _refusals(recipe: Recipe, cost: Cost, precision: str) -> dict[bool, str]:
    """Why the recipe cannot be trained in pieces (True), or not as a whole (False)."""
    found = {}
    for in_pieces in (False, True):
        try:
            check_recipe(recipe, Sharding((), True, False) if in_pieces else None, precision)
        except RecipeError as error:
            found[in_pieces] = str(error)
    if True not in found and precision == "bf16" and cost.has_batch_norm:
        said = "train.precision: bf16 is not possible with FSDP2 and BatchNorm; allowed: fp32"
        found[True] = said
    return found


def _fits(engine: Engine, space: float, refusals: dict[bool, str]) -> str:
    if (engine.holders > 1) in refusals:
        return "refused"
    return "yes" if engine.memory < space else "no"


def _advice(
    found: list[Estimate], fits: dict[str, str], machines: Machines, space: float, batch: int
) -> str:
    """What to choose, in words: the first of those that nothing is faster than by much."""
    possible = [one for one in found if fits[one.engine] == "yes"]
    small = listed(name for name, fit in fits.items() if fit == "no")
    if not possible:
        fewer = "fewer images a micro-batch (train.gradient_accumulation), or more machines"
        return f"No engine that takes this recipe fits into {space / _GIB:.0f} GiB: {fewer}."
    fastest = min(one.step for one in possible)
    best = next(one for one in possible if one.step <= PAYS * fastest)
    (base,) = (o for o in found if (o.engine, o.protocol) == (best.engine, BASELINE))
    protocol = best.protocol
    if best.engine.startswith("FSDP2"):
        protocol = protocol.partition(",")[0]  # it has one side
    said = f"Choose {best.engine} and {protocol}: {best.step:.3g} s a step, "
    said += f"{batch / best.step:,.0f} images/s"
    if best is not base:
        said += f", {base.step / best.step:.2f} times as fast as {BASELINE}"
    if best.engine != possible[0].engine:
        other = min((o for o in possible if o.engine == possible[0].engine), key=lambda o: o.step)
        said += f"; {other.engine} would take {other.step:.3g} s"
    if small:
        said += f"; into {space / _GIB:.0f} GiB do not fit: {small}"
    if best is base:
        why = "nothing leaves a machine"
        if machines.nodes > 1:
            why = "the backward hides the exchange, or the step is longer by far"
        said += f". Compressing gradients does not pay here: {why}"
    return f"{said}."


def _assumed(how: str, job: Job) -> list[str]:
    hides = "a CPU hides nothing" if job.on_cpu else "the backward hides it, ZeRO's not"
    layer = job.cost.layer
    layers = f"layer by layer ({layer})" if layer else "all at once: it has no layers"
    return [
        f"Assumed: {how};",
        f"every machine's link at {job.rate * 8 / 1e9:g} Gbit/s both ways, and no latency;",
        f"while gradients are sent {hides}; no worker slower than another; inside of a machine",
        f"nothing takes time to send; FSDP2 gathers the network {layers}.",
    ]
