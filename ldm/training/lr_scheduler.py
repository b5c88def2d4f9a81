"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def lr_multiplier(
    step: int, steps: int, name: str = "constant", warmup: int = 0, decay: float = 1.0, low: float = 0.1
) -> float:
    """What the base learning rate is multiplied by at `step` (from 0) of `steps`.

    Linear warm-up over `warmup` steps; then 1 until the last share `decay` of the run, over which it falls to zero
    along `linear` or half a `cosine` (Loshchilov & Hutter 2017, eq. 5, one cycle), or is `low` throughout (`step`).
    `constant` never falls.
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
