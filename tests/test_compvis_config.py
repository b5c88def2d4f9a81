"""CompVis's yamls -> our configurations, against what the weights themselves say; the yamls that we ship."""

import copy
from pathlib import Path

import pytest
import torch
from golden_fill import published_shapes
from meta_models import built, on_meta
from omegaconf import OmegaConf

from ldm.checkpoint.compvis import normalise
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.families import recognise

CONFIGS = Path(__file__).parents[1] / "configs" / "stable-diffusion"
SHIPPED = ("v1-inference", "v1-inpainting-inference", "v2-inference", "v2-inference-v", "v2-inpainting-inference")
DDPM = "ldm.models.diffusion.ddpm"
ENCODERS = "ldm.modules.encoders.modules"
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def ddconfig(**changes) -> dict:
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    return sizes | {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0} | changes


KL_F8 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        **{"embed_dim": 4, "monitor": "val/rec_loss", "ckpt_path": "models/first_stage_models/kl-f8/model.ckpt"},
        **{"ddconfig": ddconfig(), "lossconfig": {"target": "torch.nn.Identity"}},
    },
}


def vq_f4(**changes) -> dict:
    params = {"embed_dim": 3, "n_embed": 8192, "lossconfig": {"target": "torch.nn.Identity"}}
    params["ddconfig"] = ddconfig(double_z=False, z_channels=3, ch_mult=[1, 2, 4]) | changes
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def unet(channels: int, out: int, width: int, mult: list[int], attention: list[int], **others) -> dict:
    sizes = {"image_size": 64, "in_channels": channels, "out_channels": out, "model_channels": width}
    levels = {"channel_mult": mult, "attention_resolutions": attention, "num_res_blocks": 2}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": sizes | levels | others}


def cross(context_dim: int, depth: int = 1) -> dict:
    return {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": context_dim}


def sd_unet(context_dim: int, **others) -> dict:
    heads = {} if "num_head_channels" in others else {"num_heads": 8}
    both = {"use_checkpoint": True, "legacy": False} | heads | cross(context_dim) | others
    return unet(both.pop("in_channels", 4), 4, 320, [1, 2, 4, 4], [4, 2, 1], **both)


def model(
    start: float, end: float, unet: dict, first_stage: dict, cond, target: str = f"{DDPM}.LatentDiffusion", **more
):
    """A yaml with the parameters that all of CompVis's have."""
    params = {
        **{"linear_start": start, "linear_end": end, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000},
        **{"image_size": 64, "channels": 4, "monitor": "val/loss_simple_ema", "first_stage_key": "image"},
        **{"unet_config": unet, "first_stage_config": first_stage, "cond_stage_config": cond},
    }
    section = {"base_learning_rate": 1e-4, "target": target, "params": params | more}
    return {"model": section, "data": {"target": "main.X"}}


LINEAR = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"warm_up_steps": [10000]}}
SCHEDULED, V = {"scheduler_config": LINEAR}, {"parameterization": "v"}
SD = {"scale_factor": 0.18215, "conditioning_key": "crossattn", "cond_stage_key": "txt", "use_ema": False}
HYBRID = SD | {"target": f"{DDPM}.LatentInpaintDiffusion", "conditioning_key": "hybrid", "finetune_keys": None}
CLIP = {"target": f"{ENCODERS}.FrozenCLIPEmbedder"}
OPENCLIP = {"target": f"{ENCODERS}.FrozenOpenCLIPEmbedder", "params": {"freeze": True, "layer": "penultimate"}}
SD2 = {"num_head_channels": 64, "use_linear_in_transformer": True, "use_fp16": True}
BERT = f"{ENCODERS}.BERTEmbedder"

