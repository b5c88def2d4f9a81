"""The maps of names: there and back over all of Stable Diffusion 1 and 2, and against diffusers' own networks."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from conftest import randomised, refused
from tiny_stable_diffusion import LINEAR, UNET, VAE
from torch import Tensor

from ldm.checkpoint import diffusers_names as names
from ldm.checkpoint.diffusers_config import read_unet, read_vae, unet_levels
from ldm.checkpoint.diffusers_names import UNetLevel
from ldm.checkpoint.diffusers_writer import write_unet, write_vae
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNetModel

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "state_dict_keys.json.gz").read_bytes()))
SD_LEVELS = [UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, False)]
# The parts of the published configurations (stable-diffusion-v1-5, stable-diffusion-2-1) that are not defaults
SD1_UNET = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
SD2_UNET = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TINY_UNET = UNET | {"attention_resolutions": [1, 2], "channel_mult": [1, 2], "context_dim": 24}
UNETS = {
    "one level": {"channel_mult": [1], "attention_resolutions": [1]},
    "attention in the middle alone": {"attention_resolutions": []},
    "attention below": {"attention_resolutions": [4], "channel_mult": [1, 1, 2]},
    "attention above": {"attention_resolutions": [1, 2], "channel_mult": [1, 2, 2, 4], "num_res_blocks": 3},
    "unlike levels": {"num_res_blocks": [1, 3, 2], "channel_mult": [1, 2, 3], "transformer_depth": [1, 2, 3]},
    "deep and linear": LINEAR | {"transformer_depth": 2},
    "inpainting": {"in_channels": 9},
    "scale and shift": {"use_scale_shift_norm": True, "dropout": 0.1},
    "first attention to the text too": {"disable_self_attentions": [True, False]},
}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def golden(model: str, prefix: str) -> dict[str, Tensor]:
    """Meta tensors of one network of the key file."""
    return {
        name.removeprefix(prefix): torch.empty(shape, device="meta")
        for name, shape in GOLDEN[model].items()
        if name.startswith(prefix)
    }


def text_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """transformers' own, under the names that every version reads."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        own = shapes(CLIPTextModel(CLIPTextConfig(**config)).state_dict())
    own = {name: shape for name, shape in own.items() if not name.endswith("position_ids")}
    return {"text_model." + name.removeprefix("text_model."): shape for name, shape in own.items()}


@pytest.mark.parametrize(("model", "config"), [("sd-v1", SD1_UNET), ("sd-v2", SD2_UNET), ("sd-v2-v", SD2_UNET)])
def test_unets_of_stable_diffusion(model, config):
    from diffusers import UNet2DConditionModel

    ours = golden(model, "model.diffusion_model.")
    assert len(ours) == 686
    theirs = names.unet_to_diffusers(ours, SD_LEVELS)
    with torch.device("meta"):
        assert shapes(theirs) == shapes(UNet2DConditionModel(**config).state_dict())
        assert shapes(ours) == shapes(UNetModel(**read_unet(config)).state_dict())
    assert unet_levels(read_unet(config)) == SD_LEVELS
    back = names.unet_from_diffusers(theirs)
    assert back.keys() == ours.keys() and all(back[name] is ours[name] for name in ours)


@pytest.mark.parametrize("model", ["sd-v1", "sd-v2"])
def test_autoencoders_of_stable_diffusion(model):
    from diffusers import AutoencoderKL as Theirs

    ours = golden(model, "first_stage_model.")
    assert len(ours) == 248
    theirs = names.vae_to_diffusers(ours, levels=4, blocks=2)
    with torch.device("meta"):
        assert shapes(theirs) == shapes(Theirs(**SD_VAE).state_dict())
        assert shapes(ours) == shapes(AutoencoderKL(**read_vae(SD_VAE)[0]).state_dict())
    assert shapes(names.vae_from_diffusers(theirs)) == shapes(ours)


def test_the_text_encoder_of_stable_diffusion_1():
    ours = golden("sd-v1", "cond_stage_model.transformer.")
    position_ids = ours.pop("text_model.embeddings.position_ids")
    theirs = names.clip_to_transformers(ours, layers=12)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    assert shapes(theirs) == text_shapes(sizes)
    flat = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    for written in (theirs, flat):  # by transformers before 5.6, and from then on
        old = written | {next(iter(written)).partition("embeddings.")[0] + "embeddings.position_ids": position_ids}
        back = names.clip_from_transformers(old)
        assert back.keys() == ours.keys() and all(back[name] is ours[name] for name in ours)


