"""A tiny Stable Diffusion XL that diffusers built, and the images that it and ours make of one prompt and noise.

The sizes are those at which a file without configuration is read right: heads 64 wide, 32 groups, CLIP's vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
from conftest import randomised

from ldm.checkpoint.diffusers_text_writer import write_tokenizer
from ldm.conditioning.sizes import Sizes
from ldm.conditioning.tokenizer import clip_merges
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.schedule import sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion

PROMPTS = ["a photo of a cat", "An astronaut, riding a horse: 4K"]
SIZE = {"height": 32, "width": 48}  # not square: height and width differ
SIZES = Sizes((32, 48), (0, 0), (32, 48))
STEPS, SCALE, CLOSE = 4, 3.0, {"atol": 1e-4, "rtol": 1e-4}


def build_pipeline(root: Path):
    """Return a pipeline of networks that diffusers and transformers built, and the folder that it wrote in `root`."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    merges, ends = clip_merges(), {"bos_token_id": 49406, "eos_token_id": 49407}
    first, second = (  # diffusers tells a file's two towers apart by their widths
        CLIPTextConfig(
            **{"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64},
            **ends | {"num_hidden_layers": layers, "hidden_act": activation, "projection_dim": 32, "pad_token_id": pad},
        )
        for width, layers, activation, pad in ((64, 2, "quick_gelu", 49407), (128, 3, "gelu", 0))
    )
    modules = {
        "vae": AutoencoderKL(
            **{"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
            **{"up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 32, "scaling_factor": 0.13025},
        ),
        "unet": UNet2DConditionModel(
            **{"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 192},
            **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True},
            **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 1)},
            **{"transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"},
            **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 32 + 6 * 256},
        ),
        "text_encoder": CLIPTextModel(first),
        "text_encoder_2": CLIPTextModelWithProjection(second),
    }
    curve = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipe = StableDiffusionXLPipeline(
        **{name: randomised(module.eval()) for name, module in modules.items()},
        tokenizer=write_tokenizer(root / "tokenizer", merges, pad=49407, context_length=77),
        tokenizer_2=write_tokenizer(root / "tokenizer_2", merges, pad=0, context_length=77),
        scheduler=EulerDiscreteScheduler(**curve, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(root / "xl")
    return pipe, root / "xl"


def start() -> torch.Tensor:
    return SeededNoise([0, 1], (4, 16, 24))()


def their_images(pipe, **options) -> np.ndarray:
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "np"}
    return pipe(PROMPTS, latents=start(), **SIZE, **settings, **options).images


@torch.no_grad()
def our_images(model: LatentDiffusion, negative: str = "", sizes: Sizes = SIZES) -> np.ndarray:
    """As `generate` makes them, in floats."""
    sigmas = sampling_sigmas(model.schedule, STEPS, "leading", "zero")
    cond = model.condition(PROMPTS, sizes=sizes)
    uncond = model.condition([negative] * 2, sizes=sizes, negative=True)
    denoise = classifier_free(model.denoiser(), cond, uncond, SCALE)
    *_, step = get_sampler("euler")(denoise, start() * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
    return (model.decode(step.x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
