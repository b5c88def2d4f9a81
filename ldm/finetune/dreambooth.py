"""DreamBooth: teach a model a subject from a few pictures and keep what it knew (Ruiz et al. 2022, arXiv 2208.12242).

loss = MSE(subject's pictures) + lambda MSE(class pictures, drawn by the model before it was tuned)      (eq. 2)
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.finetune.contact_sheet import Row, save_contact_sheet
from ldm.finetune.embeddings import token_embedding
from ldm.finetune.lora import Adapter, attach, merge
from ldm.finetune.lora_files import save_lora
from ldm.finetune.optimizers import make_optimizer
from ldm.images import to_pil
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.loading import WHOLE, load
from ldm.training.diffusion import LatentDataset
from ldm.training.objective import Objective
from ldm.training.stage import Stage
from ldm.util import call_with

# Which of the UNet's weights train, as a regular expression that their names contain.
LAYERS = {
    "all": "",
    "attention": r"\.attn[12]\.",
    "cross-attention": r"\.attn2\.",
    "key-value": r"\.attn2\.to_[kv]\.",  # Custom Diffusion (Kumari et al. 2022)
}


# Cosine, about the empty prompt, up to which the texts of a subject and of a class may be alike; those of two of the
# shipped model's digits are -0.4 to 0.55.
ALIKE = 0.5
OPTIONAL = ("concat",)  # of LatentDiffusion's parameters, may be left out when None


class DreamBoothStage(Stage):
    """The whole UNet, or layers of it, trained on pairs of a subject's picture and a class picture.

    Args:
        ckpt: the model, any that `ldm.load` reads; None is the one that ships.
        loading: further arguments of `ldm.load`.
        resolution: pixels of the pictures that previews and the contact sheet draw.
        learning_rate: of the UNet. text_learning_rate: of the text encoder; None leaves it as it is.
        words: train only the vectors of these words' tokens in the text encoder, so that what it says of all other
            words stays as it is to the bit. They are kept apart from the class pictures' captions: see `nearness`.
        layers: a name in LAYERS, or a regular expression for names of the UNet's weights.
        lora: arguments of `lora.attach`: adapters are trained instead of the model's own weights.
        lora_file, lora_format: where the adapters go in the end, besides being merged into the model, and how.
        prior_weight: lambda.
        error, weight, noise, timesteps: of `Objective`, for both terms.
        snr_gamma: diffusers' name for `weight: {name: min_snr, gamma: ...}`.
        noise_offset: diffusers' name for `noise: {offset: ...}`.
        optimizer, betas, weight_decay: see `make_optimizer`.
        gradient_checkpointing: compute activations of the UNet twice instead of keeping them.
        cache: keep latents and texts in memory instead of encoding them at every step, where nothing changes them.
        previews: prompts and how many pictures of each: what previews draw, seeds from 0 on for each prompt.
        sheet: where the contact sheet goes: subjects' pictures, results and class pictures before and after.
    """

    def __init__(
        self,
        ckpt: str | None,
        resolution: int,
        learning_rate: float,
        text_learning_rate: float | None = None,
        words: Sequence[str] | None = None,
        layers: str = "all",
        lora: Mapping[str, Any] | None = None,
        lora_file: str | None = None,
        lora_format: str = "kohya",
        prior_weight: float = 1.0,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        optimizer: str = "adamw",
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        gradient_checkpointing: bool = False,
        cache: bool = True,
        previews: Sequence[str] = (),
        preview_columns: int = 4,
        sheet: str | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not prior_weight >= 0:
            raise ValueError(f"prior_weight {prior_weight} must not be below 0")
        if weight is not None and snr_gamma is not None or noise is not None and noise_offset:
            raise ValueError(
                f"give weight {weight} or snr_gamma {snr_gamma}, and noise {noise} or noise_offset {noise_offset}: "
                "they are two names of one setting"
            )
        weight = weight if snr_gamma is None else {"name": "min_snr", "gamma": snr_gamma}
        noise = {"offset": noise_offset} if noise is None else noise
        whole = load(ckpt, device="cpu", dtype=None, **(loading or {}))  # in the file's own dtypes
        check_model(whole)
        self.dtypes = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
        object.__setattr__(self, "latent_diffusion", whole.float())
        self.objective = Objective(whole, error, weight, noise, timesteps)
        self._choose(layers, text_learning_rate is not None, words, lora)
        self.lora_file, self.lora_format = None if lora_file is None else Path(lora_file), lora_format
        if gradient_checkpointing:
            checkpoint_blocks(self.model)
        self.resolution, self.prior_weight = resolution, prior_weight
        self.learning_rate, self.text_learning_rate = learning_rate, text_learning_rate
        self.optimizer = {"name": optimizer, "betas": tuple(betas), "weight_decay": weight_decay}
        self.cache, self.previews, self.preview_columns = cache, list(previews), preview_columns
        self.sheet = None if sheet is None else Path(sheet)
        self.texts: dict[str, Conditioning] = {}  # cached
        self.apart_from: Conditioning = {}  # directions of the class pictures' texts, where words are trained
        self.before: list[Image.Image] = []

    def _choose(
        self, layers: str, train_text: bool, words: Sequence[str] | None, lora: Mapping[str, Any] | None
    ) -> None:
        """Set what trains: weights of the UNet and the text encoder, or adapters beside them.

        Networks of which nothing trains are no submodules, so that a saved state of adapters is as small as they are.
        """
        whole = self.latent_diffusion
        self.train_text, self.words = train_text, words
        frozen = {"first_stage": whole.first_stage_model}
        networks = {"model": (whole.model, True), "text": (whole.cond_stage_model, train_text)}
        for name, (network, trains) in networks.items():
            if trains and lora is None:
                self.add_module(name, network.requires_grad_())
            else:
                frozen[name] = network
        self.exclude_from_modules(**frozen)
        self.adapters: dict[str, Adapter] = {}
        if lora is None:
            choose_layers(self.model, layers)
        elif train_text:
            self.adapters = call_with("lora", attach, lora, network=whole)
        else:
            own = call_with("lora", attach, lora, network=self.model)
            self.adapters = {f"model.{name}": adapter for name, adapter in own.items()}
        if words is not None and train_text:
            train_words(self.text, words)
        self.trained = nn.ModuleList(self.adapters.values())  # as modules: moved, averaged and saved with the rest

    @torch.no_grad()
    def prepare(self, dataset: Dataset, device: torch.device) -> Dataset:
        """Draw what the contact sheet shows of the model as it was; cache latents and texts."""
        self.to(device)
        self.eval()
        self.pictures = [[sub[i]["image"] for i in range(min(8, len(sub)))] for sub in dataset.instances]
        if self.sheet is not None:
            self.before = self.preview()
        if self.words is not None:
            others = {caption for pictures in dataset.classes for caption in pictures.captions}
            if others:
                self.apart_from = self._directions(self.latent_diffusion.cond_stage_model(sorted(others)))
        if self.cache and not self.train_text:
            for caption in dataset.captions():
                self.texts[caption] = {k: v[0] for k, v in self.latent_diffusion.cond_stage_model([caption]).items()}
        if self.cache and not dataset.augments:
            dataset.map(self._encoded)
        self.train()
        return dataset

    def _encoded(self, pictures: Dataset) -> Dataset:
        """A set of pictures as the means and deviations of their latents, on the CPU."""
        means, stds = [], []
        for batch in self.iterate(pictures, 16 if len(set(pictures.shapes)) == 1 else 1, "encoding latents"):
            mean, std = posterior(self.first_stage, batch["image"].to(self.latent_diffusion.device))
            means += mean.cpu()
            stds += std.cpu()
        return LatentDataset(pictures, means, stds)

    def optimizers(self) -> list[Optimizer]:
        weights = {name: p for name, p in self.latent_diffusion.named_parameters() if p.requires_grad}
        weights |= {f"{name}.{end}": p for name, a in self.adapters.items() for end, p in a.named_parameters()}
        text = [p for name, p in weights.items() if name.startswith("cond_stage_model.")]
        groups = [{"params": [p for n, p in weights.items() if n.startswith("model.")], "lr": self.learning_rate}]
        if text:
            # No decay with words: it would move the other words' vectors, which have no gradient.
            decay = {} if self.words is None else {"weight_decay": 0.0}
            groups.append({"params": text, "lr": self.text_learning_rate, **decay})
        return [make_optimizer(groups, **self.optimizer)]

    def forward(self, batch: Mapping[str, Any], k: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its two terms; instances and class pictures go through the UNet as one batch of 2 b, or, where
        the instances are in a bucket of another shape, as two of b."""
        parts = ["", "class_"] if "class_caption" in batch else [""]
        captions = [batch[f"{part}caption"] for part in parts]
        with torch.no_grad():
            z = [self._latents(batch, part) for part in parts]  # (b, z, h/f, w/f) each
        if len({half.shape for half in z}) == 1:
            z, captions = [torch.cat(z)], [sum(captions, [])]
        losses, (cond, *_) = zip(*map(self._losses, z, captions), strict=True)
        instance, *prior = (part.mean() for part in torch.cat(losses).chunk(len(parts)))
        if not prior:
            return instance, {"loss": instance, "instance_loss": instance}
        loss = instance + self.prior_weight * prior[0]
        values = {"loss": loss, "instance_loss": instance, "class_loss": prior[0]}
        if not self.apart_from:
            return loss, values
        near = nearness(self._directions(cond), self.apart_from, len(batch["caption"]))
        return loss + near, values | {"nearness": near}

    def _losses(self, z: Tensor, captions: list[str]) -> tuple[Tensor, Conditioning]:
        """Return the loss of each of the latents z (b, ...), and the captions' conditioning."""
        t, noise = self.objective.sample_timesteps(z), self.objective.sample_noise(z)
        cond = self._condition(captions)
        return self.objective.losses(z, cond, t, noise), cond

    def _directions(self, cond: Conditioning) -> Conditioning:
        """Unit vectors (b, -) from what the text encoder says of the empty prompt to each of (b, ...)."""
        with torch.no_grad():
            null = self.latent_diffusion.cond_stage_model([self.latent_diffusion.cond_stage_model.null])
        return {key: F.normalize((value - null[key]).flatten(1).float(), dim=1) for key, value in cond.items()}

    def _latents(self, batch: Mapping[str, Any], part: str) -> Tensor:
        """A sample of the scaled latents of a batch's pictures, of the subject (part "") or the class ("class_")."""
        if f"{part}mean" in batch:
            mean, std = batch[f"{part}mean"], batch[f"{part}std"]
        else:
            mean, std = posterior(self.first_stage, batch[f"{part}image"])
        return self.latent_diffusion.scale_factor * (mean + std * torch.randn_like(mean))

    def _condition(self, captions: list[str]) -> Conditioning:
        """Captions, taken literally, as the UNet is told of them."""
        if not self.texts:
            with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
                return self.latent_diffusion.cond_stage_model(captions)
        conds = [self.texts[caption] for caption in captions]
        return {key: torch.stack([cond[key] for cond in conds]) for key in conds[0]}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """`preview_columns` pictures of each prompt, with the model's own settings at the training size."""
        prompts = [prompt for prompt in self.previews for _ in range(self.preview_columns)]
        seeds = list(range(self.preview_columns)) * len(self.previews)
        size = self.resolution
        return self.latent_diffusion.generate(prompts, seeds=seeds, height=size, width=size)

    def finish(self, dataset: Dataset) -> None:
        """Write the contact sheet and the adapters' own file."""
        if self.lora_file is not None:
            dtype = next(iter(self.dtypes.values()))
            save_lora(self.lora_file, self.adapters, self.latent_diffusion, self.lora_format, dtype)
        if self.sheet is None:
            return
        after = self.preview()
        rows = [Row("the subject's pictures", [to_pil(x[None])[0] for x in p]) for p in self.pictures]
        for i, prompt in enumerate(self.previews):
            chosen = slice(i * self.preview_columns, (i + 1) * self.preview_columns)
            rows += [Row(f"{prompt}: before", self.before[chosen]), Row(f"{prompt}: after", after[chosen])]
        save_contact_sheet(rows, self.sheet)

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The whole model, adapters merged, in the dtypes of the file that it came from, so that it is no larger."""
        model = self.latent_diffusion
        merge(model, self.adapters)
        state = {name: tensor.to(self.dtypes[name]) for name, tensor in model.state_dict().items()}
        # Without what says nothing: the file is to be no larger than that of the model.
        config = {name: value for name, value in model.config.items() if value is not None or name not in OPTIONAL}
        return {"target": WHOLE, "params": config}, state


def posterior(first_stage: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pictures' unscaled latents, (b, z, h/f, w/f) each; a VQ autoencoder's have no deviation."""
    code = first_stage.encode(images)
    return (code, torch.zeros_like(code)) if isinstance(code, Tensor) else (code.mean, code.std)


def nearness(texts: Conditioning, others: Conditioning, count: int) -> Tensor:
    """By how much more than ALIKE the first `count` of texts (b, d) are like the nearest of others (k, d): a scalar.

    What is easiest for the words of a subject that the model cannot draw yet is to become those of something that it
    can: with that it is then confused.
    """
    over = [(value[:count] @ others[key].T - ALIKE).clamp(min=0) for key, value in texts.items()]  # (count, k)
    return torch.stack([excess.amax(1).mean() for excess in over]).sum()


def check_model(model: LatentDiffusion) -> None:
    """ValueError for a model that DreamBooth cannot teach: one without text, or that is told of a picture to change."""
    if getattr(model.cond_stage_model, "tokenizer", None) is None or model.concat is not None:
        raise ValueError("DreamBooth needs a model that draws from text alone: this one is told of something else")


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
