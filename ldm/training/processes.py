"""The processes of one run, as torchrun and (on GPUs) `accelerate launch` start them."""

from datetime import timedelta
from typing import TYPE_CHECKING

from ldm.util import pick_device

if TYPE_CHECKING:
    from accelerate import PartialState


def processes(device: str) -> "PartialState":
    """Return accelerate's state: which process is the main one, how many there are, and how to wait for each other.

    Call it before `train`, because accelerate keeps its first state. device: as `train` takes it.
    """
    from accelerate import PartialState

    # The others wait while one generates class images, which takes longer than torch's default timeout.
    return PartialState(cpu=pick_device(device).type == "cpu", timeout=timedelta(hours=12))
