"""The UNet of a small model as machine code that is kept on disk: torch's AOTInductor.

torch.compile begins anew in each process, and leaves weights as they are. Here they are constants, laid out once for
kernels that are chosen by trial (docs/results/speed.md has what it brings). So a file is for these weights, one shape
of inputs, one number of threads, this torch and this CPU.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.atomic import atomic
from ldm.models import kernels
from ldm.models.compiler import compiler_failures, compiles, uncompiled

MOST_WEIGHTS = 2**24  # numbers in a network's weights; in larger ones torch's own kernels take nearly all of the time
KEPT = 32  # files, of those used last; each has the size of the weights
INDUCTOR = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the output, relative, by the order of sums


def compile_ahead(network: nn.Module, option: str, name: str) -> None:
    """Let a network that `compile_calls` compiles run from a file for each shape of its inputs, wherever that serves.

    It does on a CPU, without gradients and autocast, for networks of up to `MOST_WEIGHTS` weights. What is not there is
    compiled, which is announced on stderr. Weights that change are seen; hooks and modules that are added are not.

    Args:
        option, name: what asked for it, and the network's name, for messages.
    Raises:
        ValueError: when the compiler fails, or what it made computes something else.
    """
    otherwise: Any = network._compiled_call_impl
    groups: list[dict[str, Any]] = [
        group for module in network.modules() for group in (module._parameters, module._buffers)
    ]
    places = [(group, key) for group in groups for key, tensor in group.items() if tensor is not None]
    if sum(group[key].numel() for group, key in places) > MOST_WEIGHTS:
        return
    ready: dict[tuple, tuple[Callable, list[Tensor]]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        weights = [group[key] for group, key in places]
        inputs = [*args, *kwargs.values()]
        if not (compiles() and not network.training and _serves([weights[0], *inputs])):
            return otherwise(*args, **kwargs)
        # a change in place counts the version up, and one by `.data =` moves the memory
        now = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        asked = ([*range(len(args)), *kwargs], [(x.shape, x.dtype) for x in inputs], kernels.chosen_attention())
        situation = repr(asked), now, torch.get_num_threads()
        if situation not in ready:
            path = _folder() / f"{digest(network, weights, asked)}.pt2"
            run = _load(path)
            if run is None:
                size = " x ".join(map(str, inputs[0].shape))
                wait = f"a minute or two, once for this shape; it is kept in {path.parent}"
                print(f"compiling the {name} for an input of {size} ({wait}) ...", file=sys.stderr, flush=True)
                run = _compile(network, args, kwargs, path, option)
            ready[situation] = run, [w.detach() for w in weights]  # whose memory is not given to others
        return ready[situation][0](inputs)

    network._compiled_call_impl = call


def _serves(tensors: list[Any]) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(isinstance(x, Tensor) and x.device.type == "cpu" for x in tensors) and tensors[0].dtype in ROUNDING


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "compiled"


def digest(network: nn.Module, weights: list[Tensor], asked: tuple) -> str:
    """Return a hash of all that the machine code follows from; `asked` are the inputs and the attention's kernel."""
    plain = (bool, int, float, str, type(None), tuple, torch.dtype)
    modules = [
        (name, type(module).__qualname__, [(key, v) for key, v in sorted(vars(module).items()) if isinstance(v, plain)])
        for name, module in network.named_modules()
    ]
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # of Linux; the same for all cores but in its numbers
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), cpu)
    found = hashlib.sha256(repr((modules, asked, torch.__version__, torch.get_num_threads(), INDUCTOR, cpu)).encode())
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):  # whoever changes a network has another
        found.update(path.read_bytes())
    for weight in weights:
        found.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _load(path: Path) -> Callable[[list[Tensor]], Tensor] | None:
    """Return what runs a file; None where there is none that this torch can read."""
    with suppress(OSError, RuntimeError):
        os.utime(path)  # is in use
        try:  # torch._inductor's own function does this too, and takes a second to import
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except (AttributeError, TypeError):  # of an older torch
            from torch._inductor import aoti_load_package

            loader = aoti_load_package(BytesIO(path.read_bytes())).loader  # a path must end in .pt2
        return lambda inputs: loader.run([x.contiguous() for x in inputs])[0]
    return None


def _compile(
    network: nn.Module, args: tuple, kwargs: dict, path: Path, option: str
) -> Callable[[list[Tensor]], Tensor]:
    """Write the file and return what runs it, once it has computed the same as the network."""
    package = BytesIO()
    # compiled for inputs in the order in memory that `_load` gives them; what is tried is listed on stderr, and left in
    # torch's own cache, which two processes may damage
    args, kwargs = tuple(x.contiguous() for x in args), {name: x.contiguous() for name, x in kwargs.items()}
    with compiler_failures(option), uncompiled(), redirect_stderr(StringIO()):
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_inductor_cache

        expected = network(*args, **kwargs)
        program = torch.export.export(network, args, kwargs, strict=False)
        with fresh_inductor_cache():
            aoti_compile_and_package(program, package_path=package, inductor_configs=dict(INDUCTOR))
    with atomic(path) as temporary:
        temporary.write_bytes(package.getvalue())
        run = _load(temporary)
        off = float("inf") if run is None else (run([*args, *kwargs.values()]) - expected).norm().item()
        if run is None or not off <= ROUNDING[expected.dtype] * expected.norm().item():
            raise ValueError(f"torch.compile failed (what it made is off by {off:.2g}): leave {option} out")
    for old in sorted(path.parent.glob("*.pt2"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return run
