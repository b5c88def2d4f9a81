"""The arguments of a network, read from the names and shapes of its weights: what the yaml beside them would have said.

Every reader takes `{name: shape}` with the names inside its network, and raises ValueError when a weight that it reads
from is not there. What weights do not show (attention heads, the group size of normalisations, dropout) is not in the
result: heads come from `families`, the rest keeps the networks' defaults.
"""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

WHOLE = "ldm.latent_diffusion.LatentDiffusion"
UNET = "ldm.models.unet.UNetModel"
KL = "ldm.models.autoencoder.AutoencoderKL"
VQ = "ldm.models.vq_autoencoder.VQModelInterface"
TEXT = "ldm.conditioning.text.TextEncoder"
BERT = "ldm.conditioning.bert.BERTEncoder"
CLASSES = "ldm.conditioning.classes.ClassEmbedder"
RESCALER = "ldm.conditioning.spatial.SpatialRescaler"
PICTURE = "ldm.conditioning.spatial.Picture"

# What distinguishes OpenAI's CLIP (Stable Diffusion 1) from OpenCLIP (2) besides the names of their weights.
CLIP_SETTINGS = {"layout": "transformers", "activation": "quick_gelu", "layer": "last"}
OPENCLIP_SETTINGS = {"layout": "openclip", "activation": "gelu", "layer": "penultimate"}
CLIP_HEAD_WIDTH = 64  # of every CLIP published, by OpenAI and by open_clip up to ViT-H; the weights do not show it


