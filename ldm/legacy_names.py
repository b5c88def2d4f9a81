"""Old module names -> the files that now contain their classes, and where the other names of those modules are.

`ldm.legacy_paths` imports this when it meets an old name.
"""

from functools import cache

# CompVis's modules.
HOMES = {
    "ldm.data.base": "ldm.compvis.main",
    "ldm.data.personalized": "ldm.compvis.personalized",
    "ldm.data.personalized_style": "ldm.compvis.personalized_style",
    "ldm.lr_scheduler": "ldm.compvis.lr_scheduler",
    "ldm.models.diffusion.ddim": "ldm.compvis.samplers",
    "ldm.models.diffusion.ddpm": "ldm.compvis.ddpm",
    "ldm.models.diffusion.dpm_solver": "ldm.compvis.samplers",
    "ldm.models.diffusion.dpm_solver.sampler": "ldm.compvis.samplers",
    "ldm.models.diffusion.plms": "ldm.compvis.samplers",
    "ldm.models.diffusion.sampling_util": "ldm.compvis.util",
    "ldm.modules.attention": "ldm.models.attention",
    "ldm.modules.diffusionmodules.model": "ldm.models.autoencoder",
    "ldm.modules.diffusionmodules.openaimodel": "ldm.models.unet",
    "ldm.modules.diffusionmodules.util": "ldm.models.blocks",  # the networks call `checkpoint` there: forks replace it
    "ldm.modules.distributions.distributions": "ldm.models.distributions",
    "ldm.modules.ema": "ldm.compvis.ema",
    "ldm.modules.embedding_manager": "ldm.compvis.embedding_manager",
    "ldm.modules.encoders.modules": "ldm.compvis.encoders",
    "ldm.modules.image_degradation": "ldm.compvis.degradation",
    "ldm.modules.losses": "ldm.compvis.losses",
    "ldm.modules.losses.contperceptual": "ldm.compvis.losses",
    "ldm.modules.losses.vqperceptual": "ldm.compvis.losses",
    "ldm.modules.x_transformer": "ldm.models.transformer",
}

# Earlier names of this package's own modules, which headers of checkpoints and configurations contain.
EARLIER = {
    "ldm.data.degradation": "ldm.compvis.degradation",
    "ldm.denoising_gan": "ldm.optional.denoising_gan",
    "ldm.finetune.embedding_manager": "ldm.compvis.embedding_manager",
    "ldm.finetune.personalized": "ldm.compvis.personalized",
    "ldm.finetune.personalized_style": "ldm.compvis.personalized_style",
    "ldm.inference.guides": "ldm.inference.guiders",
    "ldm.models.ddgan": "ldm.optional.ddgan",
    "ldm.models.noisy_classifier": "ldm.optional.noisy_classifier",
    "ldm.models.teaching.simple_unet": "ldm.optional.simple_unet",
    "ldm.models.teaching.unet2d": "ldm.optional.unet2d",
    "ldm.training.ddgan": "ldm.optional.ddgan_stage",
    "ldm.training.losses": "ldm.compvis.losses",
    "ldm.training.noisy_classifier": "ldm.optional.noisy_classifier_stage",
}

# Modules of CompVis's program and of taming-transformers that configurations name; only for `util.get_obj_from_str`.
CONFIG_HOMES = {
    "main": "ldm.compvis.main",
    "taming.modules.discriminator.model": "ldm.models.discriminator",
    "taming.modules.losses.lpips": "ldm.compvis.losses",
    "taming.modules.losses.vqperceptual": "ldm.compvis.losses",
    "taming.modules.vqvae.quantize": "ldm.models.quantize",
}

