"""The parameters and attributes that CompVis's classes have: facts of its three repositories and textual inversion's.

Written from their sources: the order of positional parameters is that of the code, and what only one version has is
included. A name is here too, or it is refused by name: nothing is swallowed.
"""

import copy
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from compvis_models import PIXELS, UNET, VQ, built, config
from conftest import refused
from golden_fill import fill

from ldm import legacy_names
from ldm.compvis import base, ddpm, finetune, samplers
from ldm.util import instantiate_from_config

DDPM, ENCODERS = "ldm.models.diffusion.ddpm", "ldm.modules.encoders.modules"
BLOCKS, MODEL = "ldm.modules.diffusionmodules.openaimodel", "ldm.modules.diffusionmodules.model"
HELPERS = "ldm.modules.diffusionmodules.util"
DENOISING = (
    "cond shape x_T ddim_use_original_steps callback timesteps quantize_denoised mask x0 img_callback log_every_t"
)
STEP = "x c t index repeat_noise use_original_steps quantize_denoised temperature noise_dropout score_corrector"
GUIDED = "corrector_kwargs unconditional_guidance_scale unconditional_conditioning"
LOGGED = "batch N n_row sample ddim_steps ddim_eta return_keys quantize_denoised inpaint plot_denoise_rows"
PARAMETERS = {
    "ldm.modules.attention": {
        "GEGLU": "dim_in dim_out",
        "FeedForward": "dim dim_out mult glu dropout",
        "CrossAttention": "query_dim context_dim heads dim_head dropout",
        "CrossAttention.forward": "x context mask",
        "BasicTransformerBlock": "dim n_heads d_head dropout context_dim gated_ff checkpoint disable_self_attn",
        "BasicTransformerBlock.forward": "x context",
        "SpatialTransformer": "in_channels n_heads d_head depth dropout context_dim disable_self_attn use_linear "
        "use_checkpoint",
        "SpatialTransformer.forward": "x context",
        "SpatialSelfAttention": "in_channels",
        "Normalize": "in_channels num_groups",
    },
    BLOCKS: {
        "AttentionPool2d": "spacial_dim embed_dim num_heads_channels output_dim",
        "TimestepEmbedSequential.forward": "x emb context",
        "Upsample": "channels use_conv dims out_channels padding",
        "Downsample": "channels use_conv dims out_channels padding",
        "ResBlock": "channels emb_channels dropout out_channels use_conv use_scale_shift_norm dims use_checkpoint up "
        "down",
        "ResBlock.forward": "x emb",
        "AttentionBlock": "channels num_heads num_head_channels use_checkpoint use_new_attention_order",
        "UNetModel": "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout "
        "channel_mult conv_resample dims num_classes use_checkpoint use_fp16 use_bf16 num_heads num_head_channels "
        "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order use_spatial_transformer "
        "transformer_depth context_dim n_embed legacy disable_self_attentions num_attention_blocks "
        "disable_middle_self_attn use_linear_in_transformer adm_in_channels",
        "UNetModel.forward": "x timesteps context y",
        "UNetModel.convert_to_fp16": "",
        "UNetModel.convert_to_fp32": "",
    },
    MODEL: {
        "Upsample": "in_channels with_conv",
        "Downsample": "in_channels with_conv",
        "ResnetBlock": "* in_channels out_channels conv_shortcut dropout temb_channels",
        "ResnetBlock.forward": "x temb",
        "AttnBlock": "in_channels",
        "Encoder": "* ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels "
        "resolution z_channels double_z use_linear_attn attn_type",
        "Decoder": "* ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels "
        "resolution z_channels give_pre_end tanh_out use_linear_attn attn_type",
    },
    HELPERS: {
        "make_beta_schedule": "schedule n_timestep linear_start linear_end cosine_s",
        "make_ddim_timesteps": "ddim_discr_method num_ddim_timesteps num_ddpm_timesteps verbose",
        "make_ddim_sampling_parameters": "alphacums ddim_timesteps eta verbose",
        "betas_for_alpha_bar": "num_diffusion_timesteps alpha_bar max_beta",
        "extract_into_tensor": "a t x_shape",
        "checkpoint": "func inputs params flag",
        "timestep_embedding": "timesteps dim max_period repeat_only",
        "zero_module": "module",
        "scale_module": "module scale",
        "mean_flat": "tensor",
        "normalization": "channels",
        "HybridConditioner": "c_concat_config c_crossattn_config",
        "HybridConditioner.forward": "c_concat c_crossattn",
        "noise_like": "shape device repeat",
    },
    "ldm.models.autoencoder": {
        "AutoencoderKL": "ddconfig lossconfig embed_dim ckpt_path ignore_keys image_key colorize_nlabels monitor "
        "ema_decay learn_logvar",
        "AutoencoderKL.encode": "x",
        "AutoencoderKL.decode": "z",
        "AutoencoderKL.forward": "input sample_posterior",
        "VQModel": "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key colorize_nlabels monitor "
        "batch_resize_range scheduler_config lr_g_factor remap sane_index_shape use_ema",
        "VQModel.decode_code": "code_b",
        "VQModel.forward": "input return_pred_indices",
        "VQModelInterface.decode": "h force_not_quantize",
        "IdentityFirstStage": "* vq_interface",
    },
    DDPM: {
        "DDPM": "unet_config timesteps beta_schedule loss_type ckpt_path ignore_keys load_only_unet monitor use_ema "
        "first_stage_key image_size channels log_every_t clip_denoised linear_start linear_end cosine_s given_betas "
        "original_elbo_weight v_posterior l_simple_weight conditioning_key parameterization scheduler_config "
        "use_positional_encodings learn_logvar logvar_init use_fp16 make_it_fit ucg_training reset_ema "
        "reset_num_ema_updates",
        "DDPM.register_schedule": "given_betas beta_schedule timesteps linear_start linear_end cosine_s",
        "DDPM.init_from_ckpt": "path ignore_keys only_model",
        "DDPM.p_mean_variance": "x t clip_denoised",
        "DDPM.p_sample": "x t clip_denoised repeat_noise",
        "DDPM.p_sample_loop": "shape return_intermediates",
        "DDPM.sample": "batch_size return_intermediates",
        "DDPM.q_sample": "x_start t noise",
        "DDPM.get_loss": "pred target mean",
        "DDPM.p_losses": "x_start t noise",
        "DDPM.get_input": "batch k",
        "DDPM.training_step": "batch batch_idx",
        "DDPM._get_rows_from_list": "samples",
        "DDPM.log_images": "batch N n_row sample return_keys",
        "DiffusionWrapper": "diff_model_config conditioning_key",
        "DiffusionWrapper.forward": "x t c_concat c_crossattn c_adm",
        "LatentDiffusion": "first_stage_config cond_stage_config num_timesteps_cond cond_stage_key "
        "cond_stage_trainable concat_mode cond_stage_forward conditioning_key scale_factor scale_by_std * "
        "force_null_conditioning use_fp16 personalization_config embedding_reg_weight unfreeze_model model_lr",
        "LatentDiffusion.on_train_batch_start": "batch batch_idx dataloader_idx",
        "LatentDiffusion.instantiate_first_stage": "config",
        "LatentDiffusion.instantiate_cond_stage": "config",
        "LatentDiffusion.instantiate_embedding_manager": "config embedder",
        "LatentDiffusion._get_denoise_row_from_list": "samples desc force_no_decoder_quantization",
        "LatentDiffusion.get_first_stage_encoding": "encoder_posterior",
        "LatentDiffusion.get_learned_conditioning": "c",
        "LatentDiffusion.get_unconditional_conditioning": "batch_size null_label",
        "LatentDiffusion.get_input": "batch k return_first_stage_outputs force_c_encode cond_key return_original_cond "
        "bs return_x",
        "LatentDiffusion.decode_first_stage": "z predict_cids force_not_quantize",
        "LatentDiffusion.encode_first_stage": "x",
        "LatentDiffusion.apply_model": "x_noisy t cond return_ids",
        "LatentDiffusion.p_losses": "x_start cond t noise",
        "LatentDiffusion.p_mean_variance": "x c t clip_denoised return_codebook_ids quantize_denoised return_x0 "
        "score_corrector corrector_kwargs",
        "LatentDiffusion.p_sample": "x c t clip_denoised repeat_noise return_codebook_ids quantize_denoised return_x0 "
        "temperature noise_dropout score_corrector corrector_kwargs",
        "LatentDiffusion.progressive_denoising": "cond shape verbose callback quantize_denoised img_callback mask x0 "
        "temperature noise_dropout score_corrector corrector_kwargs batch_size x_T start_T log_every_t",
        "LatentDiffusion.p_sample_loop": "cond shape return_intermediates x_T verbose callback timesteps "
        "quantize_denoised mask x0 img_callback start_T log_every_t",
        "LatentDiffusion.sample": "cond batch_size return_intermediates x_T verbose timesteps quantize_denoised mask "
        "x0 shape",
        "LatentDiffusion.sample_log": "cond batch_size ddim ddim_steps",
        "LatentDiffusion.log_images": f"{LOGGED} plot_progressive_rows plot_diffusion_rows "
        "unconditional_guidance_scale unconditional_guidance_label use_ema_scope",
        "LatentDiffusion.to_rgb": "x",
        "LatentInpaintDiffusion": "concat_keys masked_image_key * finetune_keys keep_finetune_dims c_concat_log_start "
        "c_concat_log_end",
        "LatentInpaintDiffusion.get_input": "batch k cond_key bs return_first_stage_outputs",
    },
    "ldm.models.diffusion.ddim": {
        "DDIMSampler": "model schedule device",
        "DDIMSampler.make_schedule": "ddim_num_steps ddim_discretize ddim_eta verbose",
        "DDIMSampler.sample": "S batch_size shape conditioning callback normals_sequence img_callback quantize_x0 eta "
        f"mask x0 temperature noise_dropout score_corrector corrector_kwargs verbose x_T log_every_t {GUIDED[17:]} "
        "dynamic_threshold ucg_schedule",
        "DDIMSampler.ddim_sampling": f"{DENOISING} {GUIDED} dynamic_threshold ucg_schedule",
        "DDIMSampler.p_sample_ddim": f"{STEP} {GUIDED} dynamic_threshold",
        "DDIMSampler.stochastic_encode": "x0 t use_original_steps noise",
        "DDIMSampler.decode": "x_latent cond t_start unconditional_guidance_scale unconditional_conditioning "
        "use_original_steps callback",
        "DDIMSampler.encode": "x0 c t_enc use_original_steps return_intermediates unconditional_guidance_scale "
        "unconditional_conditioning callback",
    },
    "ldm.models.diffusion.plms": {
        "PLMSSampler": "model schedule",
        "PLMSSampler.plms_sampling": f"{DENOISING} {GUIDED} dynamic_threshold",
        "PLMSSampler.p_sample_plms": f"{STEP} {GUIDED} old_eps t_next dynamic_threshold",
    },
    ENCODERS: {
        "FrozenCLIPEmbedder": "version device max_length freeze layer layer_idx",
        "FrozenOpenCLIPEmbedder": "arch version device max_length freeze layer",
        "FrozenOpenCLIPEmbedder.encode_with_transformer": "text",
        "FrozenOpenCLIPEmbedder.text_transformer_forward": "x attn_mask",
        "ClassEmbedder": "embed_dim n_classes key ucg_rate",
        "ClassEmbedder.forward": "batch key disable_dropout",
        "BERTEmbedder": "n_embed n_layer vocab_size max_seq_len device use_tokenizer embedding_dropout",
        "TransformerEmbedder": "n_embed n_layer vocab_size max_seq_len device",
        "SpatialRescaler": "n_stages method multiplier in_channels out_channels bias",
        "FrozenCLIPTextEmbedder": "version device max_length n_repeat normalize",
        "FrozenClipImageEmbedder": "model jit device antialias",
    },
    "ldm.modules.embedding_manager": {
        "EmbeddingManager": "embedder placeholder_strings initializer_words per_image_tokens num_vectors_per_token "
        "progressive_words * shuffle_mode",
        "EmbeddingManager.forward": "tokenized_text embedded_text",
        "EmbeddingManager.load": "ckpt_path full",
        "EmbeddingManager.save": "ckpt_path",
    },
    "ldm.modules.ema": {"LitEma": "model decay use_num_upates", "LitEma.forward": "model"},
    "ldm.modules.distributions.distributions": {
        "DiagonalGaussianDistribution": "parameters deterministic",
        "DiagonalGaussianDistribution.kl": "other",
        "DiagonalGaussianDistribution.nll": "sample dims",
        "normal_kl": "mean1 logvar1 mean2 logvar2",
    },
    "ldm.util": {
        "instantiate_from_config": "config",
        "get_obj_from_str": "string reload",
        "log_txt_as_img": "wh xc size",
        "count_params": "model verbose",
        "parallel_data_prefetch": "func data n_proc target_data_type cpu_intensive use_worker_id",
    },
}
# What functions with **kwargs pass on, or read by name; they refuse other names.
_LOOP = {*inspect.signature(base.DDPM._walk).parameters, *ddpm.PER_STEP, "batch_size"}
_SAMPLER = {*inspect.signature(samplers.CompVisSampler._p_sample).parameters, "temperature", "score_corrector"}
PASSED_ON = {
    **dict.fromkeys(("DDPM", "LatentDiffusion"), base.DDPM_SETTINGS),
    "LatentInpaintDiffusion": inspect.signature(finetune.LatentFinetuneDiffusion).parameters,
    **dict.fromkeys(("LatentDiffusion.p_sample_loop", "LatentDiffusion.progressive_denoising"), _LOOP),
    "LatentDiffusion.sample": _LOOP,
    "DDIMSampler.ddim_sampling": _SAMPLER,
    "DDIMSampler.p_sample_ddim": _SAMPLER,
    "PLMSSampler.plms_sampling": _SAMPLER,
    "LatentInpaintDiffusion.get_input": inspect.signature(ddpm.LatentDiffusion.get_input).parameters,
}
CASES = [(module, name, names) for module, rows in PARAMETERS.items() for name, names in rows.items()]


