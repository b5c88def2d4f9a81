"""Textual inversion: a new word for a subject (Gal et al. 2022, https://arxiv.org/abs/2208.01618, eq. 2).

The model's own loss on a few images of the subject, captioned with the word; all that trains is the word's vectors.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checks import Count, Rate
from ldm.conditioning.tokenizer import Tokenizer
from ldm.data.captions import TRAIN_FRAMES, render
from ldm.data.dreambooth import check_apart, notes_on_images
from ldm.data.finding import find_images
from ldm.data.folder_captions import has_captions
from ldm.finetune.embeddings import add_word, check_new_word, deviation, initial_vectors, text_encoder
from ldm.finetune.parts import FineTuningStage, knows_only_digits, save_contact_sheet
from ldm.images import to_pil
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.latents import LatentDataset, encode_dataset
from ldm.training.objective import loss_mask
from ldm.training.stage import Loss

# Captions that fit any image of the subject: they mention nothing but the subject.
FRAMES = {
    "object": (
        *("a photo of a {}", "a photo of the {}", "a photo of one {}", "a picture of a {}", "an image of the {}"),
        *("a close-up of a {}", "a cropped photo of the {}", "a photo of my {}", "this is a {}", "here is the {}"),
        *("a good photo of a {}", "a snapshot of the {}", "a {} in a photo", "the {}, photographed", "a {}"),
    ),
    "style": (
        *("a painting in the style of {}", "a picture in the style of {}", "a drawing in the style of {}"),
        *("an artwork in the style of {}", "a scene in the style of {}", "an image in {} style", "art by {}"),
    ),
}


class TextualInversionStage(FineTuningStage):
    """Learn the vectors of one word; the model itself stays as it is to the bit. Its data is a `Folder` of images.

    Args:
        word: the subject's name in prompts.
        initial: words to start from, such as "five"; they may be several tokens.
        learning_rate: of Adam, each of whose steps moves each number by about as much.
        vectors: how many tokens the word is; None: as many as the initial words are.
        relative_learning_rate: the learning rate in units of `deviation`, used where `learning_rate` is None.
        frames: captions with {} for the word, or a name in FRAMES; None: what suits the model (`captions`).
        pull: weight of the mean squared distance to the initial vectors, in units of `deviation`.
        error, weight, noise, timesteps: of `Objective`.
        previews: how many images a preview generates.
    """

    def __init__(
        self,
        word: str,
        initial: str,
        resolution: int | None = None,
        learning_rate: Rate | None = None,
        ckpt: str | LatentDiffusion | None = None,
        loading: Mapping[str, Any] | None = None,
        vectors: Count | None = None,
        relative_learning_rate: Rate | None = None,
        frames: Sequence[str] | str | None = None,
        pull: Rate = 0.0,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        optimizer: str | Mapping[str, Any] = "adamw",
        previews: Count = 8,
        sheet: str | None = None,
    ) -> None:
        objective = (error, weight, noise, timesteps)
        adam = {"weight_decay": 0.0, "optimizer": optimizer}
        super().__init__(ckpt, loading, resolution, objective, sheet, previews, **adam)
        model = self.latent_diffusion
        self.freeze(model=model)
        encoder = text_encoder(model)
        start = initial_vectors(encoder, initial, vectors)
        self.vectors = nn.Parameter(start.clone())  # (n, d)
        self.networks["word"] = nn.ParameterList([self.vectors])
        check_new_word(encoder, word)
        add_word(model, word, self.vectors)
        self.word, self.initial, self.start, self.pull = word, initial, start, pull
        if (learning_rate is None) == (relative_learning_rate is None):
            raise ValueError("give either learning_rate or relative_learning_rate")
        self.deviation = deviation(encoder)
        self.adam["lr"] = learning_rate if relative_learning_rate is None else relative_learning_rate * self.deviation
        self.captions = captions(encoder.tokenizer, word, len(start), frames)

    @torch.no_grad()
    def prepare(self, dataset: Any) -> Dataset:
        """Encode the images, once, and generate what the contact sheet shows of the initial words."""
        check_apart(dataset.root, self.sheet)
        for note in notes_on_images(dataset.root):
            print(f"note: {note}", file=sys.stderr)
        if has_captions(dataset.root, find_images(dataset.root)):
            print("note: the images' own captions are not used: each is one of the stage's frames", file=sys.stderr)
        self.images = [to_pil(sample["image"][None])[0] for sample in dataset]
        self.before = [] if self.sheet is None else self._generate(self.captions[0].replace(self.word, self.initial))
        latents = encode_dataset(self.first_stage, dataset, self.share, self.workers)
        return Repeated(LatentDataset(dataset, *latents, keys=()))

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        model = self.latent_diffusion
        z = self.latents(batch)
        t = self.objective.sample_timesteps(z, self.share)
        chosen = torch.randint(len(self.captions), (len(z) * self.share.count,), generator=self.share.generator())
        said = self.share.cut(chosen).tolist()
        cond = model.cond_stage_model([self.captions[i] for i in said])
        noise = self.objective.sample_noise(z, self.share)
        loss = self.objective.losses(z, cond, t, noise, self.share, loss_mask(batch, z)).mean()
        moved = ((self.vectors - self.start.to(self.vectors)) / self.deviation).square().mean()
        return loss + self.pull * moved, {"loss": loss, "moved": moved.sqrt()}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return a row of the subject's images, and one that the model generates for the first caption."""
        made = self._generate(self.captions[0])
        shown = [self.images[i % len(self.images)] for i in range(self.preview_columns)]
        return [one if one.size == made[0].size else ImageOps.pad(one, made[0].size) for one in shown] + made

    def preview_labels(self) -> list[str]:
        return ["the subject's images", self.captions[0]]

    def _generate(self, prompt: str) -> list[Image.Image]:
        return self.generate([prompt] * self.preview_columns, plain=True)

    def write_extras(self) -> None:
        """Write the contact sheet."""
        if self.sheet is not None:
            prompt = self.captions[0]
            before, after = prompt.replace(self.word, self.initial), self._generate(prompt)
            rows = [("the subject's images", self.images[:8]), (before, self.before), (prompt, after)]
            save_contact_sheet(rows, self.sheet)

    def export(self) -> tuple[None, dict[str, Tensor]]:
        """Return the word's vectors, without a configuration: diffusers' format of an embedding."""
        return None, {self.word: self.vectors.detach()}


