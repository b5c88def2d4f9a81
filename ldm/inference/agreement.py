"""CompVis's options that describe the model. Here the checkpoint does, so they are only checked against it."""

from ldm.latent_diffusion import LatentDiffusion


def check_latents(model: LatentDiffusion, channels: int | None, factor: int | None) -> None:
    """ValueError if --C (latent channels) or --f (pixels per latent) is given and is not the model's own."""
    for option, asked, own in (("--C", channels, model.channels), ("--f", factor, model.downsampling)):
        if asked not in (None, own):
            raise ValueError(f"{option} {asked} does not fit this model, whose own is {own}: leave it out")
