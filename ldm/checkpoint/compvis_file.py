"""A single file of CompVis's kind as a model: its weights under our names, and the configuration that it lacks."""

from pathlib import Path

from ldm.checkpoint.compvis import normalise
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.families import recognise, stored_scale_factor
from ldm.checkpoint.networks import Found
from ldm.checkpoint.tensors import Contents
from ldm.input_files import read_yaml


def model_in(contents: Contents, config: str | Path | None, ema: bool, prediction: str | None) -> Found:
    """Return what such a file holds: by a yaml, or else as it is recognised; others are arguments of `ldm.load`."""
    clean, notes = normalise(contents.state, ema)
    if config is None:
        recognised = recognise(contents.state, contents.metadata, contents.facts, prediction)
        return Found(recognised.config, clean, [*recognised.notes, *notes])
    described, stored = from_compvis(read_yaml(config)), stored_scale_factor(contents.state)
    if stored is not None:  # of models whose yaml only says that it was measured (scale_by_std)
        described["params"]["scale_factor"] = stored
    return Found(described, clean, [*notes, f"the configuration is that of {config}"])
