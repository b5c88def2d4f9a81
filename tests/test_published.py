"""The networks against the reference implementation's numbers, and against published checkpoints' names and shapes."""

from pathlib import Path

import pytest
import torch
from golden_fill import fill, load_golden, published_shapes, shapes
from torch import Tensor, nn

from ldm.conditioning.bert import BERTEncoder
from ldm.conditioning.classes import ClassEmbedder
from ldm.conditioning.spatial import SpatialRescaler
from ldm.conditioning.text import TextEncoder
from ldm.input_files import CONFIGS
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.discriminator import NLayerDiscriminator
from ldm.models.unet import UNetModel
from ldm.models.vq_autoencoder import VQModel, VQModelInterface
from ldm.optional.noisy_classifier import EncoderUNetModel
from ldm.training.config import read_configs
from ldm.util import instantiate_from_config


def kl_outputs(model: AutoencoderKL, x: Tensor) -> dict[str, Tensor]:
    posterior = model.encode(x)
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "reconstruction": model.decode(posterior.mean)}
    return found | {"kl": posterior.kl(), "nll_of_mode": posterior.nll(posterior.mode())}


def vq_outputs(model: VQModelInterface, x: Tensor) -> dict[str, Tensor]:
    h = model.encode(x)
    quantized, loss, (_, _, indices) = model.quantize(h)
    found = {"pre_quantized": h, "quantized": quantized, "codebook_loss": loss.view(1), "indices": indices}
    return found | {"reconstruction": model.decode(h)}


def patchgan(use_actnorm: bool, **params: int) -> NLayerDiscriminator:
    assert not use_actnorm  # batch normalisation is the only form here
    return NLayerDiscriminator(**params)


UNET = (UNetModel, lambda model, **inputs: {"eps": model(**inputs)})
CLASSIFIER = (EncoderUNetModel, lambda model, **inputs: {"logits": model(**inputs)})
GOLDENS = {
    **dict.fromkeys(["unet_sd1", "unet_cin_crossattn", "unet_class_adm", "unet_unconditional"], UNET),
    **dict.fromkeys([f"noisy_classifier_{pool}" for pool in ("adaptive", "attention", "spatial_v2")], CLASSIFIER),
    "autoencoder_kl": (AutoencoderKL, kl_outputs),
    "autoencoder_vq": (VQModelInterface, vq_outputs),
    "bert_embedder": (BERTEncoder, lambda model, tokens: {"embedding": model.encode(tokens)}),
    "spatial_rescaler": (SpatialRescaler, lambda model, x: {"y": model.encode(x)}),
    "patchgan": (patchgan, lambda model, x: {"logits": model(x)}),
}


@pytest.mark.parametrize("name", GOLDENS)
@torch.no_grad()
def test_golden(name):
    params, seed, tensors = load_golden(name)
    build, outputs = GOLDENS[name]
    inputs = {key.removeprefix("in/"): value for key, value in tensors.items() if key.startswith("in/")}
    found = outputs(fill(build(**params), seed), **inputs)
    assert {f"out/{key}" for key in found} == {key for key in tensors if key.startswith("out/")}
    for key, value in found.items():
        sums = key in ("kl", "nll_of_mode")  # thousands of terms
        torch.testing.assert_close(value, tensors[f"out/{key}"], atol=0 if sums else 1e-5, rtol=1e-6 if sums else 0)


def unet(in_channels: int, out_channels: int, width: int, mult: list[int], attention: list[int], **others) -> nn.Module:
    return UNetModel(64, in_channels, width, out_channels, 2, attention, channel_mult=mult, **others)


def stable(context_dim: int, **others) -> nn.Module:
    text = {"use_spatial_transformer": True, "context_dim": context_dim, "legacy": False}
    return unet(4, 4, 320, [1, 2, 4, 4], [4, 2, 1], **text, **others)


def stable_2() -> nn.Module:
    return stable(1024, num_head_channels=64, use_linear_in_transformer=True, use_fp16=True)


