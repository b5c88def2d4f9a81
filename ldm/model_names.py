"""Names of models that one page or one server has."""

import os
from collections.abc import Sequence
from pathlib import Path

from ldm.checks import SHIPPED_MODELS


def model_names(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for the model of each path: its file's, with as many of its folders as make it the only one.

    Raises:
        ValueError: for a model that is there twice.
    """
    full = [Path(os.path.abspath(path)) for path in paths]  # of "." and "..", too
    stems = [(path.parent, path.stem) for path in full]
    parts = []
    for path, own, stem in zip(paths, full, stems, strict=True):
        last = own.stem if stems.count(stem) == 1 else own.name
        parts.append((str(path),) if str(path) in SHIPPED_MODELS else (*own.parts[1:-1], last))
    if len(set(parts)) < len(parts):
        raise ValueError(f"--ckpt names one model twice: {' '.join(map(str, paths))}")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        depth = next(k for k in range(1, len(own) + 2) if all(other[-k:] != own[-k:] for other in others))
        names.append("-".join(own[-depth:]) or "model")
    return names
