"""Samplers' names in AUTOMATIC1111's web UI, ComfyUI and k-diffusion."""

import re

from ldm.diffusion.schedule import SIGMA_SPACINGS

# Those that are other words, not only other spellings, than our table's.
OTHER_NAMES = {"dpm_2": "dpm2", "dpm_2_a": "dpm2_a", "uni_pc": "unipc"}


def other_name(name: str) -> tuple[str, str | None]:
    """Return our table's name of a sampler, if it has one, and the spacing in the given one."""
    key = re.sub(r"[\s-]+", "_", name.strip().lower()).replace("+", "p").replace("_ancestral", "_a")
    key = key.removeprefix("sample_").removeprefix("k_")
    spacing = next((spacing for spacing in SIGMA_SPACINGS if key.endswith(f"_{spacing}")), None)
    key = key.removesuffix(f"_{spacing}")
    return OTHER_NAMES.get(key, key), spacing
