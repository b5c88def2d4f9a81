"""What Stable Diffusion XL takes beside a caption (Podell et al. 2023, section 2.2). No torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """What Stable Diffusion XL takes beside a caption: sizes and a place in pixels, and a score.

    Args:
        original_size: (height, width) of the image before it was scaled and cropped.
        crop: (top, left), where the crop begins.
        target_size: (height, width) of the image itself.
        aesthetic_score: how much people like it, from 1 to 10.
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float = 6.0


LOW_SCORE = 2.5  # the aesthetic score of negative prompts, as diffusers has it


def sizes_of(model: Any, settings: Mapping[str, Any], size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return further arguments of `condition` for prompts and for negative prompts, {} for other models.

    Args:
        settings: original_size, crop and aesthetic_score; None where they were not chosen. ValueError for one that
            was, and that the model does not take.
        size: (height, width) of the image in pixels.
    """
    taken = model.cond_stage_model.sizes if hasattr(model.cond_stage_model, "with_sizes") else ()
    own = {name: value for name, value in settings.items() if value is not None}
    if unused := [name for name in own if name not in taken]:
        which = "Stable Diffusion XL's refiner" if "aesthetic_score" in unused else "Stable Diffusion XL"
        raise ValueError(f"{', '.join(unused)} would have no effect: this model is not {which}")
    if not taken:
        return {}, {}
    sizes = Sizes(**dict[str, Any](original_size=size, crop=(0, 0), target_size=size) | own)
    return {"sizes": sizes}, {"sizes": sizes._replace(aesthetic_score=LOW_SCORE), "negative": True}
