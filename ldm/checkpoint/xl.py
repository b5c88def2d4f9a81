"""Stable Diffusion XL's conditioner as a configuration."""

from typing import Any

from ldm.checkpoint import networks
from ldm.checkpoint.networks import Config

# What Stable Diffusion XL takes beside the pooled text, and its refiner: fields of `ldm.conditioning.sizes.Sizes`.
BASE_SIZES, REFINER_SIZES = ("original_size", "crop", "target_size"), ("original_size", "crop", "aesthetic_score")


def sized_text(towers: list[Config], **more: Any) -> Config:
    """Return {"target", "params"} of Stable Diffusion XL's conditioner, from TextEncoder's arguments of its towers.

    Its refiner has one tower, takes a score in place of the size, and encodes the empty prompt.
    """
    if len(towers) == 1:
        more = {"sizes": list(REFINER_SIZES), "zeros_for_empty": False, **more}
    embedders = [tower | {"layer": "hidden", "layer_index": -2} for tower in towers]
    embedders[-1] = embedders[-1] | {"pooled": True}
    return {"target": networks.SIZED_TEXT_TARGET, "params": {"embedders": embedders, **more}}


def check_sized_text(params: Config) -> None:
    """Raise ValueError where the conditioner is not as other programs take Stable Diffusion XL's to be."""
    towers, sizes = params["embedders"], tuple(params.get("sizes", BASE_SIZES))
    for i, tower in enumerate(towers):
        states, pooled = tower["layers"] + 1, bool(tower.get("pooled", False))
        if tower.get("layer") != "hidden" or tower.get("layer_index", 0) % states != states - 2:
            raise ValueError(f"text encoder {i} gives other states than those before its last block")
        if pooled != (i == len(towers) - 1):
            raise ValueError("the last text encoder alone is pooled in Stable Diffusion XL")
    if sizes != (REFINER_SIZES if len(towers) == 1 else BASE_SIZES):
        raise ValueError(f"{len(towers)} text encoders with the sizes {', '.join(sizes)}")
