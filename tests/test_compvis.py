"""CompVis's single files: what is stray and what varies in them, and the files that we write."""

import pytest
import torch
from conftest import refused
from golden_fill import GOLDEN, published_shapes
from meta_models import on_meta
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoint.compvis import SCHEDULE_BUFFERS, normalise, schedule_buffers, single_file
from ldm.checkpoint.families import recognise
from ldm.checkpoint.networks import KL_TARGET, VQ_TARGET
from ldm.util import instantiate_network

UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
WITH_EMA = (
    "ldm-celebahq-vq4",
    "ldm-lsun-churches-kl8",
    "ldm-inpainting-big",
    "ldm-layout2img",
    "ldm-semantic-synthesis256",
    "ldm-bsr-sr",
)
# one tensor of each part is enough of a model here
MODEL = {f"{UNET}out.2.weight": (2, 3, 3, 3), f"{FIRST_STAGE}quant_conv.bias": (4,), f"{TEXT}embedding.weight": (3, 2)}


def random(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The very tensors under the very names: nothing was copied."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


STRAYS = {
    **dict.fromkeys(SCHEDULE_BUFFERS, (1000,)),
    **dict.fromkeys(("scale_factor", "logvar", "lvlb_weights"), (1,)),
    **dict.fromkeys(("v_pred", "ztsnr"), (0,)),
    **dict.fromkeys(("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas"), (50,)),
    **{"model_ema.decay": (), "model_ema.num_updates": (), "model_ema.diffusion_modelout2weight": (2, 3, 3, 3)},
    **{f"{FIRST_STAGE}loss.logvar": (), f"{FIRST_STAGE}loss.perceptual_loss.lin0.model.1.weight": (1, 64, 1, 1)},
    **{f"{TEXT}transformer.text_model.embeddings.position_ids": (1, 77), f"{TEXT}logit_scale": ()},
    "embedding_manager.string_to_param_dict.*": (1, 768),
}


def test_what_is_known_to_be_stray_is_left_out_and_nothing_else():
    state = random(MODEL)
    assert same(normalise(state | on_meta(STRAYS))[0], state)
    assert normalise(state)[1] == []
    for name in STRAYS:  # a name that only resembles one stays, for the loader to list
        whole_prefix = "model_ema" in name or "loss" in name or "embedding_manager" in name
        for other in (f"x.{name}", f"{UNET}{name}") if whole_prefix else (f"{name}x", f"x.{name}", f"{UNET}{name}"):
            assert other in normalise(state | on_meta({other: (1,)}))[0]


def test_normalising_twice_changes_nothing_more():
    for sizes in (published_shapes("sd-v1"), published_shapes("ldm-inpainting-big"), published_shapes("kl-f8")):
        once, _ = normalise(on_meta(sizes))
        assert same(normalise(once)[0], once)


@pytest.mark.parametrize("model", WITH_EMA)
def test_averaged_weights_are_taken_when_asked_for(model):
    state = on_meta(published_shapes(model))
    plain, notes = normalise(state)
    assert "averaged weights (EMA), which were not taken" in notes[0]
    averaged, notes = normalise(state, ema=True)
    assert notes == ["the averaged weights (EMA) were taken"]
    assert averaged.keys() == plain.keys()
    for name, tensor in averaged.items():
        shadow = state.get("model_ema." + name.removeprefix("model.").replace(".", ""))
        assert tensor is (shadow if name.startswith(UNET) else plain[name])
        assert (shadow is not None) == name.startswith(UNET)


def test_averaged_weights_that_are_not_there_or_do_not_fit():
    state, name = random(MODEL), f"{UNET}out.2.weight"
    refused("has no averaged weights .EMA, model_ema.*: load it without ema", normalise, state, ema=True)
    with pytest.raises(ValueError, match="has no averaged weights"):  # the counters of an "emaonly" file
        normalise(state | on_meta({"model_ema.decay": (), "model_ema.num_updates": ()}), ema=True)
    fits = {"model_ema.diffusion_modelout2weight": torch.zeros(2, 3, 3, 3)}
    assert torch.equal(normalise(state | fits, ema=True)[0][name], torch.zeros(2, 3, 3, 3))
    for wrong in ({"model_ema.diffusion_modelout2weight": (2, 3, 3, 1)}, {"model_ema.diffusion_modelout2bias": (2,)}):
        with pytest.raises(
            ValueError, match=f"do not fit the model, 1 of them .*{'bias' if 'bias' in str(wrong) else 'out'}"
        ):
            normalise(state | fits | on_meta(wrong), ema=True)


def test_averaged_weights_of_parts_alone():
    unet = random({"out.2.weight": (2, 3, 3, 3), "model_ema.diffusion_modelout2weight": (2, 3, 3, 3)})
    shadow = {"out.2.weight": unet["model_ema.diffusion_modelout2weight"]}
    assert same(normalise(unet, ema=True)[0], shadow)
    autoencoder = random({"quant_conv.bias": (4,), "model_ema.quant_convbias": (4,), "loss.logvar": ()})
    assert same(normalise(autoencoder, ema=True)[0], {"quant_conv.bias": autoencoder["model_ema.quant_convbias"]})


def test_text_model_is_inserted_where_it_is_absent():
    sizes = published_shapes("sd-v1")
    expected, _ = normalise(on_meta(sizes))
    assert f"{TEXT}transformer.text_model.embeddings.position_ids" in sizes
    without = on_meta({name.replace("transformer.text_model.", "transformer."): shape for name, shape in sizes.items()})
    found, _ = normalise(without)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert f"{TEXT}transformer.text_model.encoder.layers.11.mlp.fc2.bias" in found
    for family in ("ldm-text2img-large", "ldm-layout2img"):  # another `transformer.`
        assert not any("text_model" in name for name in normalise(on_meta(published_shapes(family)))[0])


def test_names_that_come_twice():
    state = random(MODEL) | random({"diffusion_model.out.2.weight": (2, 3, 3, 3)})
    refused("holds 1 tensors twice, .*diffusion_model.out.2.weight", normalise, state)


def test_the_copy_of_the_first_stage_is_dropped_if_it_is_one():
    sizes = published_shapes("ldm-inpainting-big")
    found, _ = normalise(on_meta(sizes))
    assert not any(name.startswith(TEXT) for name in found)
    assert sum(name.startswith(FIRST_STAGE) for name in found) == sum(name.startswith(TEXT) for name in sizes)
    for change, count in (
        ({f"{TEXT}encoder.conv_in.weight": (64, 3, 3, 3)}, 1),
        ({f"{TEXT}encoder.more.weight": (3,)}, 1),
    ):
        with pytest.raises(ValueError, match=f"autoencoder other than the first stage: they differ in {count} tensors"):
            normalise(on_meta(sizes | change))


def test_what_others_leave_out_of_openclip_is_supplied():
    sizes = published_shapes("sd-v2")
    whole, notes = normalise(on_meta(sizes))
    assert notes == []
    tower = f"{TEXT}model."
    unused = ("text_projection", "logit_scale", "transformer.resblocks.23.")
    for left_out in (unused, unused[:1], unused[1:2], unused[2:]):
        names = {name for name in sizes if name.startswith(tuple(tower + start for start in left_out))}
        found, notes = normalise(on_meta({name: shape for name, shape in sizes.items() if name not in names}))
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in whole.items()}
        assert notes == [f"the file lacks {len(names)} tensors of OpenCLIP that nothing reads; stand-ins were supplied"]
    blocks = {f"{tower}transformer.resblocks.{i}.ln_1.bias": (4,) for i in range(2)}
    state = random({f"{tower}token_embedding.weight": (5, 4), f"{tower}ln_final.weight": (4,)} | blocks | MODEL)
    found, _ = normalise({name: tensor.half() for name, tensor in state.items()})
    blocks = [found[f"{tower}transformer.resblocks.{i}.ln_1.bias"] for i in range(3)]
    # or no file could be saved
    assert torch.equal(blocks[2], blocks[1]) and blocks[2].data_ptr() != blocks[1].data_ptr()
    assert torch.equal(found[f"{tower}text_projection"], torch.eye(4).half())
    assert found[f"{tower}logit_scale"].dtype == torch.float16