class Repeated(Dataset):
    """A few samples, many times over, so that an epoch holds whole batches."""

    def __init__(self, dataset: LatentDataset, times: int = 100) -> None:
        self.dataset, self.times = dataset, times
        self.groups = None if dataset.groups is None else dataset.groups * times

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.dataset.__getitems__([index % len(self.dataset) for index in indices])


def captions(tokenizer: Tokenizer, word: str, vectors: int, frames: Sequence[str] | str | None = None) -> list[str]:
    """Return captions for images of `word`: those of `frames` that fit the text encoder with so many vectors.

    Args:
        frames: a name in FRAMES, or captions with {} for the word; None: the "object" ones, or, for a model that knows
            only digits, those that it was trained on.
    """
    if frames is None:
        frames = [render(frame, "{}") for frame in TRAIN_FRAMES] if knows_only_digits(tokenizer) else "object"
    frames = FRAMES[frames] if isinstance(frames, str) else frames
    without = [frame for frame in frames if "{}" not in frame]
    if without or not frames:
        raise ValueError(f"the caption {(without or [''])[0]!r} has no {{}}, where the word goes")
    room = tokenizer.context_length - 2 - vectors
    fitting = [frame for frame in frames if len(tokenizer.encode(frame.replace("{}", " "))) <= room]
    if not fitting:
        raise ValueError(f"{vectors} vectors leave room for {room} tokens, too few for {frames[0]!r}: use fewer")
    return [frame.replace("{}", word) for frame in fitting]
