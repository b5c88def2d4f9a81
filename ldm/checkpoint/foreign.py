"""Files that are not models of a supported kind: what each of them is, recognised by its names."""

import re
from collections.abc import Mapping

from torch import Tensor

WANTED = "supported are Stable Diffusion 1, 2 and XL, and the latent diffusion models before them"
EMBEDDING = "load the model that it was learned with, and this with --embedding FILE"

# A pattern that is found in a name -> what the file is and what would be right; the first that fits counts.
_FOREIGN = {
    r"^lora_(unet|te)|\.lora[._](up|down|A|B)\.|_lora\.(up|down)\.|\.(hada_w1|lokr_w1|oft_)": (
        "holds LoRA weights, which change a model: load the model they are for, with --lora FILE"
    ),
    r"\bjoint_blocks\.": f"is Stable Diffusion 3, which is not supported: {WANTED}",
    r"\bdouble_blocks\.": f"is Flux, which is not supported: {WANTED}",
    r"^control_model\.|^(zero_convs|input_hint_block)\.|^controlnet_(down_blocks|cond_embedding)\.": (
        f"is a ControlNet, which is not supported: {WANTED}"
    ),
    r"^depth_model\.": f"is Stable Diffusion 2's depth-to-image model, which is not supported: {WANTED}",
    r"^low_scale_model\.": f"is Stable Diffusion's x4 upscaler, which is not supported: {WANTED}",
    r"^(noise_augmentor|embedder)\.": f"is Stable Diffusion 2.1 unCLIP, which is not supported: {WANTED}",
    r"^(string_to_param|emb_params$|clip_[gl]$)": f"holds a textual-inversion embedding: {EMBEDDING}",
    r"^(unet\.)?(down_blocks\.\d+\.resnets\.|time_embedding\.linear_1\.)": (
        "is the UNet of a diffusers folder: load the folder that has its model_index.json"
    ),
    r"^(text_model\.|embeddings\.token_embedding)": (
        "is a CLIP text encoder alone, in transformers' format: load the model or folder that it belongs to"
    ),
}
_WORD = re.compile(r"[^.]+")  # diffusers' textual inversion: the embedding is named by the word that it stands for


def refuse_foreign(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names what the file is, unless it may hold a supported model."""
    if not state:
        raise ValueError("the file holds no tensors")
    for pattern, sentence in _FOREIGN.items():
        if any(re.search(pattern, name) for name in state):
            raise ValueError(f"the file {sentence}")
    if len(state) < 8 and all(_WORD.fullmatch(name) and tensor.ndim in (1, 2) for name, tensor in state.items()):
        small = f"{len(state)} small tensors ({', '.join(sorted(state)[:3])})"
        raise ValueError(f"the file holds {small}, as a textual-inversion embedding does: {EMBEDDING}")


def what_it_is(start: bytes) -> str:
    """Return, for a file of neither format, what it is instead."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty: the download or copy did not finish"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, saved in place of the file it leads to: download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, which stands for the file: fetch the file itself with `git lfs pull`"
    return f"is neither safetensors nor torch's format (it begins with {start[:8]!r})"