CROSS = {"use_spatial_transformer": True, "context_dim": 512}
UNETS = {
    "sd-v1": lambda: stable(768, num_heads=8),
    "sd-v2": stable_2,
    "sd-v2-v": stable_2,
    "ldm-text2img-large": lambda: stable(1280, num_heads=8),
    "ldm-cin256-v2": lambda: unet(3, 3, 192, [1, 2, 3, 5], [8, 4, 2], num_heads=1, **CROSS),
    "ldm-celebahq-vq4": lambda: unet(3, 3, 224, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32),
    "ldm-lsun-churches-kl8": lambda: unet(
        4, 4, 192, [1, 2, 2, 4, 4], [1, 2, 4, 8], num_heads=8, use_scale_shift_norm=True, resblock_updown=True
    ),
    "ldm-inpainting-big": lambda: unet(7, 3, 256, [1, 2, 3, 4], [8, 4, 2], num_heads=8, resblock_updown=True),
    "ldm-layout2img": lambda: unet(
        3, 3, 128, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32, transformer_depth=3, **CROSS
    ),
    "ldm-semantic-synthesis256": lambda: unet(6, 3, 128, [1, 4, 8], [32, 16, 8], num_heads=8),
    "ldm-bsr-sr": lambda: unet(6, 3, 160, [1, 2, 2, 4], [16, 8], num_head_channels=32),
}
CONDITIONERS = {
    "sd-v1": lambda: TextEncoder("transformers", 768, 12, 12, "quick_gelu"),
    **dict.fromkeys(["sd-v2", "sd-v2-v"], lambda: TextEncoder("openclip", 1024, 24, 16, "gelu", layer="penultimate")),
    "ldm-text2img-large": lambda: BERTEncoder(1280, 32),
    "ldm-layout2img": lambda: BERTEncoder(512, 16, 8192, 92),
    "ldm-cin256-v2": lambda: ClassEmbedder(512, n_classes=1001),
    "ldm-semantic-synthesis256": lambda: SpatialRescaler(n_stages=2, in_channels=182, out_channels=3),
}
AUTOENCODERS = {  # LDM's tables: latent channels, ch_mult, attn_resolutions, entries of the codebook
    "kl-f4": (3, [1, 2, 4], [], None),
    "kl-f8": (4, [1, 2, 4, 4], [], None),
    "kl-f16": (16, [1, 1, 2, 2, 4], [16], None),
    "kl-f32": (64, [1, 1, 2, 2, 4, 4], [16, 8], None),
    "vq-f4": (3, [1, 2, 4], [], 8192),
    "vq-f8": (4, [1, 2, 2, 4], [32], 16384),
    "vq-f16": (8, [1, 1, 2, 2, 4], [16], 16384),
}
FIRST_STAGES = {
    "kl-f8": "sd-v1 sd-v2 sd-v2-v ldm-text2img-large ldm-lsun-churches-kl8",
    "vq-f4": "ldm-cin256-v2 ldm-celebahq-vq4 ldm-layout2img ldm-semantic-synthesis256 ldm-bsr-sr",
    "vq-f4 none": "ldm-inpainting-big",
}


def autoencoder(kind: str, vq: type = VQModelInterface) -> nn.Module:
    kind, _, attn_type = kind.partition(" ")
    z_channels, ch_mult, attn_resolutions, n_embed = AUTOENCODERS[kind]
    ddconfig = {"ch": 128, "out_ch": 3, "in_channels": 3, "num_res_blocks": 2, "resolution": 256, "ch_mult": ch_mult}
    ddconfig |= {"z_channels": z_channels, "attn_resolutions": attn_resolutions, "attn_type": attn_type or "vanilla"}
    if n_embed is None:
        return AutoencoderKL(ddconfig, embed_dim=z_channels)
    return vq(ddconfig | {"double_z": False}, embed_dim=z_channels, n_embed=n_embed)


def trained(kind: str) -> nn.Module:
    """The network that a configuration of configs/autoencoder trains."""
    (config,) = read_configs([f"configs/autoencoder/{kind}.yaml"], ["stage.params.perceptual=null"])
    return instantiate_from_config(config["stage"]).model


LATENT = {
    "unconditional-vq-f4": "ldm-celebahq-vq4",
    "classes-vq-f4": "ldm-cin256-v2",
    "text-kl-f8": "sd-v1",
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "latent").iterdir()), ids=lambda path: path.stem)
def test_the_configurations_of_latent_diffusion(path):
    (config,) = read_configs([str(path)])
    with torch.device("meta"):
        network = instantiate_from_config(config["stage"]["params"]["unet_config"])
    assert shapes(network) == published_shapes(LATENT[path.stem], "model.diffusion_model.")
    width = config["data"]["params"]["size"] // network.image_size
    assert Path(config["stage"]["params"]["first_stage"]).parent.name.endswith(f"f{width}")


PUBLISHED = [
    *((path.stem, "", lambda kind=path.stem: trained(kind)) for path in sorted((CONFIGS / "autoencoder").iterdir())),
    *((model, "model.diffusion_model.", build) for model, build in UNETS.items()),
    *((model, "cond_stage_model.", build) for model, build in CONDITIONERS.items()),
    *((kind, "", lambda kind=kind: autoencoder(kind)) for kind in AUTOENCODERS),
    *((kind, "", lambda kind=kind: autoencoder(kind, VQModel)) for kind in AUTOENCODERS if kind.startswith("vq")),
    *(
        (model, "first_stage_model.", lambda kind=kind: autoencoder(kind))
        for kind, models in FIRST_STAGES.items()
        for model in models.split()
    ),
    # the conditioner "__is_first_stage__" was saved once more
    ("ldm-inpainting-big", "cond_stage_model.", lambda: autoencoder("vq-f4 none")),
]


@pytest.mark.parametrize("model, prefix, build", PUBLISHED, ids=[f"{model}-{prefix}" for model, prefix, _ in PUBLISHED])
def test_names_and_shapes(model, prefix, build):
    with torch.device("meta"):
        network = build()
    expected = published_shapes(model, prefix)
    expected.pop("transformer.text_model.embeddings.position_ids", None)  # a buffer of old transformers: 0 .. 76
    assert shapes(network) == expected
    if model in AUTOENCODERS:
        assert network.downsampling == int(model[4:])
