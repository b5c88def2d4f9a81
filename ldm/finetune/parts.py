"""What DreamBooth and textual inversion share: the model to tune, what of it trains, and what it knows."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.tokenizer import NUM_CLIP_MERGES, Tokenizer
from ldm.data.captions import NUMBER_WORDS, TRAIN_FRAMES, render
from ldm.finetune.embeddings import token_embedding
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import load

# Which of the UNet's weights train, as a regular expression that their names contain.
LAYERS = {
    "all": "",
    "attention": r"\.attn[12]\.",
    "cross-attention": r"\.attn2\.",
    "key-value": r"\.attn2\.to_[kv]\.",  # Custom Diffusion (Kumari et al. 2022)
}


def load_to_tune(ckpt: str | LatentDiffusion | None, loading: Mapping[str, Any] | None) -> LatentDiffusion:
    """Load a checkpoint on the CPU in the file's own dtypes, if it is not a model already, and print its notes."""
    if not isinstance(ckpt, LatentDiffusion):
        ckpt = load(ckpt, device="cpu", dtype=None, **(loading or {}))
    for note in ckpt.notes:
        print(f"note: {note}", file=sys.stderr)
    return ckpt


def training_size(model: LatentDiffusion, resolution: int | None) -> int:
    """Return the pixels of a side of the images to train on. ValueError for a size that the model cannot make."""
    size = model.defaults["height"] if resolution is None else resolution
    model.latent_size(size, size)
    return size


def posterior(first_stage: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of images' unscaled latents, (b, z, h/f, w/f) each; a VQ autoencoder's deviate by 0."""
    code = first_stage.encode(images)
    return (code, torch.zeros_like(code)) if isinstance(code, Tensor) else (code.mean, code.std)


def knows_only_digits(tokenizer: object) -> bool:
    """Return whether the vocabulary was reduced to the digits' captions: then nothing else can have been learned."""
    words = {part for frame in TRAIN_FRAMES for part in re.findall(r"[a-z]+", render(frame, "five"))}
    reduced = isinstance(tokenizer, Tokenizer) and len(tokenizer.merges) < NUM_CLIP_MERGES
    return reduced and all(len(tokenizer.encode(word)) == 1 for word in words)


def known_prompts(tokenizer: object) -> list[str]:
    """Return prompts that cover what the model can generate; none where that is unknown, as of Stable Diffusion."""
    return [f"a handwritten digit {word}" for word in NUMBER_WORDS] if knows_only_digits(tokenizer) else []


def choose_text(train_text: str, words: Sequence[str], lora: bool) -> str:
    """Return what to train of the text encoder: "none", "words" or "all".

    Raises ValueError for another choice, and for words where a LoRA file is to hold what is learned.
    """
    if train_text == "auto":
        return "all" if lora else "words" if words else "none"
    if train_text not in ("none", "words", "all"):
        raise ValueError(f"train_text {train_text!r} is unknown: use none, words, all or auto")
    if train_text == "words" and lora:
        raise ValueError("a LoRA file cannot hold the vectors of words: use --train_text none or all with --rank")
    return train_text


def rate_for(name: str, rates: float | Mapping[str, float] | None, part: str) -> float:
    """Return a part's learning rate. ValueError where none is given."""
    rate = rates.get(part) if isinstance(rates, Mapping) else rates
    if rate is None:
        raise ValueError(f"{name} {rates!r} must be a number, or a mapping with one for {part!r}")
    return rate


def choose_layers(network: nn.Module, layers: str) -> None:
    """Let only the weights train whose names the layers (a name in LAYERS, or a regular expression) match.

    Raises ValueError for a pattern that is none, or that matches nothing.
    """
    try:
        pattern = re.compile(LAYERS.get(layers, layers))
    except re.error as error:
        raise ValueError(f"layers {layers!r}: {error}; use {', '.join(LAYERS)} or a regular expression") from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(pattern.search(f".{name}") is not None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"layers {layers!r} match no weight of the UNet: use {', '.join(LAYERS)} or part of a name")


def train_words(encoder: nn.Module, words: Sequence[str]) -> None:
    """Let nothing train of the text encoder but the vectors of the words' tokens.

    Raises ValueError for no words.
    """
    rows = sorted({token for word in words for token in encoder.tokenizer.encode(word)})
    if not rows:
        raise ValueError("there are no words to train: those of the subject's prompt that a class's prompt lacks")
    encoder.requires_grad_(False)
    vectors = token_embedding(encoder).weight
    chosen = torch.zeros(len(vectors), 1).index_fill_(0, torch.tensor(rows), 1.0)  # (vocabulary, 1)
    vectors.requires_grad_(True).register_hook(lambda grad: grad * chosen.to(grad))


def checkpoint_blocks(network: nn.Module) -> None:
    """Turn on the checkpointing that the UNet's blocks have."""
    for module in network.modules():
        for name in ("use_checkpoint", "checkpoint"):  # of residual and attention blocks, and of transformer blocks
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, True)
