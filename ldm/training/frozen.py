"""The networks that the diffusion stage only uses, out of the files that hold them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.file import checkpoint_at, load_file
from ldm.checkpoint.networks import TEXT_TARGET
from ldm.loading import take_part


def read_first_stage(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of an autoencoder: out of a run's folder, or whatever --vae takes."""
    found = take_part("first_stage", checkpoint_at(path))
    return found.config, found.state


def read_text_stage(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of a text encoder of ours, or of a CLIP in a folder of transformers."""
    if not (Path(path) / "config.json").is_file():
        return load_file(path)
    from ldm.conditioning import public_clip

    params, state = public_clip.read_text_encoder(path)
    return {"target": TEXT_TARGET, "params": params}, state