def test_the_text_encoder_of_stable_diffusion_2():
    ours = golden("sd-v2", "cond_stage_model.model.")
    theirs = names.openclip_to_transformers(ours, layers=23)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    assert shapes(theirs) == text_shapes(sizes)
    assert shapes(names.openclip_from_transformers(theirs, layers=24)) == shapes(ours)


def test_openclip_there_and_back_is_exact_for_what_is_used():
    """And the last block, which is not, is a copy of the one before in memory of its own."""
    from ldm.models.clip import OpenCLIPTextModel

    torch.manual_seed(0)
    ours = OpenCLIPTextModel(99, width=32, layers=4, heads=2, context_length=16, activation="gelu").state_dict()
    theirs = names.openclip_to_transformers(ours, layers=3)
    q, k, v = (theirs[f"text_model.encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(torch.cat([q, k, v]), ours["transformer.resblocks.1.attn.in_proj_weight"])
    back = names.openclip_from_transformers(theirs, layers=4)
    assert shapes(back) == shapes(ours)
    made_up = {"text_projection", "logit_scale"}
    for name, tensor in back.items():
        if name.startswith("transformer.resblocks.3."):
            source = ours[name.replace("resblocks.3", "resblocks.2")]
            assert torch.equal(tensor, source) and tensor.data_ptr() != source.data_ptr()
        elif name not in made_up:
            assert torch.equal(tensor, ours[name]), name
    assert torch.equal(back["text_projection"], torch.eye(32)) and back["logit_scale"] == 0
    complete = names.openclip_from_transformers(names.openclip_to_transformers(ours, layers=4), layers=4)
    assert all(torch.equal(complete[name], ours[name]) for name in ours.keys() - made_up)


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS)
@torch.no_grad()
def test_unets_of_any_structure(changes):
    """Names, shapes, configuration and numbers against the network that diffusers builds from what we write."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    params = TINY_UNET | changes
    config, levels = write_unet(params, sample_size=8), unet_levels(params)
    ours, theirs = randomised(UNetModel(**params)).eval(), UNet2DConditionModel(**config).eval()
    state = ours.state_dict()
    mapped = names.unet_to_diffusers(state, levels)
    assert shapes(mapped) == shapes(theirs.state_dict())
    back = names.unet_from_diffusers(mapped)
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)
    assert unet_levels(read_unet(config)) == levels
    theirs.load_state_dict(mapped)
    again = UNetModel(**read_unet(config)).eval()
    again.load_state_dict(state)
    x, t, context = torch.randn(2, params["in_channels"], 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    expected = ours(x, t, context)
    # two sums of the same hundreds of float32 products
    torch.testing.assert_close(theirs(x, t, context).sample, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(again(x, t, context), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"num_classes": 7}, {"num_class_embeds": 7}),
        (
            {"num_classes": "sequential", "adm_in_channels": 5},
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
        ),
        (
            {"num_classes": "continuous"},
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 1},
        ),
    ],
    ids=["classes", "vector", "number"],
)
def test_class_embeddings(ours, theirs):
    from diffusers import UNet2DConditionModel

    config, levels = write_unet(TINY_UNET, sample_size=8), unet_levels(TINY_UNET)
    with torch.device("meta"):
        state = UNetModel(**TINY_UNET, **ours).state_dict()
        expected = UNet2DConditionModel(**config, **theirs).state_dict()
    mapped = names.unet_to_diffusers(state, levels)
    assert shapes(mapped) == shapes(expected)
    assert names.unet_from_diffusers(mapped).keys() == state.keys()


@pytest.mark.parametrize(
    "changes",
    [{}, {"attn_resolutions": [16, 4]}, {"ch_mult": [1], "num_res_blocks": 3}, {"attn_type": "none", "out_ch": 1}],
    ids=["plain", "attention", "one level", "no attention"],
)
@torch.no_grad()
def test_autoencoders_of_any_structure(changes):
    from diffusers import AutoencoderKL as Theirs

    ddconfig = VAE["ddconfig"] | {"z_channels": 3, "resolution": 16, "ch_mult": [1, 2, 4]}
    params = {"embed_dim": 3, "ddconfig": ddconfig | changes}
    config = write_vae(params, scale_factor=0.5, sample_size=16)
    own, scale_factor = read_vae(config)
    torch.manual_seed(0)
    ours, again, theirs = AutoencoderKL(**params), AutoencoderKL(**own), Theirs(**config)
    state = ours.state_dict()
    sizes = {"levels": len(params["ddconfig"]["ch_mult"]), "blocks": params["ddconfig"]["num_res_blocks"]}
    mapped = names.vae_to_diffusers(state, **sizes)
    assert scale_factor == 0.5 and shapes(mapped) == shapes(theirs.state_dict())
    theirs.load_state_dict(mapped)
    again.load_state_dict(names.vae_from_diffusers(mapped))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(theirs.encode(x).latent_dist.mode(), ours.encode(x).mode(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(z).sample, ours.decode(z), atol=1e-5, rtol=1e-5)
    assert torch.equal(again.decode(z), ours.decode(z))


def test_an_autoencoder_under_the_names_before_diffusers_0_17():
    theirs = names.vae_to_diffusers(golden("sd-v1", "first_stage_model."), levels=4, blocks=2)
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in theirs.items():
        for after, before in new.items():
            name = name.replace(after, before)
        old[name] = tensor
    assert sum("query" in name or "proj_attn" in name for name in old) == 8
    back = names.vae_from_diffusers(old)
    assert shapes(back) == shapes(golden("sd-v1", "first_stage_model."))


def test_attention_of_the_autoencoder_in_either_rank_and_on_both_sides():
    conv, linear = torch.randn(4, 4, 1, 1), torch.randn(4, 4)
    ours, theirs = "encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"
    for tensor in (conv, linear):
        there = names.vae_to_diffusers({ours: tensor}, 1, 1)[theirs]
        back = names.vae_from_diffusers({theirs: tensor})[ours]
        assert there.shape == (4, 4) and back.shape == (4, 4, 1, 1)
        assert there.data_ptr() == back.data_ptr() == tensor.data_ptr()  # views
        assert torch.equal(there, tensor.reshape(4, 4)) and torch.equal(back, tensor.reshape(4, 4, 1, 1))


def test_names_without_a_place_are_listed():
    state = {"conv_in.weight": torch.zeros(1), "add_embedding.x.weight": torch.zeros(1), "x": torch.zeros(1)}
    refused("UNet has 2 unexpected weights: add_embedding.x.weight, x$", names.unet_from_diffusers, state)
    attention = "encoder.mid_block.attentions.0."  # under its old and its new name at once
    with pytest.raises(ValueError, match=f"autoencoder has 1 unexpected weights: {attention}query.bias$"):
        names.vae_from_diffusers({attention + "to_q.bias": torch.zeros(1), attention + "query.bias": torch.zeros(1)})
    state = {f"encoder.layers.0.self_attn.{part}_proj.weight": torch.zeros(1, 1) for part in "qv"}
    refused("not all three of .*k_proj.weight", names.openclip_from_transformers, state, layers=1)


def test_heads_are_a_number_or_a_width():
    config = write_unet(TINY_UNET | {"channel_mult": [1, 2, 2]}, sample_size=8)
    for heads, expected in (
        (4, {"num_heads": 4}),
        ([4, 4, 4], {"num_heads": 4}),
        ([2, 4, 4], {"num_head_channels": 8}),
        ([2, 9, 4], None),
    ):
        if expected is None:
            refused("one number of heads, or one width of a head", read_unet, config | {"attention_head_dim": heads})
        else:
            params = read_unet(config | {"attention_head_dim": heads})
            assert {key: value for key, value in params.items() if "head" in key} == expected
    # no level has attention, but the middle, of the last level's width, has
    with pytest.raises(ValueError, match="num_head_channels 12"):
        write_unet(
            TINY_UNET | {"channel_mult": [1, 2], "attention_resolutions": [], "num_heads": -1, "num_head_channels": 12},
            8,
        )
