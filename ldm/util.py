"""Build objects from configurations, read configuration files, choose a device."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.nn.modules import module as registration
from torch.utils._device import DeviceContext
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.checks import shorten, unfit
from ldm.legacy_paths import elsewhere, open_home

__getattr__ = elsewhere(__name__)  # CompVis's other helpers

# Classes outside this package that a configuration may name. The list is short on purpose: a yaml or checkpoint from a
# stranger must not reach anything that runs code, opens files or downloads.
ALLOWED_IN = {
    "torch.nn": "Identity Linear Conv2d Embedding Sequential GELU SiLU ReLU",
    "torch.optim": "Adam AdamW SGD RAdam NAdam Adamax Adagrad Adadelta RMSprop Rprop Adafactor",
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree",
    "prodigyopt": "Prodigy",
    "bitsandbytes.optim": "Adam8bit AdamW8bit PagedAdamW8bit Lion8bit",
    "torchvision.transforms": "Resize RandomCrop CenterCrop RandomHorizontalFlip",
}
ALLOWED = {f"{module}.{name}" for module, names in ALLOWED_IN.items() for name in names.split()}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALLOWED_PACKAGES: set[str] = set()  # named by `--allow PACKAGE`: their modules may be imported and their classes built


def get_obj_from_str(string: str, reload: bool = False) -> type:
    """Return the class that a configuration's `target` names, e.g. `ldm.models.unet.UNetModel`.

    Allowed are classes defined in `ldm`, the names in `ALLOWED`, and Modules or Datasets defined in one of the running
    program's own packages (`is_own_package`) or in a package of `allowed_packages`. Everything else raises ValueError.
    A module may have its old name; `reload` reloads it first.
    """
    if not isinstance(string, str):
        raise ValueError(f"target {shorten(repr(string))} must be a text, the name of a class with its module")
    module_name, _, name = string.rpartition(".")
    if not module_name.startswith("ldm.") and module_name not in sys.modules:  # the program's own `taming` wins
        from ldm.legacy_names import CONFIG_HOMES  # only other programs' configurations need it

        module_name = CONFIG_HOMES.get(module_name, module_name)
    package = module_name.partition(".")[0]
    ours, named = package == "ldm", string in ALLOWED or package in allowed_packages()
    own = not (ours or named) and is_own_package(package)
    if not (ours or own or named):
        raise ValueError(
            f"target {shorten(repr(string))} is not an allowed class: use one of ldm, or one of your own code that the "
            f"program has imported, or allow its package (--allow {shorten(package)}, or LDM_ALLOW={shorten(package)} "
            "in the environment)"
        )
    try:
        module = open_home(module_name)
        found = getattr(importlib.reload(module) if reload else module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target {string!r} does not exist: {error}") from None
    if not inspect.isclass(found):
        raise ValueError(f"target {string!r} is not a class: a configuration may only name classes")
    # Not a class that one of our modules only imports (ldm.util.Dataset, pathlib.Path ...), nor one that a package of
    # the program's, whose modules may be imported only now, imports from elsewhere (torchvision, for example).
    definer = found.__module__.partition(".")[0]
    if definer != "ldm" and (ours or (own and not is_own_package(definer))):
        raise ValueError(f"target {string!r} is not defined in {package}, so it is not an allowed class")
    if not ours and string not in ALLOWED and not issubclass(found, (nn.Module, Dataset, torch.optim.Optimizer)):
        raise ValueError(
            f"target {string!r} is neither a torch Module nor a Dataset nor an Optimizer, so it is not allowed"
        )
    return found


def allowed_packages() -> set[str]:
    """Return the packages that `--allow` names, or LDM_ALLOW, with commas, for programs without that option."""
    return ALLOWED_PACKAGES.union(filter(None, os.environ.get("LDM_ALLOW", "").split(",")))


def is_own_package(name: str) -> bool:
    """Return whether the running program has imported that package, or module, as its own: not an installed one.

    By importing one module of its code a program allows all of that package.
    """
    if name not in sys.modules or name in (*sys.stdlib_module_names, "torch", "torchvision"):
        return False
    module = sys.modules[name]
    places = [*getattr(module, "__path__", ()), *filter(None, [getattr(module, "__file__", None)])]
    return not any({"site-packages", "dist-packages"} & set(Path(place).resolve().parts) for place in places)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"]` with the keyword arguments `config["params"]` and `extra`.

    Raises ValueError for a target that is missing or not allowed, and as `call_with` does.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):  # CompVis's marks for "has no network"
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise ValueError(f"{shorten(repr(config))} names no class to build: it must be a mapping with a `target`")
    params = config.get("params")
    if isinstance(params, Mapping):
        params = {name: value for name, value in params.items() if name not in extra}
    cls = get_obj_from_str(config["target"])
    with at_most():
        return call_with(config["target"], cls, {} if params is None else params, **extra)


def call_with(part: str, function: Callable[..., Any], params: Mapping[str, Any], **own: Any) -> Any:
    """Return `function(**own, **params)`, the one way from a configuration's values to what they build.

    A key in `params` that is unknown, missing or in `own` raises ValueError, and so does a value that does not fit the
    type hint that a function or class of ours has for it (`ldm.checks.unfit`).

    Args:
        part: name of this part of a configuration, for messages.
        params: from the configuration.
        own: arguments that the configuration may not set.
    """
    signature = inspect.signature(function)
    signature = signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in own])
    takes = list(signature.parameters)
    if not isinstance(params, Mapping):
        raise ValueError(f"{part}: {shorten(repr(params))} is not a mapping; it takes {takes}")
    try:
        signature.bind_partial(**params)  # unknown keys first: one may be a missing key, misspelt
        signature.bind(**params)
    except TypeError as error:
        from ldm.spelling import did_you_mean  # only a mistake needs it

        raise ValueError(f"{part}: {error}{did_you_mean(params, takes)}; it takes {takes}") from None
    hints = {}
    if function.__module__.startswith("ldm."):  # other packages' hints need not be complete
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    for name, value in params.items():
        if wanted := unfit(value, hints.get(name, Any)):
            raise ValueError(f"{part}: {name} {shorten(repr(value))} must be {wanted}")
    try:
        return function(**own, **params)
    except (TypeError, RuntimeError) as error:  # within a parameter, or sizes that torch cannot make
        raise ValueError(f"{part}: {error}") from error


def instantiate_network(config: Mapping[str, Any]) -> Any:
    """Build a network as `instantiate_from_config` does, and nothing else, such as a data set."""
    if isinstance(config, Mapping) and "target" in config:
        if not issubclass(get_obj_from_str(config["target"]), nn.Module):
            raise ValueError(f"target {config['target']!r} is not a network (torch.nn.Module)")
    return instantiate_from_config(config)


@contextmanager
def at_most(tensors: int = 2**16, numbers: int = 2**34) -> Iterator[None]:
    """Stop the construction of networks, with ValueError, that have more tensors or numbers than that."""
    left = {"tensors": tensors, "numbers": numbers}

    def subtract(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        left["tensors"] -= tensor is not None
        left["numbers"] -= 0 if tensor is None else tensor.numel()
        for what, limit in {"tensors": tensors, "numbers": numbers}.items():
            if left[what] < 0:
                raise ValueError(f"the configuration describes a network with more than {limit} {what}")

    with registration.register_module_parameter_registration_hook(subtract):
        with registration.register_module_buffer_registration_hook(subtract):
            yield


class Unfilled(DeviceContext):
    """Builds on the meta device and skips initialisers, which would import torch._dynamo for a second.

    One mode, not two: every operation on a tensor while a network is built passes through it.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return super().__torch_function__(func, types, args, kwargs)


