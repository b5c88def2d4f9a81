"""Files without configuration: every published model's names and shapes, models of other sizes, and what is refused."""

import random

import pytest
import torch
from conftest import refused
from golden_fill import published_shapes, shapes
from meta_models import CROSS, DDCONFIG, TINY_1, TINY_2, built, levels, on_meta, tiny
from torch import Tensor

from ldm.checkpoint.compvis import normalise, schedule_buffers, single_file
from ldm.checkpoint.families import recognise
from ldm.checkpoint.networks import CLIP_SETTINGS, OPENCLIP_SETTINGS, PREFIXES
from ldm.checkpoint.structure import infer_conditioner, infer_first_stage, infer_unet
from ldm.models.unet import UNetModel

MODELS = {
    "sd-v1": "sd-v1",
    "sd-v2": "sd-v2-v",
    "sd-v2-v": "sd-v2-v",
    "ldm-text2img-large": "ldm-text2img",
    "ldm-cin256-v2": "ldm-class",
    "ldm-celebahq-vq4": "ldm-unconditional-vq",
    "ldm-lsun-churches-kl8": "ldm-unconditional-kl",
    "ldm-inpainting-big": "ldm-inpainting",
    "ldm-layout2img": "ldm-layout2img",
    "ldm-semantic-synthesis256": "ldm-semantic",
    "ldm-bsr-sr": "ldm-super-resolution",
}
FIRST_STAGES = ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f8", "vq-f16")
UNET = "model.diffusion_model."


def published(model: str) -> dict[str, Tensor]:
    return on_meta(published_shapes(model))


def sizes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_published_model_is_recognised(model):
    state = published(model)
    recognised = recognise(state)
    assert (recognised.family, recognised.part) == (MODELS[model], "model")
    assert built(recognised.config) == sizes_of(normalise(state)[0])


@pytest.mark.parametrize("model", FIRST_STAGES)
def test_every_published_first_stage_is_recognised(model):
    state = published(model)
    recognised = recognise(state)
    assert (recognised.family, recognised.part) == (model, "first_stage")
    assert built(recognised.config) == sizes_of(state)
    inside = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    assert recognise(inside) == recognised and sizes_of(normalise(inside)[0]) == sizes_of(state)
    training = {"loss.logvar": (), "loss.discriminator.main.0.weight": (64, 3, 4, 4), "model_ema.decay": ()}
    assert recognise(state | on_meta(training)) == recognised
    assert sizes_of(normalise(state | on_meta(training))[0]) == sizes_of(state)


@pytest.mark.parametrize(
    ("model", "channels", "family", "concat"),
    [
        ("sd-v1", 9, "sd-v1-inpainting", "mask_latents"),
        ("sd-v2", 9, "sd-v2-inpainting", "mask_latents"),
        ("sd-v1", 8, "sd-v1-pix2pix", "latents"),
    ],
)
def test_more_input_channels(model, channels, family, concat):
    state = published(model) | on_meta({f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)})
    recognised = recognise(state)
    params = recognised.config["params"]
    assert (recognised.family, params["concat"], params["prediction"]) == (family, concat, "eps")
    assert params["defaults"]["height"] == 512
    assert built(recognised.config) == sizes_of(normalise(state)[0])


def test_what_the_weights_do_not_show():
    """Against the yamls published beside the weights: heads, scale factor, schedule's ends, size in pixels."""
    expected = {
        "sd-v1": ({"num_heads": 8}, 0.18215, (0.00085, 0.012), 512),
        "sd-v2": ({"num_head_channels": 64}, 0.18215, (0.00085, 0.012), 768),
        "ldm-text2img-large": ({"num_heads": 8}, 0.18215, (0.00085, 0.012), 256),
        "ldm-cin256-v2": ({"num_heads": 1}, 1.0, (0.0015, 0.0195), 256),
        "ldm-celebahq-vq4": ({"num_head_channels": 32}, 1.0, (0.0015, 0.0195), 256),
        "ldm-inpainting-big": ({"num_heads": 8}, 1.0, (0.0015, 0.0205), 256),
        "ldm-layout2img": ({"num_head_channels": 32}, 1.0, (0.0015, 0.0205), 256),
        "ldm-semantic-synthesis256": ({"num_heads": 8}, 1.0, (0.0015, 0.0205), 256),
        "ldm-bsr-sr": ({"num_head_channels": 32}, 1.0, (0.0015, 0.0155), 256),
    }
    for model, (heads, scale_factor, ends, size) in expected.items():
        params = recognise(published(model)).config["params"]
        unet = params["unet_config"]["params"]
        assert {key: unet[key] for key in ("num_heads", "num_head_channels") if key in unet} == heads, model
        assert params["scale_factor"] == scale_factor, model
        assert (params["schedule"]["start"], params["schedule"]["end"]) == ends, model
        assert (params["defaults"]["height"], params["defaults"]["width"]) == (size, size), model
    churches = published("ldm-lsun-churches-kl8") | {"scale_factor": torch.tensor(0.2275)}
    params = recognise(churches).config["params"]
    assert params["scale_factor"] == 0.2275 and params["schedule"]["end"] == 0.0155
    assert params["unet_config"]["params"]["num_heads"] == 8 and params["defaults"]["height"] == 256


