"""What the LoRA tests share: tiny models, adapters that change something, outputs of a model, and namings."""

import re

import torch
from conftest import randomised
from tiny_stable_diffusion import KINDS
from torch import Tensor

from ldm.finetune import lora
from ldm.latent_diffusion import LatentDiffusion

EVERY_TARGET = tuple(lora.TARGETS)


def tiny(kind: str) -> LatentDiffusion:
    torch.manual_seed(0)
    return randomised(LatentDiffusion(**KINDS[kind])).eval().requires_grad_(False)


def learned(model, rank=3, alpha=2.0, targets=EVERY_TARGET, seed=0, attached=True):
    """Adapters as training might leave them, at the model's layers: of an effect about as large as the weights'."""
    adapters = lora.attach(model, rank, alpha, targets, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for adapter in adapters.values():
        adapter.up.data = 0.1 * torch.randn(adapter.up.shape, generator=generator)
    if not attached:
        lora.detach(adapters)
    return adapters


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, a context and tokens."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 24, 32, generator=generator)
    tokens = torch.randint(0, 500, (2, 24), generator=generator)
    return x, torch.tensor([10, 700]), context, tokens


@torch.no_grad()
def outputs(model: LatentDiffusion) -> tuple[Tensor, Tensor]:
    """What the UNet makes of `inputs`, and the text encoder."""
    x, t, context, tokens = inputs()
    return model.apply_model(x, t, {"c_crossattn": context}), model.cond_stage_model(tokens)["c_crossattn"]


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """The largest difference anywhere."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


RANK = 3
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
BLOCK = "transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn1"
# ours -> diffusers', for a model of three levels with one residual block each and attention in two
_UNET_LAYERS = {
    f"input_blocks.1.1.{ATTENTION}.to_q": f"down_blocks.0.attentions.0.{ATTENTION}.to_q",
    f"input_blocks.3.1.{ATTENTION}.to_out.0": f"down_blocks.1.attentions.0.{ATTENTION}.to_out.0",
    f"middle_block.1.{ATTENTION}.to_v": f"mid_block.attentions.0.{ATTENTION}.to_v",
    f"output_blocks.4.1.{BLOCK}.attn2.to_k": f"up_blocks.2.attentions.0.{BLOCK}.attn2.to_k",
    f"output_blocks.4.1.{BLOCK}.ff.net.0.proj": f"up_blocks.2.attentions.0.{BLOCK}.ff.net.0.proj",
    "output_blocks.5.1.proj_out": "up_blocks.2.attentions.1.proj_out",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.0.0.skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks.0.0.emb_layers.1": "up_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.2": "time_embedding.linear_2",
}
_TEXT_LAYERS = ("0.self_attn.q_proj", "1.self_attn.out_proj", "1.mlp.fc2")
LAYERS = {UNET + ours: f"unet.{theirs}" for ours, theirs in _UNET_LAYERS.items()}
for _layer in _TEXT_LAYERS:
    LAYERS[f"{TEXT}text_model.encoder.layers.{_layer}"] = f"text_encoder.text_model.encoder.layers.{_layer}"
ATTENDED = {ours: theirs for ours, theirs in LAYERS.items() if re.search("to_[qkv]$|to_out.0$|_proj$", ours)}


def kohya(ours, theirs):
    part, _, name = theirs.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")


def kohya_compvis(ours, theirs):
    return "lora_unet_" + ours.removeprefix(UNET).replace(".", "_") if UNET in ours else kohya(ours, theirs)


def processor(ours, theirs):
    """diffusers 0.12 to 0.21: an attention's adapters in its processor, to_out without its number."""
    theirs = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", theirs)
    return re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora" if UNET in ours else r".\1_lora", theirs)


def linear_layer(ours, theirs):
    """diffusers 0.18 to 0.21, of text encoders."""
    return theirs + (".lora" if UNET in ours else ".lora_linear_layer")


# endings of down, up and alpha
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight", None)
OLD = (".down.weight", ".up.weight", None)
NAMED_PEFT = (".lora_A.default.weight", ".lora_B.default.weight", None)
OF_UNET = {ours: theirs for ours, theirs in LAYERS.items() if UNET in ours}
# naming: (layers, ours and diffusers' name -> name, endings)
NAMINGS = {
    "kohya": (LAYERS, kohya, KOHYA),
    "kohya te1": (LAYERS, lambda *n: kohya(*n).replace("_te_", "_te1_"), KOHYA),
    "kohya, CompVis's blocks": (LAYERS, kohya_compvis, KOHYA),
    "peft": (LAYERS, lambda ours, theirs: theirs, PEFT),
    "peft with an adapter's name": (LAYERS, lambda ours, theirs: theirs, NAMED_PEFT),
    "peft, transformers 5": (LAYERS, lambda ours, theirs: theirs.replace("text_model.", ""), PEFT),
    "PEFT's own": (LAYERS, lambda o, theirs: "base_model.model." + re.sub("^(unet|text_encoder).", "", theirs), PEFT),
    "diffusers before PEFT": (LAYERS, linear_layer, OLD),
    "diffusers' processors": (ATTENDED, processor, OLD),
    "diffusers' processors, the UNet's alone": (
        {ours: theirs for ours, theirs in ATTENDED.items() if UNET in ours},
        lambda *n: processor(*n).removeprefix("unet."),
        OLD,
    ),
    "dots, CompVis's names": (OF_UNET, lambda ours, theirs: ours.removeprefix("model."), KOHYA),
}


def file_of(adapters, naming: str) -> dict[str, Tensor]:
    """What a file holds that has these adapters (those that the naming has layers for) in that naming."""
    layers, name, (down, up, alpha) = NAMINGS[naming]
    state = {}
    for ours, theirs in layers.items():
        if ours not in adapters:
            continue
        own, adapter = name(ours, theirs), adapters[ours]
        state |= {own + down: adapter.down.data, own + up: adapter.up.data}
        if alpha is not None:
            state[own + alpha] = torch.tensor(adapter.alpha)
    return state