# Names that CompVis's modules define or import, but their homes do not: home -> {module: names}. "a=b" is b of that
# module under the name a, and "a=" the module itself.
_UTIL = "exists default ismap isimage mean_flat count_params log_txt_as_img"
_SCHEDULE = "make_beta_schedule make_ddim_timesteps make_ddim_sampling_parameters extract_into_tensor noise_like"
_ND = "conv_nd avg_pool_nd"
_LAYERS = "linear=Linear SiLU GroupNorm32=GroupNorm"  # called like CompVis's functions, they return the same
ELSEWHERE = {
    "ldm.models.diffusion.dpm_solver": {"ldm.compvis.samplers": "DPMSolverSampler"},
    "ldm.modules.losses": {"ldm.compvis.losses": "LPIPSWithDiscriminator"},
    "ldm.compvis.ddpm": {
        "ldm.compvis.finetune": "LatentFinetuneDiffusion LatentInpaintDiffusion",
        "ldm.compvis.util": f"{_UTIL} {_SCHEDULE} IdentityFirstStage",
        "ldm.compvis.ema": "LitEma",
        "ldm.models.autoencoder": "AutoencoderKL",
        "ldm.diffusion.bound": "normal_kl",
        "ldm.util": "instantiate_from_config",
        "torch.optim.lr_scheduler": "LambdaLR",
        "einops": "rearrange",
        "tqdm": "tqdm",
        "contextlib": "contextmanager",
        "numpy": "np=",
    },
    "ldm.compvis.encoders": {"ldm.compvis.util": "default count_params autocast"},
    "ldm.compvis.samplers": {"ldm.compvis.util": "extract_into_tensor", "functools": "partial"},
    "ldm.models.attention": {
        "ldm.compvis.util": "exists default Normalize",
        "ldm.models.attention": "MemoryEfficientCrossAttention=CrossAttention",
        "ldm.models.autoencoder": "SpatialSelfAttention=AttnBlock",
        "ldm.models.blocks": "checkpoint",
        "torch": "torch= einsum",
        "einops": "rearrange repeat",
        "inspect": "isfunction",
        "math": "math=",
    },
    "ldm.models.autoencoder": {  # CompVis's `models.autoencoder` and `diffusionmodules.model`
        "ldm.models.vq_autoencoder": "VQModel VQModelInterface",
        "ldm.models.quantize": "VectorQuantizer VectorQuantizer2=VectorQuantizer",
        "ldm.models.autoencoder": "MemoryEfficientAttnBlock=AttnBlock",
        "ldm.compvis.util": "IdentityFirstStage Normalize",
        "ldm.compvis.ema": "LitEma",
        "ldm.util": "instantiate_from_config",
        "math": "math=",
        "numpy": "np=",
    },
    "ldm.models.blocks": {
        "ldm.compvis.util": f"{_SCHEDULE} betas_for_alpha_bar mean_flat scale_module HybridConditioner {_ND}",
        "ldm.util": "instantiate_from_config",
        "torch.nn": _LAYERS,
        "numpy": "np=",
    },
    "ldm.models.distributions": {
        "ldm.compvis.util": "AbstractDistribution DiracDistribution",
        "ldm.diffusion.bound": "normal_kl",
        "numpy": "np=",
    },
    "ldm.models.quantize": {"ldm.models.quantize": "VectorQuantizer2=VectorQuantizer"},
    "ldm.models.transformer": {
        "ldm.compvis.util": "exists default",
        "ldm.models.attention": "GEGLU",
        "torch": "torch=",
    },
    "ldm.models.unet": {
        "ldm.compvis.util": f"exists {_ND}",
        "ldm.models.blocks": "TimestepBlock checkpoint",
        "ldm.optional.noisy_classifier": "AttentionPool2d EncoderUNetModel",
        "torch": "th=",
        "torch.nn": _LAYERS,
        "torch.nn.functional": "F=",
        "numpy": "np=",
        "math": "math=",
    },
    "ldm.util": {
        "ldm.compvis.util": f"{_UTIL} parallel_data_prefetch autocast",
        "inspect": "isfunction",
        "numpy": "np=",
        "PIL.Image": "Image=",
    },
}

