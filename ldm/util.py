"""Building objects from configurations, reading those, and choosing a device."""

import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from ldm.legacy_paths import TARGETS, elsewhere, open_home

__getattr__ = elsewhere(__name__)  # CompVis's other helpers

# Classes outside this package that a configuration may name. A short list on purpose: a yaml or a checkpoint from a
# stranger must not reach anything that runs code, opens files or downloads.
ALLOWED = {
    *(
        f"torch.nn.{name}"
        for name in ("Identity", "Linear", "Conv2d", "Embedding", "Sequential", "GELU", "SiLU", "ReLU")
    ),
    *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD", "RAdam", "NAdam")),
    *(f"torchvision.transforms.{name}" for name in ("Resize", "RandomCrop", "CenterCrop", "RandomHorizontalFlip")),
}
ALLOWED_PACKAGES: set[str] = set()  # what `--allow PACKAGE` names; its modules may be imported and its classes built


def get_obj_from_str(string: str, reload: bool = False) -> type:
    """The class that a configuration's `target` names, e.g. `ldm.models.unet.UNetModel`; its module loaded anew first
    with `reload`.

    Allowed are classes defined in `ldm`, the names in `ALLOWED`, and Modules or Datasets that are defined in a package
    of the running program's own (`is_own_package`), in another module that it has imported itself, or in a package in
    `ALLOWED_PACKAGES`. Raises ValueError for everything else.
    """
    module_name, _, name = str(string).rpartition(".")
    if module_name not in sys.modules:  # a `main` or `taming` of the program's own goes first
        module_name = TARGETS.get(module_name, module_name)
    package = module_name.partition(".")[0]
    ours, imported = package == "ldm", package not in ("torch", "torchvision") and module_name in sys.modules
    named = string in ALLOWED or package in ALLOWED_PACKAGES
    own = not (ours or named) and is_own_package(package)
    if not (ours or own or named or imported):
        raise ValueError(
            f"target {string!r} is not an allowed class: use one of ldm, or import its package (--allow PACKAGE) first"
        )
    try:
        module = open_home(module_name)
        found = getattr(importlib.reload(module) if reload else module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target {string!r} does not exist: {error}") from None
    if not inspect.isclass(found):
        raise ValueError(f"target {string!r} is not a class: a configuration may only name classes")
    # A class merely imported by one of our modules (ldm.util.Dataset, pathlib.Path ...) is not ours to offer; nor, by a
    # package of the program's, whose modules may be imported only now, one of torchvision's, say.
    definer = found.__module__.partition(".")[0]
    if definer != "ldm" and (ours or (own and not is_own_package(definer))):
        raise ValueError(f"target {string!r} is not defined in {package}, so it is not an allowed class")
    if not ours and string not in ALLOWED and not issubclass(found, (nn.Module, Dataset)):
        raise ValueError(f"target {string!r} is neither a torch Module nor a Dataset, so it is not an allowed class")
    return found


def is_own_package(name: str) -> bool:
    """Whether the running program has imported that package and brings it along: it is neither installed nor Python's.

    A program that imports one module of its code says by it that the package is its own; which modules of an installed
    package a configuration may reach is for the program to say, by importing them, or for `--allow`.
    """
    folders = [Path(folder).resolve() for folder in getattr(sys.modules.get(name), "__path__", ())]
    python = Path(sysconfig.get_path("stdlib")).resolve()
    foreign = [{"site-packages", "dist-packages"} & set(folder.parts) or python in folder.parents for folder in folders]
    return len(folders) > 0 and not any(foreign)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"]` with the keyword arguments `config["params"]` and `extra`.

    Raises KeyError without a target, and ValueError for a target that is not allowed or a parameter it does not take.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):  # CompVis's marks for "no network of its own"
        return None
    if "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    cls = get_obj_from_str(config["target"])
    return call_with(config["target"], cls, {**(config.get("params") or {}), **extra})


def call_with(part: str, function: Callable[..., Any], params: Mapping[str, Any], **own: Any) -> Any:
    """`function(**own, **params)`, where `params` are the part of a configuration that is called `part` in messages.

    Raises ValueError for a key that the function does not take, or not from there, and for one that it needs.
    """
    signature = inspect.signature(function)
    signature = signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in own])
    takes = list(signature.parameters)
    if not isinstance(params, Mapping):
        raise ValueError(f"{part}: {params!r} is no mapping; it takes {takes}")
    try:
        signature.bind_partial(**params)  # what is unknown first: it may be what is missing, misspelt
        signature.bind(**params)
    except TypeError as error:
        raise ValueError(f"{part}: {error}; it takes {takes}") from None
    try:
        return function(**own, **params)
    except TypeError as error:  # a value of the wrong kind, or a parameter of a parameter: ddconfig's, say
        raise ValueError(f"{part}: {error}") from error


def instantiate_network(config: Mapping[str, Any]) -> nn.Module:
    """`instantiate_from_config` for what must be a network: no checkpoint may build a data set that downloads, say."""
    if "target" in config and not issubclass(get_obj_from_str(config["target"]), nn.Module):
        raise ValueError(f"target {config['target']!r} is no network (torch.nn.Module)")
    return instantiate_from_config(config)


class Unfilled(TorchFunctionMode):
    """Leaves initialisers out: meta tensors hold nothing, and filling them imports torch._dynamo for a second."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_yaml(path: str | Path) -> Any:
    """OmegaConf's form of a yaml file, unresolved. FileNotFoundError, or ValueError for what is not yaml."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise FileNotFoundError(f"configuration {str(path)!r} does not exist")
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {str(path)!r} is not yaml: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A yaml file's mapping as plain dicts, resolved. Errors as `load_yaml`, and ValueError for what is no mapping."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(load_yaml(path), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration {str(path)!r} does not resolve: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"configuration {str(path)!r} is no mapping")
    return content


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the GPU where there is one. ValueError if torch has no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not available here: use auto, cpu, cuda or mps") from None
    return device
