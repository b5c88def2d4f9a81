"""A text encoder in place of a model's own: it must be of the same kind and size, and is read as that was."""

from ldm.checkpoint.networks import Config, Found

READS = ("layer", "layer_index", "pooled")  # what a model reads of its text encoder, whichever that is


def read_alike(own: Config | None, new: Found) -> Found:
    """Return a text encoder, read from the layer that the model reads of its own. ValueError where it does not fit."""
    targets = [None if config is None else config["target"] for config in (own, new.config)]
    if own is None or targets[0] != targets[1]:
        raise ValueError(f"the model is conditioned by {targets[0]}, and {new.notes[0]} is a {targets[1]}")
    kinds = [_kinds(config["params"]) for config in (own, new.config)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the model's text encoder is {kinds[0]}, and {new.notes[0]} is {kinds[1]}")
    params = new.config["params"]
    if "embedders" not in params:
        params = params | {key: own["params"][key] for key in READS if key in own["params"]}
    return new._replace(config={"target": targets[0], "params": params})


def _kinds(params: Config) -> str:
    """Return the layout and width of each text encoder in words."""
    towers = params.get("embedders", [params])
    sizes = [(own.get("layout", "BERT"), own.get("width", own.get("n_embed"))) for own in towers]
    return " and ".join(f"{layout} of width {width}" for layout, width in sizes)
