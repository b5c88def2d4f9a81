"""The networks that a checkpoint is made of: the classes that its configuration names, the prefixes of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.checkpoint.tensors import State
from ldm.checks import ONNX_INDEX, SHIPPED_MODELS, shorten
from ldm.util import ALLOWED, allowed_packages, get_obj_from_str

Config = dict[str, Any]

PRETRAINED = Path(__file__).parents[1] / "pretrained"

MODEL_TARGET = "ldm.latent_diffusion.LatentDiffusion"
UNET_TARGET = "ldm.models.unet.UNetModel"
KL_TARGET = "ldm.models.autoencoder.AutoencoderKL"
VQ_TARGET = "ldm.models.vq_autoencoder.VQModelInterface"
TEXT_TARGET = "ldm.conditioning.text.TextEncoder"
SIZED_TEXT_TARGET = "ldm.conditioning.sized_text.SizedTextEncoder"
BERT_TARGET = "ldm.conditioning.bert.BERTEncoder"
CLASSES_TARGET = "ldm.conditioning.classes.ClassEmbedder"
RESCALER_TARGET = "ldm.conditioning.spatial.SpatialRescaler"
IMAGE_TARGET = "ldm.conditioning.spatial.ConcatImage"

# The classes that the header of a checkpoint may name. None of them opens a file or downloads anything.
BUILT_IN = {
    **{
        "ldm.latent_diffusion": "LatentDiffusion",
        "ldm.pixel_diffusion": "PixelDiffusion",
        "ldm.models.unet": "UNetModel",
    },
    **{"ldm.models.autoencoder": "AutoencoderKL", "ldm.models.vq_autoencoder": "VQModel VQModelInterface"},
    **{"ldm.models.identity": "IdentityFirstStage", "ldm.models.classifier": "Judge FeatureNetwork"},
    **{"ldm.models.image_encoder": "ImageEncoder"},
    **{"ldm.conditioning.text": "TextEncoder", "ldm.conditioning.bert": "BERTEncoder"},
    **{"ldm.conditioning.sized_text": "SizedTextEncoder", "ldm.conditioning.word_sum": "WordSum"},
    **{"ldm.conditioning.classes": "ClassEmbedder ClassLabels", "ldm.conditioning.layout": "LayoutEncoder"},
    **{"ldm.conditioning.spatial": "SpatialRescaler ConcatImage", "ldm.optional.simple_unet": "SimpleUNet"},
    **{
        "ldm.optional.unet2d": "UNet2D",
        "ldm.optional.denoising_gan": "DenoisingGAN",
        "ldm.optional.ddgan": "Generator",
    },
    **{"ldm.optional.noisy_classifier": "EncoderUNetModel"},
}
BUILT = {f"{module}.{name}" for module, names in BUILT_IN.items() for name in names.split()}
UNUSED = ("lossconfig", "scheduler_config")  # arguments of CompVis's autoencoders, of which nothing is built

PREFIXES = {"unet": "model.diffusion_model.", "first_stage": "first_stage_model.", "text": "cond_stage_model."}

# What distinguishes OpenAI's CLIP (Stable Diffusion 1) from OpenCLIP (2) besides the names of their weights.
CLIP_SETTINGS = {"layout": "transformers", "activation": "quick_gelu", "layer": "last"}
OPENCLIP_SETTINGS = {"layout": "openclip", "activation": "gelu", "layer": "penultimate"}


class Found(NamedTuple):
    """What a file or folder holds: {"target": class, "params": ...}, its tensors, and notes about it."""

    config: Config
    state: State
    notes: list[str]
    scale_factor: float | None = None  # of a first stage taken from a model or folder that has one
    words: Mapping[str, Tensor] = {}  # vectors of learned words


def shipped(path: Path) -> Path:
    """Return the file of the model that ships by this name; the path where there is none, or a model lies there."""
    exists = path.is_file() or any((path / name).is_file() for name in ("model_index.json", "config.yaml", ONNX_INDEX))
    return PRETRAINED / f"{path}.safetensors" if str(path) in SHIPPED_MODELS and not exists else path


def check_targets(config: Any) -> None:
    """Raise ValueError if a header's configuration names a class, at any depth, that a checkpoint may not build.

    It may build those in BUILT, by any of their names, torch's layers in ALLOWED, and those of packages that the user
    allows.
    """
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, dict):
        return
    target = config.get("target")
    package = str(target).partition(".")[0]
    if target is not None and str(target) not in ALLOWED and package not in allowed_packages():
        cls = get_obj_from_str(target) if package == "ldm" else None
        name = shorten(package)
        allow = "" if package == "ldm" else f", or allow its package (--allow {name}, or LDM_ALLOW={name})"
        if cls is None or f"{cls.__module__}.{cls.__qualname__}" not in BUILT:
            raise ValueError(
                f"it names {shorten(repr(target))}, and a checkpoint may name only networks of ldm that open no files: "
                f"if you trust it, give its configuration as a yaml of your own (--config FILE){allow}"
            )
    for key, value in config.items():
        if key not in UNUSED:
            check_targets(value)
