"""Learning-rate schedules: pure functions of the training step, so that a resumed run needs no scheduler state."""

import math


def lr_multiplier(
    step: int, steps: int, name: str = "constant", warmup: int = 0, decay: float = 1.0, low: float = 0.1
) -> float:
    """Return the factor of the learning rate at `step` (from 0) of `steps`.

    Args:
        name: constant; or how the factor falls in the last part of the run: to zero by `linear` or half a `cosine`
            (Loshchilov & Hutter 2017, eq. 5, one cycle), or to `low` at once (`step`).
        warmup: steps over which the factor first rises to 1.
        decay: the last part, as a share of the run.
        low: the factor after `step`.
    """
    if name not in ("constant", "linear", "cosine", "step"):
        raise ValueError(f"learning-rate schedule {name!r} is unknown: use constant, linear, cosine or step")
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    start = max(steps * (1 - decay), warmup)
    if name == "constant" or step < start:
        return rise
    if name == "step":
        return low
    done = min(1.0, (step - start + 1) / max(1.0, steps - start))
    return rise * (1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
