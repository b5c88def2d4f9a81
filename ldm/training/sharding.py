"""Complete tensors of weights that the processes hold a part of each (`fsdp.py`), and such parts of complete ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def complete(state: Any) -> Any:
    """Return a state, or tensor, with complete tensors; all processes call this."""
    if not torch.distributed.is_initialized():
        return state
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda x: x.full_tensor(), state, test_type=lambda x: hasattr(x, "full_tensor"))


def like(value: Any, live: Tensor) -> Any:
    """Return a complete tensor sharded as a live one is; others as they are."""
    if not hasattr(live, "full_tensor") or not isinstance(value, Tensor) or value.shape != live.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(live, DTensor)
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements)


def sharded(state: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with its tensors sharded as those of the run's parts are."""
    live = {"networks": parts["networks"].state_dict(), "ema": parts["ema"].shadow}
    state |= {"networks": {k: like(v, live["networks"][k]) for k, v in state["networks"].items()}}
    state["ema"] |= {"shadow": {k: like(v, live["ema"][k]) for k, v in state["ema"]["shadow"].items()}}
    for key in (key for key in parts if key.startswith("optimizer_")):
        weights = [p for group in parts[key].param_groups for p in group["params"]]
        for number, entries in state[key]["state"].items():
            state[key]["state"][number] = {name: like(v, weights[number]) for name, v in entries.items()}
    return state


@contextmanager
def joined(module: Any) -> Iterator[None]:
    """In the block, the weights are complete: for what calls the networks outside of a training step."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