NO_COND = "__is_unconditional__"
CLASSES = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"}}
BERT_LARGE = {"target": BERT, "params": {"n_embed": 1280, "n_layer": 32}}
BOXES = {"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}
RESCALER = {"target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 2, "in_channels": 182, "out_channels": 3}}
PIX2PIX = SD | {"conditioning_key": "hybrid", "cond_stage_key": "edit", "load_ema": True}
PIX2PIX["target"] = "ldm.models.diffusion.ddpm_edit.LatentDiffusion"
CHURCHES = {"num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True}
LAYOUT = {"conditioning_key": "crossattn", "cond_stage_key": "coordinates_bbox"}
LAYOUT["target"] = f"{DDPM}.Layout2ImgDiffusion"

# The facts of the yamls that were published beside the weights: (betas from, to, UNet, first stage, conditioner), what
# else they set, and the key file's name of the weights.
FACTS = {
    "v1-inference": ((0.00085, 0.0120, sd_unet(768, image_size=32), KL_F8, CLIP), SD | SCHEDULED, "sd-v1"),
    "v1-inpainting": ((0.00085, 0.0120, sd_unet(768, in_channels=9), KL_F8, CLIP), HYBRID, "sd-v1"),
    "instruct-pix2pix": ((0.00085, 0.0120, sd_unet(768, in_channels=8), KL_F8, CLIP), PIX2PIX, "sd-v1"),
    "v2-inference": ((0.00085, 0.0120, sd_unet(1024, **SD2), KL_F8, OPENCLIP), SD, "sd-v2"),
    "v2-inference-v": ((0.00085, 0.0120, sd_unet(1024, **SD2), KL_F8, OPENCLIP), SD | V, "sd-v2-v"),
    "v2-inpainting": ((0.00085, 0.0120, sd_unet(1024, in_channels=9, **SD2), KL_F8, OPENCLIP), HYBRID, "sd-v2"),
    "txt2img-1p4B": (
        (0.00085, 0.012, sd_unet(1280), KL_F8, BERT_LARGE),
        SD | {"image_size": 32, "cond_stage_trainable": True, "cond_stage_key": "caption"},
        "ldm-text2img-large",
    ),
    "cin256-v2": (
        (0.0015, 0.0195, unet(3, 3, 192, [1, 2, 3, 5], [8, 4, 2], num_heads=1, **cross(512)), vq_f4(), CLASSES),
        {"channels": 3, "conditioning_key": "crossattn", "cond_stage_key": "class_label"},
        "ldm-cin256-v2",
    ),
    "celebahq-ldm-vq-4": (
        (0.0015, 0.0195, unet(3, 3, 224, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32), vq_f4(), NO_COND),
        {},
        "ldm-celebahq-vq4",
    ),
    "lsun_churches-ldm-kl-8": (
        (0.0015, 0.0155, unet(4, 4, 192, [1, 2, 2, 4, 4], [1, 2, 4, 8], **CHURCHES), KL_F8, NO_COND),
        {"loss_type": "l1", "image_size": 32, "cond_stage_key": "image", "concat_mode": False, "scale_by_std": True},
        "ldm-lsun-churches-kl8",
    ),
    "inpainting_big": (
        (
            *(0.0015, 0.0205, unet(7, 3, 256, [1, 2, 3, 4], [8, 4, 2], num_heads=8, resblock_updown=True)),
            *(vq_f4(attn_type="none"), "__is_first_stage__"),
        ),
        {
            **{"loss_type": "l1", "cond_stage_key": "masked_image", "concat_mode": True, "monitor": "val/loss"},
            "scheduler_config": {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler"},
        },
        "ldm-inpainting-big",
    ),
    "layout2img-openimages256": (
        (
            *(0.0015, 0.0205, unet(3, 3, 128, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32, **cross(512, depth=3))),
            *(vq_f4(), {"target": BERT, "params": BOXES}),
        ),
        LAYOUT,
        "ldm-layout2img",
    ),
    "semantic_synthesis": (
        (0.0015, 0.0205, unet(6, 3, 128, [1, 4, 8], [32, 16, 8], num_heads=8), vq_f4(), RESCALER),
        {"concat_mode": True, "cond_stage_trainable": True, "cond_stage_key": "segmentation"},
        "ldm-semantic-synthesis256",
    ),
    "bsr_sr": (
        (
            *(0.0015, 0.0155, unet(6, 3, 160, [1, 2, 2, 4], [16, 8], num_head_channels=32), vq_f4()),
            {"target": "torch.nn.Identity"},
        ),
        {"concat_mode": True, "cond_stage_key": "LR_image"},
        "ldm-bsr-sr",
    ),
}
YAMLS = {name: (model(*copy.deepcopy(own), **copy.deepcopy(more)), file) for name, (own, more, file) in FACTS.items()}
# Where the weights do not show all: the measured scale factor is a tensor in the file.
DIFFERENCES = {"lsun_churches-ldm-kl-8": {"scale_factor": 1.0}}


def weights(name: str) -> tuple[dict, dict]:
    """(tensors on meta, the header) of the published model that the yaml of that name is for."""
    state = on_meta(published_shapes(YAMLS[name][1]))
    channels = YAMLS[name][0]["model"]["params"]["unet_config"]["params"]["in_channels"]
    if "sd-" in YAMLS[name][1]:
        state[FIRST_LAYER] = torch.empty(320, channels, 3, 3, device="meta")
    prediction = YAMLS[name][0]["model"]["params"].get("parameterization", "eps")
    return state, {"modelspec.prediction_type": {"eps": "epsilon"}.get(prediction, prediction)}


def comparable(params: dict) -> dict:
    """What of a configuration decides the images; some settings can be written in two ways, or have no effect."""
    params = copy.deepcopy(params)
    unet = params["unet_config"]["params"]
    factors = range(len(unet["channel_mult"]))
    unet["attention_resolutions"] = sorted(2**i for i in factors if 2**i in unet["attention_resolutions"])
    for name in ("image_size", "use_checkpoint", "use_fp16"):
        unet.pop(name, None)
    if params["cond_stage_config"] is not None and params["cond_stage_config"]["target"].endswith("TextEncoder"):
        for name in ("vocab_size", "context_length", "projection_dim"):  # the defaults, read from the weights
            params["cond_stage_config"]["params"].pop(name, None)
    if params["cond_stage_config"] is not None and params["cond_stage_config"]["target"].endswith("BERTEncoder"):
        encoder = params["cond_stage_config"]
        encoder["params"] = {"vocab_size": 30522, "max_seq_len": 77} | encoder["params"]
    return params


@pytest.mark.parametrize("name", YAMLS)
def test_compvis_yamls_say_what_the_weights_say(name):
    yaml, _ = YAMLS[name]
    state, header = weights(name)
    config = from_compvis(yaml)
    recognised = recognise(state, header).config
    assert config["target"] == recognised["target"]
    assert comparable(config["params"]) == comparable(recognised["params"]) | DIFFERENCES.get(name, {})
    assert built(config) == {n: tuple(t.shape) for n, t in normalise(state)[0].items()}
    assert from_compvis(yaml["model"]) == config == from_compvis(config)  # the section alone; ours stays


@pytest.mark.parametrize("file", SHIPPED)
def test_the_yamls_that_we_ship(file):
    path = CONFIGS / f"{file}.yaml"
    config = from_compvis(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    yaml = file.replace("inpainting-inference", "inpainting")
    assert comparable(config["params"]) == comparable(from_compvis(YAMLS[yaml][0])["params"])
    head = path.read_text().partition("model:")[0]
    assert "licence" in head and all(line.startswith("#") for line in head.splitlines())
    assert {path.stem for path in CONFIGS.iterdir()} == set(SHIPPED)


@pytest.mark.parametrize("prefix", ["kl", "vq"])
def test_an_autoencoder_s_own_yaml(prefix):
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 50001}}
    section = copy.deepcopy(KL_F8 if prefix == "kl" else vq_f4())
    section["params"]["lossconfig"] = loss
    if prefix == "vq":
        section["target"] = "ldm.models.autoencoder.VQModel"
    config = from_compvis({"model": {"base_learning_rate": 4.5e-6} | section})
    assert config == recognise(on_meta(published_shapes("kl-f8" if prefix == "kl" else "vq-f4"))).config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta_schedule": "linear"}, {"name": "scaled_linear", "start": 0.001, "end": 0.02, "T": 1000}),
        ({"beta_schedule": "sqrt_linear"}, {"name": "linear", "start": 0.001, "end": 0.02, "T": 1000}),
        ({"beta_schedule": "sqrt", "timesteps": 50}, {"name": "sqrt", "start": 0.001, "end": 0.02, "T": 50}),
        ({"beta_schedule": "cosine", "cosine_s": 8e-3}, {"name": "cosine", "T": 1000}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"name": "cosine", "T": 1000}),
    ],
)
def test_schedules_have_other_names(settings, expected):
    yaml = model(0.001, 0.02, sd_unet(768), KL_F8, CLIP, **SD | settings)
    assert from_compvis(yaml)["params"]["schedule"] == expected