@pytest.mark.parametrize(("module", "name", "names"), CASES, ids=[f"{module}.{name}" for module, name, _ in CASES])
def test_parameters(module, name, names):
    """By position in CompVis's order, and by name."""
    found = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    own = [p for p in parameters if p != "self"]
    positional, _, by_name = names.rpartition("* ")
    missing = [n for n in (positional + by_name).split() if n not in parameters and n not in PASSED_ON.get(name, ())]
    assert not missing, (missing, own)
    order = (positional if "*" in names else names).split()
    assert [n for n in own if n in order][: len(order)] == [n for n in order if n in own], own


ATTRIBUTES = {
    "model": "model first_stage_model cond_stage_model num_timesteps num_timesteps_cond shorten_cond_schedule "
    "num_downs bbox_tokenizer cond_stage_key cond_stage_trainable cond_stage_forward concat_mode "
    "clip_denoised scale_by_std "
    "scale_factor restarted_from_ckpt force_null_conditioning parameterization log_every_t first_stage_key image_size "
    "channels use_positional_encodings use_ema use_scheduler v_posterior original_elbo_weight l_simple_weight monitor "
    "linear_start linear_end loss_type learn_logvar logvar lvlb_weights embedding_reg_weight embedding_manager",
    "model.model": "diffusion_model conditioning_key sequential_cross_attn",
    "model.model.diffusion_model": "image_size in_channels model_channels out_channels num_res_blocks num_classes "
    "attention_resolutions dropout channel_mult conv_resample use_checkpoint dtype num_heads num_head_channels "
    "num_heads_upsample predict_codebook_ids time_embed input_blocks middle_block output_blocks out",
    "model.model.diffusion_model.input_blocks[1][0]": "channels emb_channels dropout out_channels use_conv "
    "use_checkpoint use_scale_shift_norm in_layers updown h_upd x_upd emb_layers out_layers skip_connection",
    "model.model.diffusion_model.input_blocks[2][0]": "channels out_channels use_conv dims op",
    "model.first_stage_model.encoder": "ch in_ch_mult temb_ch num_resolutions num_res_blocks resolution in_channels "
    "conv_in down mid norm_out conv_out",
    "model.first_stage_model.decoder": "ch temb_ch num_resolutions num_res_blocks resolution in_channels "
    "give_pre_end tanh_out z_shape conv_in mid up norm_out conv_out",
    "model.first_stage_model.encoder.mid.block_1": "in_channels out_channels use_conv_shortcut norm1 norm2",
    "model.first_stage_model.encoder.mid.attn_1": "in_channels norm q k v proj_out",
    "model.cond_stage_model": "tokenizer transformer device max_length layer layer_idx",
    "model.cond_stage_model.transformer": "text_model config device dtype",
}


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


