"""Complete tensors of weights that the processes hold a part of each (`fsdp.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def complete(state: Any) -> Any:
    """Return a state, or tensor, with complete tensors; all processes call this."""
    if not torch.distributed.is_initialized():
        return state
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda x: x.full_tensor(), state, test_type=lambda x: hasattr(x, "full_tensor"))


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
