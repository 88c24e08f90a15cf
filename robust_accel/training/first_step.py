"""Applied or refused: what the first step of a run did, measured, told and checked."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from robust_accel.comm import AllReduce, Collective, GradientCompression
from robust_accel.evaluation.ledger import told_to_all
from robust_accel.provenance import equal_parameters
from robust_accel.robust_model import RobustModel
from robust_accel.training.shards import Shards


def check_first_step(
    robust_model: RobustModel,
    accelerator: Accelerator,
    collective: Collective,
    compression: GradientCompression,
    ema_decay: float | None,
    check_finite: Callable[[], None] = lambda: None,
    *,
    shards: Shards | None = None,
) -> dict[str, Any] | None:
    """What the report says of it, under ``applied``; None where only the next step can tell.

    Attack and weight perturbation have measured themselves (``MinMax.applied``), and have raised
    already where they did nothing.

    Args:
        ema_decay: With which the moving average was updated; None without one.
        check_finite: Raises, on all processes, where one of them has numbers that are not finite.
        shards: Where each process has its own pieces of the parameters.

    Raises:
        RuntimeError: Nothing was attacked, the processes' parameters are not the same any more, or
            a protocol other than the plain all-reduce sent nothing.
    """
    attack, num_processes = robust_model.min_max.applied, accelerator.num_processes
    equal = shards is not None or equal_parameters(robust_model.classifier, accelerator)
    sent = compression.meter.bytes_sent
    faults = [] if robust_model.min_max.calls else ["no batch was attacked"]
    if not equal:
        check_finite()  # one process's NaN makes them differ, and is what is to be said
        faults.append(f"the parameters of {num_processes} processes are not the same any more")
    if num_processes > 1 and sent == 0 and collective != AllReduce():
        faults.append(f"{collective!r} sent nothing")
    if faults:
        raise RuntimeError(f"the first step was not what the recipe says: {'; '.join(faults)}")
    # one may have met no gradient yet: two batches without one are an error
    if not all(told_to_all([attack is not None], accelerator)):
        return None
    found: dict[str, Any] = {"attack": vars(attack)}
    if num_processes > 1:
        found["bytes_sent"] = sent
        if shards is None:
            found["processes_with_equal_parameters"] = num_processes
        else:
            found["processes_with_pieces"] = num_processes
            found["copies_of_pieces"] = shards.copies
            found["bytes_of_weights_sent"] = compression.gathered.bytes_sent
    if ema_decay is not None:
        found["ema_decay"] = ema_decay
    return found


def in_words(found: dict[str, Any]) -> str:
    """The rest of it, as one line of the run's log."""
    parts = []  # the attack has said what it did
    if "bytes_sent" in found:
        parts.append(f"{found['bytes_sent']} bytes sent")
    if "processes_with_equal_parameters" in found:
        parts[-1] += f", parameters equal on {found['processes_with_equal_parameters']} processes"
    if "processes_with_pieces" in found:
        parts[-1] += (
            f", and {found['bytes_of_weights_sent']} of weights, which are in pieces on "
            f"{found['processes_with_pieces']} processes"
        )
        if found["copies_of_pieces"] > 1:
            parts[-1] += f", {found['copies_of_pieces']} copies"
    if "ema_decay" in found:
        parts.append(f"averaged with decay {found['ema_decay']:.3g}")
    return "; ".join(parts)
