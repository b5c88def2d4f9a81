"""A single file of CompVis's kind as a model: its weights under our names, and the configuration that it lacks."""

from pathlib import Path

from ldm.checkpoint import networks
from ldm.checkpoint.compvis import has_part, normalise
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.eight_bits import widened
from ldm.checkpoint.families import recognise, stored_scale_factor
from ldm.checkpoint.networks import Found
from ldm.checkpoint.tensors import Contents, State
from ldm.input_files import read_yaml


def model_in(
    contents: Contents, config: str | Path | None, ema: bool, prediction: str | None, part: str | None = None
) -> Found:
    """Return what such a file holds: by a yaml, or else as it is recognised; others are arguments of `ldm.load`.

    part: what is wanted, which a file may hold with others that are no model without a third.
    """
    state, widths = widened(contents.state)
    clean, notes = normalise(state, ema)
    notes += widths
    if config is None and part is not None and _lacks_another(clean, part):
        alone = {name: tensor for name, tensor in clean.items() if name.startswith(networks.PREFIXES[part])}
        recognised, clean = recognise(alone), normalise(alone)[0]
        return Found(recognised.config, clean, [*recognised.notes, *notes])
    if config is None:
        recognised = recognise(state, contents.metadata, contents.facts, prediction)
        return Found(recognised.config, clean, [*recognised.notes, *notes])
    described, stored = from_compvis(read_yaml(config)), stored_scale_factor(contents.state)
    if stored is not None:  # of models whose yaml only says that it was measured (scale_by_std)
        described["params"]["scale_factor"] = stored
    return Found(described, clean, [*notes, f"the configuration is that of {config}"])


def _lacks_another(state: State, part: str) -> bool:
    """Return whether a file has this part and another, but not all that a model needs."""
    found = {name for name in networks.PREFIXES if has_part(state, name)}
    unet = f"{networks.PREFIXES['unet']}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    needed = {"unet", "first_stage"} | ({"text"} if unet in state else set())
    return part in found and len(found) > 1 and not needed <= found