# --- other sizes -----------------------------------------------------------------------------------------------------

BASE = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 2}


@pytest.mark.parametrize(
    "options",
    [
        levels([1, 2], 1, [2, 1]),
        levels([1], 2, []),
        levels([1, 1, 3], 2, [4]),
        levels([2, 1, 3], 1, [4, 1]),
        levels([1, 2, 2], [1, 3, 2], [2]),
        levels([1, 2], [2, 1], [2]) | {"resblock_updown": True},
        levels([1, 2, 2], [1, 3, 2], [1]) | {"conv_resample": False},
        levels([1, 2], 1, [2]) | {"use_scale_shift_norm": True},
        levels([1, 2], 1, [2]) | {"num_classes": 10},
        levels([1, 2], 1, [2]) | {"num_classes": "continuous"},
        levels([1, 2], 1, [2]) | {"num_classes": "sequential", "adm_in_channels": 6},
        levels([1, 2], 1, [2, 1]) | CROSS | {"transformer_depth": 1},
        levels([1, 2, 2], 2, [2]) | CROSS | {"transformer_depth": 3},
        levels([1, 2], 1, [2, 1]) | CROSS | {"transformer_depth": [1, 2], "use_linear_in_transformer": True},
    ],
    ids=str,
)
def test_a_unet_of_any_size_is_read_off_its_weights(options):
    params = BASE | options
    with torch.device("meta"):
        sizes = shapes(UNetModel(**params))
    read = infer_unet(sizes)
    assert read == {key: value for key, value in params.items() if key in read}  # nothing is read wrong
    with torch.device("meta"):  # and nothing is left out that shows
        heads = {key: params[key] for key in ("image_size", "num_heads")}
        assert shapes(UNetModel(**read, **heads)) == sizes


@pytest.mark.parametrize("vq", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ch_mult": [1]},
        {"ch_mult": [1, 1, 4], "num_res_blocks": 3, "attn_resolutions": [64]},
        {"attn_resolutions": [256, 128], "z_channels": 3, "in_channels": 1, "out_ch": 2},
        {"attn_type": "none"},
        {"resamp_with_conv": False},
    ],
    ids=str,
)
def test_a_first_stage_of_any_size_is_read_off_its_weights(options, vq):
    params = {"embed_dim": 5, "ddconfig": DDCONFIG | options | {"double_z": not vq}}
    target = "vq_autoencoder.VQModelInterface" if vq else "autoencoder.AutoencoderKL"
    config = {"target": f"ldm.models.{target}", "params": params | ({"n_embed": 7} if vq else {})}
    assert infer_first_stage(built(config)) == config


TOKENS = {"vocab_size": 49408, "context_length": 77}


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("text.TextEncoder", CLIP_SETTINGS | TOKENS | {"width": 16, "layers": 2, "heads": 1}),
        (
            "text.TextEncoder",
            OPENCLIP_SETTINGS | TOKENS | {"width": 128, "layers": 3, "heads": 2, "projection_dim": 8},
        ),
        ("bert.BERTEncoder", {"n_embed": 24, "n_layer": 3, "vocab_size": 50, "max_seq_len": 9}),
        ("classes.ClassEmbedder", {"embed_dim": 12, "n_classes": 7}),
        ("spatial.SpatialRescaler", {"in_channels": 9, "out_channels": 4, "bias": True}),
    ],
)
def test_a_conditioner_of_any_size_is_read_off_its_weights(target, params):
    config = {"target": f"ldm.conditioning.{target}", "params": params}
    assert infer_conditioner(built(config)) == config


