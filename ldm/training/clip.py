"""A small CLIP, trained contrastively on the data's own captions and then frozen (Radford et al. 2021, figure 3).

The network is open_clip's class. The loss differs in one point: captions of the same thing are not negatives of each
other (supervised contrastive learning, Khosla et al. 2020, eq. 2), since a batch holds many fives. Several processes
compare all their images with all their captions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoint.writing import save_file
from ldm.checks import Count, Rate
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import reduce
from ldm.images import to_pil
from ldm.training.contract import note_cut, square_side
from ldm.training.shapes import squared
from ldm.training.stage import Loss, Stage


class CLIPStage(Stage):
    """Trains open_clip.CLIP; exports its text half as a `TextEncoder`.

    Args:
        width, layers, heads, context_length, projection_dim: of the text tower.
        vision: open_clip's vision_cfg; its image_size, if not given, is the data's.
        merges_first: how many of CLIP's byte-pair merges to keep besides those that the captions need.
        pooled: whether the exported encoder also gives the pooled text, which the UNet adds to the time embedding.
            False, as in Stable Diffusion, makes models that diffusers can express; see `DiffusionStage`.
        agreement: weight of a caption that is entirely true of an image (label and stated style), where one that only
            names its label has weight 1.
        image_encoder: where the image half goes, as an `ImageEncoder` to measure by; None drops it.
    """

    reads, methods = ("image", "caption"), ("texts",)
    validation_batch = 128  # a value depends on the captions that an image is compared with

    def __init__(
        self,
        vision: Mapping[str, Any],
        learning_rate: Rate,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        context_length: int = 24,
        projection_dim: int = 128,
        merges_first: int = 1000,
        pooled: bool = True,
        agreement: float = 4.0,
        image_encoder: str | None = None,
        weight_decay: Rate = 0.05,
        optimizer: str | Mapping[str, Any] = "adamw",
        preview_columns: Count = 10,
    ) -> None:
        adam = {"lr": learning_rate, "betas": (0.9, 0.98), "weight_decay": weight_decay, "optimizer": optimizer}
        super().__init__(preview_columns, **adam)
        self.vision: Any = dict(vision)
        self.text: dict[str, Any] = {"width": width, "layers": layers, "heads": heads, "context_length": context_length}
        self.projection_dim, self.merges_first, self.agreement = projection_dim, merges_first, agreement
        self.pooled, self.image_encoder = pooled, image_encoder

    def prepare(self, dataset: Any) -> Dataset:
        """Choose the vocabulary from the data set's captions and build the two towers."""
        from open_clip import CLIP

        self.side = self.vision["image_size"] = square_side(dataset, **self.vision)
        self.vocabulary = merges = reduce(dataset.texts(), self.merges_first, cleaning="openclip")
        vocab_size = 512 + len(merges) + 2
        # Exported in the end; its tower has the same parameters as the text half of the CLIP that trains.
        self.params: dict[str, Any] = {
            **self.text, "layout": "openclip", "activation": "gelu", "vocab_size": vocab_size,
            "projection_dim": self.projection_dim, "pooled": self.pooled, "tokenizer": {"merges": merges},
        }  # fmt: skip
        self.encoder = TextEncoder(**self.params)
        note_cut(self.encoder.tokenizer, dataset.texts())
        self.clip = CLIP(self.projection_dim, self.vision, dict[str, Any](self.text, vocab_size=vocab_size))
        self.networks["clip"] = self.clip
        count = min(50, len(dataset))
        shown = [dataset[i * (len(dataset) // count)] for i in range(count)]
        self.shown: list[dict[str, Any]] = [{**s, "image": squared(s["image"][None], self.side)[0]} for s in shown]
        self.preview_columns = min(self.preview_columns, count)
        return dataset

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        share, (images, texts, scale) = self.share, self._embed(batch)
        true: dict[str, Any] = {"caption": share.objects(batch["caption"])}
        if "label" in batch:
            pairs = {key: list(map(share.joined, batch[key])) for key in ("stated", "style")}
            true |= {"label": share.joined(batch["label"]), **pairs}
        losses, found, _ = self._compare(share.joined(images), share.joined(texts), scale, true)
        loss = losses.mean()
        return loss, {"loss": loss, "accuracy": found.mean()}

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the loss, and whether an image's nearest caption of 128 is right, and a caption's nearest image."""
        losses, caption_found, image_found = self._compare(*self._embed(batch), batch)
        return {"loss": losses, "accuracy": caption_found, "image_accuracy": image_found}

    def _compare(
        self, images: Tensor, texts: Tensor, scale: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (b,), and whether caption retrieval and image retrieval within the batch are right, (b,)."""
        logits = scale.clamp(max=100.0) * images @ texts.T  # (images, captions)
        true = self.positives(batch).to(logits.device)
        rows = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
        columns = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
        caption_found, image_found = (true.gather(k, logits.argmax(k, keepdim=True)).squeeze(k) > 0 for k in (1, 0))
        return (rows + columns) / 2, caption_found.float(), image_found.float()

    def _embed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        image = squared(batch["image"], self.side).expand(-1, 3, -1, -1)  # open_clip's towers have three channels
        tokens = self.encoder.tokenizer(batch["caption"]).to(image.device)
        images, texts, scale = self.clip(image, tokens)
        return images.float(), texts.float(), scale.float()

    def positives(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how true caption j is of image i, (b, b): 0, 1 (its label) or `agreement` (label and style)."""
        if "label" not in batch:
            captions = batch["caption"]
            return torch.tensor([[float(a == b) for b in captions] for a in captions])
        same = (batch["label"][:, None] == batch["label"]).float()
        pairs = zip(batch["stated"], batch["style"], strict=True)  # stroke weight and slant, (b,) each; -1: not stated
        agrees = torch.stack([(stated == style[:, None]) | (stated < 0) for stated, style in pairs]).all(0)
        return torch.where(agrees, same * self.agreement, same).cpu()

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return, for each of a few captions (rows), the images closest to it."""
        batch = {
            "image": torch.stack([sample["image"] for sample in self.shown]).to(self.clip.logit_scale.device),
            "caption": [sample["caption"] for sample in self.shown],
        }
        images, texts, _ = self._embed(batch)
        closest = (texts[: self.preview_columns] @ images.T).topk(self.preview_columns, dim=1).indices
        return to_pil(batch["image"][closest.flatten()])

    def preview_labels(self) -> list[str]:
        return [sample["caption"] for sample in self.shown[: self.preview_columns]]

    def finish(self, dataset: Dataset) -> None:
        if self.image_encoder is not None:
            state = {f"visual.{name}": tensor for name, tensor in self.clip.visual.state_dict().items()}
            params = {"vision": self.vision, "projection_dim": self.projection_dim}
            save_file(self.image_encoder, state, {"target": "ldm.models.image_encoder.ImageEncoder", "params": params})

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = {name: p for name, p in self.clip.state_dict().items() if not name.startswith("visual.")}
        self.encoder.model.load_state_dict(state)
        return {"target": "ldm.conditioning.text.TextEncoder", "params": self.params}, self.encoder.state_dict()
