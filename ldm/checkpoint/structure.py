"""Infer a network's arguments from the names and shapes of its weights: what the yaml beside them would have said.

Every function takes `{name: shape}` with the names inside its network. What weights do not show is not in the result:
attention heads come from `families`; the group size of normalisations and dropout keep the networks' defaults.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.checkpoint import networks
from ldm.checkpoint.networks import Config
from ldm.checkpoint.xl import sized_text
from ldm.checks import few

Shapes = Mapping[str, tuple[int, ...]]

CLIP_HEAD_WIDTH = 64  # of every CLIP published, by OpenAI and by open_clip up to ViT-bigG; the weights do not show it
EMBEDDERS = "embedders."  # the numbered towers of Stable Diffusion XL's conditioner

_CLIP = "transformer.text_model."
_CLIP_TOKENS, _OPENCLIP_TOKENS = f"{_CLIP}embeddings.token_embedding.weight", "model.token_embedding.weight"
_CLIP_MLP, _OPENCLIP_MLP = f"{_CLIP}encoder.layers.0.mlp.fc1.weight", "model.transformer.resblocks.0.mlp.c_fc.weight"
_BERT_TOKENS, _CLASSES, _MAPPER = "transformer.token_emb.weight", "embedding.weight", "channel_mapper.weight"
# Signatures: a weight that only such a conditioner has -> its class, the settings that its weights do not show, and
# which argument shows where: (weight, dimension), or (how numbered modules begin, -N) with N modules per layer.
CONDITIONERS: dict[str, tuple[str, Config, Config]] = {
    _CLIP_TOKENS: (
        networks.TEXT_TARGET,
        networks.CLIP_SETTINGS,
        {
            **{"width": (_CLIP_TOKENS, 1), "vocab_size": (_CLIP_TOKENS, 0), "layers": (f"{_CLIP}encoder.layers.", -1)},
            "context_length": (f"{_CLIP}embeddings.position_embedding.weight", 0),
        },
    ),
    _OPENCLIP_TOKENS: (
        networks.TEXT_TARGET,
        networks.OPENCLIP_SETTINGS,
        {
            **{"width": (_OPENCLIP_TOKENS, 1), "vocab_size": (_OPENCLIP_TOKENS, 0)},
            **{"layers": ("model.transformer.resblocks.", -1), "context_length": ("model.positional_embedding", 0)},
            "projection_dim": ("model.text_projection", 1),
        },
    ),
    _BERT_TOKENS: (
        networks.BERT_TARGET,
        {},
        {
            **{"n_embed": (_BERT_TOKENS, 1), "vocab_size": (_BERT_TOKENS, 0)},
            "n_layer": ("transformer.attn_layers.layers.", -2),  # attention and feed-forward take turns
            "max_seq_len": ("transformer.pos_emb.emb.weight", 0),
        },
    ),
    _CLASSES: (networks.CLASSES_TARGET, {}, {"embed_dim": (_CLASSES, 1), "n_classes": (_CLASSES, 0)}),
    _MAPPER: (networks.RESCALER_TARGET, {}, {"in_channels": (_MAPPER, 1), "out_channels": (_MAPPER, 0)}),
}


def under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def count(shapes: Collection[str], prefix: str) -> int:
    """Return how many numbered modules there are: one more than the highest N of the names `prefix`N..."""
    numbers = (name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix))
    total = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
    if total > 2 * len(shapes):
        raise ValueError(f"the weights {prefix}N are numbered up to {total - 1}, most of them missing")
    return total


def infer_unet(shapes: Shapes) -> Config:
    """Return UNetModel's arguments from `input_blocks...`, `output_blocks...`; the heads and image_size are missing."""
    in_channels, stem = _shape(shapes, "input_blocks.0.0.weight", 4)[1::-1]
    blocks = _blocks_per_level(shapes)
    firsts = [1 + sum(blocks[:i]) + i for i in range(len(blocks))]  # each level's first block; between them, resampling
    widths = [_shape(shapes, f"input_blocks.{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    if any(width % stem for width in widths):
        raise ValueError(f"the UNet's levels are {widths} channels wide: each must be a multiple of {stem}")
    attended = [f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    params = {
        "in_channels": in_channels,
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "model_channels": stem,
        "num_res_blocks": one_if_equal(blocks),
        "attention_resolutions": [2**i for i, attends in enumerate(attended) if attends][::-1],
        "channel_mult": [width // stem for width in widths],
    }
    return params | _block_kinds(shapes, widths[0]) | _transformers(shapes, firsts, attended) | _labels(shapes)


def _blocks_per_level(shapes: Shapes) -> list[int]:
    """Return the residual blocks of each level of the encoder, the highest resolution first."""
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


def _block_kinds(shapes: Shapes, width: int) -> Config:
    """Return how residual blocks take in the time, and how resampling is done."""
    kinds = {}
    if _shape(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * width:
        kinds["use_scale_shift_norm"] = True
    ups = [name for name in shapes if name.startswith("output_blocks.") and name.split(".")[2] in ("1", "2")]
    if any(name.endswith(".in_layers.2.weight") for name in ups):
        kinds["resblock_updown"] = True
    elif not any(name.endswith(".conv.weight") for name in ups) and len(_blocks_per_level(shapes)) > 1:
        kinds["conv_resample"] = False
    return kinds


def _transformers(shapes: Shapes, firsts: list[int], attended: list[bool]) -> Config:
    middle = count(shapes, "middle_block.1.transformer_blocks.")
    if middle == 0:
        return {}
    depths = [
        count(shapes, f"input_blocks.{first}.1.transformer_blocks.") if attends else middle
        for first, attends in zip(firsts, attended, strict=True)
    ]
    params = {
        "use_spatial_transformer": True,
        "transformer_depth": one_if_equal(depths),
        "context_dim": _shape(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
    }
    if len(_shape(shapes, "middle_block.1.proj_in.weight", 2, 4)) == 2:
        params["use_linear_in_transformer"] = True
    return params


def _labels(shapes: Shapes) -> Config:
    if "label_emb.0.0.weight" in shapes:
        return {"num_classes": "sequential", "adm_in_channels": _shape(shapes, "label_emb.0.0.weight", 2)[1]}
    if "label_emb.bias" in shapes:
        return {"num_classes": "continuous"}
    if "label_emb.weight" in shapes:
        return {"num_classes": _shape(shapes, "label_emb.weight", 2)[0]}
    return {}


def infer_first_stage(shapes: Shapes) -> Config:
    """Return {"target", "params"} of a KL or VQ autoencoder from `encoder...`, `decoder...`, `quant_conv...`."""
    if "quant_conv.weight" not in shapes:
        raise ValueError("the first stage has no quant_conv: it is of another family (those of SD3 and Flux have none)")
    width, in_channels = _shape(shapes, "encoder.conv_in.weight", 4)[:2]
    levels = count(shapes, "encoder.down.")
    wide = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if any(w % width for w in wide):
        raise ValueError(f"the first stage's levels are {wide} channels wide: each must be a multiple of {width}")
    resolution = 256  # LDM's; it only turns `attn_resolutions` back into levels
    vq = "quantize.embedding.weight" in shapes
    ddconfig = {
        "double_z": not vq,
        "z_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        **{"resolution": resolution, "in_channels": in_channels, "ch": width, "ch_mult": [w // width for w in wide]},
        "out_ch": _shape(shapes, "decoder.conv_out.weight", 4)[0],
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
    return {"target": networks.VQ_TARGET if vq else networks.KL_TARGET, "params": params}


def infer_conditioner(shapes: Shapes) -> Config:
    """Return {"target", "params"} of the conditioner whose signature fits; a rescaler's n_stages is missing."""
    if any(name.startswith(EMBEDDERS) for name in shapes):
        return _infer_towers(shapes)
    mark = next((mark for mark in CONDITIONERS if mark in shapes), None)
    if mark is None:
        known = "a CLIP or BERT text encoder, class embedding or rescaler"
        raise ValueError(f"the conditioner ({', '.join(sorted(shapes)[:3])}, ...) is unknown: it is not {known}")
    target, settings, sizes = CONDITIONERS[mark]
    if mark == _CLIP_TOKENS and "transformer.text_projection.weight" in shapes:
        sizes = sizes | {"projection_dim": ("transformer.text_projection.weight", 0)}
    rank = 4 if mark == _MAPPER else 2
    params = settings | {
        key: count(shapes, name) // -axis if axis < 0 else _shape(shapes, name, rank)[axis]
        for key, (name, axis) in sizes.items()
    }
    if target == networks.TEXT_TARGET:
        params["heads"] = max(1, params["width"] // CLIP_HEAD_WIDTH)
        inner = shapes.get(_OPENCLIP_MLP if mark == _OPENCLIP_TOKENS else _CLIP_MLP)
        if inner is not None and inner[0] != 4 * params["width"]:
            params["mlp_width"] = inner[0]
    if "channel_mapper.bias" in shapes:
        params["bias"] = True
    return {"target": target, "params": params}


def _infer_towers(shapes: Shapes) -> Config:
    """Return Stable Diffusion XL's conditioner: the states before the last block, without the final norm."""
    found = [under(shapes, f"{EMBEDDERS}{i}.") for i in range(count(shapes, EMBEDDERS))]
    if {} in found:
        raise ValueError(f"the conditioner has {EMBEDDERS}{len(found) - 1}, and no {EMBEDDERS}{found.index({})}")
    towers = [infer_conditioner(own) for own in found]
    if not all(tower["target"] == networks.TEXT_TARGET for tower in towers):
        raise ValueError(f"the conditioner's {EMBEDDERS}* are not all CLIP text encoders, as Stable Diffusion XL's are")
    return sized_text([tower["params"] for tower in towers])


def misfits(expected: Shapes, found: Shapes) -> str:
    """Say what is missing, unexpected or of another shape, a few names of each."""
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    return "; ".join(f"{len(names)} {kind} ({few(sorted(names))})" for kind, names in kinds.items() if names)


def _shape(shapes: Shapes, name: str, *ranks: int) -> tuple[int, ...]:
    """Return the shape of a weight that must be there, with one of these numbers of dimensions."""
    if name not in shapes:
        raise ValueError(f"the weights lack {name!r}, which shows the network's size: the file is damaged or foreign")
    shape = tuple(shapes[name])
    if len(shape) not in ranks or 0 in shape:
        raise ValueError(f"{name!r} cannot have the shape {list(shape)}: the file is damaged or foreign")
    return shape


def one_if_equal(values: Any) -> Any:
    """Return one value for all levels if they share it, else the list of them."""
    if not isinstance(values, Sequence):
        return values
    return values[0] if len(set(values)) == 1 else list(values)
