"""Names and layouts of weights: CompVis's, which are ours, <-> those of diffusers and transformers.

One table of names per network, read in both directions. Tensors are passed on as they are, or as views where one side
has a 1x1 convolution and the other a linear layer; only OpenCLIP's stacked q, k and v are copied together. Names are
without the prefixes of a complete model (`model.diffusion_model.` ...). Every map refuses names that are not in its
table; that all weights are there is checked by the network that gets them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from ldm.checkpoint.structure import count
from ldm.checkpoint.tensors import State
from ldm.checks import few

T = TypeVar("T")  # tensors, or what stands for them
Table = dict[str, str]  # how a name begins: ours -> theirs

RESNET = {
    **{"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"},
    **{"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"},
}
UNET_ENDS = {
    **{"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"},
    "label_emb": "class_embedding",  # a table of classes, or one linear layer; or two of a projected vector
    **{"label_emb.0.0": "class_embedding.linear_1", "label_emb.0.2": "class_embedding.linear_2"},
    **{"input_blocks.0.0": "conv_in", "middle_block.1": "mid_block.attentions.0"},
    **{"out.0": "conv_norm_out", "out.2": "conv_out"},
}
XL_UNET_ENDS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
VAE_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_CONVOLUTIONS = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")  # linear layers in diffusers
OLD_VAE_NAMES = {".to_q": ".query", ".to_k": ".key", ".to_v": ".value", ".to_out.0": ".proj_attn"}  # before 0.17
OPENCLIP_BLOCK = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    "attn.out_proj": "self_attn.out_proj",
}
OPENCLIP_ENDS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
CLIP_BLOCKS = "text_model.encoder.layers."
OPENCLIP_BLOCKS = "transformer.resblocks."
OPENCLIP_UNUSED = ("text_projection", "logit_scale")


class UNetLevel(NamedTuple):
    """One resolution of a UNet, the highest first: residual blocks in the encoder, and whether attention follows."""

    blocks: int
    attention: bool


def unet_to_diffusers(state: Mapping[str, T], levels: Sequence[UNetLevel], xl: bool = False) -> dict[str, T]:
    """Rename our UNetModel's weights to UNet2DConditionModel's; xl: of Stable Diffusion XL."""
    return _renamed(state, _unet(levels) | (XL_UNET_ENDS if xl else {}), "the UNet")


def unet_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """Rename UNet2DConditionModel's weights to our UNetModel's."""
    levels = []
    for i in range(count(state, "down_blocks.")):
        attention = any(name.startswith(f"down_blocks.{i}.attentions.") for name in state)
        levels.append(UNetLevel(count(state, f"down_blocks.{i}.resnets."), attention))
    return _renamed(state, _inverse(_unet(levels) | XL_UNET_ENDS) | _inverse(UNET_ENDS), "the UNet")


def vae_to_diffusers(state: Mapping[str, Tensor], levels: int, blocks: int) -> State:
    """Rename our AutoencoderKL's weights to diffusers'; `blocks` residual blocks per level of the encoder."""
    linear = {
        name: rearrange(tensor, "o i 1 1 -> o i") if name.endswith(VAE_CONVOLUTIONS) and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }
    return _renamed(linear, _vae(levels, blocks), "the autoencoder")


def vae_from_diffusers(state: Mapping[str, Tensor]) -> State:
    """Rename diffusers' AutoencoderKL's weights, under new or old names, to ours."""
    levels, blocks = (count(state, f"encoder.down_blocks.{inside}") for inside in ("", "0.resnets."))
    heads = _inverse(_vae(levels, blocks))
    for new, old in OLD_VAE_NAMES.items():
        heads |= {head.removesuffix(new) + old: ours for head, ours in heads.items() if head.endswith(new)}
    return {
        name: rearrange(tensor, "o i -> o i 1 1") if name.endswith(VAE_CONVOLUTIONS) and tensor.ndim == 2 else tensor
        for name, tensor in _renamed(state, heads, "the autoencoder").items()
    }


def attention_from_diffusers(name: str) -> str:
    """Return an autoencoder's name with the layers of its attention, in CompVis's place, under CompVis's names."""
    place = re.fullmatch(r"(.*\.attn(?:_1|\.\d+))(\..*)(\.\w+)", name)
    if place is None:
        return name
    layer = {old: new for new, old in OLD_VAE_NAMES.items()}.get(place[2], place[2])
    return place[1] + "." + _inverse(VAE_ATTENTION).get(layer[1:], layer[1:]) + place[3]


def clip_to_transformers(state: Mapping[str, Tensor], layers: int) -> State:
    """Return the weights that transformers' CLIPTextModel of `layers` blocks has of our CLIPTextModel's."""
    return {n: t for n, t in state.items() if _block(n, CLIP_BLOCKS) < layers and n != "text_projection.weight"}


def clip_from_transformers(state: Mapping[str, Tensor]) -> State:
    """Rename transformers' CLIPTextModel's weights to ours: `text_model.` in front, as versions before 5.6 wrote it."""
    return {
        "text_model." + name if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name: tensor
        for name, tensor in state.items()
        if not name.endswith("embeddings.position_ids")  # 0, 1, 2 ...: a buffer before 4.31
    }


