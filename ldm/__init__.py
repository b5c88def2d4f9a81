"""Latent diffusion with text: `model = ldm.load(); images = model.generate(["a handwritten digit five"])`."""

from importlib import import_module
from typing import Any

from ldm import legacy_paths

__version__ = "0.1.0"

_HOMES = {"load": "ldm.loading", "save": "ldm.loading", "LatentDiffusion": "ldm.latent_diffusion"}
__all__ = ["LatentDiffusion", "__version__", "load", "save"]

legacy_paths.install()


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for, so that `import ldm` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
