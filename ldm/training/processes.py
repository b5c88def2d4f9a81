"""Several processes of one run, as torchrun and `accelerate launch` start them (the latter not on a CPU)."""

from datetime import timedelta
from typing import TYPE_CHECKING

from ldm.util import pick_device

if TYPE_CHECKING:
    from accelerate import PartialState


def processes(device: str) -> "PartialState":
    """accelerate's view of them: which is the main one, how many there are, and waiting for each other.

    To be asked before `train` is called, since accelerate keeps its first answer. device: as `train` takes it.
    """
    from accelerate import PartialState

    # Drawing a large model's class images, for which the others wait, takes longer than torch's usual patience.
    return PartialState(cpu=pick_device(device).type == "cpu", timeout=timedelta(hours=12))
