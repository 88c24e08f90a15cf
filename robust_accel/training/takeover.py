"""A machine in a lost one's place may become the first: it takes the run from another's disk."""

import logging
import shutil
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from robust_accel.files import INCOMPLETE
from robust_accel.locks import OWNER
from robust_accel.processes import decided
from robust_accel.recipe import Recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.courier import Courier
from robust_accel.training.start import find_start

logger = logging.getLogger(__name__)

_NONE, _REFUSED = -1, -2


def take_over(
    recipe: Recipe,
    folder: RunFolder,
    engine: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Where the first process has no run, but others have on disks of their own: copy the furthest.

    Without it the run would begin anew. One that was started otherwise, or has no whole checkpoint,
    is not taken.

    Args:
        folder: Owned by the first process.
        engine: From ``engine_of``.

    Raises:
        ValueError: ``output: ...``: the first process's folder holds other files.
    """
    place = folder.path / f"{INCOMPLETE}run"

    def is_missing() -> bool:
        shutil.rmtree(place, ignore_errors=True)  # of one that was interrupted
        return not folder.check(resume=True)

    if not folder.absent or not decided(is_missing, accelerator):
        return
    is_absent = accelerator.process_index in folder.absent
    found = gather_object([_step(recipe, folder, engine) if is_absent else (_NONE, "")])
    for rank, (step, fault) in enumerate(found):
        if step == _REFUSED:
            logger.warning("what process %d has on its disk is not gone on with: %s", rank, fault)
    holder = max(folder.absent, key=lambda rank: found[rank][0])
    step = found[holder][0]
    if step < 0:
        return
    logger.info(
        "%s is taken over at step %d from the disk of process %d", folder.path, step, holder
    )
    own = folder.path if accelerator.process_index == holder else place
    Courier(accelerator, folder.absent).bring(own, holder, accelerator.is_main_process)

    def keep() -> None:
        (place / OWNER).unlink(missing_ok=True)
        # the recipe last: with it, there is a run
        for path in sorted(place.iterdir(), key=lambda path: path.name == folder.recipe.name):
            path.rename(folder.path / path.name)
        place.rmdir()

    decided(keep, accelerator)


def _step(recipe: Recipe, folder: RunFolder, engine: dict[str, Any]) -> tuple[int, str]:
    """Of the newest whole checkpoint on this process's disk; or why it cannot be used."""
    try:
        checkpoint = find_start(recipe, folder, engine, resume=True).checkpoint
    except ValueError as error:
        return _REFUSED, str(error)
    return int(checkpoint.removeprefix("step-")) if checkpoint else _NONE, ""
