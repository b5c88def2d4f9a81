"""What CompVis's yamls name: every target resolves or is listed as missing."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import refused

from ldm.util import get_obj_from_str

DOCS = Path(__file__).parents[1] / "docs/reference/compvis.md"


@pytest.mark.parametrize(
    ("target", "home"),
    [
        ("main.DataModuleFromConfig", "ldm.compvis.main"),
        ("main.ImageLogger", "ldm.compvis.main"),
        ("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "ldm.compvis.losses"),
        ("taming.modules.vqvae.quantize.VectorQuantizer2", "ldm.models.quantize"),
        ("taming.modules.discriminator.model.NLayerDiscriminator", "ldm.models.discriminator"),
        ("ldm.modules.losses.LPIPSWithDiscriminator", "ldm.compvis.losses"),
        ("ldm.modules.losses.contperceptual.DummyLoss", "ldm.compvis.losses"),
        ("ldm.models.autoencoder.VQModel", "ldm.models.vq_autoencoder"),
        ("ldm.models.autoencoder.VQModelInterface", "ldm.models.vq_autoencoder"),
        ("ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.unet"),
        ("ldm.lr_scheduler.LambdaLinearScheduler", "ldm.compvis.lr_scheduler"),
        ("ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "ldm.compvis.lr_scheduler"),
    ],
)
def test_targets_resolve(target, home):
    assert get_obj_from_str(target).__module__ == home


def test_main_and_taming_do_not_become_modules():
    get_obj_from_str("main.ImageLogger")
    get_obj_from_str("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator")
    assert "main" not in sys.modules and "taming" not in sys.modules


def test_a_main_of_the_program_s_own_goes_first(monkeypatch):
    main = ModuleType("main")

    class ImageLogger(torch.nn.Module):
        pass

    main.ImageLogger = ImageLogger
    monkeypatch.setitem(sys.modules, "main", main)
    assert get_obj_from_str("main.ImageLogger") is ImageLogger


@pytest.mark.parametrize(
    "target",
    [
        "main.torch",
        "main.Path",
        "main.instantiate_from_config",
        "main.DataLoader",
        "main.nonsense",
        "main",
        "taming.modules.losses.lpips.LPIPS",  # a function here
        "taming.modules.losses.vqperceptual.nn",
        "taming.anything.Else",
        "ldm.util.Image",
        "ldm.util.parallel_data_prefetch",
        "ldm.models.diffusion.ddim.partial",
        "ldm.modules.diffusionmodules.openaimodel.th",
        "ldm.modules.diffusionmodules.util.GroupNorm32",  # torch's
        "ldm.models.diffusion.ddpm.LambdaLR",
        "ldm.legacy_paths.import_module",
        "ldm.legacy_paths.ModuleSpec",
        "ldm.modules.os.system",
        "ldm.modules.losses.__class__",
    ],
)
def test_old_names_open_nothing_else(target):
    refused("^target ", get_obj_from_str, target)


# Every `target:` of the yamls of latent-diffusion, stable-diffusion and stablediffusion, and of forks that add to them.
DDPM, ENCODERS = "ldm.models.diffusion.ddpm", "ldm.modules.encoders.modules"
NAMED = {
    DDPM: "LatentDiffusion LatentInpaintDiffusion LatentDepth2ImageDiffusion LatentUpscaleDiffusion "
    "ImageEmbeddingConditionedLatentDiffusion",
    "ldm.modules.diffusionmodules.openaimodel": "UNetModel",
    "ldm.models.autoencoder": "AutoencoderKL VQModelInterface VQModel",
    "torch.nn": "Identity",
    "ldm.modules.losses": "LPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual": "VQLPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual": "DummyLoss",
    ENCODERS: "ClassEmbedder BERTEmbedder SpatialRescaler FrozenCLIPEmbedder FrozenOpenCLIPEmbedder "
    "FrozenOpenCLIPImageEmbedder ClipImageEmbedder CLIPEmbeddingNoiseAugmentation",
    "ldm.modules.diffusionmodules.upscaling": "ImageConcatWithNoiseAugmentation",
    "ldm.modules.midas.api": "MiDaSInference",
    "ldm.lr_scheduler": "LambdaLinearScheduler LambdaWarmUpCosineScheduler",
    "main": "DataModuleFromConfig ImageLogger",
    "torchvision.transforms": "Resize RandomCrop CenterCrop",
    "ldm.data.imagenet": "ImageNetTrain ImageNetValidation ImageNetSRTrain ImageNetSRValidation",
    "ldm.data.lsun": "LSUNChurchesTrain LSUNChurchesValidation LSUNBedroomsTrain LSUNBedroomsValidation",
    "ldm.data.openimages": "FullOpenImagesTrain",
    "ldm.data.faceshq": "CelebAHQTrain CelebAHQValidation FFHQTrain FFHQValidation",
    "ldm.data.landscapes": "RFWTrain",
    "ldm.data.previews": "PreviewsTrain",
    "ldm.data.laion": "WebDataModuleFromConfig",
    "ldm.data.personalized": "PersonalizedBase",
    "ldm.data.personalized_style": "PersonalizedBase",
    "ldm.modules.embedding_manager": "EmbeddingManager",
}


def test_every_target_of_a_yaml_resolves_or_is_on_the_list():
    text = DOCS.read_text()
    unsupported = text.partition("## What is not here")[2]
    resolved = []
    for module, names in NAMED.items():
        for name in names.split():
            try:
                get_obj_from_str(f"{module}.{name}")
                resolved.append(name)
            except ValueError:
                assert f"`{name}`" in unsupported or f"`{module}`" in unsupported, f"{module}.{name}"
    assert len(resolved) >= 17 and "LatentDiffusion" in resolved and "ImageLogger" in resolved
