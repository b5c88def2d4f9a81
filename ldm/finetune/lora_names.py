"""Names of weights in LoRA files: from any of the common namings to one, and from that to the layers of a model.

The one naming is diffusers', a part of the pipeline and a layer in it: `unet.down_blocks.0.attentions.0...attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. CompVis's block names are kept behind the same parts:
`unet.input_blocks.1.1...attn1.to_q`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoint.diffusers_config import unet_levels
from ldm.checkpoint.diffusers_names import UNetLevel, openclip_to_transformers, unet_to_diffusers
from ldm.checkpoint.foreign import WANTED
from ldm.checkpoint.networks import PREFIXES
from ldm.checkpoint.structure import EMBEDDERS
from ldm.conditioning.sized_text import SizedTextEncoder
from ldm.conditioning.text import TextEncoder
from ldm.finetune.lora import places
from ldm.latent_diffusion import LatentDiffusion

PARTS = ("unet", "text_encoder", "text_encoder_2")  # diffusers' names of the networks; XL alone has the third
SECOND = "text_encoder_2."
# Of Stable Diffusion 1 and 2, and of XL, which files are assumed to be for where no model is given.
USUAL_LEVELS = [UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, True), UNetLevel(2, False)]
XL_LEVELS = [UNetLevel(2, False), UNetLevel(2, True), UNetLevel(2, True)]

# A weight's name: the layer's, and an ending: sd-scripts' and LyCORIS's, PEFT's, diffusers' before it used PEFT, alpha.
_WEIGHT = re.compile(
    r"(.+?)(?:\.lora_(down|up|mid)\.weight|\.lora_([AB])(?:\.\w+)?\.weight"
    r"|(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight|\.(alpha))"
)
_MATRICES = {"A": "down", "B": "up"}
# How a layer's name begins; behind an underscore, its words are joined by underscores. Files of one network have no
# prefix.
_TEXT = re.compile(r"lora_te[12]?_|text_encoder(_2)?\.|(?=text_model\.|encoder\.layers\.)")
_UNET = re.compile(r"lora_unet_|unet\.|(model\.)?diffusion_model\.|")
# Words that contain an underscore, among those that sd-scripts joins by underscores.
_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj linear_1 "
    "linear_2 time_embedding class_embedding add_embedding conv_in conv_out conv_shortcut text_model self_attn q_proj "
    "k_proj v_proj out_proj input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection "
    "time_embed label_emb c_fc c_proj text_projection"
).split()
_JOINED = re.compile(f"({'|'.join(sorted(_WORDS, key=len, reverse=True))})|_")

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
        (r"\.(diff|diff_b|w_norm|b_norm)$", f"holds full weights beside or in place of LoRA: {_PLAIN}"),
        (
            r"^(lora_)?transformer[._](?!text_model|resblocks)|[._](double|joint|single|single_transformer)_blocks[._]",
            f"is for a diffusion transformer (Flux, Stable Diffusion 3 ...), which is not supported: {WANTED}",
        ),
    )
)


def refuse_other_kinds(names: Iterable[str]) -> None:
    """Raise ValueError, naming its kind, if a file with these names is an adapter that is not supported."""
    names = list(names)
    for pattern, sentence in _REFUSED:
        if any(pattern.search(name) for name in names):
            raise ValueError(sentence)


def parse(key: str) -> tuple[str, str] | None:
    """Return a LoRA weight's layer and what it is of it: "down", "up", "mid" or "alpha"; None for any other name."""
    found = _WEIGHT.fullmatch(key)
    if found is None:
        return None
    matrix = next(filter(None, found.groups()[1:]))
    return _normalise(found[1]), _MATRICES.get(matrix, matrix)


def _normalise(layer: str) -> str:
    """Return our common name of a layer named in any way."""
    # Prefixes of PEFT's own files, and where diffusers' adapters once were.
    name = layer.replace("base_model.model.", "").replace(".processor.", ".")
    text = _TEXT.match(name)
    prefix = (text or _UNET.match(name))[0]
    name = name.removeprefix(prefix)
    if prefix.endswith("_"):
        name = _JOINED.sub(lambda match: match[1] or ".", name)
    if text is None:
        return f"unet.{re.sub(r'[.]to_out$', '.to_out.0', name)}"
    name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    part = SECOND if prefix in ("lora_te2_", SECOND) else "text_encoder."
    return f"{part}{'text_model.' if name.startswith('encoder.') else ''}{name}"  # transformers from 5.6 on


