"""What LoRA files call their weights: any of the common namings -> one, and from that one to the layers of a model.

The one is diffusers', a part of the pipeline and a layer in it: `unet.down_blocks.0.attentions.0. ... .attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. Files with CompVis's block names keep those behind the
same parts: `unet.input_blocks.1.1. ... .attn1.to_q`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoint.diffusers_config import unet_levels
from ldm.checkpoint.diffusers_names import UNetLevel, openclip_to_transformers, unet_to_diffusers
from ldm.checkpoint.foreign import WANTED
from ldm.checkpoint.networks import PREFIXES
from ldm.conditioning.text import TextEncoder
from ldm.finetune.lora import places
from ldm.latent_diffusion import LatentDiffusion

PARTS = {"unet": "lora_unet", "text_encoder": "lora_te"}  # diffusers' and sd-scripts' names of the two networks
# Those of Stable Diffusion 1 and 2, the models that files without a model beside them are taken to be for.
USUAL_LEVELS = [UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, False)]

# The end of a weight's name: sd-scripts' and LyCORIS's, PEFT's, and diffusers' before it used PEFT.
_WEIGHT = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<kohya>down|up|mid)|\.lora_(?P<peft>[AB])(?:\.\w+)?|(?:[._]lora|\.lora_linear_layer)\.(?P<old>down|up))"
    r"\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_MATRIX = {"A": "down", "B": "up"}
_FLAT = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_DOTTED = {
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
}
# Words with an underscore of their own among those that sd-scripts joins by underscores.
_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj linear_1 "
    "linear_2 time_embedding class_embedding conv_in conv_out conv_shortcut text_model self_attn q_proj k_proj v_proj "
    "out_proj input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed "
    "label_emb c_fc c_proj"
).split()
_JOINED = re.compile(f"({'|'.join(sorted(_WORDS, key=len, reverse=True))})|_")

XL = f"is for Stable Diffusion XL, which is not supported: {WANTED}"
XL_CONTEXT = 2048  # the width of what its UNet attends to
_PLAIN = "only plain LoRA is read, of linear layers and convolutions"
_REFUSED = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"\.hada_[wt]", f"is a LoHa: {_PLAIN}"),
        (r"\.lokr_", f"is a LoKr: {_PLAIN}"),
        (r"\.b?oft_", f"is an OFT: {_PLAIN}"),
        (r"\.dora_scale$|\.lora_magnitude_vector\b", f"is a DoRA: {_PLAIN}"),
        (r"\.on_input$|\.ia3_l\b", f"is an IA3: {_PLAIN}"),
        (r"\.(diff|diff_b|w_norm|b_norm)$", f"holds whole weights beside or in place of LoRA: {_PLAIN}"),
        (
            r"^(lora_)?transformer[._](?!text_model|resblocks)|[._](double|joint|single|single_transformer)_blocks[._]",
            f"is for a diffusion transformer (Flux, Stable Diffusion 3 ...), which is not supported: {WANTED}",
        ),
        (r"^(lora_te2_|text_encoder_2\.)|add_embedding", XL),
    )
)


def refuse_other_kinds(names: Iterable[str]) -> None:
    """Raises ValueError, saying what it is, if a file with these names is an adapter that is not read."""
    names = list(names)
    for pattern, sentence in _REFUSED:
        if any(pattern.search(name) for name in names):
            raise ValueError(sentence)


def parse(key: str) -> tuple[str, str] | None:
    """A weight's name in a file -> (the layer in the one naming, "down" | "up" | "mid" | "alpha"); None: no LoRA's."""
    found = _WEIGHT.fullmatch(key)
    if found is None:
        found = _ALPHA.fullmatch(key)
        return None if found is None else (_spelled(found["layer"]), "alpha")
    matrix = next(text for text in (found["kohya"], found["peft"], found["old"]) if text is not None)
    return _spelled(found["layer"]), _MATRIX.get(matrix, matrix)


def _spelled(layer: str) -> str:
    """A layer's name in any naming -> in the one naming."""
    part, name = None, layer.replace("base_model.model.", "")  # of PEFT's own files
    for prefix, own in _FLAT.items():
        if layer.startswith(prefix):
            part, name = own, _JOINED.sub(lambda m: "." if m[1] is None else m[1], layer.removeprefix(prefix))
    if part is None:
        for prefix, own in _DOTTED.items():
            if name.startswith(prefix):
                part, name = own, name.removeprefix(prefix)
    if part is None:  # files of one network; training scripts once wrote the UNet's alone
        part = "text_encoder" if name.startswith(("text_model.", "encoder.layers.")) else "unet"
    name = name.replace(".processor.", ".")  # where diffusers' adapters once were
    if part == "unet":
        return f"unet.{re.sub(r'[.]to_out$', '.to_out.0', name)}"
    name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return f"text_encoder.{'text_model.' if name.startswith('encoder.') else ''}{name}"  # transformers from 5.6 on


