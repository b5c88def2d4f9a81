"""Models on the meta device, names and shapes alone, and configurations of tiny ones like Stable Diffusion 1 and 2."""

import json
from functools import cache

import torch
from golden_fill import shapes
from torch import Tensor

from ldm.checkpoint.networks import CLIP_SETTINGS, OPENCLIP_SETTINGS, PREFIXES, TEXT_TARGET
from ldm.util import instantiate_network

CROSS = {"use_spatial_transformer": True, "context_dim": 16, "legacy": False}


def levels(mult: list[int], blocks: int | list[int], attention: list[int]) -> dict:
    return {"channel_mult": mult, "num_res_blocks": blocks, "attention_resolutions": attention}


DDCONFIG = {
    **{"z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]},
    **{"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "double_z": True},
}


def on_meta(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}


def built(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network of a configuration; a complete model's with the three prefixes."""
    return dict(_built(json.dumps(config)))


@cache
def _built(text: str) -> dict[str, tuple[int, ...]]:
    config = json.loads(text)
    networks = {"": config}
    if config["target"].endswith(".LatentDiffusion"):
        parts = {"unet": "unet_config", "first_stage": "first_stage_config", "text": "cond_stage_config"}
        networks = {PREFIXES[part]: config["params"][key] for part, key in parts.items()}
    found = {}
    for prefix, network in networks.items():
        if network is not None:
            with torch.device("meta"):
                found |= {prefix + name: shape for name, shape in shapes(instantiate_network(network)).items()}
    return found


def tiny(text: dict, **unet) -> dict:
    """A model like Stable Diffusion's, of the smallest sizes."""
    sizes = {"image_size": 64, "in_channels": 4, "out_channels": 4, "model_channels": 32}
    text = {"width": 16, "layers": 2, "heads": 1, "vocab_size": 49408, "context_length": 77} | text
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {
                "target": "ldm.models.unet.UNetModel",
                "params": sizes | levels([1, 2], 1, [2, 1]) | {"transformer_depth": 1} | CROSS | unet,
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"embed_dim": 4, "ddconfig": DDCONFIG},
            },
            "cond_stage_config": {"target": TEXT_TARGET, "params": text},
            "concat": None,
            "schedule": {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "T": 1000},
            "prediction": "eps",
            "scale_factor": 0.18215,
            "defaults": {"height": 128, "width": 128, "steps": 50, "scale": 7.5},
        },
    }


TINY_1 = tiny(CLIP_SETTINGS, num_heads=8)
TINY_2 = tiny(OPENCLIP_SETTINGS | {"projection_dim": 16}, num_head_channels=32, use_linear_in_transformer=True)
TINY_2["params"]["defaults"]["scale"] = 9.0