def to_kohya(layer: str, xl: bool) -> str:
    """Return a layer's name in sd-scripts' naming: `lora_unet_down_blocks_0_ ...`, `lora_te_text_model_ ...`.

    xl: of Stable Diffusion XL, whose text encoders are `lora_te1` and `lora_te2`.
    """
    part, _, name = layer.partition(".")
    begin = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}[part]
    return f"{begin}_{name.replace('.', '_')}"


def for_xl(adapters: Mapping[str, Any], names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Return whether a file is for Stable Diffusion XL: by the context's width, else by its names and its header.

    Args:
        adapters: by layers in the common naming.
        names: of the file's tensors.
    """
    if widths := {own.down.shape[1] for name, own in adapters.items() if re.search(r"attn2\.to_[kv]$", name)}:
        return XL_CONTEXT in widths
    header = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    named = any(name.startswith(("lora_te1_", "lora_te2_", SECOND)) for name in names)
    return named or re.search(r"\bsdxl|stable-diffusion-xl", header) is not None


def with_usual_levels(layers: Mapping[str, Any], xl: bool) -> dict[str, Any]:
    """Return layers with CompVis's block names under diffusers', as in Stable Diffusion 1 and 2, or XL; others stay.

    Raises ValueError for a block that those models do not have.
    """
    blocks = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    ours = {name: value for name, value in layers.items() if name.removeprefix("unet.").startswith(blocks)}
    levels = XL_LEVELS if xl else USUAL_LEVELS
    theirs = unet_to_diffusers({name.removeprefix("unet."): value for name, value in ours.items()}, levels, xl)
    rest = {name: value for name, value in layers.items() if name not in ours}
    return rest | {f"unet.{name}": value for name, value in theirs.items()}


def own_spellings(model: LatentDiffusion) -> dict[str, str]:
    """Return our names of a model's layers by CompVis's and open_clip's names behind the one naming's parts."""
    towers = _towers(model)
    parts = {PREFIXES["unet"]: "unet."} | {prefix: part for part, (prefix, _) in towers.items()}
    return {
        part + name.removeprefix(prefix): name
        for name in places(model)
        for prefix, part in parts.items()
        if name.startswith(prefix)
    }


def layers_of(model: LatentDiffusion) -> dict[str, str]:
    """Return our names of all layers of a model that can be adapted, by the one naming."""
    own = own_spellings(model)
    unet = {f"{n.removeprefix('unet.')}.weight": ours for n, ours in own.items() if n.startswith("unet.")}
    theirs = unet_to_diffusers(unet, unet_levels(model.config["unet_config"]["params"]), is_xl(model))
    found = {f"unet.{name.removesuffix('.weight')}": ours for name, ours in theirs.items()}
    for part, (_, encoder) in _towers(model).items():
        if isinstance(encoder, TextEncoder):
            text = {n.removeprefix(part): ours for n, ours in own.items() if n.startswith(part)}
            found |= {f"{part}{name}": ours for name, ours in _text(encoder, text).items()}
    return found


def is_xl(model: LatentDiffusion) -> bool:
    """Return whether the model is Stable Diffusion XL."""
    return isinstance(model.cond_stage_model, SizedTextEncoder)


def _towers(model: LatentDiffusion) -> dict[str, tuple[str, Any]]:
    """Return (the beginning of our names, network) of each text encoder by that of the common names."""
    if not isinstance(model.cond_stage_model, SizedTextEncoder):
        return {"text_encoder.": (PREFIXES["text"], model.cond_stage_model)}
    found = [(f"{PREFIXES['text']}{EMBEDDERS}{i}.", own) for i, own in enumerate(model.cond_stage_model.embedders)]
    return dict(zip(("text_encoder.", SECOND)[-len(found) :], found, strict=True))  # the refiner has the second


def _text(encoder: TextEncoder, own: Mapping[str, str]) -> dict[str, str]:
    """Return the text encoder's layers by transformers' names instead of open_clip's or its own."""
    if encoder.layout == "transformers":
        return {name.removeprefix("transformer."): ours for name, ours in own.items()}
    # q, k and v lie where out_proj does, on both sides
    named = {f"{n.removeprefix('model.')}.weight": v for n, v in own.items() if not re.search("[qkv]_proj$", n)}
    found = {}
    for name, ours in openclip_to_transformers(named, encoder.layers).items():
        name = name.removesuffix(".weight")
        found[name] = ours
        if name.endswith(".out_proj"):
            for part in "qkv":
                found[name.replace("out_proj", f"{part}_proj")] = ours.replace("out_proj", f"{part}_proj")
    return found
