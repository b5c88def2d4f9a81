"""Stable Diffusion XL's names and shapes at full size, on the meta device, and what its files hold."""

from functools import cache

import pytest
import torch
from conftest import refused
from golden_fill import published_shapes, shapes
from meta_models import built, on_meta
from torch import Tensor

from ldm.checkpoint.compvis import normalise, single_file
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.diffusers_writer import write_pipeline
from ldm.checkpoint.families import recognise
from ldm.checkpoint.xl import BASE_SIZES, REFINER_SIZES
from ldm.conditioning.text import TextEncoder
from ldm.models.unet import UNetModel

UNET, TEXT = "model.diffusion_model.", "conditioner.embedders."
CLIP = ("transformers", 768, 12, 12, "quick_gelu")
BIGG = ("openclip", 1280, 32, 20, "gelu")


def count(sizes: dict[str, tuple[int, ...]], prefix: str) -> tuple[int, int]:
    """How many parameters, in how many tensors."""
    found = [torch.Size(shape).numel() for name, shape in sizes.items() if name.startswith(prefix)]
    return sum(found), len(found)


REFINER_UNET = {"model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4, "context_dim": 1280}


@cache
def base() -> dict[str, tuple[int, ...]]:
    """The names and shapes of sd_xl_base_1.0.safetensors, after generative-models' sd_xl_base.yaml."""
    with torch.device("meta"):
        networks = {
            UNET: UNetModel(
                **{"image_size": None, "in_channels": 4, "model_channels": 320, "out_channels": 4, "num_res_blocks": 2},
                **{"attention_resolutions": [4, 2], "channel_mult": [1, 2, 4], "num_head_channels": 64},
                **{"use_spatial_transformer": True, "transformer_depth": [1, 2, 10], "context_dim": 2048},
                **{"num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True},
                legacy=False,
            ),
            f"{TEXT}0.": TextEncoder(*CLIP),
            f"{TEXT}1.": TextEncoder(*BIGG),
        }
    found = {prefix + name: shape for prefix, own in networks.items() for name, shape in shapes(own).items()}
    found[f"{TEXT}0.transformer.text_model.embeddings.position_ids"] = (1, 77)
    vae = "first_stage_model."
    return found | {vae + name: shape for name, shape in published_shapes("sd-v1", vae).items()}


def state(**changes: tuple[int, ...]) -> dict[str, Tensor]:
    return on_meta(base() | changes)


def test_the_base_model_is_recognised():
    assert count(base(), UNET) == (2_567_463_684, 1680) and len(base()) == 2515
    assert count(base(), f"{TEXT}0.") == (123_060_480 + 77, 196 + 1)
    assert count(base(), f"{TEXT}1.") == (694_659_841, 390)
    recognised = recognise(state())
    params = recognised.config["params"]
    assert (recognised.family, recognised.part, params["prediction"]) == ("sdxl", "model", "eps")
    assert params["scale_factor"] == 0.13025
    assert params["schedule"] == {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "T": 1000}
    assert params["defaults"] == {"height": 1024, "width": 1024, "steps": 50, "scale": 5.0}
    first, second = params["cond_stage_config"]["params"]["embedders"]
    assert {"layout": CLIP[0], "heads": 12, "activation": CLIP[-1], "layer": "hidden", "layer_index": -2}.items() <= (
        first.items()
    )
    assert {"layout": BIGG[0], "heads": 20, "activation": "gelu", "pooled": True}.items() <= second.items()
    assert params["unet_config"]["params"]["num_head_channels"] == 64
    clean = {name: tuple(tensor.shape) for name, tensor in normalise(state(**{"denoiser.sigmas": (1000,)}))[0].items()}
    assert built(recognised.config) == clean


def refiner() -> dict[str, Tensor]:
    """The names and shapes of sd_xl_refiner_1.0.safetensors, after generative-models' sd_xl_refiner.yaml."""
    with torch.device("meta"):
        unet = UNetModel(
            **{"image_size": None, "in_channels": 4, "out_channels": 4, "num_res_blocks": 2, "legacy": False},
            **{"attention_resolutions": [4, 2], "num_head_channels": 64, "use_spatial_transformer": True},
            **{"num_classes": "sequential", "adm_in_channels": 2560, "use_linear_in_transformer": True},
            **REFINER_UNET,
        )
    tower = {name.replace("embedders.1.", "embedders.0."): own for name, own in base().items() if f"{TEXT}1." in name}
    vae = {name: own for name, own in base().items() if name.startswith("first_stage_model.")}
    return on_meta({UNET + name: own for name, own in shapes(unet).items()} | tower | vae)


def engine(unet: dict, towers: list[dict], last: str, **more) -> dict:
    """A yaml of generative-models, as its repository has one for the base model and one for the refiner."""
    modules, sizes = "sgm.modules", ("original_size_as_tuple", "crop_coords_top_left", last)
    embedder = {"target": f"{modules}.encoders.modules.ConcatTimestepEmbedderND", "params": {"outdim": 256}}
    models = [{"is_trainable": False, "input_key": "txt", **tower} for tower in towers]
    models += [{"is_trainable": False, "input_key": key, **embedder} for key in sizes]
    ddconfig = {"attn_type": "vanilla-xformers", "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3}
    ddconfig |= {"out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    discrete = f"{modules}.diffusionmodules"
    unet = {"num_classes": "sequential", "use_checkpoint": True, "in_channels": 4, "out_channels": 4} | unet
    unet |= {"attention_resolutions": [4, 2], "num_res_blocks": 2, "num_head_channels": 64}
    unet |= {"use_linear_in_transformer": True, "spatial_transformer_attn_type": "softmax-xformers"}
    denoiser = {
        "num_idx": 1000,
        "scaling_config": {"target": f"{discrete}.denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{discrete}.discretizer.LegacyDDPMDiscretization"},
    }
    params = {
        **{"scale_factor": 0.13025, "disable_first_stage_autocast": True},
        "denoiser_config": {"target": f"{discrete}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": f"{discrete}.openaimodel.UNetModel", "params": unet},
        "conditioner_config": {"target": f"{modules}.GeneralConditioner", "params": {"emb_models": models}},
        "first_stage_config": {
            "target": "sgm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": ddconfig, "lossconfig": {}},
        },
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params | more}}


OPENCLIP = {
    "target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
    "params": {
        **{"arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True, "layer": "penultimate"},
        **{"always_return_pooled": True, "legacy": False},
    },
}
CLIP_L = {
    "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"layer": "hidden", "layer_idx": 11},
}
BASE_UNET = {"adm_in_channels": 2816, "model_channels": 320, "channel_mult": [1, 2, 4], "context_dim": 2048}
YAMLS = {
    "base": engine(
        BASE_UNET | {"transformer_depth": [1, 2, 10], "use_spatial_transformer": True, "legacy": False},
        *([CLIP_L, OPENCLIP], "target_size_as_tuple"),
    ),
    "refiner": engine(
        REFINER_UNET | {"adm_in_channels": 2560, "context_dim": [1280] * 4}, [OPENCLIP], "aesthetic_score"
    ),
}


@pytest.mark.parametrize("which", YAMLS)
def test_generative_models_yamls_say_what_is_recognised(which):
    found = {"base": state, "refiner": refiner}[which]()
    described, recognised = from_compvis(YAMLS[which]), recognise(found).config
    assert built(described) == built(recognised)
    for key in ("schedule", "prediction", "scale_factor", "defaults", "concat"):
        assert described["params"][key] == recognised["params"][key], key
    text, own = (config["params"]["cond_stage_config"]["params"] for config in (described, recognised))
    assert text["sizes"] == own.get("sizes", list(BASE_SIZES))
    assert text.get("zeros_for_empty", True) == own.get("zeros_for_empty", True)
    settings = [[tower.items() for tower in some["embedders"]] for some in (own, text)]
    assert all(first >= second for first, second in zip(*settings, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unknown": 1}, "DiffusionEngine's parameters unknown are not known"),
        ({"denoiser_config": {"target": "sgm.x.Denoiser"}}, "the denoiser Denoiser with None has no counterpart"),
        ({"first_stage_config": {"target": "sgm.x.AutoencodingEngine"}}, "the first stage AutoencodingEngine has no"),
        ({"conditioner_config": {"params": {"emb_models": [{"target": "a.T5"}]}}}, "the conditioner T5 of None has no"),
        ({"conditioner_config": {}}, "the conditioner has no text encoder"),
    ],
)
def test_other_yamls_of_generative_models_are_refused(changes, message):
    yaml = engine(BASE_UNET, [CLIP_L, OPENCLIP], "target_size_as_tuple", **changes)
    refused(message, from_compvis, yaml)


def test_the_refiner_is_recognised():
    found = refiner()
    assert count({name: tensor.shape for name, tensor in found.items()}, UNET) == (2_259_526_660, 1220)
    recognised = recognise(found)
    params = recognised.config["params"]
    assert (recognised.family, recognised.part, params["scale_factor"]) == ("sdxl-refiner", "model", 0.13025)
    assert REFINER_UNET.items() <= params["unet_config"]["params"].items()
    text = params["cond_stage_config"]["params"]
    assert (text["sizes"], text["zeros_for_empty"]) == (["original_size", "crop", "aesthetic_score"], False)
    clean = normalise(found)[0]
    assert built(recognised.config) == {name: tuple(tensor.shape) for name, tensor in clean.items()}
    written, metadata = single_file(clean, recognised.config)
    assert found.keys() <= written.keys() and recognise(written, metadata).config == recognised.config
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-refiner"
    alone = {name.removeprefix(UNET): tensor for name, tensor in found.items() if name.startswith(UNET)}
    assert (recognise(alone).family, recognise(alone).part) == ("sdxl-refiner", "unet")
    del found[f"{TEXT}0.model.text_projection"]  # which is read, so that nothing stands in for it
    assert f"{TEXT}0.model.text_projection".replace("conditioner", "cond_stage_model") not in normalise(found)[0]


def test_the_temperature_may_be_missing():
    """CLIP's, which some programs leave out and nothing reads."""
    found = state()
    whole = normalise(found)[0]
    del found[f"{TEXT}1.model.logit_scale"]
    clean, notes = normalise(found)
    assert clean.keys() == whole.keys() and any("lacks 1 tensors of OpenCLIP that nothing reads" in n for n in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_index": -1}, "text encoder 0 gives other states"),
        ({"layer": "last", "layer_index": None}, "text encoder 0 gives other states"),
        ({"pooled": True}, "the last text encoder alone is pooled"),
        ({}, "2 text encoders with the sizes original_size, crop, aesthetic_score"),
    ],
)
def test_what_other_programs_would_not_see_is_not_written(changes, message, tmp_path):
    clean, config = normalise(state())[0], recognise(state()).config
    text = config["params"]["cond_stage_config"]["params"]
    text["embedders"][0] |= {"layer_index": 11}  # the same, counted from the other end
    single_file(clean, config)
    text["embedders"][0] |= changes
    if not changes:
        text["sizes"] = list(REFINER_SIZES)
    refused(message, single_file, clean, config)
    refused(f"cannot express this model: {message}", write_pipeline, tmp_path / "folder", config, clean)


def test_the_temperature_of_a_whole_clip_is_left_out():
    assert normalise(state(**{f"{TEXT}0.logit_scale": ()}))[0].keys() == normalise(state())[0].keys()


def test_a_file_of_ours_has_the_published_names():
    clean, config = normalise(state())[0], recognise(state()).config
    written, metadata = single_file(clean, config)
    assert {name: tuple(written[name].shape) for name in base()} == base()
    assert normalise(written)[0].keys() == clean.keys()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert recognise(written, metadata).config == config


def test_the_unet_alone_is_recognised():
    alone = {name.removeprefix(UNET): tensor for name, tensor in state().items() if name.startswith(UNET)}
    recognised = recognise(alone)
    assert (recognised.family, recognised.part) == ("sdxl", "unet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UNET}label_emb.0.0.weight": (1280, 1280)}, "takes 1280 numbers .* with 2 text encoders takes 2816"),
        ({f"{TEXT}2.embedding.weight": (10, 1280)}, r"embedders\.\* are not all CLIP text encoders"),
        ({f"{TEXT}5.logits.weight": (10, 1280)}, r"the conditioner has embedders\.5, and no embedders\.2"),
        ({f"{TEXT}2.logits.weight": (10, 1280)}, "the conditioner .*logits.* is unknown"),
    ],
)
def test_other_models_with_its_names_are_refused(changes, message):
    refused(message, recognise, state(**changes))