def test_linear_attention_of_a_first_stage_becomes_convolutional():
    names = [f"{FIRST_STAGE}decoder.mid.attn_1.{part}.weight" for part in ("q", "k", "v", "proj_out")]
    names.append(f"{FIRST_STAGE}encoder.down.4.attn.1.q.weight")
    state = random(MODEL | dict.fromkeys(names, (8, 8)))
    found, _ = normalise(state)
    for name in names:
        assert found[name].shape == (8, 8, 1, 1) and torch.equal(found[name][:, :, 0, 0], state[name])
    assert state[names[0]].shape == (8, 8)  # the caller's tensors are the caller's


def test_a_first_stage_in_diffusers_names():
    """The form in which most VAEs are shared alone: as a part, and gives diffusers' images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, layers_per_block=2, **blocks).eval()
    recognised = recognise(theirs.state_dict())
    assert (recognised.family, recognised.part) == ("kl-f2", "first_stage")
    ours = instantiate_network(recognised.config).eval()
    ours.load_state_dict(normalise(theirs.state_dict())[0])
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mode()
        torch.testing.assert_close(ours.encode(x).mode(), z, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=0)
    in_a_model = {f"vae.{name}": tensor for name, tensor in ours.state_dict().items()}
    assert normalise(in_a_model)[0].keys() == ours.state_dict().keys()


# --- what we write ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd-v1", "sd-v2"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_file_of_ours_has_the_published_names_and_shapes(model, prediction):
    sizes = published_shapes(model)
    state, _ = normalise(on_meta(sizes))
    config = recognise(on_meta(sizes), prediction=prediction).config
    written, metadata = single_file(state, config)
    marks = {"v_pred": (0,)} if prediction == "v" else {}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == sizes | marks
    assert same(normalise(written)[0], state)
    version = {"sd-v1": "1", "sd-v2": "2-768-v" if prediction == "v" else "2-512"}[model]
    size = "768x768" if version == "2-768-v" else "512x512"
    expected = {"sai_model_spec": "1.0.0", "architecture": f"stable-diffusion-v{version}", "resolution": size}
    expected |= {"prediction_type": {"eps": "epsilon", "v": "v"}[prediction]}
    assert (
        metadata.items() >= {"format": "pt", **{f"modelspec.{name}": value for name, value in expected.items()}}.items()
    )
    assert {"modelspec.title", "modelspec.implementation"} < metadata.keys()  # which the standard demands
    assert all(isinstance(value, str) and value for value in metadata.values())
    if model == "sd-v1":
        ids = written[f"{TEXT}transformer.text_model.embeddings.position_ids"]
        assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(77)[None])


def test_marks_scale_factor_and_architecture():
    params = {
        "cond_stage_config": None,
        "first_stage_config": {"target": KL_TARGET, "params": {}},
        "schedule": {"name": "cosine", "zero_terminal_snr": True},
        "prediction": "v",
        "scale_factor": 0.18215,
        "defaults": {"height": 64, "width": 32},
    }
    written, metadata = single_file({}, {"params": params})
    assert written.keys() == {*SCHEDULE_BUFFERS, "v_pred", "ztsnr"}
    assert written["v_pred"].numel() == written["ztsnr"].numel() == 0
    assert metadata["modelspec.architecture"] == "latent-diffusion" and metadata["modelspec.resolution"] == "32x64"
    vq = params | {"first_stage_config": {"target": VQ_TARGET, "params": {}}, "prediction": "eps"}
    vq["concat"] = "latents_mask"
    written, metadata = single_file({}, {"params": vq})
    assert written["scale_factor"] == torch.tensor(0.18215) and "v_pred" not in written
    assert metadata["modelspec.architecture"] == "latent-diffusion-inpainting"
    assert "scale_factor" not in single_file({}, {"params": vq | {"scale_factor": 1.0}})[0]
    inpainting = on_meta(published_shapes("sd-v1") | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)})
    _, metadata = single_file({}, recognise(inpainting).config)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1-inpainting"


def test_schedule_buffers_are_compvis_s():
    """Against CompVis's own of its "linear" schedule: float32, so a rounding each."""
    golden = load_file(GOLDEN / "samplers.safetensors")
    buffers = schedule_buffers({"name": "scaled_linear", "start": 0.00085, "end": 0.012})
    assert tuple(buffers) == SCHEDULE_BUFFERS and {b.dtype for b in buffers.values()} == {torch.float32}
    compared = [name for name in SCHEDULE_BUFFERS if f"ddpm/{name}" in golden]
    assert len(compared) == 6
    for name in compared:
        torch.testing.assert_close(buffers[name], golden[f"ddpm/{name}"], rtol=1e-6, atol=1e-9)
    betas = golden["betas/linear"]
    ab = (1 - betas).cumprod(0)
    expected = {"betas": betas, "alphas_cumprod": ab, "sqrt_alphas_cumprod": ab.sqrt()}
    expected |= {"sqrt_one_minus_alphas_cumprod": (1 - ab).sqrt(), "log_one_minus_alphas_cumprod": (1 - ab).log()}
    for name, values in expected.items():
        torch.testing.assert_close(buffers[name], values.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(buffers["alphas_cumprod_prev"][1:], ab.float()[:-1], rtol=1e-6, atol=0)
    assert buffers["alphas_cumprod_prev"][0] == 1


def test_schedule_buffers_at_zero_signal_are_finite():
    buffers = schedule_buffers({"name": "scaled_linear", "zero_terminal_snr": True})
    assert all(torch.isfinite(buffer).all() for buffer in buffers.values())
    assert buffers["alphas_cumprod"][-1] == 0 and buffers["betas"][-1] == 1