def pick_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of that name, "fp16" or "float16" say; None is none. ValueError unless it is one of floats."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str | torch.dtype) else ""
    found = FLOATS.get(name, getattr(torch, name, None))
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype {dtype!r} is not one of floats: use {', '.join(FLOATS)}, or torch.float16, say")
    return found


def pick_device(name: str | torch.device | None = "auto") -> torch.device:
    """Return the device of that name; `auto`, or None, is the GPU if there is one. ValueError if torch has it not."""
    if name is None or name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        usable = ["auto", "cpu", *(kind for kind, there in found.items() if there)]
        raise ValueError(f"device {name!r} is not available here: use {' or '.join(usable)}") from None
    return device


LOG_SECONDS = 30  # between the lines of a bar in a log


class _Log:
    """Standard error as tqdm's file, where it is no terminal: each state of a bar is a line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16; others emulate it, more slowly than they compute in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has private functions for CPUs, in some versions
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def progress_bar(
    iterable: Iterable[Any] | None = None, leave: bool = False, disable: bool = False, **options: Any
) -> tqdm:
    """Return a bar that only the first of torchrun's processes shows, and that vanishes at the end, unless `leave`.

    In a log, such as a file, it is a line now and then, and none where it would vanish before the first.
    """
    own = getattr(sys.stderr, "stream", sys.stderr)  # of `ldm.program.Printable`
    if own is sys.__stderr__ and not own.isatty():  # not where a notebook or a test has replaced it
        options |= {"file": _Log(), "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
        options |= {} if leave else {"delay": LOG_SECONDS}
    return tqdm(iterable, leave=leave, disable=disable or os.environ.get("RANK", "0") != "0", **options)
