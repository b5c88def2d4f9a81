"""Every yaml of latent-diffusion, stable-diffusion and stablediffusion, built on the meta device under CompVis's names:
the names and shapes are those of the published weights. What its files say is from the facts, not from the files."""

import copy
from pathlib import Path

import pytest
from conftest import refused
from golden_fill import published_shapes, shapes
from test_compvis_config import (
    BERT,
    DDPM,
    ENCODERS,
    KL_F8,
    OPENCLIP,
    SD,
    YAMLS,
    cross,
    ddconfig,
    model,
    sd_unet,
    unet,
    vq_f4,
)

from ldm.util import Unfilled, instantiate_from_config

DOCS = Path(__file__).parents[1] / "docs/reference/compvis.md"
KL_LOSS = {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5}
VQ_LOSS = {"disc_conditional": False, "disc_in_channels": 3, "disc_start": 250001, "codebook_weight": 1.0}
LOSSES = {
    "AutoencoderKL": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": KL_LOSS},
    "VQModel": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": VQ_LOSS},
}


def first_stage(kind: str, z: int, mult: list[int], attention: list[int] = (), n: int | None = None, **more) -> dict:
    """An autoencoder's `model` section: AutoencoderKL, VQModel or, as a part of another model, VQModelInterface."""
    own = {} if n is None else {"n_embed": n}
    sizes = {"double_z": n is None, "z_channels": z, "ch_mult": mult, "attn_resolutions": list(attention)}
    params = {"embed_dim": z, "monitor": "val/rec_loss", "ddconfig": ddconfig(**sizes, **more)} | own
    params["lossconfig"] = copy.deepcopy(LOSSES.get(kind, {"target": "torch.nn.Identity"}))
    return {"base_learning_rate": 4.5e-6, "target": f"ldm.models.autoencoder.{kind}", "params": params}