# Modules of CompVis's, and names in homes, that are not here, and why.
_MIDAS, _UPSCALER = "it needs MiDaS, a network of another project", "the x4 upscaler is not part of this package"
_UNCLIP, _OTHERS = "unCLIP is not part of this package", "it is another project's code"
_DEGRADATION = "ldm.modules.image_degradation", "ldm.compvis.degradation"  # a package there, and a file here
_UNUSED = "no published model uses it, or it does nothing"
_UNUSED_IN = {
    "ldm.util": "AdamWwithEMAandWings",
    "ldm.models.blocks": "CheckpointFunction",
    "ldm.models.attention": "LinearAttention",
    "ldm.models.unet": "TransposedUpsample count_flops_attn convert_module_to_f16 convert_module_to_f32",
    "ldm.models.autoencoder": "LinAttnBlock LinearAttention MemoryEfficientCrossAttentionWrapper Model SimpleDecoder "
    "UpsampleDecoder LatentRescaler MergedRescaleEncoder MergedRescaleDecoder Upsampler Resize FirstStagePostProcessor "
    "get_timestep_embedding",
}
_REASONS = {
    **{f"{home}.{name}": _UNUSED for home, names in _UNUSED_IN.items() for name in names.split()},
    **dict.fromkeys(
        ("ldm.models.unet.QKVAttention", "ldm.models.unet.QKVAttentionLegacy"),
        "its blocks call ldm.models.kernels.attention",
    ),
    "ldm.models.unet.Timestep": _UNCLIP,
    **dict.fromkeys(("ldm.data.util", "ldm.modules.midas", "ldm.compvis.ddpm.LatentDepth2ImageDiffusion"), _MIDAS),
    **dict.fromkeys((f"ldm.compvis.ddpm.LatentUpscale{name}Diffusion" for name in ("", "Finetune")), _UPSCALER),
    "ldm.modules.diffusionmodules.upscaling": _UPSCALER,
    "ldm.compvis.ddpm.ImageEmbeddingConditionedLatentDiffusion": _UNCLIP,
    "ldm.modules.karlo": _UNCLIP,
    "ldm.compvis.encoders.FrozenOpenCLIPImageEmbedder": _UNCLIP,
    "ldm.compvis.encoders.ClipImageEmbedder": _UNCLIP,
    "ldm.compvis.encoders.CLIPEmbeddingNoiseAugmentation": _UNCLIP,
    "ldm.compvis.encoders.FrozenT5Embedder": "T5's network is not part of this package",
    "ldm.models.diffusion.dpm_solver.dpm_solver": f"{_OTHERS}; DPMSolverSampler is here",
    **dict.fromkeys(
        ("ldm.data.imagenet", "ldm.data.lsun"),
        "it needs its authors' folders; ldm.data.folder reads images with captions",
    ),
    **dict.fromkeys(
        [f"ldm.data.{name}" for name in ("openimages", "faceshq", "landscapes", "previews", "laion")],
        "CompVis's repositories do not have it either",
    ),
    **dict.fromkeys(
        (f"{home}.{name}" for home in _DEGRADATION for name in ("bsrgan", "bsrgan_light", "utils_image")),
        f"{_OTHERS}; ldm.compvis.degradation has degradation_fn_bsr and degradation_fn_bsr_light, after the paper",
    ),
    "ldm.models.diffusion.ddpm_edit": "InstructPix2Pix has this file",
    "ldm.models.diffusion.classifier": "it trains with Lightning; ldm.optional.noisy_classifier_stage trains the same",
}
ABSENT = {
    name: f"{name} is not here: {reason} (docs/reference/compvis.md, `What is not here`)"
    for name, reason in _REASONS.items()
}

OLD_NAMES = HOMES | EARLIER
REAL = ("ldm", "ldm.data", "ldm.finetune", "ldm.inference", "ldm.models", "ldm.training")
PACKAGES = {name[:i] for name in OLD_NAMES for i in range(len(name)) if name[i] == "."} - set(REAL)


@cache
def exports(home: str) -> dict[str, tuple[str, str]]:
    """Return the home's names in `ELSEWHERE`, each with its module and its name there, "" for the module itself."""
    entries = (
        (place, entry.partition("=")) for place, names in ELSEWHERE.get(home, {}).items() for entry in names.split()
    )
    return {alias: (place, name if equals else alias) for place, (alias, equals, name) in entries}