def test_a_tiny_model_like_stable_diffusion_1():
    recognised = recognise(on_meta(built(TINY_1)))
    assert (recognised.family, recognised.config) == ("sd-v1", TINY_1)
    assert recognised.notes == [
        "recognised Stable Diffusion 1: UNet 32 x [1, 2], first stage kl-f2, conditioner clip 16 wide",
        "prediction eps is assumed, the file does not say: if images are noise, try prediction v (--prediction v)",
        "noise schedule scaled_linear 0.00085 to 0.012 is assumed, scale factor 0.18215 is assumed, "
        "num_heads 8 is assumed",
    ]


def test_a_tiny_model_like_stable_diffusion_2():
    recognised = recognise(on_meta(built(TINY_2)), prediction="eps")
    assert (recognised.family, recognised.config) == ("sd-v2-base", TINY_2)
    assert recognised.notes[-1].endswith("num_head_channels 32 is assumed")  # SD 2's 64 are wider than the layers
    recognised = recognise(on_meta(built(TINY_2)))
    assert recognised.family == "sd-v2-v" and recognised.config["params"]["defaults"]["height"] == 192


@pytest.mark.parametrize(("width", "heads"), [(32, 32), (64, 64), (96, 32), (320, 64)])
def test_heads_divide_the_layers(width, heads):
    """A rule, for sizes that nobody published: Stable Diffusion 2's heads are 64 wide, 1's are 8 of any width."""
    second = recognise(on_meta(built(tiny(OPENCLIP_SETTINGS, num_head_channels=heads, model_channels=width))))
    assert second.config["params"]["unet_config"]["params"]["num_head_channels"] == heads
    first = recognise(on_meta(built(tiny(CLIP_SETTINGS, num_heads=8, model_channels=width))))
    assert first.config["params"]["unet_config"]["params"]["num_heads"] == 8
    assert built(first.config) == built(tiny(CLIP_SETTINGS, num_heads=8, model_channels=width))


def test_pooled_text():
    with_pooled = tiny(
        OPENCLIP_SETTINGS | {"projection_dim": 16}, num_head_channels=32, num_classes="sequential", adm_in_channels=16
    )
    config = recognise(on_meta(built(with_pooled))).config
    assert config["params"]["cond_stage_config"]["params"]["pooled"] is True
    assert built(config) == built(with_pooled)
    other = built(with_pooled) | {f"{UNET}label_emb.0.0.weight": (128, 17)}
    refused("label_emb", recognise, on_meta(other))


# --- what lies beside the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "metadata", "steps", "asked", "expected", "note"),
    [
        ([], {}, None, None, "v", "is assumed, the file does not say"),
        ([], {}, 875000, None, "eps", "by the file's 875000 training steps"),
        ([], {}, 110000, None, "v", "by the file's 110000 training steps"),
        ([], {}, 140000, None, "v", "by the file's 140000 training steps"),
        ([], {}, 12345, None, "v", "is assumed, the file does not say"),
        ([], {"modelspec.prediction_type": "epsilon"}, 110000, None, "eps", "by the file's header"),
        ([], {"modelspec.prediction_type": "v"}, 875000, None, "v", "by the file's header"),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, 875000, None, "v", "by the mark 'v_pred'"),
        (["ztsnr"], {}, None, None, "v", "by the mark 'ztsnr'"),
        (["v_pred"], {"modelspec.prediction_type": "v"}, 110000, "eps", "eps", "as asked for"),
    ],
)
def test_who_says_what_the_unet_predicts(marks, metadata, steps, asked, expected, note):
    state = on_meta(built(TINY_2) | {mark: (0,) for mark in marks})
    recognised = recognise(state, metadata, {} if steps is None else {"global_step": steps}, asked)
    params = recognised.config["params"]
    assert params["prediction"] == expected
    assert recognised.family == ("sd-v2-v" if expected == "v" else "sd-v2-base")
    assert any(line.startswith(f"prediction {expected}") and note in line for line in recognised.notes)
    zero = "ztsnr" in marks
    assert params["schedule"].get("zero_terminal_snr", False) == zero
    assert params["defaults"].get("spacing") == ("trailing" if zero else None)


