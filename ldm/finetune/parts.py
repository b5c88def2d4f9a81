"""What DreamBooth and textual inversion share: the model to tune, what of it trains, and what it knows."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint.atomic import write_png
from ldm.checks import Count
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import NUM_CLIP_MERGES, Tokenizer
from ldm.conditioning.words import token_embedding
from ldm.data.captions import NUMBER_WORDS, TRAIN_FRAMES, render
from ldm.labels import Row, labelled_rows
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import load
from ldm.training.latents import posterior
from ldm.training.objective import Objective
from ldm.training.stage import Stage

# Which of the UNet's weights train, as a regular expression that their names contain.
LAYERS = {
    "all": "",
    "attention": r"\.attn[12]\.",
    "cross-attention": r"\.attn2\.",
    "key-value": r"\.attn2\.to_[kv]\.",  # Custom Diffusion (Kumari et al. 2022)
}


class FineTuningStage(Stage):
    """A stage that tunes a loaded model on a few images, and shows what it generates before and after.

    Args:
        ckpt: a checkpoint that `ldm.load` reads, or a loaded model; None is the model that ships.
        loading: further arguments of `ldm.load`.
        resolution: pixels of a side of the images; None is the model's own size.
        objective: arguments of `Objective` after the model.
        sheet: where the contact sheet goes.
        preview_columns, adam: of `Stage`.
    """

    rehearses, masked = False, True

    def __init__(
        self,
        ckpt: str | LatentDiffusion | None,
        loading: Mapping[str, Any] | None,
        resolution: int | None,
        objective: Sequence[Any],
        sheet: str | None,
        preview_columns: Count,
        **adam: Any,
    ) -> None:
        super().__init__(preview_columns, **adam)
        model = model_to_tune(ckpt, loading, dtype=None)  # in its own dtypes, which the result keeps
        if getattr(model.cond_stage_model, "tokenizer", None) is None or model.concat is not None:
            raise ValueError("fine-tuning needs a model that is conditioned on text, and on nothing else")
        self.resolution = model.defaults["height"] if resolution is None else resolution
        model.latent_size(self.resolution, self.resolution)  # raises for a size that the model cannot make
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self.latent_diffusion, self.first_stage = model.float(), model.first_stage_model
        self.objective = Objective(model, *objective)
        self.sheet = None if sheet is None else Path(sheet)

    def compiles(self) -> list[nn.Module]:
        return [self.latent_diffusion.model]  # frozen or not, it has most of the work

    def data_params(self) -> dict[str, Any]:
        """Return the images' size and channels, which follow from the model."""
        return {"size": self.resolution, "channels": self.latent_diffusion.image_channels}

    def latents(self, batch: Mapping[str, Any], part: str = "") -> Tensor:
        """Sample the scaled latents of a batch's images; `part` begins their names."""
        if f"{part}mean" in batch:
            mean, std = batch[f"{part}mean"], batch[f"{part}std"]
        else:
            mean, std = posterior(self.first_stage, batch[f"{part}image"])
        return self.latent_diffusion.scale_factor * (mean + std * self.share.randn(mean))

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
        """Generate images of the training size with the model's own settings."""
        return self.latent_diffusion.generate(prompts, height=self.resolution, width=self.resolution, **settings)


def model_to_tune(
    ckpt: str | LatentDiffusion | None, loading: Mapping[str, Any] | None, **options: Any
) -> LatentDiffusion:
    """Return a loaded model, or that of a checkpoint, on the CPU, by these arguments and options of `ldm.load`."""
    if isinstance(ckpt, LatentDiffusion):
        if loading:
            raise ValueError(f"loading {dict(loading)} has no effect on a model that is loaded already: leave it out")
        model = ckpt
    else:
        model = load(ckpt, device="cpu", **options, **(loading or {}))
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return model


def save_contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write rows of images, each under its label, as a PNG file, atomically."""
    write_png(path, labelled_rows([Row(*row) for row in rows]))


def knows_only_digits(tokenizer: object) -> bool:
    """Return whether the vocabulary was reduced to the digits' captions: then nothing else can have been learned."""
    words = {part for frame in TRAIN_FRAMES for part in re.findall(r"[a-z]+", render(frame, "five"))}
    reduced = isinstance(tokenizer, Tokenizer) and len(tokenizer.merges) < NUM_CLIP_MERGES
    return reduced and all(len(tokenizer.encode(word)) == 1 for word in words)


def known_prompts(tokenizer: object) -> list[str]:
    """Return prompts that cover what the model can generate; none where that is unknown, as of Stable Diffusion."""
    return [f"a handwritten digit {word}" for word in NUMBER_WORDS] if knows_only_digits(tokenizer) else []


def choose_text(train_text: str, words: Sequence[str], lora: bool) -> str:
    """Return what to train of the text encoder: "none", "words" or "all"."""
    if train_text == "auto":
        return "all" if lora else "words" if words else "none"
    if train_text not in ("none", "words", "all"):
        raise ValueError(f"train_text {train_text!r} is unknown: use none, words, all or auto")
    if train_text == "words" and lora:
        raise ValueError("a LoRA file cannot hold the vectors of words: use --train_text none or all with --rank")
    return train_text


def rate_for(name: str, rates: float | Mapping[str, float] | None, part: str) -> float:
    """Return a part's learning rate. ValueError where none is given, or 0, by which nothing trains."""
    rate = rates.get(part) if isinstance(rates, Mapping) else rates
    if rate is None or rate <= 0:
        raise ValueError(f"{name} {rates!r} must be a number above 0, or a mapping with one for {part!r}")
    return rate


def choose_layers(network: nn.Module, layers: str) -> None:
    """Let only the weights train whose names the layers (a name in LAYERS, or a regular expression) match."""
    try:
        pattern = re.compile(LAYERS.get(layers, layers))
    except re.error as error:
        raise ValueError(f"layers {layers!r}: {error}; use {', '.join(LAYERS)} or a regular expression") from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(pattern.search(f".{name}") is not None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"layers {layers!r} match no weight of the UNet: use {', '.join(LAYERS)} or part of a name")


def train_words(encoder: TextEncoder, words: Sequence[str]) -> None:
    """Let nothing train of the text encoder but the vectors of the words' tokens."""
    rows = sorted({token for word in words for token in encoder.tokenizer.encode(word)})
    if not rows:
        raise ValueError("there are no words to train: the subject's prompt has none that the class's prompt lacks")
    encoder.requires_grad_(False)
    vectors = token_embedding(encoder).weight
    if rows[-1] >= len(vectors):
        raise ValueError(
            f"{' '.join(words)} has a learned word, which no model file can hold: use train_text none or all"
        )
    chosen = torch.zeros(len(vectors), 1).index_fill_(0, torch.tensor(rows), 1.0)  # (vocabulary, 1)
    vectors.requires_grad_(True).register_hook(lambda grad: grad * chosen.to(grad))