def to_kohya(layer: str) -> str:
    """The one naming -> sd-scripts': `lora_unet_down_blocks_0_ ...`, `lora_te_text_model_ ...`."""
    part, _, name = layer.partition(".")
    return f"{PARTS[part]}_{name.replace('.', '_')}"


def with_usual_levels(layers: Mapping[str, Any]) -> dict[str, Any]:
    """CompVis's block names -> diffusers', as they are in Stable Diffusion 1 and 2; other names stay.

    Raises ValueError for a block that those do not have.
    """
    prefix, blocks = "unet.", ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
    ours = {n.removeprefix(prefix): v for n, v in layers.items() if n.removeprefix(prefix).startswith(blocks)}
    theirs = unet_to_diffusers(ours, USUAL_LEVELS)
    rest = {n: v for n, v in layers.items() if n.removeprefix(prefix) not in ours}
    return {**rest, **{prefix + name: value for name, value in theirs.items()}}


def own_spellings(model: LatentDiffusion) -> dict[str, str]:
    """CompVis's and open_clip's names behind the parts of the one naming -> our names, as `layers_of`."""
    prefixes = {PREFIXES["unet"]: "unet.", PREFIXES["text"]: "text_encoder."}
    return {
        part + name.removeprefix(prefix): name
        for name in places(model)
        for prefix, part in prefixes.items()
        if name.startswith(prefix)
    }


def layers_of(model: LatentDiffusion) -> dict[str, str]:
    """The one naming -> our names, of every layer of a model that can be adapted.

    Raises ValueError for a UNet whose blocks diffusers has no names for.
    """
    ours = list(places(model))
    unet, text = PREFIXES["unet"], PREFIXES["text"]
    named = {f"{name.removeprefix(unet)}.weight": name for name in ours if name.startswith(unet)}
    theirs = unet_to_diffusers(named, unet_levels(model.config["unet_config"]["params"]))
    found = {f"unet.{name.removesuffix('.weight')}": own for name, own in theirs.items()}
    if isinstance(model.cond_stage_model, TextEncoder):
        names = [name.removeprefix(text) for name in ours if name.startswith(text)]
        for name, own in _text(model.cond_stage_model, names).items():
            found[f"text_encoder.{name}"] = text + own
    return found


def _text(encoder: TextEncoder, ours: list[str]) -> dict[str, str]:
    """transformers' names -> ours, both without the part."""
    if encoder.layout == "transformers":
        return {name.removeprefix("transformer."): name for name in ours}
    # q, k and v lie where out_proj does, on both sides
    named = {f"{name.removeprefix('model.')}.weight": name for name in ours if not re.search("[qkv]_proj$", name)}
    found = {}
    for name, own in openclip_to_transformers(named, encoder.layers).items():
        name = name.removesuffix(".weight")
        found[name] = own
        if name.endswith(".out_proj"):
            for part in "qkv":
                found[name.replace("out_proj", f"{part}_proj")] = own.replace("out_proj", f"{part}_proj")
    return found
