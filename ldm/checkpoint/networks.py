"""The networks that a checkpoint is made of: the classes that its configuration names, the prefixes of its weights."""

from typing import Any

Config = dict[str, Any]

MODEL_TARGET = "ldm.latent_diffusion.LatentDiffusion"
UNET_TARGET = "ldm.models.unet.UNetModel"
KL_TARGET = "ldm.models.autoencoder.AutoencoderKL"
VQ_TARGET = "ldm.models.vq_autoencoder.VQModelInterface"
TEXT_TARGET = "ldm.conditioning.text.TextEncoder"
BERT_TARGET = "ldm.conditioning.bert.BERTEncoder"
CLASSES_TARGET = "ldm.conditioning.classes.ClassEmbedder"
RESCALER_TARGET = "ldm.conditioning.spatial.SpatialRescaler"
IMAGE_TARGET = "ldm.conditioning.spatial.ConcatImage"

PREFIXES = {"unet": "model.diffusion_model.", "first_stage": "first_stage_model.", "text": "cond_stage_model."}

# What distinguishes OpenAI's CLIP (Stable Diffusion 1) from OpenCLIP (2) besides the names of their weights.
CLIP_SETTINGS = {"layout": "transformers", "activation": "quick_gelu", "layer": "last"}
OPENCLIP_SETTINGS = {"layout": "openclip", "activation": "gelu", "layer": "penultimate"}