def test_what_a_yaml_leaves_out_is_compvis_s_default():
    yaml = model(0.001, 0.02, sd_unet(768), KL_F8, CLIP)
    for name in ("linear_start", "linear_end", "timesteps", "image_size"):
        del yaml["model"]["params"][name]
    params = from_compvis(yaml)["params"]
    assert params["schedule"] == {"name": "scaled_linear", "start": 1e-4, "end": 2e-2, "T": 1000}
    assert (params["prediction"], params["scale_factor"]) == ("eps", 1.0)


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ({"version": "openai/clip-vit-large-patch14", "device": "cuda", "max_length": 77}, (768, 12, 12, "last", None)),
        ({"version": "/somewhere/clip-vit-base-patch32"}, (512, 12, 8, "last", None)),
        ({"layer": "hidden", "layer_idx": 11}, (768, 12, 12, "hidden", 11)),
        ({"arch": "ViT-H-14", "version": "laion2b_s32b_b79k"}, (1024, 24, 16, "last", None)),
        ({"arch": "ViT-L-14", "layer": "penultimate"}, (768, 12, 12, "penultimate", None)),
    ],
)
def test_text_encoders(encoder, expected):
    name = "FrozenOpenCLIPEmbedder" if "arch" in encoder else "FrozenCLIPEmbedder"
    cond = {"target": f"{ENCODERS}.{name}", "params": encoder}
    params = from_compvis(model(0.001, 0.02, sd_unet(768), KL_F8, cond, **SD))["params"]["cond_stage_config"]["params"]
    assert tuple(params.get(key) for key in ("width", "layers", "heads", "layer", "layer_index")) == expected
    assert params["activation"] == ("gelu" if "arch" in encoder else "quick_gelu")


