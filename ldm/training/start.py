"""The weights of a complete model, with which the diffusion stage begins."""

from pathlib import Path

from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import load


def start_from(model: LatentDiffusion, path: str | Path, conditioner: bool) -> None:
    """Copy the UNet and the scale factor out of a complete model's checkpoint.

    conditioner: whether to copy the conditioner, too, because it trains.

    Raises:
        ValueError: for a checkpoint of no complete model, and for one with another UNet or conditioner.
    """
    given = load(path, device="cpu")
    for name in ("unet_config", "cond_stage_config")[: 1 + conditioner]:
        theirs, ours = given.config.get(name), model.config.get(name)
        if theirs != ours:
            raise ValueError(f"start {str(path)!r} has the {name} {theirs}, and this stage {ours}: give it the same")
    model.model.load_state_dict(given.model.state_dict())
    if conditioner:
        model.cond_stage_model.load_state_dict(given.cond_stage_model.state_dict())
    model.scale_factor = given.scale_factor
