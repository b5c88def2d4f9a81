"""Tensors of torch and arrays of numpy in the same code, without importing torch, which a model that onnxruntime
computes does without. In the signatures of such code, `Tensor` is either.
"""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = type("Tensor", (), {})


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def library(x: Tensor) -> Any:
    """Return the module whose functions compute with x: torch or numpy, which name many of them alike."""
    return sys.modules["torch"] if is_tensor(x) else np


def cast_like(value: Any, x: Tensor) -> Tensor:
    """Return a value with the dtype and on the device of x, in its library."""
    return value.to(x) if is_tensor(value) else library(x).asarray(value, dtype=x.dtype, device=x.device)


def float32_or_wider(x: Tensor) -> Tensor:
    """Return x as float32 or wider, itself where it is."""
    own = library(x)
    return own.asarray(x, dtype=own.promote_types(x.dtype, own.float32))


def to_numpy(x: Tensor) -> np.ndarray:
    return x.numpy(force=True) if is_tensor(x) else np.asarray(x)