def changed(path: str, value) -> dict:
    """v1-inference.yaml with one entry changed, or taken out (None)."""
    yaml = copy.deepcopy(YAMLS["v1-inference"][0])
    *parents, last = path.split(".")
    node = yaml
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    if value is None:
        del node[last]
    return yaml


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", None, "names no model"),
        ("model.target", None, "names no model"),
        ("model.target", "cldm.cldm.ControlLDM", "the model's target 'cldm.cldm.ControlLDM' is not supported"),
        ("model.target", f"{DDPM}.LatentDepth2ImageDiffusion", "target '.*Depth2ImageDiffusion' is not supported"),
        ("model.target", "os.system", "target 'os.system' is not supported"),
        ("model.target", ["a", "list"], "target .* is not supported"),
        ("model.params.linaer_start", 1, "LatentDiffusion's parameters linaer_start are not known"),
        ("model.params.unet_config", None, "LatentDiffusion lacks its parameters unet_config"),
        ("model.params.unet_config.target", "os.system", "the UNet's target 'os.system' is not supported"),
        ("model.params.unet_config.params.heads", 1, "UNetModel's parameters heads are not known"),
        ("model.params.unet_config.params.model_channels", None, "UNetModel lacks its parameters model_channels"),
        ("model.params.unet_config.params.in_channels", 7, "takes 3 channels beside 4 noised latents"),
        ("model.params.first_stage_config.target", "ldm.models.autoencoder.IdentityFirstStage", "Identity.* is not"),
        ("model.params.first_stage_config.params.embedding", 4, "the first stage's parameters embedding are not known"),
        ("model.params.first_stage_config.params.embed_dim", None, "the first stage lacks its parameters embed_dim"),
        ("model.params.first_stage_config.params.ddconfig.attn", 1, "ddconfig's parameters attn are not known"),
        ("model.params.cond_stage_config.target", f"{ENCODERS}.FrozenT5Embedder", "conditioner's target .*T5.* is not"),
        ("model.params.cond_stage_config", "__is_something__", "conditioner's target '__is_something__' is not"),
        ("model.params.cond_stage_config", {"target": "torch.nn.Identity"}, "embeddings from outside"),
        ("model.params.cond_stage_config.params.version", "google/t5", "version 'google/t5' is unknown"),
        ("model.params.cond_stage_config.params.max_length", 60, "max_length 60"),
        ("model.params.cond_stage_config.params.layer", "pooled", "layer 'pooled' has no counterpart"),
        ("model.params.conditioning_key", "crossattn-adm", "conditioning_key 'crossattn-adm' has no counterpart"),
        ("model.params.parameterization", "noise", "parameterization 'noise' is unknown"),
        ("model.params.beta_schedule", "quadratic", "beta_schedule 'quadratic' is unknown"),
        ("model.params.given_betas", [0.1, 0.2], "given_betas"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_is_named(path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_compvis(changed(path, value))
    assert "\n" not in str(caught.value)