def test_training_steps_say_nothing_of_stable_diffusion_1():
    facts = {"global_step": 140000}
    assert recognise(on_meta(built(TINY_1)), facts=facts).config["params"]["prediction"] == "eps"
    v = recognise(on_meta(built(TINY_1) | {"v_pred": (0,)})).config["params"]
    assert (v["prediction"], v["defaults"]["height"]) == ("v", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "T": 1000},
        {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "T": 1000, "zero_terminal_snr": True},
        {"name": "scaled_linear", "start": 0.0015, "end": 0.0195, "T": 1000},
        {"name": "linear", "start": 0.0001, "end": 0.02, "T": 500},
        {"name": "cosine", "T": 250},
    ],
    ids=str,
)
def test_the_schedule_is_read_from_the_file(schedule, dtype):
    buffers = {name: buffer.to(dtype) for name, buffer in schedule_buffers(schedule).items()}
    recognised = recognise(on_meta(built(TINY_1)) | buffers)
    read = recognised.config["params"]["schedule"]
    if dtype is torch.bfloat16:  # 8 bits: the ends are known to half a percent
        for end in ("start", "end"):
            if end in schedule:
                assert read.pop(end) == pytest.approx(schedule[end], rel=0.02)
        schedule = {key: value for key, value in schedule.items() if key not in ("start", "end")}
    assert read == schedule
    assert recognised.notes[-1].startswith(f"noise schedule {schedule['name']}") and "read from" in recognised.notes[-1]


def test_a_schedule_of_no_known_kind_is_told():
    betas = torch.linspace(0.001, 0.05, 1000) ** 0.5
    recognised = recognise(on_meta(built(TINY_1)) | {"betas": betas})
    assert recognised.config["params"]["schedule"] == TINY_1["params"]["schedule"]
    assert "of an unknown kind" in recognised.notes[-1] and "is assumed" in recognised.notes[-1]
    for damaged in (torch.full((1000,), float("nan")), torch.zeros(1000), torch.ones(1000)):
        assert "unknown kind" in recognise(on_meta(built(TINY_1)) | {"betas": damaged}).notes[-1]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_factor_that_scales_nothing(value):
    state = on_meta(built(TINY_1)) | {"scale_factor": torch.tensor(value)}
    refused("scale_factor in the file is .*: it must be positive", recognise, state)


