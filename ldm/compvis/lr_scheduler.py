"""CompVis's learning rate schedules: multipliers for torch's LambdaLR."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class LambdaWarmUpCosineScheduler2:
    """In each cycle linear from f_start to f_max, then half a cosine to f_min; the lists have an entry per cycle."""

    def __init__(
        self, warm_up_steps: Sequence[int], f_min: Sequence[float], f_max: Sequence[float], f_start: Sequence[float],
        cycle_lengths: Sequence[int], verbosity_interval: int = 0,
    ) -> None:  # fmt: skip
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))
        self.ends = list(accumulate(cycle_lengths))

    def schedule(self, n: int, **kwargs: int) -> float:
        """Return the multiplier at step n, counted from 0; the last cycle continues."""
        cycle = min(bisect_left(self.ends, n), len(self.ends) - 1)
        warm_up, f_min, f_max, f_start, length = self.cycles[cycle]
        n -= self.ends[cycle] - length
        if n < warm_up:
            return f_start + (f_max - f_start) / warm_up * n
        return f_min + (f_max - f_min) * self.decay(n, warm_up, length)

    __call__ = schedule

    def decay(self, n: int, warm_up: int, length: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min((n - warm_up) / max(length - warm_up, 1), 1)))


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """The same with a line, which starts where the whole cycle's line is at the end of the warm-up."""

    def decay(self, n: int, warm_up: int, length: int) -> float:
        return max((length - n) / length, 0)


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """The same with one cycle."""

    def __init__(
        self, warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:  # fmt: skip
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps])
