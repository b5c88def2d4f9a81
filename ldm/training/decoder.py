"""Train an autoencoder's decoder on, and keep its latents: models that were trained on them get sharper images.

Stable Diffusion's public decoders were made so (`sd-vae-ft-mse`).
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from ldm.checkpoint.networks import KL_TARGET, VQ_TARGET
from ldm.checks import Count, Rate
from ldm.training.autoencoder import AutoencoderStage
from ldm.training.frozen import read_first_stage
from ldm.training.optimizers import make_optimizer


class DecoderStage(AutoencoderStage):
    """Trains the decoder of an autoencoder whose encoder stays as it is.

    Args:
        first_stage: checkpoint of the autoencoder, or any file or folder that has one.
        others: of `AutoencoderStage`.

    Raises:
        ValueError: for a first stage of another class, which has no such decoder.
    """

    def __init__(
        self,
        first_stage: str,
        learning_rate: Rate,
        reconstruction: str = "l2",
        edge_weight: Rate = 0.0,
        discriminator: Mapping[str, Any] | None = None,
        disc_start: int = 0,
        disc_weight: float = 0.5,
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        optimizer: str | Mapping[str, Any] = "adamw",
        preview_columns: Count = 8,
    ) -> None:
        config, weights = read_first_stage(first_stage)
        if config["target"] not in (KL_TARGET, VQ_TARGET):
            raise ValueError(f"first_stage {first_stage!r} is a {config['target']}: give a KL or a VQ autoencoder")
        super().__init__(
            config["params"]["ddconfig"],
            config["params"]["embed_dim"],
            learning_rate,
            config["params"].get("n_embed"),
            reconstruction=reconstruction,
            edge_weight=edge_weight,
            discriminator=discriminator,
            disc_start=disc_start,
            disc_weight=disc_weight,
            perceptual=perceptual,
            perceptual_weight=perceptual_weight,
            normalize=False,
            optimizer=optimizer,
            preview_columns=preview_columns,
        )
        self.model.load_state_dict(weights)
        for name, part in self.model.named_children():
            part.requires_grad_(name in ("decoder", "post_quant_conv"))

    def optimizers(self) -> list[Optimizer]:
        trained = [[p for p in network.parameters() if p.requires_grad] for network in self.networks.values()]
        return [make_optimizer(parameters, **self.adam) for parameters in trained]