def openclip_to_transformers(state: Mapping[str, Tensor], layers: int) -> State:
    """Rename our OpenCLIPTextModel's weights to those of transformers' CLIPTextModel of `layers` blocks.

    Stable Diffusion 2 conditions on the state before the 24th block, so its diffusers folders have 23. Later blocks,
    text_projection and logit_scale are left out.
    """
    rest, apart = {}, {}
    for name, tensor in state.items():
        if name in OPENCLIP_UNUSED or _block(name, OPENCLIP_BLOCKS) >= layers:
            continue
        block, stacked, kind = name.partition(".attn.in_proj_")
        if stacked:
            block = CLIP_BLOCKS + block.removeprefix(OPENCLIP_BLOCKS)
            names = [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            apart |= zip(names, tensor.chunk(3), strict=True)
        else:
            rest[name] = tensor
    return _renamed(rest, _openclip(layers), "the text encoder") | apart


def openclip_from_transformers(state: Mapping[str, Tensor], layers: int) -> State:
    """Rename transformers' CLIPTextModel's weights to our OpenCLIPTextModel's, completed to `layers` blocks.

    That with a projection is Stable Diffusion XL's second encoder, which has all blocks.
    """
    state = clip_from_transformers(state)
    stacked = {}
    if "text_projection.weight" in state:
        stacked["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for i in range(layers):
        for kind in ("weight", "bias"):
            names = [f"{CLIP_BLOCKS}{i}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            found = [state.pop(name) for name in names if name in state]
            if len(found) == 3:
                stacked[f"{OPENCLIP_BLOCKS}{i}.attn.in_proj_{kind}"] = torch.cat(found)
            elif found:
                raise ValueError(f"the text encoder has not all three of {', '.join(names)}")
    return complete_openclip(_renamed(state, _inverse(_openclip(layers)), "the text encoder") | stacked, layers)


def complete_openclip(state: State, layers: int) -> State:
    """Add the weights of OpenCLIP's text tower of `layers` blocks that nothing reads, where they are missing.

    Stable Diffusion 2 reads the state before the last block, so diffusers keeps neither that block nor projection and
    temperature. Stand-ins: a copy of the block before (as sd-scripts writes), the identity and 0.
    """
    last, before = (f"{OPENCLIP_BLOCKS}{i}." for i in (layers - 1, layers - 2))
    if not any(name.startswith(last) for name in state):
        # clones: no two names of a file may share their memory
        state |= {last + n.removeprefix(before): t.clone() for n, t in state.items() if n.startswith(before)}
    norm = state.get("ln_final.weight")  # of the right width and dtype; without it the network lists what is missing
    if norm is not None:
        state.setdefault("text_projection", torch.eye(len(norm), dtype=norm.dtype, device=norm.device))
        state.setdefault("logit_scale", norm.new_zeros(()))
    return state


def _block(name: str, blocks: str) -> int:
    """Return which of the tower's blocks a weight belongs to; -1 for none."""
    number = name.removeprefix(blocks).partition(".")[0]
    return int(number) if name.startswith(blocks) and number.isdecimal() else -1


def _renamed(state: Mapping[str, T], heads: Mapping[str, str], whose: str) -> dict[str, T]:
    """Replace the longest beginning of every name that `heads` has."""
    renamed, unknown = {}, []
    for name, tensor in state.items():
        head = name
        while head and head not in heads:
            head = head.rpartition(".")[0]
        new = heads[head] + name[len(head) :] if head else name
        if not head or new in renamed:
            unknown.append(name)
        renamed[new] = tensor
    if unknown:
        raise ValueError(f"{whose} has {len(unknown)} unexpected weights: {few(sorted(unknown))}")
    return renamed


def _inverse(table: Table) -> Table:
    return {theirs: ours for ours, theirs in table.items()}


def _inside(ours: str, theirs: str, table: Table) -> Table:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def _unet(levels: Sequence[UNetLevel]) -> Table:
    table = dict(UNET_ENDS)
    table |= _inside("middle_block.0", "mid_block.resnets.0", RESNET)
    table |= _inside("middle_block.2", "mid_block.resnets.1", RESNET)
    n = 0
    for i, level in enumerate(levels):
        for j in range(level.blocks):
            n += 1
            table |= _inside(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", RESNET)
            if level.attention:
                table[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
        n += 1  # the last level has none
        table[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    n = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(level.blocks + 1):
            table |= _inside(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", RESNET)
            if level.attention:
                table[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
            n += 1
        # after the level's last block, and after its attention if there is one
        table[f"output_blocks.{n - 1}.{1 + level.attention}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return table


def _vae(levels: int, blocks: int) -> Table:
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, level, resnets in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        for i in range(levels):
            # our up.0 is the highest resolution, the last to run, their up_blocks.0 the first
            ours = f"{side}.{level}.{i}"
            theirs = f"{side}.{level}_blocks.{i if level == 'down' else levels - 1 - i}"
            for j in range(resnets):
                table |= _inside(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", VAE_RESNET)
                table |= _inside(f"{ours}.attn.{j}", f"{theirs}.attentions.{j}", VAE_ATTENTION)
            table[f"{ours}.{level}sample.conv"] = f"{theirs}.{level}samplers.0.conv"
        table |= _inside(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", VAE_RESNET)
        table |= _inside(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", VAE_ATTENTION)
        table |= _inside(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", VAE_RESNET)
        table |= _inside(side, side, VAE_ENDS)
    return table


def _openclip(layers: int) -> Table:
    """Return all of OpenCLIP's text tower but the stacked q, k and v."""
    table = dict(OPENCLIP_ENDS)
    for i in range(layers):
        table |= _inside(f"{OPENCLIP_BLOCKS}{i}", f"{CLIP_BLOCKS}{i}", OPENCLIP_BLOCK)
    return table
