"""Tiny models in CompVis's terms, under its old names, and the same models of ours with the same weights."""

import copy
import json
from pathlib import Path

import torch
from golden_fill import fill
from meta_models import TINY_1
from safetensors.torch import save_file
from torch import nn

from ldm import latent_diffusion as core
from ldm.checkpoint.compvis import normalise
from ldm.checkpoint.diffusers_text_writer import write_vocabulary
from ldm.conditioning.tokenizer import reduce
from ldm.diffusion import guidance, sampling
from ldm.diffusion.denoiser import from_vp, to_vp
from ldm.diffusion.schedule import sampling_sigmas
from ldm.models.clip_transformers import CLIPTextModel
from ldm.util import instantiate_from_config

DDPM = "ldm.models.diffusion.ddpm"
ENCODERS = "ldm.modules.encoders.modules"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
WIDTH, LAYERS = 16, 2
MERGES = reduce(["a photograph of a cat", "a red dog, x"], merges_first=50)  # other words are spelled
VOCABULARY = 514 + len(MERGES)
CLIP_CONFIG = {
    **{"model_type": "clip_text_model", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCABULARY},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": 1, "max_position_embeddings": 77},
    "hidden_act": "quick_gelu",
}
PIXELS = {
    **{"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1]},
    **{"num_res_blocks": 1, "attention_resolutions": [], "num_heads": 1},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        **{"embed_dim": 4, "n_embed": 32, "lossconfig": {"target": "torch.nn.Identity"}},
        "ddconfig": {
            **{"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32},
            **{"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
        },
    },
}


class Recorder(nn.Module):
    """In place of a UNet: keeps what it is given, and returns x."""

    def forward(self, x, t, **inputs):
        self.given = {"x": x, **inputs}
        return x


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch(n: int = 2) -> dict:
    """Pictures (n, 16, 16, 3) in [-1, 1] and what is said of them."""
    return {"jpg": randn(n, 16, 16, 3).clamp(-1, 1), "txt": ["a photograph of a cat", "", "x"][:n]}


def clip_folder(folder: Path) -> Path:
    """A tiny text encoder in transformers' layout, with a vocabulary of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    write_vocabulary(folder, MERGES)
    tower = fill(CLIPTextModel(VOCABULARY, WIDTH, LAYERS, 1, 77, "quick_gelu"), 1)
    save_file(tower.state_dict(), folder / "model.safetensors")
    return folder


def config(clip: Path, unet: dict | None = None, target: str = f"{DDPM}.LatentDiffusion", **changes) -> dict:
    """The `model` section of a yaml as CompVis writes them, of Stable Diffusion 1 in small."""
    own = copy.deepcopy(TINY_1["params"])
    params = {
        **{"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000},
        **{"num_timesteps_cond": 1, "log_every_t": 200},
        **{"first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 8, "channels": 4, "use_ema": False},
        **{"conditioning_key": "crossattn", "scale_factor": 0.18215, "monitor": "val/loss_simple_ema"},
        "unet_config": {"target": UNET, "params": own["unet_config"]["params"] | (unet or {})},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": own["first_stage_config"]["params"] | {"lossconfig": {"target": "torch.nn.Identity"}},
        },
        "cond_stage_config": {"target": f"{ENCODERS}.FrozenCLIPEmbedder", "params": {"version": str(clip)}},
    }
    return {"target": target, "params": params | changes}


def built(section: dict, seed: int = 0):
    """A model with weights of order one, in eval mode."""
    return fill(instantiate_from_config(section), seed)


def ours(model, **changes) -> core.LatentDiffusion:
    """Our own model with the weights of one in CompVis's terms."""
    params = copy.deepcopy(TINY_1["params"]) | {"prediction": model.parameterization} | changes
    params["cond_stage_config"]["params"] |= {"vocab_size": VOCABULARY, "tokenizer": {"merges": MERGES}}
    twin = core.LatentDiffusion(**params)
    twin.load_state_dict(normalise(model.state_dict())[0])
    return twin.eval().requires_grad_(False)


def sampled(twin, cond, null, start, steps, scale, spacing="compvis", final="sigma_min") -> torch.Tensor:
    """DDIM by our own sampler on CompVis's levels: latents."""
    sigmas = sampling_sigmas(twin.schedule, steps, spacing, final).tolist()
    denoise = guidance.classifier_free(twin.denoiser(), {"c_crossattn": cond}, {"c_crossattn": null}, scale)
    *_, last = sampling.sample(denoise, from_vp(start, sigmas[0]), sigmas)
    return to_vp(last.x, sigmas[-1])


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of a run of several steps in float32: relative to the largest, as an untrained network amplifies."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
