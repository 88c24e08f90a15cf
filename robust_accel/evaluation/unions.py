"""What withstands attacks in the balls of several norms: an image counts if it withstands all."""

from collections.abc import Sequence
from typing import Any

import torch

from robust_accel.evaluation.outcomes import Outcomes


def union_of(parts: Sequence[Outcomes]) -> Outcomes:
    """Of each image what the attack has left that did most; the cost is that of all.

    Args:
        parts: Of the same images, each attacked in its own ball.
    """
    found, *others = parts
    everything = torch.arange(len(found.index))
    for other in others:
        assert found.index.equal(other.index)
        found = found.after(everything, other.verdicts, other.chosen).spent([vars(other)])
    return found


def attack_of_union(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A union's attack, from the descriptions of its parts, each with norm and eps.

    Settings in which they differ (lengths of steps) are lists, in the order of ``union``, which has
    norms and radii.
    """
    about: dict[str, Any] = {
        "union": [{key: part[key] for key in ("norm", "eps")} for part in parts]
    }
    for key in dict.fromkeys(key for part in parts for key in part if key not in ("norm", "eps")):
        values = [part.get(key) for part in parts]
        about[key] = values[0] if all(value == values[0] for value in values) else values
    return about
