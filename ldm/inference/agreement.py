"""CompVis's options that describe the model. Here the checkpoint does, so they are only checked against it."""

from pathlib import Path

from ldm.latent_diffusion import LatentDiffusion


def check_latents(model: LatentDiffusion, channels: int | None, factor: int | None) -> None:
    """ValueError if --C (latent channels) or --f (pixels per latent) is given and is not the model's own."""
    for option, asked, own in (("--C", channels, model.channels), ("--f", factor, model.downsampling)):
        if asked not in (None, own):
            raise ValueError(f"{option} {asked} does not fit this model, whose own is {own}: leave it out")


def check_config(model: LatentDiffusion, path: Path) -> None:
    """ValueError if the yaml's `model.params`, or its `params`, say anything but the model's own configuration."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no configuration: {' '.join(str(error).split())}") from None
    config = config.get("model", config) if isinstance(config, dict) else {}
    params = config.get("params") if isinstance(config, dict) else None
    if not isinstance(params, dict):
        raise ValueError(f"{path} is no configuration of a model: it has neither `model.params` nor `params`")
    wrong = [key for key, value in params.items() if key not in model.config or model.config[key] != value]
    if wrong:
        raise ValueError(
            f"{path} describes another model than the checkpoint, which carries its own configuration "
            f"(they differ in {', '.join(map(str, wrong))}): leave --config out"
        )