@pytest.mark.parametrize("part", ATTRIBUTES)
def test_attributes(model, part):
    found = eval(part, {"model": model})
    assert not [name for name in ATTRIBUTES[part].split() if not hasattr(found, name)]


def test_the_parts_of_autoencoders_are_what_their_settings_say(model):
    encoder, decoder = model.first_stage_model.encoder, model.first_stage_model.decoder
    assert encoder.num_resolutions == len(encoder.down) == 2 and decoder.num_resolutions == len(decoder.up)
    image = torch.zeros(1, 3, encoder.resolution, encoder.resolution, device="meta")
    z = copy.deepcopy(encoder).to("meta")(image).chunk(2, dim=1)[0]
    assert z.shape == decoder.z_shape and encoder.in_ch_mult == (1, *encoder.ch_mult)
    features = []
    hook = decoder.norm_out.register_forward_hook(lambda module, inputs, out: features.append(inputs[0]))
    z = torch.randn(1, z.shape[1], 16, 16)
    decoder(z)
    hook.remove()
    decoder.give_pre_end = True
    assert torch.equal(decoder(z), features[0])
    decoder.give_pre_end = False
    refused("use_linear_attn is not supported", type(encoder), **_ddconfig(encoder), use_linear_attn=True)


def _ddconfig(encoder) -> dict:
    names = "ch out_ch ch_mult num_res_blocks attn_resolutions in_channels resolution z_channels"
    return {name: getattr(encoder, name) for name in names.split()}