@pytest.mark.parametrize("config", [TINY_1, TINY_2], ids=["1", "2"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_our_own_single_file_is_recognised_as_what_it_is(config, prediction):
    params = config["params"] | {"prediction": prediction, "scale_factor": 0.75}
    params["schedule"] = {"name": "linear", "start": 0.0002, "end": 0.03, "T": 100}
    state, metadata = single_file(on_meta(built(config)), {"target": config["target"], "params": params})
    read = recognise(state, metadata).config["params"]
    for key in ("unet_config", "first_stage_config", "cond_stage_config", "prediction", "scale_factor", "schedule"):
        ours = params[key]
        if key == "unet_config" and prediction == "v":  # image_size: what SD 2's v models were trained with
            ours = read[key] | {"params": ours["params"] | {"image_size": read[key]["params"]["image_size"]}}
        assert read[key] == ours


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "family"), [("sd-v1", "sd-v1"), ("sd-v2", "sd-v2-v"), ("ldm-text2img-large", "ldm-text2img")]
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_unet_alone(model, family, prefix):
    sizes = published_shapes(model, UNET)
    sizes = {name: shape for name, shape in sizes.items() if f"{UNET}{name}" in published_shapes(model)}
    state = on_meta({prefix + name: shape for name, shape in sizes.items()})
    recognised = recognise(state)
    assert (recognised.family, recognised.part) == (family, "unet")
    assert built(recognised.config) == sizes == sizes_of(normalise(state)[0])


@pytest.mark.parametrize(("config", "family"), [(TINY_1, "clip"), (TINY_2, "openclip")])
def test_a_text_encoder_alone(config, family):
    state = {name: tensor for name, tensor in on_meta(built(config)).items() if name.startswith("cond_stage_model.")}
    recognised = recognise(state)
    assert (recognised.family, recognised.part) == (family, "text")
    assert built(recognised.config) == sizes_of(normalise(state)[0])


def test_models_that_lack_a_part():
    sizes = built(TINY_1)

    def without(part: str) -> dict[str, Tensor]:
        return on_meta({name: shape for name, shape in sizes.items() if not name.startswith(PREFIXES[part])})

    refused("has no first stage .*: give one beside it", recognise, without("first_stage"))
    refused("context of width 16, but the file has no encoder for it", recognise, without("text"))
    refused("no UNet", recognise, without("unet"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "Stable Diffusion 3"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, "Flux"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9, 3)}, "Flux"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
        ({"zero_convs.0.0.weight": (320, 320, 1, 1)}, "ControlNet"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "LoRA"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "LoRA"),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (4, 320)}, "LoRA"),
        ({"unet.down_blocks.0.attentions.0.processor.to_q_lora.up.weight": (320, 4)}, "LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora.down.weight": (4, 320)}, "LoRA"),
        ({"emb_params": (3, 768)}, "textual-inversion"),
        ({"string_to_param.*": (3, 768)}, "textual-inversion"),
        ({"<cat-toy>": (768,)}, "textual-inversion"),
        ({"down_blocks.0.resnets.0.norm1.weight": (320,)}, "the UNet of a diffusers folder"),
        ({"text_model.final_layer_norm.weight": (768,)}, "CLIP text encoder alone"),
        ({"depth_model.model.pretrained.cls_token": (1, 1, 768)}, "depth-to-image"),
        ({"low_scale_model.betas": (1000,)}, "x4 upscaler"),
        ({"noise_augmentor.data_mean": (1, 768)}, "unCLIP"),
        ({}, "holds no tensors"),
        ({"fc.weight": (10, 3), "fc.bias": (10,), "conv1.weight": (3, 3, 3, 3)}, "no known model: 3 tensors"),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_other_files_are_refused_by_name(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        recognise(on_meta(names))
    assert "\n" not in str(caught.value)


def test_models_of_unknown_make_say_what_was_seen():
    first = f"{UNET}input_blocks.0.0.weight"
    refused("takes 1 channels beside 4 noised latents", recognise, on_meta(built(TINY_2) | {first: (32, 5, 3, 3)}))
    classes = {name: s for name, s in built(TINY_1).items() if not name.startswith("cond_stage_model.")}
    for weight, message in (
        ("embedding", "first stage is of kind kl, its conditioner of kind classes"),
        ("logits", "the conditioner .*logits.* is unknown"),
    ):
        refused(message, recognise, on_meta(classes | {f"cond_stage_model.{weight}.weight": (10, 16)}))
    without = {name: shape for name, shape in published_shapes("kl-f16").items() if "quant_conv" not in name}
    refused("has no quant_conv", recognise, on_meta(without))
    refused("unknown prediction 'noise'", recognise, on_meta(built(TINY_1)), prediction="noise")


def test_damaged_files_end_in_a_sentence():
    """Whatever is missing or misshapen: a ValueError, or a configuration that the strict loader can hold against it."""
    rng, outcomes = random.Random(0), {"refused": 0, "read": 0}
    configs = [published_shapes("ldm-cin256-v2"), built(TINY_1), built(TINY_2)]
    for trial in range(150):
        sizes = dict(configs[trial % len(configs)])
        for name in rng.sample(sorted(sizes), rng.choice((1, 5, len(sizes) // 2))):
            kind = rng.choice(("drop", "reshape", "flatten", "renumber"))
            shape = sizes.pop(name)
            if kind == "reshape":
                sizes[name] = tuple(rng.choice((0, 1, 3, 32, 7)) for _ in shape)
            elif kind == "flatten":
                sizes[name] = shape[:1]
            elif kind == "renumber":
                sizes[".".join(rng.choice((p, "99999999999")) if p.isdigit() else p for p in name.split("."))] = shape
        try:
            recognise(on_meta({name: shape for name, shape in sizes.items()}))
            outcomes["read"] += 1
        except ValueError as error:
            assert len(str(error)) < 400 and "unpack" not in str(error) and "invalid literal" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10  # both happen


def test_recognising_moves_no_tensors(monkeypatch):
    """Gigabytes stay where they are: names and shapes suffice."""
    copied = []
    monkeypatch.setattr(Tensor, "clone", lambda self: copied.append(self) or self)
    recognise(on_meta(built(TINY_1)))
    assert not copied


def test_an_ordinary_stable_diffusion_1_is_one_calm_line():
    state = on_meta(published_shapes("sd-v1"))
    assert recognise(state).notes == ["recognised Stable Diffusion 1, with its usual settings: it predicts eps"]
    assert len(recognise(state | {"v_pred": torch.empty(0)}).notes) == 3
