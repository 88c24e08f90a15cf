"""Lengths of steps: the rule where none is given, and which of the given ones search a ball."""

_ROUNDING = 1e-6  # 10 steps of 0.1 do reach 1


def default_step(num_steps: int, eps: float) -> float:
    """2.5 eps / num_steps, at most eps: Madry et al.'s rule, by which every number reaches eps."""
    return min(2.5 / num_steps, 1) * eps


def unfit_step(num_steps: int, step_size: float, eps: float, rule: float) -> str | None:
    """Why such steps do not search the ball; None where they do.

    Args:
        num_steps: How many there are.
        step_size: Length of each, in pixel units.
        eps: The ball's radius. One step beyond 2 eps leaps over the whole ball, and ends where one
            of 2 eps does.
        rule: The length that leaving it out gives.
    """
    way = num_steps * step_size
    noun, ending = ("step", "s") if num_steps == 1 else ("steps", "")
    about = f"{num_steps} {noun} of {step_size:.4g}"
    if way < eps * (1 - _ROUNDING):
        why = f"get{ending} no further than {way:.4g} from the start, in"
    elif step_size > 2 * eps * (1 + _ROUNDING):
        why = f"leap{ending} over"
    else:
        return None
    least, most = eps / num_steps, 2 * eps
    return (
        f"{about} {why} a ball of eps {eps:.4g}: leave it out (null) for {rule:.4g}, or give "
        f"{least:.4g} to {most:.4g}"
    )