@torch.no_grad()
def test_residual_blocks_take_an_embedded_time():
    Block = import_module(MODEL).ResnetBlock
    block = fill(Block(in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0), 0)
    assert block.temb_proj.weight.shape == (64, 512) and block.conv_shortcut.kernel_size == (3, 3)
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 512)
    swish = torch.nn.functional.silu
    h = block.conv1(swish(block.norm1(x))) + block.temb_proj(swish(temb))[:, :, None, None]
    expected = block.conv_shortcut(x) + block.conv2(swish(block.norm2(h)))
    torch.testing.assert_close(block(x, temb), expected)
    assert {n.split(".")[0] for n, _ in Block(in_channels=32, dropout=0.0, temb_channels=0).named_parameters()} == {
        *("norm1", "conv1", "norm2", "conv2")
    }


def test_attention_modes_and_feed_forward(monkeypatch):
    attention = import_module("ldm.modules.attention")

    class Own(attention.CrossAttention):
        pass

    monkeypatch.setitem(attention.BasicTransformerBlock.ATTENTION_MODES, "softmax", Own)
    block = attention.BasicTransformerBlock(16, 2, 8, context_dim=12)
    assert type(block.attn1) is Own and block.attn2.to_k.in_features == 12 and block.attn1.dim_head == 8
    assert attention.FeedForward(16, 24, 2)(torch.zeros(1, 3, 16)).shape == (1, 3, 24)


