"""How networks compute, besides their own way: with gradient checkpointing, and through torch.compile."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

BACKEND: Any = "inductor"
SHAPES = 64  # of inputs, for each of which a network is compiled; torch has 8, and computes uncompiled beyond
SILENT = "TORCH_COMPILE_DISABLE=1, torch.compiler.set_stance, a dispatch mode, or more shapes than it allows"

_uncompiled: ContextVar[bool] = ContextVar("_uncompiled", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled networks compute uncompiled, in this thread, until the block ends: compiled code runs no hooks."""
    # not by torch.compiler.set_stance, of the whole process: of two threads, the last to end would restore the other's
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def compiles() -> bool:
    """Return whether compiled networks compute so here: not within `uncompiled`."""
    return not _uncompiled.get()


@contextmanager
def compiled(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the networks' calls with gradients, until the block ends; those without, of previews, stay as they are.

    They take a minute for each new shape of inputs. Random numbers are those of the networks that are not compiled.
    """
    from torch._functorch import config  # takes a second to import

    own: Any = {"config_patches": {"fallback_random": True}} if BACKEND == "inductor" else {}
    # the adaptive weight of a discriminator needs a network's gradients twice, from buffers that must stay
    with ExitStack() as undo, config.patch(donated_buffer=False):
        for network in networks:
            if type(network).forward is not nn.Module.forward:
                undo.enter_context(compile_calls(network, "loop.compile", BACKEND, torch.is_grad_enabled, **own))
        yield


def compile_calls(
    network: nn.Module,
    option: str,
    backend: str | Callable,
    when: Callable[[], bool] = lambda: True,
    name: str = "",
    **settings: Any,
) -> ExitStack:
    """Run a network's calls through torch.compile, until the result is closed.

    Args:
        option: what asked for it, for messages.
        backend: of torch.compile, called with `settings`.
        when: says before each call whether it is compiled.
        name: of the network, to announce on stderr each new shape of inputs; "" does not.
    Raises:
        ValueError: when the compiler fails, and when torch, which would not say so, computed uncompiled.
    """
    ran, announced, plain, undo = [0], [], network._call_impl, ExitStack()

    def counted(graph: Any, inputs: Any) -> Callable:
        from torch import _dynamo

        made = _dynamo.lookup_backend(backend)(graph, inputs, **settings)

        def run(*args: Any) -> Any:
            ran[0] += 1
            return made(*args)

        return run

    fast: Any = None  # until the first call, as torch's compiler takes a second to import

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (compiles() and when()):
            return plain(*args, **kwargs)
        from torch import _dynamo

        nonlocal fast
        fast = fast or _compile_anew(plain, counted)
        before = ran[0]
        if name:
            _announce(name, announced, (*args, *kwargs.values()))
        try:
            with compiler_failures(option), _dynamo.config.patch(cache_size_limit=SHAPES):
                result = fast(*args, **kwargs)
        except Exception:
            fast = _compile_anew(plain, counted)  # torch gives up what raised, as for a wrong argument
            raise
        if ran[0] == before:
            what = f"torch computed {type(network).__name__} uncompiled, as it does for {SILENT}"
            raise ValueError(f"torch.compile failed ({what}): repair that, or leave {option} out")
        return result

    network._compiled_call_impl = call
    undo.callback(vars(network).pop, "_compiled_call_impl")  # torch has no call that takes it back
    return undo


def _compile_anew(function: Callable, backend: Callable) -> Callable:
    """Compile a function apart from all that torch compiled, how often, and what it gave up: these are of code objects,
    which all networks of a class share."""

    def own(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own.__code__ = own.__code__.replace()
    return torch.compile(own, dynamic=False, backend=backend)


def _announce(name: str, announced: list, inputs: Sequence[Any]) -> None:
    shapes = [part.shape for part in inputs if isinstance(part, Tensor)]
    if shapes not in announced:
        announced.append(shapes)
        size = " x ".join(map(str, shapes[0]))
        print(f"compiling the {name} for an input of {size} ...", file=sys.stderr, flush=True)


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