FIRST_STAGES = {
    "kl-f4": first_stage("AutoencoderKL", 3, [1, 2, 4]),
    "kl-f8": first_stage("AutoencoderKL", 4, [1, 2, 4, 4]),
    "kl-f16": first_stage("AutoencoderKL", 16, [1, 1, 2, 2, 4], [16]),
    "kl-f32": first_stage("AutoencoderKL", 64, [1, 1, 2, 2, 4, 4], [16, 8]),
    "vq-f4": first_stage("VQModel", 3, [1, 2, 4], n=8192),
    "vq-f4-noattn": first_stage("VQModel", 3, [1, 2, 4], n=8192, attn_type="none"),
    "vq-f8": first_stage("VQModel", 4, [1, 2, 2, 4], [32], n=16384),
    "vq-f8-n256": first_stage("VQModel", 4, [1, 2, 2, 4], [32], n=256),
    "vq-f16": first_stage("VQModel", 8, [1, 1, 2, 2, 4], [16], n=16384),
}
FULL = {"num_head_channels": 64, "use_linear_in_transformer": True, "use_checkpoint": False}
CLASSES = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"embed_dim": 512, "key": "class_label"}}
CIN_F8 = model(
    *(0.0015, 0.0195, unet(4, 4, 256, [1, 2, 4], [4, 2, 1], num_head_channels=32, **cross(512))),
    first_stage("VQModelInterface", 4, [1, 2, 2, 4], [32], n=16384),
    CLASSES,
    **{"image_size": 32, "cond_stage_key": "class_label", "conditioning_key": "crossattn", "use_ema": False},
)
# Yamls beyond those of test_compvis_config. Those of models whose names are in no key file have None.
MORE = {
    "intel/v2-inference-bf16": (
        model(0.00085, 0.012, sd_unet(1024, **FULL, use_bf16=True), KL_F8, OPENCLIP, **SD),
        "sd-v2",
    ),
    "intel/v2-inference-fp32": (
        model(0.00085, 0.012, sd_unet(1024, **FULL, use_fp16=False), KL_F8, OPENCLIP, **SD),
        "sd-v2",
    ),
    "cin-ldm-vq-f8": (CIN_F8, None),
    "text2img256": (
        model(
            *(0.0015, 0.0195, unet(3, 3, 192, [1, 2, 3, 5], [8, 4, 2], num_head_channels=32, **cross(640)), vq_f4()),
            {"target": BERT, "params": {"n_embed": 640, "n_layer": 32}},
            **{"cond_stage_key": "caption", "conditioning_key": "crossattn", "use_ema": False},
        ),
        None,
    ),
    "768x768": (
        model(
            *(0.0015, 0.015, unet(16, 16, 448, [1, 2, 3, 4], [4, 2, 1], num_head_channels=32, **cross(768))),
            first_stage("AutoencoderKL", 16, [1, 1, 2, 2, 4], [16]),
            {"target": "torch.nn.Identity"},
            **{"cond_stage_key": "nix", "conditioning_key": "crossattn", "scale_factor": 0.22765929, "image_size": 48},
        ),
        None,
    ),
}
UNSUPPORTED = {  # yaml -> the target that has no counterpart
    "v2-midas-inference": "LatentDepth2ImageDiffusion",
    "x4-upscaling": "LatentUpscaleDiffusion",
    "v2-1-stable-unclip-h-inference": "ImageEmbeddingConditionedLatentDiffusion",
    "v2-1-stable-unclip-l-inference": "ImageEmbeddingConditionedLatentDiffusion",
}
# Every yaml of the three repositories with a model in it -> where what it says is tested: in YAMLS, MORE, FIRST_STAGES
# or UNSUPPORTED. Those of one row differ in data, learning rates or folders, not in the model.
FILES = {
    "configs/autoencoder": {
        "autoencoder_kl_64x64x3": "kl-f4",
        "autoencoder_kl_32x32x4": "kl-f8",
        "autoencoder_kl_16x16x16": "kl-f16",
        "autoencoder_kl_8x8x64": "kl-f32",
    },
    "configs/latent-diffusion": {
        "celebahq-ldm-vq-4": "celebahq-ldm-vq-4",
        "ffhq-ldm-vq-4": "celebahq-ldm-vq-4",
        "lsun_bedrooms-ldm-vq-4": "celebahq-ldm-vq-4",
        "lsun_churches-ldm-kl-8": "lsun_churches-ldm-kl-8",
        "cin-ldm-vq-f8": "cin-ldm-vq-f8",
        "cin256-v2": "cin256-v2",
        "txt2img-1p4B-eval": "txt2img-1p4B",
    },
    "configs/retrieval-augmented-diffusion": {"768x768": "768x768"},
    "models/first_stage_models": {name: name for name in FIRST_STAGES},
    "models/ldm": {
        "bsr_sr": "bsr_sr",
        "celeba256": "celebahq-ldm-vq-4",
        "ffhq256": "celebahq-ldm-vq-4",
        "lsun_beds256": "celebahq-ldm-vq-4",
        "lsun_churches256": "lsun_churches-ldm-kl-8",
        "cin256": "cin-ldm-vq-f8",
        "inpainting_big": "inpainting_big",
        "layout2img-openimages256": "layout2img-openimages256",
        "semantic_synthesis256": "semantic_synthesis",
        "semantic_synthesis512": "semantic_synthesis",
        "text2img256": "text2img256",
    },
    "configs/stable-diffusion": {
        "v1-inference": "v1-inference",
        "v2-inference": "v2-inference",
        "v2-inference-v": "v2-inference-v",
        "v2-inpainting-inference": "v2-inpainting",
        **{name: name for name in UNSUPPORTED},
    },
    "configs/stable-diffusion/intel": {
        "v2-inference-bf16": "intel/v2-inference-bf16",
        "v2-inference-fp32": "intel/v2-inference-fp32",
        "v2-inference-v-bf16": "intel/v2-inference-bf16",
        "v2-inference-v-fp32": "intel/v2-inference-fp32",
    },
}


def test_every_yaml_is_tested_or_listed():
    tested = {*YAMLS, *MORE, *FIRST_STAGES}
    found = {name for files in FILES.values() for name in files.values()}
    assert found <= tested | set(UNSUPPORTED) and set(MORE) | set(FIRST_STAGES) | set(UNSUPPORTED) <= found
    counts = {folder: len(files) for folder, files in FILES.items()}
    assert list(counts.values()) == [4, 7, 1, 9, 11, 8, 4]
    latent_diffusion = [name for folder, files in FILES.items() for name in files.values() if "stable" not in folder]
    targets = [(YAMLS | MORE)[name][0]["model"]["target"] for name in latent_diffusion if name not in FIRST_STAGES]
    assert len(targets) == 19  # as the survey of their targets counts them
    unsupported = DOCS.read_text().partition("## What is not here")[2]
    for target in UNSUPPORTED.values():
        assert f"`{target}`" in unsupported
        with pytest.raises(ValueError, match=f"target '{DDPM}.{target}' does not exist"):
            instantiate_from_config({"target": f"{DDPM}.{target}", "params": {}})