def under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The names that begin with `prefix`, without it."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are: one more than the highest N of the names `prefix`N...

    Raises ValueError when most of them have no weights.
    """
    numbers = (name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix))
    total = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
    if total > 2 * len(shapes):
        raise ValueError(f"the weights {prefix}N are numbered up to {total - 1}, most of them missing")
    return total


def read_unet(shapes: Shapes) -> dict[str, Any]:
    """UNetModel's arguments from `input_blocks...`, `output_blocks...`; the heads and image_size are missing."""
    in_channels, stem = _shape(shapes, "input_blocks.0.0.weight", 4)[1::-1]
    blocks = _blocks_per_level(shapes)
    firsts = [1 + sum(blocks[:i]) + i for i in range(len(blocks))]  # each level's first block; between them, resampling
    widths = [_shape(shapes, f"input_blocks.{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    if any(width % stem for width in widths):
        raise ValueError(f"the UNet's levels are {widths} channels wide, no multiples of its first layer's {stem}")
    attended = [f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    params = {
        "in_channels": in_channels,
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "model_channels": stem,
        "num_res_blocks": _one_if_equal(blocks),
        "attention_resolutions": [2**i for i, attends in enumerate(attended) if attends][::-1],
        "channel_mult": [width // stem for width in widths],
    }
    return params | _block_kinds(shapes, widths[0]) | _transformers(shapes, firsts, attended) | _labels(shapes)


def _blocks_per_level(shapes: Shapes) -> list[int]:
    """Residual blocks of each level of the encoder, the highest resolution first."""
    total = count(shapes, "output_blocks.")
    # where the decoder goes up, by a convolution or by a residual block (resblock_updown), behind attention or not
    ways = [f"{j}.{leaf}.weight" for j in (1, 2) for leaf in ("conv", "in_layers.2")]
    ends = [k for k in range(total) if any(f"output_blocks.{k}.{way}" in shapes for way in ways)]
    if ends:
        ends = [-1, *ends, total - 1]
        return [end - start - 1 for start, end in zip(ends, ends[1:], strict=False)][::-1]  # the decoder has one more
    blocks = [0]
    for i in range(1, count(shapes, "input_blocks.")):  # mean pooling (conv_resample false) has no weights: a gap
        if any(name.startswith(f"input_blocks.{i}.") for name in shapes):
            blocks[-1] += 1
        else:
            blocks.append(0)
    return blocks


def _block_kinds(shapes: Shapes, width: int) -> dict[str, Any]:
    """How residual blocks take in the time, and how resampling is done."""
    kinds = {}
    if _shape(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * width:
        kinds["use_scale_shift_norm"] = True
    ups = [name for name in shapes if name.startswith("output_blocks.") and name.split(".")[2] in ("1", "2")]
    if any(name.endswith(".in_layers.2.weight") for name in ups):
        kinds["resblock_updown"] = True
    elif not any(name.endswith(".conv.weight") for name in ups) and len(_blocks_per_level(shapes)) > 1:
        kinds["conv_resample"] = False
    return kinds


def _transformers(shapes: Shapes, firsts: list[int], attended: list[bool]) -> dict[str, Any]:
    """The arguments of the spatial transformers; none where attention, if any, is without a context."""
    middle = count(shapes, "middle_block.1.transformer_blocks.")
    if middle == 0:
        return {}
    depths = [
        count(shapes, f"input_blocks.{first}.1.transformer_blocks.") if attends else middle
        for first, attends in zip(firsts, attended, strict=True)
    ]
    params = {
        "use_spatial_transformer": True,
        "transformer_depth": _one_if_equal(depths),
        "context_dim": _shape(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
    }
    if len(_shape(shapes, "middle_block.1.proj_in.weight", 2, 4)) == 2:
        params["use_linear_in_transformer"] = True
    return params


def _labels(shapes: Shapes) -> dict[str, Any]:
    """num_classes and adm_in_channels."""
    if "label_emb.0.0.weight" in shapes:
        return {"num_classes": "sequential", "adm_in_channels": _shape(shapes, "label_emb.0.0.weight", 2)[1]}
    if "label_emb.bias" in shapes:
        return {"num_classes": "continuous"}
    if "label_emb.weight" in shapes:
        return {"num_classes": _shape(shapes, "label_emb.weight", 2)[0]}
    return {}


def read_first_stage(shapes: Shapes) -> dict[str, Any]:
    """{"target", "params"} of a KL or VQ autoencoder from `encoder...`, `decoder...`, `quant_conv...`."""
    if "quant_conv.weight" not in shapes:
        raise ValueError("the first stage has no quant_conv: it is of another family (those of SD3 and Flux have none)")
    width, in_channels = _shape(shapes, "encoder.conv_in.weight", 4)[:2]
    levels = count(shapes, "encoder.down.")
    wide = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if any(w % width for w in wide):
        raise ValueError(
            f"the first stage's levels are {wide} channels wide, no multiples of its first layer's {width}"
        )
    resolution = 256  # LDM's; it only turns `attn_resolutions` back into levels
    z_channels = _shape(shapes, "decoder.conv_in.weight", 4)[1]
    vq = "quantize.embedding.weight" in shapes
    ddconfig = {
        "double_z": not vq,
        "z_channels": z_channels,
        "resolution": resolution,
        "in_channels": in_channels,
        "out_ch": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "ch": width,
        "ch_mult": [w // width for w in wide],
        "num_res_blocks": count(shapes, "encoder.down.0.block."),
        "attn_resolutions": [resolution >> i for i in range(levels) if count(shapes, f"encoder.down.{i}.attn.")],
        "dropout": 0.0,
    }
    if "encoder.mid.attn_1.norm.weight" not in shapes:
        ddconfig["attn_type"] = "none"
    if levels > 1 and "encoder.down.0.downsample.conv.weight" not in shapes:
        ddconfig["resamp_with_conv"] = False
    params = {"embed_dim": _shape(shapes, "post_quant_conv.weight", 4)[1], "ddconfig": ddconfig}
    if vq:
        params["n_embed"] = _shape(shapes, "quantize.embedding.weight", 2)[0]
    return {"target": VQ if vq else KL, "params": params}


def read_conditioner(shapes: Shapes) -> dict[str, Any]:
    """{"target", "params"} of a text encoder, a class embedding or a rescaler of label maps (n_stages is missing)."""
    readers = {
        "transformer.text_model.embeddings.token_embedding.weight": _read_clip,
        "model.token_embedding.weight": _read_openclip,
        "transformer.token_emb.weight": _read_bert,
        "embedding.weight": _read_classes,
    }
    for mark, reader in readers.items():
        if mark in shapes:
            return reader(shapes)
    if "channel_mapper.weight" in shapes:
        out_channels, in_channels = _shape(shapes, "channel_mapper.weight", 4)[:2]
        bias = {"bias": True} if "channel_mapper.bias" in shapes else {}
        return {"target": RESCALER, "params": {"in_channels": in_channels, "out_channels": out_channels} | bias}
    seen = ", ".join(sorted(shapes)[:3])
    raise ValueError(
        f"the conditioner ({seen}, ...) is unknown: it is no CLIP or BERT text encoder, class embedding or rescaler"
    )


def _read_clip(shapes: Shapes) -> dict[str, Any]:
    names = "transformer.text_model."
    vocab_size, width = _shape(shapes, f"{names}embeddings.token_embedding.weight", 2)
    params = CLIP_SETTINGS | {
        "width": width,
        "layers": count(shapes, f"{names}encoder.layers."),
        "heads": max(1, width // CLIP_HEAD_WIDTH),
        "vocab_size": vocab_size,
        "context_length": _shape(shapes, f"{names}embeddings.position_embedding.weight", 2)[0],
    }
    if "transformer.text_projection.weight" in shapes:
        params["projection_dim"] = _shape(shapes, "transformer.text_projection.weight", 2)[0]
    return {"target": TEXT, "params": params}


def _read_openclip(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = _shape(shapes, "model.token_embedding.weight", 2)
    params = OPENCLIP_SETTINGS | {
        "width": width,
        "layers": count(shapes, "model.transformer.resblocks."),
        "heads": max(1, width // CLIP_HEAD_WIDTH),
        "vocab_size": vocab_size,
        "context_length": _shape(shapes, "model.positional_embedding", 2)[0],
        "projection_dim": _shape(shapes, "model.text_projection", 2)[1],
    }
    return {"target": TEXT, "params": params}


def _read_bert(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = _shape(shapes, "transformer.token_emb.weight", 2)
    params = {
        "n_embed": width,
        "n_layer": count(shapes, "transformer.attn_layers.layers.") // 2,  # attention and feed-forward take turns
        "vocab_size": vocab_size,
        "max_seq_len": _shape(shapes, "transformer.pos_emb.emb.weight", 2)[0],
    }
    return {"target": BERT, "params": params}


def _read_classes(shapes: Shapes) -> dict[str, Any]:
    n_classes, width = _shape(shapes, "embedding.weight", 2)
    return {"target": CLASSES, "params": {"embed_dim": width, "n_classes": n_classes}}


def _shape(shapes: Shapes, name: str, *ranks: int) -> tuple[int, ...]:
    """The shape of a weight that must be there, with one of these numbers of dimensions."""
    if name not in shapes:
        raise ValueError(f"the weights lack {name!r}, which tells the network's size: the file is damaged or foreign")
    shape = tuple(shapes[name])
    if len(shape) not in ranks or 0 in shape:
        raise ValueError(
            f"{name!r} has the shape {list(shape)}, which no such weight has: the file is damaged or foreign"
        )
    return shape


def _one_if_equal(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
