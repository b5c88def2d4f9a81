"""The families of published models: what identifies each, and what its weights cannot show.

Weights show every size. They do not show the number of attention heads, what the UNet predicts, how latents are scaled
or which settings a model is best sampled with: that is known of published models, and their descendants keep it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.checkpoint import networks
from ldm.checkpoint.networks import Config

# Of latents where neither a file nor a yaml says: that of latent-diffusion's kl-f8, which is Stable Diffusion's first
# stage; and CompVis's default, with which all published VQ models were trained.
SCALE_FACTORS = {networks.KL_TARGET: 0.18215, networks.VQ_TARGET: 1.0}


@dataclass(frozen=True)
class Family:
    """What the weights of a published model cannot show."""

    name: str
    title: str
    heads: Config  # UNetModel's arguments about attention heads
    betas: tuple[float, float] = (0.00085, 0.012)  # first and last of CompVis's "linear", our "scaled_linear"
    latents: int = 64  # height and width of those it was trained on, and is best sampled with
    steps: int = 50
    scale: float = 1.0
    prediction: str = "eps"
    scale_factor: float | None = None  # of latents, where it is not that of its kind of first stage

    @property
    def schedule(self) -> Config:
        """Return the arguments of `make_schedule`."""
        return {"name": "scaled_linear", "start": self.betas[0], "end": self.betas[1], "T": 1000}

    def defaults(self, downsampling: int) -> Config:
        """Return default settings, in pixels where a latent is `downsampling` of them."""
        size = self.latents * downsampling
        return {"height": size, "width": size, "steps": self.steps, "scale": self.scale}


_EIGHT, _WIDE_32 = {"num_heads": 8}, {"num_head_channels": 32}
_SD1, _SD2 = _EIGHT | {"legacy": False}, {"num_head_channels": 64, "legacy": False}
SD2_BASE = Family("sd-v2-base", "Stable Diffusion 2 base", _SD2, scale=9.0)

# (conditioner, first stage, concat) -> family. Heads, schedules and sizes: the yamls that were published beside the
# weights; steps and scales: the defaults of their own scripts (latent-diffusion, stable-diffusion, stablediffusion:
# scripts/txt2img.py, inpaint.py; instruct-pix2pix: edit_cli.py; XL: diffusers' pipeline), save for LDM's text-to-image,
# class-conditional and super-resolution models: what its README and notebooks use. Unconditional models: CelebA-HQ,
# FFHQ and LSUN bedrooms have a VQ first stage, LSUN churches a KL one.
FAMILIES = {
    (conditioner, first_stage, concat): Family(name, title, heads, **dict[str, Any](rest))
    for conditioner, first_stage, concat, name, title, heads, rest in (
        ("clip", "kl", None, "sd-v1", "Stable Diffusion 1", _SD1, {"scale": 7.5}),
        ("clip", "kl", "mask_latents", "sd-v1-inpainting", "Stable Diffusion 1 inpainting", _SD1, {"scale": 7.5}),
        ("clip", "kl", "latents", "sd-v1-pix2pix", "InstructPix2Pix", _SD1, {"steps": 100, "scale": 7.5}),
        (
            *("openclip", "kl", None, "sd-v2-v", "Stable Diffusion 2 (768, v)", _SD2),
            {"latents": 96, "scale": 9.0, "prediction": "v"},
        ),
        ("openclip", "kl", "mask_latents", "sd-v2-inpainting", "Stable Diffusion 2 inpainting", _SD2, {"scale": 9.0}),
        (
            *("sdxl", "kl", None, "sdxl", "Stable Diffusion XL", _SD2),
            {"latents": 128, "scale": 5.0, "scale_factor": 0.13025},
        ),
        (
            *("sdxl-refiner", "kl", None, "sdxl-refiner", "Stable Diffusion XL's refiner", _SD2),
            {"latents": 128, "scale": 5.0, "scale_factor": 0.13025},
        ),
        ("bert", "kl", None, "ldm-text2img", "LDM text-to-image (1.45B)", _SD1, {"latents": 32, "scale": 5.0}),
        ("bert", "vq", None, "ldm-layout2img", "LDM layout-to-image", _WIDE_32, {"betas": (0.0015, 0.0205)}),
        (
            *("classes", "vq", None, "ldm-class", "LDM class-conditional (ImageNet)", {"num_heads": 1}),
            {"betas": (0.0015, 0.0195), "steps": 20, "scale": 3.0},
        ),
        (None, "vq", None, "ldm-unconditional-vq", "LDM unconditional (VQ)", _WIDE_32, {"betas": (0.0015, 0.0195)}),
        (
            *(None, "kl", None, "ldm-unconditional-kl", "LDM unconditional (KL)", _EIGHT),
            {"betas": (0.0015, 0.0155), "latents": 32},
        ),
        (None, "vq", "latents_mask", "ldm-inpainting", "LDM inpainting", _EIGHT, {"betas": (0.0015, 0.0205)}),
        ("rescaler", "vq", None, "ldm-semantic", "LDM semantic synthesis", _EIGHT, {"betas": (0.0015, 0.0205)}),
        (
            *("image", "vq", None, "ldm-super-resolution", "LDM super-resolution (x4)", _WIDE_32),
            {"betas": (0.0015, 0.0155), "steps": 100},
        ),
    )
}

_KINDS = {
    **{networks.KL_TARGET: "kl", networks.VQ_TARGET: "vq", networks.BERT_TARGET: "bert"},
    **{networks.CLASSES_TARGET: "classes", networks.RESCALER_TARGET: "rescaler", networks.IMAGE_TARGET: "image"},
}


def kind(config: Mapping[str, Any] | None) -> str | None:
    """Return the table's word for a first stage or a conditioner; None for no conditioner."""
    if config is None:
        return None
    if config["target"] == networks.TEXT_TARGET:
        return "clip" if config["params"]["layout"] == "transformers" else "openclip"
    if config["target"] == networks.SIZED_TEXT_TARGET:
        return "sdxl" if len(config["params"]["embedders"]) > 1 else "sdxl-refiner"
    return _KINDS.get(config["target"], config["target"])


def find_family(in_channels: int, first_stage: Config, conditioner: Config | None) -> tuple[Family | None, str | None]:
    """Return the family of these parts, if it is known, and what its UNet's input holds beside latents (`concat`).

    Of Stable Diffusion 2 without a mask it is the v model's.
    """
    z, given = int(first_stage["params"]["embed_dim"]), 0
    if kind(conditioner) == "image":
        given = first_stage["params"]["ddconfig"]["in_channels"]
    elif conditioner is not None and kind(conditioner) == "rescaler":
        params = conditioner["params"]
        given = params.get("in_channels", 3) if params.get("out_channels") is None else params["out_channels"]
    concat = find_concat(
        int(in_channels) - z - given, z, kind(conditioner) in ("clip", "openclip", "sdxl", "sdxl-refiner")
    )
    return FAMILIES.get((kind(conditioner), kind(first_stage), concat)), concat


def find_concat(extra: int, z: int, text: bool) -> str | None:
    """Return LatentDiffusion's `concat` for `extra` channels beyond z latents and the conditioner's; `text`: CLIP's."""
    concats = {0: None, z: "latents", z + 1: "mask_latents"} if text else {0: None, z + 1: "latents_mask"}
    if extra not in concats:
        beside = f"{z} noised latents and the conditioner's"
        raise ValueError(f"the UNet takes {extra} channels beside {beside}: no known model does")
    return concats[extra]
