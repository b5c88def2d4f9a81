"""The classifier of classifier guidance, trained on images at all noise levels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checks import Betas, Count, Rate
from ldm.diffusion.schedule import make_schedule, q_sample, training_timesteps
from ldm.images import to_pil
from ldm.training.objective import timestep_settings
from ldm.training.stage import Loss, Stage
from ldm.util import call_with, instantiate_from_config


class NoisyClassifierStage(Stage):
    """Trains p(y | x_t) by cross-entropy at random timesteps t (Dhariwal & Nichol 2021, section 4 and appendix H).

    The checkpoint's configuration holds the schedule beside the network: timesteps belong to that schedule, and the
    guided model may have another one.

    Args:
        network: `{"target", "params"}` of a network(x_t, t) -> logits, such as `EncoderUNetModel`.
        schedule: arguments of `make_schedule`.
        timesteps: arguments of `training_timesteps`; None is uniform.
    """

    reads = ("image", "label")
    takes_shapes = False  # its last layer knows one

    def __init__(
        self,
        network: Mapping[str, Any],
        learning_rate: Rate,
        schedule: Mapping[str, Any],
        timesteps: Mapping[str, Any] | None = None,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.05,
        optimizer: str | Mapping[str, Any] = "adamw",
        preview_columns: Count = 10,
    ) -> None:
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        super().__init__(preview_columns, **adam)
        self.schedule = call_with("schedule", make_schedule, schedule)
        self.config = {"target": network["target"], "params": dict(network.get("params") or {})}
        self.config["schedule"] = dict(schedule)
        self.model = instantiate_from_config(self.config)
        self.networks["model"] = self.model
        self.timesteps = timestep_settings(timesteps, self.schedule.T)

    def prepare(self, dataset: Any) -> Dataset:
        """Keep an image for each row of the preview; raise ValueError if images or labels do not fit the network."""
        shown = [dataset[i] for i in range(min(10, len(dataset)))]
        self.shown = torch.stack([sample["image"] for sample in shown])
        self.labels = torch.tensor([sample["label"] for sample in shown])
        try:
            with torch.no_grad():
                logits = self.model(self.shown[:1].to(self.device), torch.zeros(1, device=self.device))
        except RuntimeError as error:
            raise ValueError(f"the network does not fit images of {tuple(self.shown.shape[1:])}: {error}") from None
        if self.labels.max() >= logits.shape[1]:
            raise ValueError(
                f"an image has label {self.labels.max()}, and the network's classes end at {logits.shape[1] - 1}"
            )
        return dataset

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        images, labels = batch["image"], batch["label"]
        options: dict[str, Any] = {"batch": len(images) * self.share.count, "generator": self.share.generator()}
        t = self.share.cut(training_timesteps(T=self.schedule.T, **options, **self.timesteps)).to(images.device)
        logits = self.model(q_sample(images, t, self.share.randn(images), self.schedule), t).float()  # (b, classes)
        loss = F.cross_entropy(logits, labels)
        return loss, {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the loss and the accuracy at uniform timesteps."""
        images, labels = batch["image"], batch["label"]
        t = (places * self.schedule.T).long().to(images.device)
        eps = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in noise]).to(images)
        logits = self.model(q_sample(images, t, eps, self.schedule), t).float()  # (b, classes)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses, "accuracy": (logits.argmax(dim=1) == labels).float()}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return a row for each image, noisier to the right; those classified wrongly are black."""
        T = self.schedule.T
        timesteps = torch.linspace(0, T - 1, self.preview_columns).round().long()
        images = self.shown.repeat_interleave(len(timesteps), dim=0)  # (rows columns, c, h, w)
        t = timesteps.repeat(len(self.shown))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        noised = q_sample(images, t, noise, self.schedule)
        predicted = self.model(noised.to(self.device), t.to(self.device)).argmax(dim=1).cpu()
        noised[predicted != self.labels.repeat_interleave(len(timesteps))] = -1
        return to_pil(noised)
