"""Names of models that one page or one server has, and what it says of those that ship."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.checks import SHIPPED_MODELS

# what the page says of the models that ship: what they show, prompts to begin with, what they were made from
ABOUT = {
    "digits": (
        "handwritten digits",
        [
            "a handwritten digit five",
            "a bold handwritten digit three leaning left",
            "a thin handwritten digit seven leaning right",
        ],
        "made from MNIST (Yann LeCun and Corinna Cortes, CC BY-SA 3.0).",
    ),
    "emoji": (
        "emoji in two styles",
        [
            "a red apple",
            "a flat drawing of an astronaut with dark skin",
            "a flat drawing of a dog on a blue background",
        ],
        "made from Noto Emoji (Google, Apache-2.0) and Fluent Emoji Flat (Microsoft, MIT).",
    ),
}


def model_row(name: str, examples: list[str]) -> dict[str, Any]:
    """Return what models.json says of a model: at least two prompts to begin with, which may be empty.

    name: of one that ships; others have the examples alone.
    """
    about, own, made_from = ABOUT.get(name, ("", [], ""))
    shown = examples or own
    return {"about": about, "examples": [*shown, "", ""][: max(2, len(shown))], "licence": made_from}


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