def built(section: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes; the weights that a yaml names are not here, and on the meta device nobody looks for them."""
    section = copy.deepcopy(section)
    if "unet_config" in section["params"]:
        section["params"]["ckpt_path"] = "models/ldm/a/model.ckpt"
    with Unfilled():
        return shapes(instantiate_from_config(section))


PUBLISHED = {name: row for name, row in (YAMLS | MORE).items() if row[1] is not None and name != "instruct-pix2pix"}


@pytest.mark.filterwarnings("ignore:no weights of")
@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_names(name):
    yaml, published = PUBLISHED[name]
    section = copy.deepcopy(yaml["model"])
    if name == "cin256-v2":
        section["params"]["use_ema"] = False  # as in its yaml
    theirs = published_shapes(published)
    if "inpainting" in name and "sd-" in published:
        theirs["model.diffusion_model.input_blocks.0.0.weight"] = (320, 9, 3, 3)
    assert built(section) == theirs


@pytest.mark.filterwarnings("ignore:no weights of")
def test_models_of_which_no_key_file_is_here():
    """Their first stages are published ones; their UNets have the sizes that the yamls say."""
    for name, first, unet_in, context in (
        ("cin-ldm-vq-f8", "vq-f8", (256, 4, 3, 3), 512),
        ("text2img256", "vq-f4", (192, 3, 3, 3), 640),
        ("768x768", "kl-f16", (448, 16, 3, 3), 768),
    ):
        found = built(MORE[name][0]["model"])
        prefix = "first_stage_model."
        stage = {key.removeprefix(prefix): shape for key, shape in found.items() if key.startswith(prefix)}
        assert stage == published_shapes(first)
        assert found["model.diffusion_model.input_blocks.0.0.weight"] == unet_in
        keys = [shape for key, shape in found.items() if key.endswith("attn2.to_k.weight")]
        assert keys and all(shape[1] == context for shape in keys)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_have_the_published_names(name):
    if name == "vq-f4-noattn":
        theirs = published_shapes("ldm-inpainting-big", "first_stage_model.")
    elif name == "vq-f8-n256":
        theirs = published_shapes("vq-f8") | {"quantize.embedding.weight": (256, 4)}
    else:
        theirs = published_shapes(name)
    assert built(FIRST_STAGES[name]) == theirs
    loss = FIRST_STAGES[name]["params"]["lossconfig"]
    loss["params"]["perceptual_weight"] = 0.0  # LPIPS is a package of its own
    assert instantiate_from_config(loss).discriminator_iter_start == loss["params"]["disc_start"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("AutoencoderKL", {"ckpt_path": "vae.ckpt"}, "ckpt_path 'vae.ckpt' has no counterpart here"),
        ("AutoencoderKL", {"colorize_nlabels": 3}, "colorize_nlabels 3 has no counterpart"),
        ("VQModel", {"remap": "used.npy"}, "remap 'used.npy' has no counterpart"),
        ("VQModelInterface", {"batch_resize_range": [128, 256]}, "batch_resize_range .* has no counterpart"),
    ],
)
def test_what_an_autoencoder_s_yaml_may_say_besides(kind, settings, message):
    """What only training reads is taken, and what would make another network is refused."""
    n = None if kind == "AutoencoderKL" else 16
    section = first_stage(kind, 4, [1], n=n, ch=32)
    training = {"ckpt_path": None, "ignore_keys": ["loss"], "image_key": "jpg", "colorize_nlabels": None}
    training |= {"ema_decay": 0.999, "learn_logvar": True} if n is None else {"use_ema": True, "lr_g_factor": 2.0}
    plain = built(section)
    section["params"] |= training
    assert built(section) == plain
    section["params"] |= settings
    refused(message, built, section)