@torch.no_grad()
def test_codes_are_decoded():
    model = fill(instantiate_from_config(VQ), 0)
    x = torch.randn(2, 3, 16, 16)
    image, _, indices = import_module("ldm.models.autoencoder").VQModel.forward(model, x, return_pred_indices=True)
    torch.testing.assert_close(model.decode_code(indices.view(2, 8, 8)), image)
    entries = model.quantize.get_codebook_entry(indices, shape=(2, 8, 8, 4))
    assert torch.equal(entries, model.quantize.get_codebook_entry(indices.view(2, 8, 8))) and model.n_embed == 32
    assert model.quantize.get_codebook_entry(indices).shape == (128, 4)


def test_a_number_of_residual_blocks_is_a_list_and_a_number():
    params = PIXELS | {"channel_mult": [1, 1]}
    one, two = [
        instantiate_from_config({"target": UNET, "params": params | {"num_res_blocks": n}}) for n in (2, [1, 2])
    ]
    assert one.num_res_blocks == [2, 2] and list(range(one.num_res_blocks)) == [0, 1]
    refused("too many values", range, two.num_res_blocks)


def test_networks_convert():
    unet = instantiate_from_config({"target": UNET, "params": PIXELS})
    unet.convert_to_fp16()
    assert unet.dtype == torch.float16
    unet.convert_to_fp32()
    assert unet.dtype == torch.float32


