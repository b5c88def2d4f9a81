"""What the training loop asks of a stage."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.training.optimizers import make_optimizer
from ldm.training.share import BatchShare

Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar, and scalars to report


class Stage:
    """One stage of training: which networks train, which are frozen, and the loss.

    Args:
        preview_columns: images in a row of the preview.
        learning_rate, optimizer, betas, weight_decay: of `make_optimizer`, for all networks that train.

    Attributes (complete once `prepare` has returned):
        networks: what trains. The loop averages them, saves them in resume.pt and wraps them for several processes.
        config: of the checkpoint, which holds the network "model" unless `export` is overridden.
        frozen: networks that the loss only uses, in eval mode and without gradients.
    """

    config: dict[str, Any]
    reads: tuple[str, ...] = ("image",)  # what a sample of its data set needs
    methods: ClassVar[tuple[str, ...]] = ()  # what its data set needs besides
    takes_shapes: ClassVar[bool] = True  # whether the images of its data set may have several shapes
    masked: ClassVar[bool] = False  # whether masks of its data set's images weigh its loss
    workers = 0  # processes that load data, which the loop sets
    cache_dir: str | None = None  # where `prepare` keeps what it makes, for other runs
    validation_batch: ClassVar[int | None] = None  # images that a value of `validate` depends on; None: itself only
    vocabulary: Sequence[str] = ()  # that `prepare` takes from the captions, and the networks' weights belong to
    rehearses: ClassVar[bool] = True  # whether it can be tried on two images: not where a model is loaded to be tuned

    def __init__(self, preview_columns: int, **adam: Any) -> None:
        self.share = BatchShare()  # of one process; the loop sets that of several
        self.networks, self.frozen = nn.ModuleDict(), nn.ModuleDict()
        self.preview_columns, self.adam = preview_columns, adam

    def freeze(self, **networks: nn.Module) -> None:
        """Add networks to `frozen`."""
        self.frozen.update({name: network.eval().requires_grad_(False) for name, network in networks.items()})

    def to(self, device: torch.device) -> "Stage":
        """Move all networks to a device."""
        self.networks.to(device)
        self.frozen.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.networks.parameters()).device

    def train(self, mode: bool = True) -> "Stage":
        """Put the networks that train into training mode, or into eval mode."""
        self.networks.train(mode)
        return self

    def checkpoint_blocks(self, on: bool = True) -> None:
        """Compute activations twice instead of keeping them, or not; ValueError where no network has such blocks."""
        from ldm.models.compiler import checkpoint_blocks  # only this option needs it

        if not sum(checkpoint_blocks(network, on) for network in (*self.networks.values(), *self.frozen.values())):
            raise ValueError(f"loop.gradient_checkpointing: no network of {type(self).__name__} has blocks for it")

    def compiles(self) -> list[nn.Module]:
        """Return the networks that `loop.compile` compiles."""
        return list(self.networks.values())

    def data_params(self) -> dict[str, Any]:
        """Return arguments of the data set that follow from the stage's model."""
        return {}

    def prepare(self, dataset: Dataset) -> Dataset:
        """Return the data set to train on, such as cached latents.

        The loop calls this once, with the networks on their device and in eval mode, as it calls `data_params`.
        """
        return dataset

    def cached(self, dataset: Dataset) -> Dataset:
        """Return what `validate` takes of a data set, such as latents for images; `prepare` was called before."""
        return dataset

    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers, in the order of their turns on each batch: one for all networks."""
        return [make_optimizer(self.networks.parameters(), **self.adam)]

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """Return the loss of a batch, for a stage with one optimizer."""
        raise NotImplementedError

    def turn(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return the loss for optimizer k, scalars to report, and what the next optimizer needs of this batch.

        Each optimizer steps before the turn of the next. Stages with several optimizers override this.

        Args:
            number: of the batch in the run, from 0.
            shared: what the turn before returned, detached; None for k = 0.
        """
        return *self.loss(batch), None

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the "loss" and other values of each image of a batch, (b,) each; means over a data set are reported.

        Of a mean, nan is left out; of all means, an image whose loss is not finite. Values do not depend on the rest of
        the batch, unless `validation_batch` says so. The loop calls this in eval mode and without gradients. Stages
        that can be validated override it.

        Args:
            places: the images', in (0, 1) and evenly spread over the data set: float64 (b,), to choose noise levels by.
            noise: a generator for each image, on the CPU, in the same state each time.
        """
        raise NotImplementedError

    def validation_count(self, images: int) -> int:
        """Return how many times in all `validate` takes one of so many images, in turn."""
        return images

    def preview(self) -> list[Image.Image]:
        """Return images that show what the networks have learned, `preview_columns` to a row."""
        raise NotImplementedError

    def preview_labels(self) -> list[str]:
        """Return what the preview's rows show; [] where that needs no words."""
        return []

    def try_preview(self) -> None:
        """Do what `preview` does, as quickly as possible: a mistake in it should show before training."""
        self.preview()

    def finish(self, dataset: Dataset) -> None:
        """Complete the averaged weights before they are exported, for example by measured statistics."""

    def write_extras(self) -> None:
        """Write what a finished run has besides its checkpoint."""

    def export(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Return (configuration, tensors) of the stage's checkpoint."""
        return self.config, self.networks["model"].state_dict()


class Trained(nn.ModuleDict):
    """The networks of a stage that train, as one module whose forward is the loss: what accelerate and DDP wrap."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(dict(stage.networks.items()))
        self.stage = stage

    def forward(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict, Any]:
        return self.stage.turn(batch, k, number, shared)
