"""How networks compute a training step: with gradient checkpointing, and through torch.compile."""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BACKEND: Any = "inductor"


@contextmanager
def compiled(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the networks' calls with gradients, until the block ends; those without, of previews, stay as they are.

    They take a minute for each new shape of inputs. Random numbers are those of the networks that are not compiled.
    """
    from torch import _dynamo
    from torch._functorch import config  # takes a second to import

    _dynamo.reset()  # its limit of 8 compilations, beyond which it computes uncompiled in silence, is of all networks
    changed = [network for network in networks if type(network).forward is not nn.Module.forward]
    options: Any = {"fallback_random": True} if BACKEND == "inductor" else None
    for network in changed:
        fast = torch.compile(network._call_impl, dynamic=False, backend=BACKEND, options=options)
        network._compiled_call_impl = _with_gradients(fast, network._call_impl)
    try:
        # the adaptive weight of a discriminator needs a network's gradients twice, from buffers that must stay
        with config.patch(donated_buffer=False):
            yield
    finally:
        for network in changed:
            vars(network).pop("_compiled_call_impl")  # torch has no call that takes it back


def _with_gradients(fast: Callable, plain: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        with compiler_failures("loop.compile"):
            return fast(*args, **kwargs)

    return call


@contextmanager
def compiler_failures(option: str) -> Iterator[None]:
    """Raise ValueError for a failure of the compiler (none is installed, say) in the block; `option` asked for it."""
    try:
        yield
    except Exception as error:
        own = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
        if not own and not isinstance(error, subprocess.SubprocessError | FileNotFoundError):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        raise ValueError(f"torch.compile failed ({reason}): repair that, or leave {option} out") from error


def checkpoint_blocks(network: nn.Module, on: bool = True) -> int:
    """Let all blocks of a network that can do so compute their activations twice, or not; return how many those are."""
    found = 0
    for module in network.modules():
        for name in ("use_checkpoint", "checkpoint"):  # of residual and attention blocks, and of transformer blocks
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, on)
                found += 1
    return found