def test_building_uses_random_numbers_as_compvis_s_code_does(clip):
    """Each layer initialised once, by torch's default, and the text encoder by none: `--seed` gives the same images."""
    torch.manual_seed(0)
    model = instantiate_from_config(config(clip, use_ema=True))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    for layer in [
        m for part in (model.model, model.first_stage_model) for m in part.modules() if isinstance(m, layers)
    ]:
        layer.reset_parameters()
    assert torch.equal(state, torch.get_rng_state())


def test_crops_are_refused(model):
    assert not hasattr(model, "split_input_params")  # as version 1's code asks
    refused("split_input_params is not supported", setattr, model, "split_input_params", {"ks": (128, 128)})


ABSENT = {
    f"{DDPM}.LatentDepth2ImageDiffusion": "MiDaS",
    f"{DDPM}.LatentUpscaleDiffusion": "upscaler",
    f"{ENCODERS}.FrozenT5Embedder": "T5",
    "ldm.modules.midas.api.MiDaSInference": "MiDaS",
    "ldm.data.util.AddMiDaS": "MiDaS",
    "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation": "upscaler",
    "ldm.modules.diffusionmodules.openaimodel.Timestep": "unCLIP",
    "ldm.modules.diffusionmodules.model.LinAttnBlock": "no published model uses it",
    "ldm.util.AdamWwithEMAandWings": "no published model uses it",
    "ldm.data.lsun.LSUNBase": "authors' folders",
    "ldm.data.laion.WebDataModuleFromConfig": "CompVis's repositories",
    "ldm.modules.image_degradation.bsrgan.degradation_bsrgan": "another project's code; ldm.compvis.degradation has",
    "ldm.modules.image_degradation.utils_image": "another project's code; ldm.compvis.degradation has",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion": "InstructPix2Pix has",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_says_why(name):
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ImportError, match=f"is not here: .*{ABSENT[name]}"):
        exec(f"from {module} import {attribute}")
    refused(ABSENT[name], instantiate_from_config, {"target": name})


def test_every_name_that_the_page_lists_as_absent_says_why():
    page = (Path(__file__).parents[1] / "docs/reference/compvis.md").read_text().split("## What is not here")[1]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([A-Z]\w+|ldm\.[\w.]+|\w+_(?:attn|f16|f32))`", cell)}
    known = {name.rpartition(".")[2] for name in legacy_names.ABSENT} | {*legacy_names.ABSENT}
    elsewhere = {"AddMiDaS", "ldm.modules.midas.api"}
    assert len(listed) > 35 and listed - known == elsewhere


def test_attention_of_autoencoders_by_compvis_names():
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, make_attn

    assert isinstance(make_attn(32), AttnBlock) and isinstance(make_attn(32, "none"), torch.nn.Identity)
    assert isinstance(make_attn(32, attn_type="vanilla-xformers"), AttnBlock)
    refused("attn_type is 'linear': it must be", make_attn, 32, "linear")
    refused("attn_kwargs is", make_attn, 32, "vanilla", {"heads": 2})
    for block in (make_attn(32), CrossAttention(32)):
        block.attention_op = None  # as subclasses set it
        assert block.attention_op is None
        refused("attention_op 'flash' is not used here: .*set_attention", setattr, block, "attention_op", "flash")
    sizes = {"ch": 32, "out_ch": 3, "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "resolution": 8}
    decoder = Decoder(**sizes, z_channels=4, ch_mult=[1])
    decoder(torch.zeros(2, 4, 8, 8))
    assert decoder.last_z_shape == (2, 4, 8, 8)
