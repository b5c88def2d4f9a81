"""The table of families: what the weights of published models cannot say, and which model has which parts.

Weights show every size. They do not show the number of attention heads, what the UNet predicts, how latents are scaled
or how a model likes to be drawn: that is known of published models, and their descendants keep it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.checkpoint.structure import BERT, CLASSES, KL, PICTURE, RESCALER, TEXT, VQ

# Of latents where neither a file nor a yaml says: that of latent-diffusion's kl-f8, which is Stable Diffusion's first
# stage; and CompVis's default, with which all published VQ models were trained.
SCALE_FACTORS = {KL: 0.18215, VQ: 1.0}


@dataclass(frozen=True)
class Family:
    """What the weights of a published model cannot say.

    heads: UNetModel's arguments about attention heads.
    betas: first and last beta of CompVis's "linear", our "scaled_linear".
    latents: height and width of the latents it was trained on, and is best drawn with.
    steps, scale: of sampling.
    """

    name: str
    title: str
    heads: Mapping[str, Any]
    betas: tuple[float, float] = (0.00085, 0.012)
    latents: int = 64
    steps: int = 50
    scale: float = 1.0
    prediction: str = "eps"

    @property
    def schedule(self) -> dict[str, Any]:
        """Arguments of `make_schedule`."""
        return {"name": "scaled_linear", "start": self.betas[0], "end": self.betas[1], "T": 1000}

    def defaults(self, downsampling: int) -> dict[str, Any]:
        """Settings to draw with, in pixels where a latent is `downsampling` of them."""
        size = self.latents * downsampling
        return {"height": size, "width": size, "steps": self.steps, "scale": self.scale}


_SD1 = {"num_heads": 8, "legacy": False}
_SD2 = {"num_head_channels": 64, "legacy": False}
SD2_BASE = Family("sd-v2-base", "Stable Diffusion 2 base", _SD2, scale=9.0)

# (conditioner, first stage, concat) -> family. Heads, schedules and sizes: the yamls that were published beside the
# weights; steps and scales: the defaults of their own scripts (latent-diffusion, stable-diffusion, stablediffusion:
# scripts/txt2img.py, inpaint.py; instruct-pix2pix: edit_cli.py), save for LDM's text-to-image, class-conditional and
# super-resolution models: what its README and notebooks draw with.
FAMILIES = {
    ("clip", "kl", None): Family("sd-v1", "Stable Diffusion 1", _SD1, scale=7.5),
    ("clip", "kl", "mask_latents"): Family("sd-v1-inpainting", "Stable Diffusion 1 inpainting", _SD1, scale=7.5),
    ("clip", "kl", "latents"): Family("sd-v1-pix2pix", "InstructPix2Pix", _SD1, steps=100, scale=7.5),
    ("openclip", "kl", None): Family(
        "sd-v2-v", "Stable Diffusion 2 (768, v)", _SD2, latents=96, scale=9.0, prediction="v"
    ),
    ("openclip", "kl", "mask_latents"): Family("sd-v2-inpainting", "Stable Diffusion 2 inpainting", _SD2, scale=9.0),
    ("bert", "kl", None): Family("ldm-text2img", "LDM text-to-image (1.45B)", _SD1, latents=32, scale=5.0),
    ("bert", "vq", None): Family(
        "ldm-layout2img", "LDM layout-to-image", {"num_head_channels": 32}, betas=(0.0015, 0.0205)
    ),
    ("classes", "vq", None): Family(
        "ldm-class", "LDM class-conditional (ImageNet)", {"num_heads": 1}, betas=(0.0015, 0.0195), steps=20, scale=3.0
    ),
    # CelebA-HQ, FFHQ and LSUN bedrooms
    (None, "vq", None): Family(
        "ldm-unconditional-vq", "LDM unconditional (VQ)", {"num_head_channels": 32}, betas=(0.0015, 0.0195)
    ),
    # LSUN churches
    (None, "kl", None): Family(
        "ldm-unconditional-kl", "LDM unconditional (KL)", {"num_heads": 8}, betas=(0.0015, 0.0155), latents=32
    ),
    (None, "vq", "latents_mask"): Family("ldm-inpainting", "LDM inpainting", {"num_heads": 8}, betas=(0.0015, 0.0205)),
    ("rescaler", "vq", None): Family(
        "ldm-semantic", "LDM semantic synthesis", {"num_heads": 8}, betas=(0.0015, 0.0205)
    ),
    ("picture", "vq", None): Family(
        "ldm-super-resolution",
        "LDM super-resolution (x4)",
        {"num_head_channels": 32},
        betas=(0.0015, 0.0155),
        steps=100,
    ),
}

_KINDS = {BERT: "bert", CLASSES: "classes", RESCALER: "rescaler", PICTURE: "picture", KL: "kl", VQ: "vq"}


def kind(config: Mapping[str, Any] | None) -> str | None:
    """The table's word for a first stage or a conditioner; None for no conditioner."""
    if config is None:
        return None
    if config["target"] == TEXT:
        return "clip" if config["params"]["layout"] == "transformers" else "openclip"
    return _KINDS[config["target"]]


def find_family(
    first_stage: Mapping[str, Any], conditioner: Mapping[str, Any] | None, concat: str | None
) -> Family | None:
    """The row of the table for these parts, where there is one; of Stable Diffusion 2 without a mask, the v model's."""
    return FAMILIES.get((kind(conditioner), kind(first_stage), concat))


def is_text(conditioner: Mapping[str, Any] | None) -> bool:
    """Whether the conditioner is Stable Diffusion's kind: CLIP, of either layout."""
    return kind(conditioner) in ("clip", "openclip")


def given_channels(first_stage: Mapping[str, Any], conditioner: Mapping[str, Any] | None) -> int:
    """How many channels of the UNet's input are the conditioner's."""
    if kind(conditioner) == "picture":
        return first_stage["params"]["ddconfig"]["in_channels"]
    if kind(conditioner) != "rescaler":
        return 0
    params = conditioner["params"]
    return params.get("in_channels", 3) if params.get("out_channels") is None else params["out_channels"]


def find_concat(extra: int, z: int, text: bool) -> str | None:
    """LatentDiffusion's `concat`, from the channels of the UNet's input beyond the z latents and the conditioner's.

    Raises ValueError when the number has no known meaning.
    """
    concats = {0: None, z: "latents", z + 1: "mask_latents"} if text else {0: None, z + 1: "latents_mask"}
    if extra not in concats:
        raise ValueError(
            f"the UNet takes {extra} channels beside {z} noised latents and what its conditioner gives: "
            "no model is known that does"
        )
    return concats[extra]
