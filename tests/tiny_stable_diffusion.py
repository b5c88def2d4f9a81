"""Tiny models of the kind of Stable Diffusion 1 and 2, as LatentDiffusion's parameters, for the folder tests."""

import json
from pathlib import Path

from torch import Tensor

from ldm.conditioning.tokenizer import reduce
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import instantiate_network

PROMPTS = ["a photo of a cat", "An astronaut, riding a horse: 4K; don't blink"]
MERGES = reduce(PROMPTS, merges_first=50)
UNET = {
    **{"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 16, "channel_mult": [1, 2, 2]},
    **{"num_res_blocks": 1, "attention_resolutions": [2, 1], "num_heads": 2, "use_spatial_transformer": True},
    **{"transformer_depth": 1, "context_dim": 32, "legacy": False, "norm_groups": 8},
}
VAE = {
    "embed_dim": 4,
    "ddconfig": {
        **{"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 8},
        **{"ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "norm_groups": 4},
    },
}
TEXT = {
    **{"layout": "transformers", "width": 32, "layers": 2, "heads": 2, "activation": "quick_gelu", "layer": "last"},
    **{"vocab_size": 514 + len(MERGES), "context_length": 24, "tokenizer": {"merges": MERGES}},
}
SD1 = {
    "unet_config": {"target": "ldm.models.unet.UNetModel", "params": UNET},
    "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": VAE},
    "cond_stage_config": {"target": "ldm.conditioning.text.TextEncoder", "params": TEXT},
    "schedule": {"name": "scaled_linear", "T": 1000, "start": 0.00085, "end": 0.012},
    "prediction": "eps",
    "scale_factor": 0.18215,
    "defaults": {"height": 32, "width": 32, "steps": 50, "scale": 7.5, "sampler": "ddim", "spacing": "leading"},
}
OPENCLIP = {"layout": "openclip", "layers": 3, "activation": "gelu", "layer": "penultimate"}
LINEAR = {"num_heads": -1, "num_head_channels": 8, "use_linear_in_transformer": True}
SD2 = SD1 | {
    "unet_config": {"target": "ldm.models.unet.UNetModel", "params": UNET | LINEAR},
    "cond_stage_config": {"target": "ldm.conditioning.text.TextEncoder", "params": TEXT | OPENCLIP},
    "prediction": "v",
}
KINDS = {"sd1": SD1, "sd2": SD2}


def changed(params: dict, part: str, **changes) -> dict:
    """LatentDiffusion's parameters with some of a part's changed."""
    config = params[f"{part}_config"]
    return params | {f"{part}_config": config | {"params": config["params"] | changes}}


def model_config(params: dict) -> dict:
    return {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}


def built(config: dict, state: dict[str, Tensor]) -> LatentDiffusion:
    model = instantiate_network(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
